"""The second pass: images whose answer is not sure are computed again with every patch. Not in the paper.

What dropping costs, it costs on few images: nearly all answers that change are ones of which the reduced model is not
sure. So it pays to drop more of every image and to give back all patches of those few. This is a cascade (Wang et al.,
NeurIPS 2021, "Not All Images are Worth 16x16 Words") of one network with itself. Up to the first group that drops
patches, both passes are the same, so the second one begins there and costs only the groups from there on. With
`Decision.scale`, the first pass sees a smaller image, and the second one begins with the image as it is.

Scores and decisions, the explanation, are those of the first pass.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from ..errors import InputError
from . import backbone as vit
from .decide import Decide, Decision, keep_all
from .macs import dense_macs, second_pass_macs
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
    model: ReducedVisionTransformer, logits: Tensor, scores: Tensor, kept: Tensor, unsure: Tensor, again: int
) -> Output:
    """An output with the MACs of its passes, ``again`` for the second one; the rest: see `Output`."""
    macs = model.count_macs(kept.sum(-1), kept.shape[-1]) + unsure * again
    return Output(logits, scores, kept, macs, unsure)


@dataclass(frozen=True)
class Replayed:
    """A function that decides which patches stay, with the passes of a `Decision`.

    Attributes:
        decide: the function.
        unsure: ``logits (B, K) -> (B,)`` bool, the images that take the second pass; None: none does.
        first: the group from which it runs; before it, the function drops nothing.
        scale: see `Decision.scale`; below 1, ``first`` is 0.
    """

    decide: Decide
    unsure: Callable[[Tensor], Tensor] | None
    first: int
    scale: float = 1.0

    def __call__(self, scores: Tensor, alive: Tensor, group: int) -> Tensor:
        """See `decide.Decide`."""
        return self.decide(scores, alive, group)


def same_passes(
    model: ReducedVisionTransformer, decide: Decide, other: Decide, num_patches: int | None = None
) -> Decide:
    """``other`` decides, with the passes of ``decide``, if it has two; for images of the model's size, or of N."""
    if isinstance(decide, Replayed):
        return replace(decide, decide=other)
    if not isinstance(decide, Decision):
        return other
    unsure = decide.unsure if decide.confidence and model.num_classes else None
    if decide.scale == 1 and unsure is None:
        return other
    decide = decide.for_model(model.grid_size, model.num_groups)
    first = decide.first_drop(num_patches or model.num_patches) if decide.scale == 1 else 0
    return Replayed(other, unsure, first, decide.scale) if first < model.num_groups else other


@dataclass(frozen=True)
class Passes:
    """What one or two passes found.

    Attributes:
        ends: the tokens that remain after the first pass.
        scores, kept: ``(B, N)`` for each group, of the first pass.
        unsure: ``(B,)`` bool, the images that took a second pass.
        again: their tokens after it, in their order; None if there are none.
        again_macs: MACs of a second pass of an image; 0 where there is none.
        told: ``(B, K)`` logits of the first pass; None if nobody had to know how sure it was.
    """

    ends: PackedTokens
    scores: list[Tensor]
    kept: list[Tensor]
    unsure: Tensor
    again: PackedTokens | None
    again_macs: int
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
        return counted(model, self.logits(model), scores, kept, self.unsure, self.again_macs)


def run(
    model: ReducedVisionTransformer, images: Tensor, decide: Decide | None = None, keys: Tensor | None = None
) -> Passes:
    """All groups on images; arguments: see `ReducedVisionTransformer.trace`."""
    groups, decide = model.num_groups, decide or model.decision
    packed = model.embed(images, keys, decide)
    twice = same_passes(model, decide, decide, packed.num_patches)
    first = twice.first if isinstance(twice, Replayed) else groups
    entrance, scores, kept = model.reduce(packed, range(first), decide)
    ends, more_scores, more_kept = model.reduce(entrance, range(first, groups), decide)
    unsure, told, again, macs = torch.zeros(len(images), dtype=torch.bool, device=images.device), None, None, 0
    if isinstance(twice, Replayed) and twice.unsure is not None:
        told, macs = model.head(ends), again_macs(model, twice, vit.grid_of(model.backbone, images.shape[2:]))
        unsure = twice.unsure(told)
        rows = unsure.nonzero()[:, 0]
        if len(rows) and twice.scale < 1:
            again = model.embed(images[rows], keys if keys is None else keys[rows], keep_all)
        elif len(rows):
            again = _whole(entrance, rows)
        if again:
            for group in range(first, groups):
                again = model.run_blocks(again, group)
    return Passes(ends, scores + more_scores, kept + more_kept, unsure, again, macs, told)


def again_macs(model: ReducedVisionTransformer, passes: Decision | Replayed, grid_size: Sequence[int]) -> int:
    """MACs of a second pass of an image of this grid: those of every patch, less what the first pass has done."""
    patches = math.prod(grid_size)
    if passes.scale < 1:
        return dense_macs(model.backbone, patches)
    first = passes.first if isinstance(passes, Replayed) else passes.first_drop(patches)
    return second_pass_macs(model, first, patches)


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
