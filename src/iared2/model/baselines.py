"""Baselines of the interpreter: scores that are not learned, in its place.

Set ``model.interpreters[group] = RandomScores(group)`` and so on; the loop treats them like interpreters. Use them with
`decide.by_share`, which keeps the best-scored share, since these scores are an order, not a probability.
A dropped patch has score 0. The MACs of these scores are not counted, to their advantage.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from .. import keyed
from ..errors import InputError
from .attention import attention_weights
from .block import applied, before_attention, parts
from .decide import SITE_RANDOM
from .dither import pattern
from .tokens import PackedTokens

if TYPE_CHECKING:
    from .reduced import ReducedVisionTransformer

KINDS = ("random", "attention", "centre", "spread", "shift", "similarity")


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


class ShiftScores(nn.Module):
    """How far the MLP of the following block moves a patch: the L2 norm of its branch, as a share of the largest.

    The representation shift of Lee et al. (ICCV 2025), which needs no attention map. Theirs is taken in the block
    before the decision, after its attention.

    Args:
        block: the first block of the group.

    Raises:
        InputError: the block has no MLP of its own.
    """

    def __init__(self, block: Any) -> None:
        super().__init__()
        self._block = (block,)
        if not parts(block).mlps:
            raise InputError(f"the representation shift is that of an MLP, and a {type(block).__name__} has none alone")

    def forward(self, packed: PackedTokens, has_class_token: bool = True) -> Tensor:
        """``(B, N)`` in [0, 1]."""
        (branch, *_) = parts(self._block[0]).mlps
        y = applied(branch.after, branch.layer(branch.before(packed.x)))
        moved = packed.to_dense(y.float().norm(dim=1))[:, packed.num_prefix_tokens :]
        return moved / moved.amax(1, keepdim=True).clamp_min(1e-9)


class SimilarityScores(nn.Module):
    """How little a patch is like the most similar one of its image: token merging's order, but dropped (ToMe)."""

    def forward(self, packed: PackedTokens, has_class_token: bool = True) -> Tensor:
        """``(B, N)`` in [0, 1]: half of 1 − the largest cosine similarity to another patch alive."""
        prefix, found = packed.num_prefix_tokens, []
        for rows in packed.buckets(packed.x):
            patches = F.normalize(rows[:, prefix:].float(), dim=2)
            alike = patches @ patches.mT
            alike.diagonal(dim1=1, dim2=2).fill_(-1)
            largest = alike.amax(2) if patches.shape[1] else alike.new_zeros(len(rows), 0)
            found.append(F.pad((1 - largest) / 2, (prefix, 0)).flatten())
        return packed.to_dense(torch.cat(found))[:, prefix:]


def baseline_scores(kind: str, model: ReducedVisionTransformer, group: int) -> nn.Module:
    """The scores of one of ``KINDS`` for one group of a `ReducedVisionTransformer`."""
    if kind == "random":
        return RandomScores(group)
    if kind == "centre":
        return PlaceScores(centre_scores(model.grid_size))
    if kind == "spread":  # evenly over the grid, for any image
        return PlaceScores(1 - pattern(model.grid_size).float())
    if kind == "similarity":
        return SimilarityScores()
    index = model.groups[group].start
    block = model.backbone.blocks[index]
    return ShiftScores(block) if kind == "shift" else AttentionScores(block, index)
