"""Photos and videos -> results and pictures."""
