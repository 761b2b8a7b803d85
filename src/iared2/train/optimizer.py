"""timm's optimisers: creation, a trial step, and conversion to tensors for the checkpoint."""

from __future__ import annotations

from typing import Any

import torch
from timm.optim import create_optimizer_v2
from torch import Tensor, nn

from ..errors import InputError
from .recipe import StageConfig


def make_optimizer(trained: nn.Module, config: StageConfig, section: str) -> torch.optim.Optimizer:
    """Create the optimiser of the parameters that are not frozen; timm excludes biases and norms from weight decay.

    First, a temporary optimiser runs and saves one step on a temporary layer: some of timm's optimisers need another
    kind of gradient, or have state that a checkpoint cannot hold.

    Raises:
        InputError: timm has no such optimiser, or it cannot be used here; ``section`` of the recipe names it.
    """
    layer = nn.Linear(2, 2)
    decay = config.layer_decay if config.layer_decay < 1 and section != "policy_gradient" else None
    more: dict[str, Any] = {"opt": config.optimizer, "lr": config.lr, "weight_decay": config.weight_decay}
    try:
        trial = create_optimizer_v2(layer, **more)
        layer(torch.ones(1, 2)).sum().backward()
        trial.step()
        optimizer_tensors(trial)
        return create_optimizer_v2(trained, layer_decay=decay, **more)
    except Exception as error:  # timm, torch or a missing package may raise anything
        reason = str(error).split("\n")[0]
        raise InputError(f"recipe: {section}.optimizer = {config.optimizer!r} cannot be used: {reason}") from None


def optimizer_tensors(optimizer: torch.optim.Optimizer) -> dict[str, Tensor]:
    """The optimiser's state, flat: ``"3.exp_avg" -> tensor``; plain numbers end in ``.number``, groups are -1, -2 …"""
    tree = optimizer.state_dict()
    steps = {-1 - i: {"step": group["step"]} for i, group in enumerate(tree["param_groups"]) if "step" in group}
    flat = {}
    for i, values in {**tree["state"], **steps}.items():
        for key, value in values.items():
            if value is not None:
                name = f"{i}.{key}" if isinstance(value, Tensor) else f"{i}.{key}.number"
                flat[name] = value if isinstance(value, Tensor) else torch.tensor(value, dtype=torch.float64)
    return flat


def load_optimizer_tensors(optimizer: torch.optim.Optimizer, tensors: dict[str, Tensor]) -> None:
    """The inverse of ``optimizer_tensors``; settings such as the learning rate stay the optimiser's."""
    state: dict[int, dict[str, Any]] = {}
    for name, tensor in tensors.items():
        index, key, *number = name.split(".")
        state.setdefault(int(index), {})[key] = tensor.item() if number else tensor
    groups = optimizer.state_dict()["param_groups"]
    for i, group in enumerate(groups):
        group.update(state.pop(-1 - i, {}))
    optimizer.load_state_dict({"state": state, "param_groups": groups})
