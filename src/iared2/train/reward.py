"""The reward of a decision (Eq. 2)."""

from __future__ import annotations

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from ..device import widest_float
from ..errors import InputError

TEMPERATURE = 3.0
"""τ of ``τ² KL(dense ‖ reduced)``, as in DORA (arXiv 2605.11683)."""


@dataclass(frozen=True)
class RewardConfig:
    """The reward of a decision."""

    tau: float = 1.5
    """τ, the penalty for a wrong prediction, ≥ 0. A higher τ gives more accuracy and more compute (Table 3)."""
    squared: bool = True
    """Reward 1 − ratio² for a correct prediction; false: 1 − ratio, the linear variant, more sensitive to τ."""
    label: str = "true"
    """Which prediction is correct: the "true" label, or that of the "dense" model, which needs no labels."""
    soft_reward: bool = False
    """Use the probability of the label in the reward instead of correct or wrong."""
    divergence: float = 0.0
    """Weight a of the divergence from the dense model's prediction, which is subtracted from the reward; needs no
    labels with label = "dense". 0: as published."""

    @property
    def needs_dense(self) -> bool:
        """Whether the prediction of the dense model is needed."""
        return self.label == "dense" or self.divergence > 0


def correctness(logits: Tensor, labels: Tensor, config: RewardConfig) -> Tensor:
    """How correct a prediction is: ``logits (B, K)``, ``labels (B,)`` -> ``(B,)`` in [0, 1]; 0 or 1 if not soft."""
    if config.soft_reward:
        return logits.to(widest_float(logits.device)).softmax(1).gather(1, labels[:, None])[:, 0]
    return (logits.argmax(1) == labels).to(widest_float(logits.device))


def alike(dense: Tensor, features: Tensor) -> Tensor:
    """How correct an embedding is: its cosine with that of the dense model, ``(B, C)`` each -> ``(B,)`` in [0, 1]."""
    wide = widest_float(features.device)
    return F.cosine_similarity(dense.to(wide), features.to(wide)).clamp(0, 1)


def overlap(dense: Tensor, features: Tensor, k: int) -> Tensor:
    """How correct an embedding is: the share of its k nearest neighbours that the dense model finds, too.

    Neighbours are the dense embeddings of the other images, by cosine, so the reward of a decision depends on no other.

    Args:
        dense: ``(B, C)``, of the dense model.
        features: ``(s·B, C)``, from s decisions on each of the same images.
        k: from 1 to B − 2.

    Returns:
        ``(s·B,)`` in [0, 1].

    Raises:
        InputError: so few images that all of the others are nearest.
    """
    if not 0 < k < len(dense) - 1:
        raise InputError(f"neighbours = {k} of {len(dense)} images: give 1 to {len(dense) - 2}, or more images")
    gallery = F.normalize(dense.float())
    itself = torch.eye(len(dense), dtype=torch.bool, device=dense.device)

    def nearest(rows: Tensor) -> Tensor:
        cosine = (F.normalize(rows.float()) @ gallery.T).unflatten(0, (-1, len(dense)))
        return cosine.masked_fill(itself, -torch.inf).topk(k).indices  # (s, B, k)

    shared = nearest(features)[..., None] == nearest(dense)[..., None, :]
    return shared.any(-1).to(widest_float(dense.device)).mean(-1).flatten()


def reward(num_kept: Tensor, num_patches: int, correct: Tensor, config: RewardConfig) -> Tensor:
    """``R(u) = 1 − (|u|₀/N)²`` if the prediction is correct, ``−τ`` if wrong (Eq. 2); a soft one interpolates.

    Args:
        num_kept: ``|u|₀``, patches alive after the group, of any shape.
        num_patches: N, patches of the image.
        correct: same shape: whether the prediction from these patches is correct. Bool, or in [0, 1].

    Returns:
        Same shape, values in [−τ, 1]; float64, or float32 on a device without float64.
    """
    ratio = num_kept.to(widest_float(num_kept.device)) / num_patches
    right = 1 - (ratio**2 if config.squared else ratio)
    return torch.lerp(torch.full_like(right, -config.tau), right, correct.to(right.dtype))
