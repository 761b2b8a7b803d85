"""The reward of a decision (Eq. 2)."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True)
class RewardConfig:
    """What a decision is worth."""

    tau: float = 1.5
    """τ, the penalty for a wrong prediction, ≥ 0. More τ: more accurate, more compute (Table 3)."""
    squared: bool = True
    """Reward 1 − ratio² for a right prediction; false: 1 − ratio, the linear variant, more sensitive to τ."""


def reward(num_kept: Tensor, num_patches: int, correct: Tensor, config: RewardConfig) -> Tensor:
    """``R(u) = 1 − (|u|₀/N)²`` if the prediction is right, ``−τ`` if it is wrong (Eq. 2).

    Args:
        num_kept: ``|u|₀``, patches alive after the group, of any shape.
        num_patches: N, patches of the image.
        correct: bool, same shape: is the prediction made from these patches right?

    Returns:
        Same shape, float64 values in [−τ, 1].
    """
    ratio = num_kept.double() / num_patches
    return torch.where(correct, 1 - (ratio**2 if config.squared else ratio), -config.tau)
