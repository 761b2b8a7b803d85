"""IA-RED²: vision transformers that drop uninformative patches, and show which."""

from .checkpoint import load
from .errors import InputError
from .model.reduced import Output, ReducedVisionTransformer, from_timm

__version__ = "0.1.0"
__all__ = ["InputError", "Output", "ReducedVisionTransformer", "from_timm", "load"]
