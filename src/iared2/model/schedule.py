"""A budget -> where patches are dropped: the shares of all groups, found on unlabelled images. Not in the paper.

The same MACs can be saved early and gently, or late and hard, and which of them keeps more answers of the dense model
depends on the model far more than on which patches are kept. The shares are
``share_g = exp(−alpha · (w_0 + … + w_g))``: the weights w, of sum 1, say where patches are dropped, and one alpha for
each w meets the budget. So the search is over w alone. It starts from plain ones (in the second half, evenly, falling,
at one group) and goes on with random changes of the best, an evolution strategy of one parent and one child (Rechenberg
1973). It minimises the divergence from the dense model, which changes smoothly where the share of equal answers jumps.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from itertools import accumulate, islice
from typing import TYPE_CHECKING

import torch
import torch.nn.functional as F
from torch import Tensor

from ..errors import InputError
from .calibrate import BATCH_SIZE, at_shares, gmacs_of, solve
from .decide import Decision, confidence_for, keep_all
from .second_pass import again_macs

if TYPE_CHECKING:
    from .reduced import ReducedVisionTransformer
    from .tokens import PackedTokens

STEP = 0.5
"""Standard deviation of the first changes, of the logarithms of the weights."""


@dataclass(frozen=True)
class Schedule:
    """Where patches are dropped, and what that keeps of the dense model on the images on which it was found.

    Attributes:
        shares: of the patches alive after each group, D numbers that do not rise.
        decision: thresholds, or counts, that keep them.
        macs: mean MACs of an image, as a share of the dense model's.
        first_macs: the same without second passes.
        agreement: share of the images with the dense model's prediction; without classes, NaN.
        divergence: mean of `divergence`.
        output: ``(B, K)``, what the model says so. Not a part of the value.
    """

    shares: tuple[float, ...]
    decision: Decision
    macs: float
    first_macs: float
    agreement: float
    divergence: float
    output: Tensor = field(compare=False, repr=False)


def divergence(dense: Tensor, reduced: Tensor, temperature: float = 1.0, classes: bool = True) -> Tensor:
    """How far outputs ``(B, K)`` are from those of the dense model: ``(B,)``, ≥ 0, 0 where they are equal.

    ``τ² KL(dense ‖ reduced)`` of the probabilities at temperature τ (Hinton et al. 2015); for features, without
    ``classes``, 1 − cosine.
    """
    dense, reduced = (x.to(torch.promote_types(x.dtype, torch.float32)) for x in (dense, reduced))
    if not classes:
        return 1 - F.cosine_similarity(dense, reduced)
    log_dense, log_reduced = ((x / temperature).log_softmax(1) for x in (dense, reduced))
    return temperature**2 * (log_dense.exp() * (log_dense - log_reduced)).sum(1).clamp_min(0)


def search(
    model: ReducedVisionTransformer,
    images: Tensor,
    macs: float,
    *,
    trials: int = 60,
    equal_counts: bool = False,
    seed: int = 0,
    log: Callable[[Schedule], None] | None = None,
    dense: Tensor | None = None,
) -> Schedule:
    """The best schedule of a budget. The model is not changed: set ``model.decision = schedule.decision``.

    Args:
        model: in evaluation mode. Its scores decide which patches stay; ``spread`` and ``scale`` of its decision hold.
        images: ``(B, in_chans, height, width)`` without labels; 300 are enough. One trial is one pass over them.
        macs: the budget, as a share of the dense model's MACs.
        trials: number of schedules to try.
        equal_counts: all images keep the same number of patches; false: one threshold for all, so they differ.
        seed: of the random changes.
        log: called with every trial that is the best so far.
        dense: ``(B, K)``, what the dense model says of the images, if it is known.

    Raises:
        InputError: no images, a model in training mode, or a budget that no schedule meets.
    """
    if not len(images) or model.training:
        raise InputError("a schedule is searched on images, at least one, and in evaluation mode: call model.eval()")
    generator = torch.Generator().manual_seed(seed)
    with torch.inference_mode():
        images = images.to(next(model.parameters()))
        sample = [model.embed(chunk) for chunk in images.split(BATCH_SIZE)]
        if dense is None:
            dense = torch.cat([model(chunk, keep_all) for chunk in images.split(BATCH_SIZE)])
        num_patches = sample[0].num_patches

        def shares_of(weights: Tensor) -> list[float] | None:
            return _shares(model, weights.tolist(), macs * model.dense_macs / 1e9, num_patches)

        best, parent, step = None, torch.empty(0), STEP
        starts = list(islice((weights for weights in _starts(model.num_groups) if shares_of(weights)), trials))
        for trial in range(trials if starts else 0):
            if trial < len(starts):
                weights = starts[trial]
            else:
                change = torch.randn(len(parent), generator=generator, dtype=torch.float64)
                weights = (parent + 0.02 / len(parent)) * (step * change).exp()
                # less a little, so that a group may drop nothing
                weights = (weights / weights.sum() - 0.01 / len(parent)).clamp_min(0)
                weights = weights / weights.sum()
            shares = shares_of(weights)
            found = tried(model, sample, dense, shares, equal_counts) if shares else None
            better = found is not None and (best is None or found.divergence < best.divergence)
            if trial >= len(starts):
                step *= 1.5 if better else 0.9
            if found and better:
                best, parent = found, weights
                if log:
                    log(best)
    if best is None:
        raise InputError(f"macs={macs:g} cannot be met by any schedule; give a larger share of the MACs, at most 1")
    return best


@torch.inference_mode()
def tried(
    model: ReducedVisionTransformer,
    sample: list[PackedTokens],
    dense: Tensor,
    shares: Sequence[float],
    equal_counts: bool = False,
) -> Schedule:
    """What shares keep of the dense model, in one pass.

    ``sample`` is of `ReducedVisionTransformer.embed`; other arguments: see `search`.
    """
    num_patches, classes = sample[0].num_patches, model.num_classes > 0
    if equal_counts:
        counts = [round(share * num_patches) for share in shares]
        decision = model.decision.but(thresholds=None, num_keep=counts, confidence=0.0)
        ends = [model.reduce(packed, decide=decision)[0] for packed in sample]
        kept = torch.tensor(counts)[:, None]
    else:
        thresholds, kept, ends = at_shares(model, sample, shares, to_the_end=True)
        decision = model.decision.but(thresholds=thresholds, num_keep=None, confidence=0.0)
    reduced = torch.cat([model.head(packed) for packed in ends])
    agreement = (reduced.argmax(1) == dense.argmax(1)).double().mean().item() if classes else math.nan
    cost = model.count_macs(kept, num_patches).double().mean().item() / model.dense_macs
    far = divergence(dense, reduced, classes=classes).double().mean().item()
    return Schedule(tuple(shares), decision, cost, cost, agreement, far, reduced)


def with_second_pass(model: ReducedVisionTransformer, found: Schedule, dense: Tensor, number: int) -> Schedule:
    """A schedule in which so many images, the least sure ones, take a second pass (second_pass.py).

    Nothing is run: these images then have the dense model's output. Where images are equally sure, all or none do.
    """
    decision = found.decision.but(confidence=confidence_for(found.output, number))
    unsure = decision.unsure(found.output)
    output = torch.where(unsure[:, None], dense.to(found.output), found.output)
    again = again_macs(model, decision, model.grid_size) / model.dense_macs
    return replace(
        found,
        decision=decision,
        macs=found.first_macs + again * unsure.double().mean().item(),
        agreement=(output.argmax(1) == dense.argmax(1)).double().mean().item(),
        divergence=divergence(dense, output).double().mean().item(),
        output=output,
    )


def _starts(num_groups: int) -> list[Tensor]:
    even = torch.ones(num_groups, dtype=torch.float64)
    falling = torch.arange(num_groups, 0, -1, dtype=torch.float64)
    late = (1 + 2 * torch.arange(num_groups, dtype=torch.float64) - num_groups).clamp_min(0) + (num_groups == 1)
    one = torch.eye(num_groups, dtype=torch.float64)
    starts = [late.sign() * falling, even, falling, falling**2, late.sign(), *one[: (num_groups + 1) // 2]]
    return [weights / weights.sum() for weights in starts]


def _shares(
    model: ReducedVisionTransformer, weights: Sequence[float], gmacs: float, num_patches: int
) -> list[float] | None:
    """The shares that drop where the weights say and meet the budget; None: no such shares do."""

    def shares(alpha: float) -> list[float]:
        return [math.exp(-alpha * total) for total in accumulate(weights)]

    alpha = solve(lambda alpha: gmacs_of(model, num_patches, shares(alpha)), gmacs)
    found = shares(alpha)
    return found if abs(gmacs_of(model, num_patches, found) / gmacs - 1) < 0.02 else None
