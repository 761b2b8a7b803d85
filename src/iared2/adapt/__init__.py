"""A vision transformer and photos without labels -> a faster model, and what it lost and gained."""
