"""Image in, logits and decisions out: the model and nothing about data, training or pictures."""
