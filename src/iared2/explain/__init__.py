"""Explanations: heat maps of our method and of baselines, and pictures of them. Does not depend on training."""
