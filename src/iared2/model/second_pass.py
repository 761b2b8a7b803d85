"""The second pass: images whose answer is not sure are computed again with every patch. Not in the paper.

What dropping costs, it costs on few images: nearly all answers that change are ones of which the reduced model is not
sure. So it pays to drop more of every image and to give back all patches of those few. This is a cascade (Wang et al.,
NeurIPS 2021, "Not All Images are Worth 16x16 Words") of one network with itself. Up to the first group that drops
patches, both passes are the same, so the second one begins there and costs only the groups from there on.

Scores and decisions, the explanation, are those of the first pass.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from ..errors import InputError
from .decide import Decide, Decision
from .macs import second_pass_macs
from .tokens import PackedTokens

if TYPE_CHECKING:
    from .reduced import ReducedVisionTransformer


@dataclass(frozen=True)
class Replayed:
    """A function that decides which patches stay, with a second pass as a `Decision` has it.

    Attributes:
        decide: the function.
        unsure: ``logits (B, K) -> (B,)`` bool, the images that take the second pass.
        first: the group from which it runs; before it, the function drops nothing.
    """

    decide: Decide
    unsure: Callable[[Tensor], Tensor]
    first: int

    def __call__(self, scores: Tensor, alive: Tensor, group: int) -> Tensor:
        """See `decide.Decide`."""
        return self.decide(scores, alive, group)


def same_pass(model: ReducedVisionTransformer, decide: Decide, other: Decide) -> Decide:
    """``other`` decides, with the second pass of ``decide``, if it has one."""
    if isinstance(decide, Replayed):
        return replace(decide, decide=other)
    if isinstance(decide, Decision) and decide.confidence and model.num_classes:
        first = decide.for_model(model.grid_size, model.num_groups).first_drop(model.num_patches)
        if first < model.num_groups:
            return Replayed(other, decide.unsure, first)
    return other


@dataclass(frozen=True)
class Passes:
    """What one or two passes found.

    Attributes:
        logits: ``(B, K)``, of the last pass of each image.
        ends: the tokens that remain after the first pass.
        scores, kept: ``(B, N)`` for each group, of the first pass.
        unsure: ``(B,)`` bool, the images that took a second pass.
        again: their tokens after it, in their order; None if there are none.
        first: the group from which the second pass runs; D where there is none.
    """

    logits: Tensor
    ends: PackedTokens
    scores: list[Tensor]
    kept: list[Tensor]
    unsure: Tensor
    again: PackedTokens | None
    first: int

    def last(self, of: Callable[[PackedTokens], Tensor]) -> Tensor:
        """``of(tokens) (B, ...)`` of the last pass of each image."""
        found = of(self.ends)
        return found if self.again is None else found.index_copy(0, self.unsure.nonzero()[:, 0], of(self.again))

    def macs(self, model: ReducedVisionTransformer) -> Tensor:
        """``(B,)`` int64 MACs of the second pass."""
        return self.unsure * second_pass_macs(model, self.first, self.ends.num_patches)


def run(model: ReducedVisionTransformer, packed: PackedTokens, decide: Decide | None = None) -> Passes:
    """Classify the images of `ReducedVisionTransformer.embed`; without ``confidence``, in one pass."""
    groups = model.num_groups
    decide = decide or model.decision
    twice = same_pass(model, decide, decide)
    first = twice.first if isinstance(twice, Replayed) else groups
    entrance, scores, kept = model.reduce(packed, range(first), decide)
    ends, more_scores, more_kept = model.reduce(entrance, range(first, groups), decide)
    logits, again = model.head(ends), None
    unsure = torch.zeros(len(logits), dtype=torch.bool, device=logits.device)
    if isinstance(twice, Replayed):
        unsure = twice.unsure(logits)
        images = unsure.nonzero()[:, 0]
        if len(images):
            again = _whole(entrance, images)
            for group in range(first, groups):
                again = model.run_blocks(again, group)
            logits = logits.index_copy(0, images, model.head(again))
    return Passes(logits, ends, scores + more_scores, kept + more_kept, unsure, again, first)


def _whole(packed: PackedTokens, images: Tensor) -> PackedTokens:
    """Some images of a batch of which nothing was dropped."""
    if len(packed.x) != packed.num_images * packed.num_tokens:
        raise InputError("a second pass begins where every patch is left: this decision drops patches before")
    return PackedTokens.from_dense(
        packed.to_dense(packed.x)[images],
        packed.num_prefix_tokens,
        keys=None if packed.keys is None else packed.keys[images],
        rotary=packed.rotary,
        grid_size=packed.grid_size,
    )
