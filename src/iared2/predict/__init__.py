"""Photos and videos in, findings and pictures out."""
