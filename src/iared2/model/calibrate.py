"""A budget -> the thresholds that meet it on a sample of images. One checkpoint serves every budget.

Scores crowd around one value, and each group has its own crowd, so a number such as 0.51 says little about cost. Here
each group's threshold is a quantile of the scores that living patches really have, taken group by group in one pass:
the share kept over the whole sample is what was asked for, to a patch, and each image keeps more or less than that.
With `Decision.spread` it is a quantile of the logits less the pattern, as a threshold.

How a budget is spread over the groups follows from what the policy itself does: if it keeps the shares ``a_g`` at its
own thresholds, the budgets are ``a_g ** alpha``, from everything (0) over its own (1) to ever less. A group that drops
nothing keeps dropping nothing. Where a budget cannot be met that way, or the policy drops nothing at all, each group
keeps the same part of what the one before it kept.
"""

from __future__ import annotations

import copy
import math
import statistics
from collections.abc import Callable, Sequence
from functools import partial
from itertools import pairwise
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from ..device import timed
from ..errors import InputError
from .decide import Decision
from .tokens import PackedTokens

if TYPE_CHECKING:
    from .reduced import ReducedVisionTransformer

BATCH_SIZE = 64
TIMED_IMAGES = 16
MAX_ALPHA = 64.0  # a share of 0.9 to the power of 64 is 0.001
MIN_SHARE = 0.02  # of the patches for the last group: with less, groups that drop nothing cost more than they are worth
TOLERANCE = 1e-3  # of the budget; the shares themselves are exact to one patch of the sample


def thresholds_for(
    model: ReducedVisionTransformer,
    images: Tensor,
    *,
    keep: float | Sequence[float] | None = None,
    gmacs: float | None = None,
    latency_ms: float | None = None,
    shape: Sequence[float] | None = None,
) -> list[float]:
    """The thresholds, one per group, that meet one budget on ``images``. The model is not changed.

    The budget is that of the first pass, see `Decision.scale`; with ``confidence``, second passes come on top of it.

    Args:
        model: a `ReducedVisionTransformer` in evaluation mode. Its ``max_tokens`` holds.
        images: ``(B, in_chans, height, width)``, a sample of what the model will see; a few hundred are plenty.
        keep: share of the patches that the blocks run on, 0…1, mean over blocks and images. Or D shares, one a group.
        gmacs: mean 10⁹ MACs per image, including the interpreters.
        latency_ms: milliseconds of a forward pass of one image alone, median over the first images of the sample, on
            the device where the model is. Measured, so it is as steady as the machine.
        shape: shares of the patches alive after each group at another budget, which take the place of the policy's own
            (`schedule.search` finds good ones).

    Raises:
        InputError: not exactly one budget, no images, a model in training mode, scores that are not numbers, or a
            budget that this model cannot meet (says what it can).
    """
    if sum(budget is not None for budget in (keep, gmacs, latency_ms)) != 1:
        raise InputError("give one budget: keep=, gmacs= or latency_ms=")
    if not len(images):
        raise InputError("a budget needs at least one image to calibrate on")
    if model.training:
        raise InputError("a budget is met in evaluation mode: call model.eval() first")
    with torch.inference_mode():
        images = images.to(next(model.parameters()))
        sample = [model.embed(chunk) for chunk in images.split(BATCH_SIZE)]
        shares = [] if keep is None else _numbers("keep", keep)
        if len(shares) > 1:
            return _for_shares(model, sample, _falling("keep", model, shares))
        own = own_shares(model, sample) if shape is None else _falling("shape", model, _numbers("shape", shape))
        if shares:
            return _for_mean_share(model, sample, shares[0], own)
        if gmacs is not None:
            return _for_gmacs(model, sample, gmacs, own)
        assert latency_ms is not None
        return _for_latency(model, sample, images[:TIMED_IMAGES], latency_ms, own)


def decision_at(model: ReducedVisionTransformer, images: Tensor, **budget: Any) -> Decision:
    """The model's decision at a budget: in one pass of the images as they are, on top of which nothing comes.

    Arguments and errors: see `thresholds_for`.
    """
    once = copy.copy(model)  # shares the weights, but has its own decision
    once.decision = model.decision.but(confidence=0.0, scale=1.0)
    return once.decision.at(thresholds_for(once, images, **budget))


def _numbers(name: str, given: Any) -> list[float]:
    try:
        shares = torch.as_tensor(given, dtype=torch.float64).flatten().tolist()
    except (TypeError, ValueError, RuntimeError):
        shares = []
    if not shares or not all(0 <= share <= 1 for share in shares):
        raise InputError(f"{name}={given}: a share of the patches is a number from 0 to 1")
    return shares


