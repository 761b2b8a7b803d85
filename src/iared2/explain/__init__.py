"""Scores and decisions -> heat maps and figures. Knows arrays and photos, not models."""
