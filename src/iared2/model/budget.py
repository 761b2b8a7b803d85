"""A budget -> the thresholds that meet it on a sample of images. One checkpoint serves every budget.

Scores crowd around one value, and each group has its own crowd, so a number such as 0.51 says little about cost. Here
each group's threshold is a quantile of the scores that living patches really have, taken group by group in one pass:
the share kept over the whole sample is exactly what was asked for, while each image still keeps more or less than that.

How a budget is spread over the groups follows from what the policy itself does: if it keeps the shares ``a_g`` at its
own thresholds, the budgets are ``a_g ** alpha``, from everything (0) over its own (1) to ever less. A group that drops
nothing keeps dropping nothing. A policy that drops nothing at all gives no shape; then each group keeps half of what
the one before it kept, to the power of alpha.
"""

from __future__ import annotations

import statistics
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from ..device import timed
from ..errors import InputError
from .decide import by_threshold
from .tokens import PackedTokens

BATCH_SIZE = 64
TIMED_IMAGES = 16
MAX_ALPHA = 64.0  # a share of 0.9 to the power of 64 is 0.001
TOLERANCE = 1e-3  # of the budget; the shares themselves are exact to one patch of the sample


@torch.no_grad()
def thresholds_for(
    model: Any,
    images: Tensor,
    *,
    keep: float | Sequence[float] | None = None,
    gmacs: float | None = None,
    latency_ms: float | None = None,
) -> list[float]:
    """The thresholds, one for each group, that meet one budget on ``images``. The model is not changed.

    Args:
        model: a `ReducedVisionTransformer` in evaluation mode.
        images: ``(B, in_chans, height, width)``, a sample of what the model will see; a few hundred are plenty.
        keep: share of the patches that the blocks run on, 0…1, mean over blocks and images. Or D shares, one a group.
        gmacs: mean multiply-adds of an image in 10⁹, interpreters included.
        latency_ms: milliseconds of a forward pass of one image alone, median over the first images of the sample, on
            the device where the model is. Measured, so it is as steady as the machine.

    Raises:
        InputError: not exactly one budget, no images, or a budget that this model cannot meet (says what it can).
    """
    if sum(budget is not None for budget in (keep, gmacs, latency_ms)) != 1:
        raise InputError("give one budget: keep=, gmacs= or latency_ms=")
    if not len(images):
        raise InputError("a budget needs at least one image to calibrate on")
    with torch.inference_mode():
        sample = [model.embed(chunk) for chunk in images.split(BATCH_SIZE)]
        if isinstance(keep, Sequence):
            return _at_shares(model, sample, _checked(keep, model.num_groups))[0]
        own = _own_shares(model, sample)
        if keep is not None:
            return _at_shares(model, sample, _shares_of_mean(model, own, keep))[0]
        if gmacs is not None:
            return _for_gmacs(model, sample, own, gmacs)
        assert latency_ms is not None
        return _for_latency(model, sample, own, images[:TIMED_IMAGES], latency_ms)


def _checked(shares: Sequence[float], num_groups: int) -> list[float]:
    falling = all(a >= b for a, b in zip([1.0, *shares], [*shares, 0.0], strict=True))
    if len(shares) != num_groups or not falling:
        raise InputError(f"keep={list(shares)}: give {num_groups} shares that do not rise, each from 0 to 1")
    return list(shares)


def _own_shares(model: Any, sample: list[PackedTokens]) -> list[float]:
    """Share of the patches alive after each group at the model's own thresholds; a geometric fall if it drops none."""
    kept = torch.cat([torch.stack(model.reduce(packed)[2]).sum(-1) for packed in sample], 1)  # (D, B)
    shares = (kept.double().mean(1) / sample[0].num_patches).clamp_min(1e-3).tolist()
    if shares[-1] == 1:
        return [2.0 ** -(g + 1) for g in range(model.num_groups)]
    return shares


