"""Photos, videos and labelled sets of them: files -> samples -> batches. Knows nothing of models."""
