"""What a model is worth: accuracy, speed, explanations."""
