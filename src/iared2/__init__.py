"""IA-RED²: vision transformers that drop uninformative patches, and show which.

The public names are imported when they are first used, so that ``iared2 --help`` does not wait for torch. If timm is
imported, before or after this package, our models are registered with it (hub.py).
"""

import sys
from importlib import import_module, util
from importlib.abc import MetaPathFinder
from importlib.machinery import ModuleSpec
from types import ModuleType
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from .adapt.accelerate import accelerate
    from .errors import InputError
    from .explain.methods import heatmap
    from .model.reduced import Output, ReducedVisionTransformer
    from .predict.batch import BatchPredictor
    from .predict.photo import Interpretation, Predictor
    from .pretrained.build import from_timm
    from .pretrained.checkpoint import load
    from .pretrained.convert import from_timesformer, from_videomae

__version__ = "0.2.0"
__all__ = [
    "BatchPredictor",
    "InputError",
    "Interpretation",
    "Output",
    "Predictor",
    "ReducedVisionTransformer",
    "accelerate",
    "from_timesformer",
    "from_timm",
    "from_videomae",
    "heatmap",
    "load",
]
_HOMES = {
    "adapt.accelerate": ["accelerate"],
    "errors": ["InputError"],
    "explain.methods": ["heatmap"],
    "model.reduced": ["Output", "ReducedVisionTransformer"],
    "predict.batch": ["BatchPredictor"],
    "predict.photo": ["Interpretation", "Predictor"],
    "pretrained.build": ["from_timm"],
    "pretrained.checkpoint": ["load"],
    "pretrained.convert": ["from_timesformer", "from_videomae"],
}


def __getattr__(name: str) -> Any:
    for module, names in _HOMES.items():
        if name in names:
            globals()[name] = getattr(import_module(f".{module}", __name__), name)
            return globals()[name]
    if not name.startswith("_") and util.find_spec(f"{__name__}.{name}"):  # a room or a module
        return import_module(f".{name}", __name__)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})


class _AfterTimm(MetaPathFinder):
    """Imports hub.py right after timm; then this finder has done its work."""

    def find_spec(self, fullname: str, path: Any = None, target: ModuleType | None = None) -> ModuleSpec | None:
        if fullname != "timm" or self not in sys.meta_path:
            return None
        sys.meta_path.remove(self)
        spec = util.find_spec(fullname)
        if spec is not None and spec.loader is not None:
            run = spec.loader.exec_module

            def run_and_register(module: ModuleType) -> None:
                run(module)
                import_module(".hub", __name__)

            spec.loader.exec_module = run_and_register  # type: ignore[method-assign]
        return spec


if "timm" in sys.modules:
    from . import hub as hub
else:
    sys.meta_path.insert(0, _AfterTimm())
