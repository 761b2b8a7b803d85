"""The names of the methods of explanation. Imports nothing, so that the command line can list them without torch."""

METHODS = (
    "interpreter",
    "attention",
    "rollout",
    "gradcam",
    "integrated-gradients",
    "memorability",
    "random",
    "center",
)
KIN = {"gradcam": "GradCAM", "gradcam++": "GradCAMPlusPlus", "hirescam": "HiResCAM", "layercam": "LayerCAM"}
"""Grad-CAM's variants and their classes in the package: those that are finite for activations of both signs."""
EVERY = tuple(dict.fromkeys((*METHODS, *KIN)))
"""All names."""
PAPER = "memorability", "attention", "interpreter"
"""The methods in the figure of the paper, in order."""
COMPARED = ("interpreter", "interpreter:all", *(m for m in METHODS if m not in ("interpreter", "memorability")))
"""What `iared2 explain-bench` measures by default: all except memorability, whose weights are large."""