def _at_shares(model: Any, sample: list[PackedTokens], shares: Sequence[float]) -> tuple[list[float], Tensor]:
    """Thresholds that keep these shares of all patches of the sample, and what they keep ``(D, B)``."""
    thresholds, kept = [], []
    for group, share in enumerate(shares):
        scores = [model.score(packed, group) for packed in sample]
        living = torch.cat([s[packed.alive] for s, packed in zip(scores, sample, strict=True)])
        num_keep = round(share * sum(s.numel() for s in scores))
        if num_keep >= len(living):
            threshold = 0.0
        else:  # the best score that has to go: `>` keeps exactly those above
            threshold = living.sort(descending=True).values[num_keep].item() if num_keep else 1.0
        decide = by_threshold(threshold)
        keep = [model.keep_one(decide(s, p.alive, 0), s, p.alive) for s, p in zip(scores, sample, strict=True)]
        sample = [
            model.run_blocks(packed.select(k), group) if group + 1 < len(shares) else packed
            for packed, k in zip(sample, keep, strict=True)
        ]
        thresholds.append(threshold)
        kept.append(torch.cat([k.sum(1) for k in keep]))
    return thresholds, torch.stack(kept)


def _solve(falls: Callable[[float], float], target: float) -> float:
    """The alpha in [0, MAX_ALPHA] where a falling function meets its target."""
    low, high = 0.0, MAX_ALPHA
    for _ in range(60):
        middle = (low + high) / 2
        low, high = (middle, high) if falls(middle) > target else (low, middle)
    return (low + high) / 2


def _shares_of_mean(model: Any, own: list[float], keep: float) -> list[float]:
    if not 0 <= keep <= 1:
        raise InputError(f"keep={keep}: a share of the patches is a number from 0 to 1")
    blocks = [len(group) for group in model.groups]

    def mean(alpha: float) -> float:
        return sum(n * a**alpha for n, a in zip(blocks, own, strict=True)) / sum(blocks)

    if mean(MAX_ALPHA) > keep:  # groups that drop nothing hold it up: let every group take its part
        return [keep] * len(own)
    alpha = _solve(mean, keep)
    return [a**alpha for a in own]


def _for_gmacs(model: Any, sample: list[PackedTokens], own: list[float], gmacs: float) -> list[float]:
    num_patches = sample[0].num_patches

    dither = (torch.arange(64) + 0.5) / 64  # whole patches, whose mean over 64 images is the share to 1/64 of a patch

    def estimate(alpha: float) -> float:  # as if each image kept the mean
        counts = torch.stack([(num_patches * a**alpha + dither).floor().long() for a in own])
        return model.count_macs(counts, num_patches).double().mean().item() / 1e9

    if not estimate(MAX_ALPHA) <= gmacs <= estimate(0):
        least, most = estimate(MAX_ALPHA), estimate(0)
        raise InputError(f"gmacs={gmacs:g} cannot be met: this model takes {least:.3g} to {most:.3g} GMACs an image")
    target = gmacs
    for _ in range(6):  # images differ and cost is convex, so the mean image costs a little less than the mean cost
        alpha = _solve(estimate, target)
        thresholds, kept = _at_shares(model, sample, [a**alpha for a in own])
        found = model.count_macs(kept.cpu(), num_patches).double().mean().item() / 1e9
        if abs(found / gmacs - 1) < TOLERANCE:
            break
        target *= gmacs / found
    return thresholds


def _for_latency(
    model: Any, sample: list[PackedTokens], own: list[float], images: Tensor, latency_ms: float
) -> list[float]:
    def median_ms(thresholds: list[float]) -> float:
        def forward(image: Tensor) -> Tensor:
            return model.head(model.reduce(model.embed(image), decide=by_threshold(thresholds))[0])

        seconds = [timed(images.device, forward, image)[1] for _ in range(3) for image in images.split(1)]
        return 1000 * statistics.median(seconds[len(images) :])  # the first round warms up

    def at(alpha: float) -> tuple[list[float], float]:
        thresholds = _at_shares(model, sample, [a**alpha for a in own])[0]
        return thresholds, median_ms(thresholds)

    whole, slowest = at(0.0)
    if slowest <= latency_ms:
        return whole
    best, fastest = at(MAX_ALPHA)
    if fastest > latency_ms:
        raise InputError(
            f"latency_ms={latency_ms:g} cannot be met: here the model takes {fastest:.3g} to {slowest:.3g} ms an image"
        )
    low, high = 0.0, 8.0
    for _ in range(7):
        middle = (low + high) / 2
        thresholds, ms = at(middle)
        if ms <= latency_ms:
            best, high = thresholds, middle
        else:
            low = middle
    return best
