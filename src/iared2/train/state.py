"""Resumable state: one file in our format (model/saved.py).

Holds the tensors of model, optimiser and moving average, and the position in the run. No
generator state is needed: every draw is a function of seed, epoch, step and sample (keyed.py), and the position holds
those.
"""

from __future__ import annotations

from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ..errors import InputError
from ..model import file as saved


@dataclass(frozen=True)
class Position:
    """Where a run stands: so many optimiser steps of ``stage`` are done."""

    stage: int = 0
    step: int = 0
    total_steps: int = 0
    """Optimiser steps since the beginning of the run."""
    skipped: int = 0
    """Images that could not be read so far."""


def optimizer_tensors(optimizer: torch.optim.Optimizer) -> dict[str, Tensor]:
    """The optimiser's state, flat: ``"3.exp_avg" -> tensor``."""
    state = optimizer.state_dict()["state"]
    return {f"{i}.{key}": torch.as_tensor(value) for i, values in state.items() for key, value in values.items()}


def load_optimizer_tensors(optimizer: torch.optim.Optimizer, tensors: dict[str, Tensor]) -> None:
    """The inverse of ``optimizer_tensors``; settings such as the learning rate stay the optimiser's."""
    state: dict[int, dict[str, Tensor]] = {}
    for name, tensor in tensors.items():
        index, key = name.split(".", 1)
        state.setdefault(int(index), {})[key] = tensor
    optimizer.load_state_dict({"state": state, "param_groups": optimizer.state_dict()["param_groups"]})


def save_state(path: Path, position: Position, identity: dict[str, Any], parts: dict[str, dict[str, Tensor]]) -> None:
    """Write the state of a run, atomically: ``identity`` is what a resumed run must agree on, ``parts`` are tensors."""
    tensors = {f"{part}/{name}": tensor for part, group in parts.items() for name, tensor in group.items()}
    saved.write(path, tensors, {"position": asdict(position), "identity": identity})


def load_state(path: Path) -> tuple[Position, dict[str, Any], dict[str, dict[str, Tensor]]]:
    """Read what ``save_state`` wrote.

    Raises:
        InputError: the file is not a state of this program.
    """
    tensors, config = saved.read(path)
    try:
        position, identity = Position(**config["position"]), config["identity"]
    except (KeyError, TypeError):
        raise InputError(f"{path} is not the state of a training run; move it away to start anew") from None
    parts: dict[str, dict[str, Tensor]] = {}
    for name, tensor in tensors.items():
        part, key = name.split("/", 1)
        parts.setdefault(part, {})[key] = tensor
    return position, identity, parts
