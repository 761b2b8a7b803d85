"""Why did the model say so: heat maps, ours and their rivals, pictures of them, and measures. Knows no training."""
