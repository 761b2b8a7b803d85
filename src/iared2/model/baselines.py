"""Baselines of the interpreter: scores that are not learned, in its place.

Set ``model.interpreters[group] = RandomScores(group)`` and so on; the loop treats them like interpreters. Use them with
`decide.by_share`, which keeps the best-scored share, since these scores are an order, not a probability.
A dropped patch has score 0. The MACs of these scores are not counted, to their advantage.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from .. import keyed
from .attention import attention_weights
from .block import before_attention
from .decide import SITE_RANDOM
from .dither import pattern
from .tokens import PackedTokens

if TYPE_CHECKING:
    from .reduced import ReducedVisionTransformer

KINDS = ("random", "attention", "centre", "spread")


class RandomScores(nn.Module):
    """Uniform draws: the paper's random baseline. Keyed by the image; without keys, by its position in the batch."""

    def __init__(self, group: int) -> None:
        super().__init__()
        self.group = group

    def forward(self, packed: PackedTokens, has_class_token: bool = True) -> Tensor:
        """``(B, N)`` in [0, 1)."""
        keys = packed.keys
        if keys is None:
            keys = torch.arange(packed.num_images, device=packed.x.device)
        return keyed.uniform(keys, SITE_RANDOM + self.group, packed.num_patches) * packed.alive


class PlaceScores(nn.Module):
    """The same scores for every image: ``scores (N,)``, by the position of a patch."""

    def __init__(self, scores: Tensor) -> None:
        super().__init__()
        self.scores = scores  # a constant, not a buffer: weights stay timm's

    def forward(self, packed: PackedTokens, has_class_token: bool = True) -> Tensor:
        """``(B, N)`` in [0, 1]."""
        return self.scores.to(packed.x.device) * packed.alive


def centre_scores(grid_size: tuple[int, ...]) -> Tensor:
    """``(N,)``, 1 in the centre, where photographers place the object, and 0 in the corners."""
    axes = [torch.linspace(-1, 1, size) if size > 1 else torch.zeros(1) for size in grid_size]
    distance = torch.cartesian_prod(*axes).square().sum(1)
    return 1 - distance / distance.max()


class AttentionScores(nn.Module):
    """Attention of the class token in the following block, mean over the heads (as in EViT, Liang et al. 2022).

    Args:
        block: the first block of the group.
        index: its number in the backbone.
    """

    def __init__(self, block: Any, index: int) -> None:
        super().__init__()
        self._block, self._index = (block,), index  # in a tuple, so that its weights are not listed twice

    def forward(self, packed: PackedTokens, has_class_token: bool = True) -> Tensor:
        """``(B, N)`` in [0, 1]; without a class token, the mean over all tokens as queries."""
        q, k, _, _ = before_attention(self._block[0], packed.x, packed.rotary_rows(self._index))
        received = []
        for weights in attention_weights(q, k, packed):  # (images, H, length, length)
            mean = weights.mean(1)
            received.append((mean[:, 0] if has_class_token else mean.mean(1)).flatten())
        return packed.to_dense(torch.cat(received))[:, packed.num_prefix_tokens :]


def baseline_scores(kind: str, model: ReducedVisionTransformer, group: int) -> nn.Module:
    """The scores of one of ``KINDS`` for one group of a `ReducedVisionTransformer`."""
    if kind == "random":
        return RandomScores(group)
    if kind == "centre":
        return PlaceScores(centre_scores(model.grid_size))
    if kind == "spread":  # evenly over the grid, for any image
        return PlaceScores(1 - pattern(model.grid_size).float())
    index = model.groups[group].start
    return AttentionScores(model.backbone.blocks[index], index)
