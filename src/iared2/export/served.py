"""A model served by `runtime.Engine`: the same decisions and the same `Output`, computed by another runtime."""

from __future__ import annotations

from pathlib import Path
from tempfile import TemporaryDirectory

import numpy as np
import torch
from torch import Tensor

from ..errors import InputError
from ..model.decide import Decide
from ..model.reduced import ReducedVisionTransformer
from ..model.second_pass import Output, Replayed, again_macs, counted, same_passes
from ..runtime import BACKENDS, Decided, Engine
from ..runtime.backends import loader
from ..runtime.values import Output as Served
from .stages import export_stages

ENGINES = ("torch", *BACKENDS)


def check_engine(engine: str, device: torch.device) -> None:
    """Refuse an engine that there is not, and a device that it does not run on.

    Raises:
        InputError: names the engines.
    """
    if engine not in ENGINES:
        raise InputError(f"engine={engine!r} should be one of {', '.join(ENGINES)}")
    if engine != "torch" and device.type != "cpu":
        raise InputError(f"the engine {engine} runs on the CPU, not on {device}: leave out one of them")


def exported(
    model: ReducedVisionTransformer, backend: str, threads: int, precision: str = "fp32", stem: int | None = None
) -> Engine:
    """The engine of a model, by way of a temporary file. Arguments and errors: of `Engine` and `export_stages`."""
    loader(backend, threads, precision)  # what is missing is missed before an export, which takes half a minute
    with TemporaryDirectory() as folder:
        path = Path(folder, "model.zip")
        export_stages(model, path, stem, precision == "int8")
        return Engine(path, backend, threads, precision)


def as_arrays(model: ReducedVisionTransformer, decide: Decide) -> Decided:
    """A decision on tensors for the engine of a model, which is asked for its sizes alone."""

    def keep(scores: np.ndarray, alive: np.ndarray, group: int) -> np.ndarray:
        return decide(torch.from_numpy(scores), torch.from_numpy(alive), group).numpy()

    second = same_passes(model, decide, decide)
    if not isinstance(second, Replayed):
        return Decided(keep)
    if (unsure := second.unsure) is None:
        return Decided(keep, scale=second.scale)
    return Decided(keep, lambda logits: unsure(torch.from_numpy(logits)).numpy(), second.first, second.scale)


def trace(engine: Engine, model: ReducedVisionTransformer, images: Tensor, decide: Decide) -> Output:
    """``model.trace(images, decide)``, computed by the model's engine.

    Args:
        engine: of the model; it has the weights.
        model: of which the sizes alone are used.
        images: ``(B, in_chans, height, width)`` on the CPU.
        decide: the decision; it may not drop patches in the first ``engine.stem`` groups.

    Raises:
        InputError: as `Engine`; or the engine has another number of classes than the model.
    """
    return in_torch(engine(images.float().numpy(), as_arrays(model, decide)), engine, model, decide)


def in_torch(found: Served, engine: Engine, model: ReducedVisionTransformer, decide: Decide) -> Output:
    """What the engine of a model returned for a decision, as the model's own output, with its MACs; see `trace`."""
    if found.logits.shape[1:] != (expected := model.num_classes or model.num_features,):
        raise InputError(
            f"the exported model has {found.logits.shape[1]} outputs, and {expected} were expected: export it again, or"
            " make a new predictor of a model that was changed"
        )
    logits, scores, kept, unsure = map(torch.from_numpy, (found.logits, found.scores, found.kept, found.unsure))
    decided = as_arrays(model, decide)
    passes = Replayed(decide, None, max(engine.stem, decided.first), decided.scale)
    again = again_macs(model, passes, model.grid_size)
    return counted(model, logits, scores, kept, unsure, again)
