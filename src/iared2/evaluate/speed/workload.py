"""The workload of the benchmark: a model, a batch, and the number of patches kept per image."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from ... import keyed
from ...errors import InputError
from ...model.decide import Decide
from ...model.reduced import ReducedVisionTransformer
from ...model.second_pass import Replayed, same_passes

SITE_COUNTS, SITE_DRAWN = 0, 1


@dataclass(frozen=True)
class Workload:
    """One batch and the decisions on it, the same for everything that is timed."""

    images: Tensor
    """``(B, in_chans, height, width)``, or clips ``(B, in_chans, T, height, width)``; on the device and in the
    precision of the model."""
    decide: Decide
    """The decision on these images, as cheap as a threshold, and who takes a second pass."""
    num_keep: Tensor
    """``(D, B)`` int64, patches kept by each group."""
    gmacs: float
    """Mean 10⁹ MACs per image, including the interpreters and second passes."""


def drawn(
    model: ReducedVisionTransformer, images: Tensor, keep: Sequence[float], std: float, seed: int = 0
) -> Workload:
    """A workload whose keep counts follow a stated distribution, for a model without a trained policy: `draw`."""
    return _workload(model, images, draw(model, len(images), keep, std, seed, images.device))


def draw(
    model: ReducedVisionTransformer,
    batch_size: int,
    keep: Sequence[float],
    std: float,
    seed: int = 0,
    device: torch.device | str = "cpu",
) -> Decide:
    """The decision of a workload that is `drawn`.

    Image b keeps a share ``keep[g] + std · z_b`` of its patches in group g. The z_b are the B quantiles of a normal
    distribution, in random order and the same in all groups: an image with a large object keeps more in each group.
    Which patches stay is drawn, too. The interpreters still run, so their cost is included.

    Raises:
        InputError: there is not one share per group, or the shares rise or leave [0, 1].
    """
    num_patches, keys = model.num_patches, keyed.sample_keys(seed, 0, torch.arange(batch_size))
    shares = torch.tensor(keep)
    if (
        len(shares) != model.num_groups
        or (shares.diff() > 0).any()
        or not 0 <= float(shares[-1]) <= float(shares[0]) <= 1
    ):
        raise InputError(f"--keep: give {model.num_groups} shares from 0 to 1 that do not rise, one per group")
    order = keyed.permutation(seed, SITE_COUNTS, batch_size)
    z = torch.special.ndtri((order + 0.5) / batch_size)
    num_keep = ((shares[:, None] + std * z) * num_patches).round().clamp(1, num_patches).long()
    num_keep = num_keep.cummin(0).values

    draws = keyed.uniform(
        keys, SITE_DRAWN, num_patches
    )  # (B, N), the same in all groups: a dropped patch stays dropped
    worst = draws.sort(1, descending=True).values.gather(1, (num_keep.t() - 1))  # (B, D): the last one that stays
    draws, worst = draws.to(device), worst.to(device)

    def decide(scores: Tensor, alive: Tensor, group: int) -> Tensor:
        return alive & (draws >= worst[:, group, None])

    return decide


def by_the_policy(model: ReducedVisionTransformer, images: Tensor) -> Workload:
    """A workload decided by the model's own thresholds on real images."""
    with torch.inference_mode():
        output = model.trace(images)

    def recorded(scores: Tensor, alive: Tensor, group: int) -> Tensor:
        # scores of a baseline may differ in the last digit, or by the policy token without a class token
        return alive & output.kept[group]

    decide = same_passes(model, model.decision, recorded)
    if isinstance(decide, Replayed) and decide.unsure is not None:
        decide = replace(decide, unsure=lambda logits: output.unsure)
    return _workload(model, images, decide)


def _workload(model: ReducedVisionTransformer, images: Tensor, decide: Decide) -> Workload:
    with torch.inference_mode():
        output = model.trace(images, decide)
    return Workload(images, decide, output.kept.sum(-1), output.macs.double().mean().item() / 1e9)
