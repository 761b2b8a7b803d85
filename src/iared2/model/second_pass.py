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
class Output:
    """The result of a forward pass.

    Attributes:
        logits: ``(B, K)``, of the last pass; scores and kept are of the first.
        scores: ``(D, B, N)`` float32 informativeness in (0, 1); 0 where the patch was already dropped.
        kept: ``(D, B, N)`` bool, the patches on which the blocks of each group ran.
        macs: ``(B,)`` int64 MACs (multiply-adds) per image, including the interpreters and a second pass.
        unsure: ``(B,)`` bool, the images that took a second pass.
    """

    logits: Tensor
    scores: Tensor
    kept: Tensor
    macs: Tensor
    unsure: Tensor

    @property
    def keep_ratio(self) -> Tensor:
        """``(D, B)`` share of an image's patches alive after each group, 0…1."""
        return self.kept.float().mean(-1)


def counted(
    model: ReducedVisionTransformer, logits: Tensor, scores: Tensor, kept: Tensor, unsure: Tensor, first: int
) -> Output:
    """An output with the MACs of its passes, the second one from the group ``first`` on; the rest: see `Output`."""
    patches = kept.shape[-1]
    macs = model.count_macs(kept.sum(-1), patches) + unsure * second_pass_macs(model, first, patches)
    return Output(logits, scores, kept, macs, unsure)


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


def same_pass(model: ReducedVisionTransformer, decide: Decide, other: Decide, num_patches: int | None = None) -> Decide:
    """``other`` decides, with the second pass of ``decide``, if it has one; for images of the model's size, or of N."""
    if isinstance(decide, Replayed):
        return replace(decide, decide=other)
    if isinstance(decide, Decision) and decide.confidence and model.num_classes:
        first = decide.for_model(model.grid_size, model.num_groups).first_drop(num_patches or model.num_patches)
        if first < model.num_groups:
            return Replayed(other, decide.unsure, first)
    return other


@dataclass(frozen=True)
class Passes:
    """What one or two passes found.

    Attributes:
        ends: the tokens that remain after the first pass.
        scores, kept: ``(B, N)`` for each group, of the first pass.
        unsure: ``(B,)`` bool, the images that took a second pass.
        again: their tokens after it, in their order; None if there are none.
        first: the group from which the second pass runs; D where there is none.
        told: ``(B, K)`` logits of the first pass; None if nobody had to know how sure it was.
    """

    ends: PackedTokens
    scores: list[Tensor]
    kept: list[Tensor]
    unsure: Tensor
    again: PackedTokens | None
    first: int
    told: Tensor | None

    def logits(self, model: ReducedVisionTransformer) -> Tensor:
        """``(B, K)`` of the last pass of each image."""
        return self._replaced(model.head(self.ends) if self.told is None else self.told, model.head)

    def last(self, of: Callable[[PackedTokens], Tensor]) -> Tensor:
        """``of(tokens) (B, ...)`` of the last pass of each image."""
        return self._replaced(of(self.ends), of)

    def _replaced(self, found: Tensor, of: Callable[[PackedTokens], Tensor]) -> Tensor:
        return found if self.again is None else found.index_copy(0, self.unsure.nonzero()[:, 0], of(self.again))

    def output(self, model: ReducedVisionTransformer) -> Output:
        """The result with its MACs."""
        scores, kept = torch.stack(self.scores), torch.stack(self.kept)
        return counted(model, self.logits(model), scores, kept, self.unsure, self.first)


def run(model: ReducedVisionTransformer, packed: PackedTokens, decide: Decide | None = None) -> Passes:
    """All groups on the images of `ReducedVisionTransformer.embed`; without ``confidence``, in one pass."""
    groups = model.num_groups
    decide = decide or model.decision
    twice = same_pass(model, decide, decide, packed.num_patches)
    first = twice.first if isinstance(twice, Replayed) else groups
    entrance, scores, kept = model.reduce(packed, range(first), decide)
    ends, more_scores, more_kept = model.reduce(entrance, range(first, groups), decide)
    unsure, told, again = torch.zeros(packed.num_images, dtype=torch.bool, device=packed.x.device), None, None
    if isinstance(twice, Replayed):
        told = model.head(ends)
        unsure = twice.unsure(told)
        images = unsure.nonzero()[:, 0]
        if len(images):
            again = _whole(entrance, images)
            for group in range(first, groups):
                again = model.run_blocks(again, group)
    return Passes(ends, scores + more_scores, kept + more_kept, unsure, again, first, told)


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
