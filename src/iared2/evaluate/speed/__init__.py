"""iared2 bench: speed against every baseline, in one run."""
