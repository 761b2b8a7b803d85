"""Evaluation of a model: accuracy, speed, explanations."""
