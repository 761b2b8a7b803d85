"""Names and files -> models."""
