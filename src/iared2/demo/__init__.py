"""The page: `iared2 demo`."""
