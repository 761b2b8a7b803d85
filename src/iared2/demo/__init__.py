"""The web page: `iared2 demo`."""
