"""iared2 explain-bench: methods of explanation against measures."""
