"""Resumable state: one file in our format (model/file.py).

Holds the tensors of model, optimiser and moving average, and the position in the run. It needs no generator state:
every draw is a function of seed, epoch, step and sample (keyed.py), which follow from the position.
"""

from __future__ import annotations

from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from torch import Tensor

from ..errors import InputError
from ..model import file as saved
from ..model.decide import Decision


@dataclass(frozen=True)
class Position:
    """The position in a run: the number of optimiser steps of ``stage`` that are done."""

    stage: int = 0
    step: int = 0
    total_steps: int = 0
    """Optimiser steps since the start of the run."""
    skipped: int = 0
    """Number of images that could not be read so far."""
    measured: bool = False
    """Whether the evaluation due at this step is done."""


@dataclass(frozen=True)
class State:
    """The state from which a run is resumed.

    Attributes:
        position: the position in the run.
        identity: the settings that a resumed run must share, as JSON types.
        decision: of the model.
        parts: tensors by part: ``model``, and if present ``teacher``, ``optimizer``, ``ema``.
    """

    position: Position
    identity: dict[str, Any]
    decision: Decision
    parts: dict[str, dict[str, Tensor]]

    def save(self, path: Path) -> None:
        """Write it to one file, atomically."""
        tensors = {f"{part}/{name}": tensor for part, group in self.parts.items() for name, tensor in group.items()}
        config = {"position": asdict(self.position), "identity": self.identity, "decision": asdict(self.decision)}
        saved.write(path, tensors, config)


def load_state(path: Path) -> State:
    """Read what ``State.save`` wrote.

    Raises:
        InputError: the file is not a state of this program.
    """
    tensors, config = saved.read(path)
    parts: dict[str, dict[str, Tensor]] = {}
    try:
        for name, tensor in tensors.items():
            part, key = name.split("/", 1)
            parts.setdefault(part, {})[key] = tensor
        decision = config.get("decision")
        if decision is None:  # earlier versions kept it among the tensors
            old = {name: tensor.tolist() for name, tensor in parts.pop("decision").items()}
            decision = {"num_keep": old["num_keep"]} if "num_keep" in old else {"thresholds": old["threshold"]}
        return State(Position(**config["position"]), config["identity"], Decision(**decision), parts)
    except (AttributeError, KeyError, TypeError, ValueError):
        raise InputError(f"{path} is not the state of a training run; move it away to start anew") from None
