"""Clips: the same loop, with patches that stand in time as well."""