def _falling(name: str, model: ReducedVisionTransformer, shares: list[float]) -> list[float]:
    if len(shares) != model.num_groups or any(b > a for a, b in pairwise(shares)):
        one = "one share, or " * (name == "keep")
        raise InputError(f"{name}={shares}: give {one}{model.num_groups} that do not rise, one for each group")
    return shares


def _mean(model: ReducedVisionTransformer, shares: Sequence[float]) -> float:
    """Over the blocks."""
    return sum(len(group) * share for group, share in zip(model.groups, shares, strict=True)) / sum(
        map(len, model.groups)
    )


def _found(model: ReducedVisionTransformer, kept: Tensor, num_patches: int) -> float:
    return _mean(model, (kept.double().mean(1) / num_patches).tolist())


def _for_shares(model: ReducedVisionTransformer, sample: list[PackedTokens], keep: list[float]) -> list[float]:
    thresholds, kept, _ = at_shares(model, sample, keep)
    _check_limit(model, _found(model, kept, sample[0].num_patches), _mean(model, keep))
    return thresholds


def _for_mean_share(
    model: ReducedVisionTransformer, sample: list[PackedTokens], keep: float, own: list[float]
) -> list[float]:
    family = _family(own, lambda shares: _mean(model, shares) <= keep)
    target = keep
    for _ in range(6):  # max_tokens may take from some groups what the others then have to keep
        thresholds, kept, _ = at_shares(model, sample, family(solve(lambda alpha: _mean(model, family(alpha)), target)))
        found = _found(model, kept, sample[0].num_patches)
        if model.max_tokens is None or abs(found - keep) < TOLERANCE:
            break
        target += keep - found
    _check_limit(model, found, keep)
    return thresholds


def _check_limit(model: ReducedVisionTransformer, found: float, keep: float) -> None:
    if model.max_tokens is not None and found < keep - 0.02:
        raise InputError(f"keep={keep} cannot be met: max_tokens={model.max_tokens} allows no more than {found:.2f}")


def own_shares(model: ReducedVisionTransformer, sample: list[PackedTokens]) -> list[float]:
    """D shares of the patches alive after each group, by the model's own decision; mean over the sample."""
    kept = torch.cat([torch.stack(model.reduce(packed)[2]).sum(-1) for packed in sample], 1)  # (D, B)
    return (kept.cpu().double().mean(1) / sample[0].num_patches).tolist()


def _family(own: list[float], meets: Callable[[list[float]], bool]) -> Callable[[float], list[float]]:
    """alpha -> the shares of each group: its own to the power of alpha, if the last keeps ``MIN_SHARE`` so.

    If not, since groups that drop nothing hold it up, each group keeps the same part of what it is given.
    """
    own = [max(share, 1e-3) for share in own]
    whole = own[-1] > 0.99
    most = 1.0 if whole else max(1.0, math.log(MIN_SHARE) / math.log(own[-1]))
    if whole or not meets([share**most for share in own]):
        own = [2.0 ** -(group + 1) for group in range(len(own))]
    return lambda alpha: [share**alpha for share in own]


def at_shares(
    model: ReducedVisionTransformer, sample: list[PackedTokens], shares: Sequence[float], to_the_end: bool = False
) -> tuple[list[float], Tensor, list[PackedTokens]]:
    """Thresholds that keep these shares of all patches of the sample.

    Returns:
        The thresholds, the numbers of patches that they keep ``(D, B)``, and the remaining tokens; those of the last
        group, whose blocks no threshold depends on, have run through these only ``to_the_end``.
    """
    thresholds: list[float] = []
    kept = []
    decision = model.decision.but(grid_size=sample[0].grid_size)
    for group, share in enumerate(shares):
        scores = [model.score(packed, group) for packed in sample]
        standing = map(decision.standing, scores)
        living = torch.cat([s[packed.alive] for s, packed in zip(standing, sample, strict=True)])
        if living.isnan().any():
            raise InputError("the scores of some images are not numbers: look for nan or inf in the images")
        level = _quantile(living, round(share * sum(s.numel() for s in scores)))
        thresholds.append(decision.threshold_at(level))
        decide = decision.at(thresholds[-1])
        keep = [model.decide(s, p.alive, group, decide) for s, p in zip(scores, sample, strict=True)]
        if to_the_end or group + 1 < len(shares):
            sample = [model.run_blocks(model.drop(p, k), group) for p, k in zip(sample, keep, strict=True)]
        kept.append(torch.cat([k.sum(1) for k in keep]))
    return thresholds, torch.stack(kept).cpu(), sample


