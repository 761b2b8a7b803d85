"""IA-RED²: vision transformers that drop uninformative patches, and show which."""

from .errors import InputError
from .explain.methods import heatmap
from .model.reduced import Output, ReducedVisionTransformer
from .predict.batch import BatchPredictor
from .predict.photo import Interpretation, Predictor
from .pretrained.build import from_timm
from .pretrained.checkpoint import load
from .pretrained.convert import from_timesformer, from_videomae

__version__ = "0.1.0"
__all__ = [
    "BatchPredictor",
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
