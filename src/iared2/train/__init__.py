"""Algorithm 1: reward -> policy_gradient -> finetune -> curriculum."""