def _quantile(standing: Tensor, num_keep: int) -> float:
    """The level above which ``num_keep`` of them stand; where equal ones straddle it, all or none of these."""
    if num_keep >= len(standing):
        return -math.inf
    if num_keep == 0:
        return math.inf
    first_to_go = standing.sort(descending=True).values[num_keep]
    above, from_there = int((standing > first_to_go).sum()), int((standing >= first_to_go).sum())
    if num_keep - above <= from_there - num_keep:
        return first_to_go.item()
    return torch.nextafter(first_to_go, first_to_go.new_tensor(-math.inf)).item()


def solve(falls: Callable[[float], float], target: float) -> float:
    """The alpha in [0, MAX_ALPHA] where a falling function meets its target."""
    low, high = 0.0, MAX_ALPHA
    for _ in range(60):
        middle = (low + high) / 2
        low, high = (middle, high) if falls(middle) > target else (low, middle)
    return (low + high) / 2


def gmacs_of(model: ReducedVisionTransformer, num_patches: int, shares: Sequence[float]) -> float:
    """10⁹ MACs of an image that keeps these shares."""
    dither = (torch.arange(64) + 0.5) / 64  # whole patches, whose mean over 64 images is the share to 1/64 of a patch
    counts = torch.stack([(num_patches * share + dither).floor().long() for share in shares])
    return model.count_macs(counts, num_patches).double().mean().item() / 1e9


def _for_gmacs(
    model: ReducedVisionTransformer, sample: list[PackedTokens], gmacs: float, own: list[float]
) -> list[float]:
    num_patches = sample[0].num_patches
    estimate = partial(gmacs_of, model, num_patches)  # as if each image kept the mean
    family = _family(own, lambda shares: estimate(shares) <= gmacs)

    least, most = estimate(family(MAX_ALPHA)), estimate(family(0))
    if not least <= gmacs <= most:
        what = "this model takes" if model.scale == 1 else f"a first pass of scale={model.scale:g} takes"
        hint = "" if model.scale == 1 else "; set scale=1 for larger budgets"
        raise InputError(f"gmacs={gmacs:g} cannot be met: {what} {least:.3g} to {most:.3g} GMACs an image{hint}")
    target = gmacs
    for _ in range(6):  # images differ and cost is convex, so the mean image costs a little less than the mean cost
        thresholds, kept, _ = at_shares(model, sample, family(solve(lambda alpha: estimate(family(alpha)), target)))
        found = model.count_macs(kept, num_patches).double().mean().item() / 1e9
        if abs(found / gmacs - 1) < TOLERANCE:
            break
        target *= gmacs / found
    if model.max_tokens is not None and found < 0.98 * gmacs:
        raise InputError(f"gmacs={gmacs:g} cannot be met: max_tokens={model.max_tokens} allows {found:.3g} at most")
    return thresholds


def _for_latency(
    model: ReducedVisionTransformer, sample: list[PackedTokens], images: Tensor, latency_ms: float, own: list[float]
) -> list[float]:
    def median_ms(thresholds: list[float]) -> float:
        decide = model.decision.at(thresholds).but(confidence=0.0)
        seconds = [timed(images.device, model, image, decide)[1] for _ in range(3) for image in images.split(1)]
        return 1000 * statistics.median(seconds[len(images) :])  # the first round warms up

    def at(alpha: float) -> tuple[list[float], float]:
        thresholds = at_shares(model, sample, family(alpha))[0]
        return thresholds, median_ms(thresholds)

    family = _family(own, lambda shares: median_ms(at_shares(model, sample, shares)[0]) <= latency_ms)
    whole, slowest = at(0.0)
    if slowest <= latency_ms:
        return whole
    best, fastest = at(MAX_ALPHA)
    if not fastest <= latency_ms:
        raise InputError(
            f"latency_ms={latency_ms:g} cannot be met: here the model takes {fastest:.3g} to {slowest:.3g} ms an image"
        )
    low, high = 1 / MAX_ALPHA, MAX_ALPHA
    for _ in range(9):  # as many steps below the policy's own shares as above
        middle = math.sqrt(low * high)
        thresholds, ms = at(middle)
        if ms <= latency_ms:
            best, high = thresholds, middle
        else:
            low = middle
    return best
