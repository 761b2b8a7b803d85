"""iared2 explain-bench: methods of explanation and their measures."""
