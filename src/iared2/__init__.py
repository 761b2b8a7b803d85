"""IA-RED²: vision transformers that drop uninformative patches, and show which."""

from .checkpoint import load
from .errors import InputError
from .explain.methods import heatmap
from .model.build import from_timm
from .model.reduced import Output, ReducedVisionTransformer
from .predictor import Interpretation, Predictor
from .video.convert import from_timesformer, from_videomae

__version__ = "0.1.0"
__all__ = [
    "InputError",
    "Interpretation",
    "Output",
    "Predictor",
    "ReducedVisionTransformer",
    "from_timesformer",
    "from_timm",
    "from_videomae",
    "heatmap",
    "load",
]
