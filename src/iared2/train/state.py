"""Resumable state: one file in our format (model/file.py).

Holds the tensors of model, optimiser and moving average, and the position in the run. No
generator state is needed: every draw is a function of seed, epoch, step and sample (keyed.py), and the position holds
those.
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
    """Where a run stands: so many optimiser steps of ``stage`` are done."""

    stage: int = 0
    step: int = 0
    total_steps: int = 0
    """Optimiser steps since the beginning of the run."""
    skipped: int = 0
    """Images that could not be read so far."""
    measured: bool = False
    """The evaluation that is due at this step is done."""


@dataclass(frozen=True)
class State:
    """What a run goes on from.

    Attributes:
        position: where it stands.
        identity: what a resumed run must agree on, as JSON types.
        decision: of the model.
        parts: tensors by part: ``model``, and where there are such ``teacher``, ``optimizer``, ``ema``.
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
