"""Scores of patches -> a heat map over the photo, as in the authors' tool.

Deviation from the tool: it always clamps at 0.48, just below its threshold of 0.5, because its scores lie close to it.
A model with a lower threshold would then show nothing. So `upsample` takes the clamp as an argument, and `clamp_below`
computes it for a threshold: 0.48, or 0.02 below the threshold if that is lower.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import matplotlib
import numpy as np
import torch
from PIL import Image
from torch import Tensor
from torch.nn import functional as F

from ..errors import InputError
from ..model.decide import Decide, first_grid

CLAMP = 0.48
PHOTO_SHARE = 0.6  # share of the photo in the overlay; the rest is colour


def default_group(num_groups: int) -> int:
    """The group whose scores make the heat map, from 0: the last, or of fewer than four the second, as in the paper.

    The first group is blind, since the class token has not attended to any patch. With three groups, the last has few
    patches left to compare; with four or more, it localises best (docs/results.md).
    """
    return num_groups - 1 if num_groups > 3 else min(1, num_groups - 1)


def clamp_below(threshold: float) -> float:
    """The lower clamp of the heat map of a group with this threshold."""
    return min(CLAMP, threshold - 0.02)


def lowest_kept(scores: Tensor, kept: Tensor) -> Tensor:
    """``(..., N)`` twice ``-> (...)``: the threshold of a model with counts is the lowest score that was kept.

    It is 0 if all patches were kept, or none.
    """
    lowest = scores.masked_fill(~kept, torch.inf).amin(-1)
    return lowest.masked_fill(kept.all(-1) | ~kept.any(-1), 0)


def grid_of(model: Any, size: Sequence[int], decide: Decide | None = None) -> tuple[float, ...]:
    """Rows and columns of patches that cover an image of this size in the first pass, preceded by T' for a clip.

    They are integers unless the model pads the image to whole patches; the last ones then extend beyond it.
    ``decide`` is the decision of a reduced model; None: its own.
    """
    embed = getattr(model, "backbone", model).patch_embed
    grid = tuple(side / patch for side, patch in zip(size, embed.patch_size, strict=True))
    first = first_grid(decide or getattr(model, "decision", None), whole := tuple(map(math.ceil, grid)))
    return grid if first == whole else first


def score_map(
    scores: Tensor, grid: Sequence[float], size: tuple[int, int], thresholds: Sequence[float], spread: float
) -> Tensor:
    """The heat map of a group: its scores, clamped just below its threshold; ``upsample`` says the rest.

    With `Decision.spread`, the patches that earlier groups dropped lie between kept ones in a regular pattern, which
    says nothing of the photo. Then each patch has the mean score around it, weighted 1, 2, 1 in both directions, where
    dropped patches count as 0, and nothing is clamped: the map is as high as many patches stayed and as they score.

    Args:
        scores: ``(..., N)``, 0 where the patch was dropped before.
        grid, size: as for ``upsample``.
        thresholds: of the group; one, or one per row of the scores.
        spread: of the decision.
    """
    low = scores.new_tensor([[clamp_below(threshold)] for threshold in thresholds]).expand(*scores.shape[:-1], 1)
    gone = (scores == 0).any(-1, keepdim=True)
    if spread and gone.any():
        rows, columns = map(math.ceil, grid[-2:])
        weights = scores.new_tensor([1, 2, 1]) / 4
        mode = "reflect" if min(rows, columns) > 1 else "replicate"  # the pattern goes on beyond the edge
        maps = F.pad(scores.nan_to_num(0).reshape(-1, 1, rows, columns), (1, 1, 1, 1), mode=mode)
        around = F.conv2d(maps, torch.outer(weights, weights)[None, None]).reshape(scores.shape)
        scores, low = torch.where(gone, around, scores), torch.where(gone, 0, low)
    return upsample(scores, grid, size, low)


def upsample(scores: Tensor, grid: Sequence[float], size: tuple[int, int], low: float | Tensor = CLAMP) -> Tensor:
    """Clamp to [low, 1], min-max normalise, resize.

    Args:
        scores: ``(..., N)`` scores of one group, in (0, 1), and 0, the lowest, where the patch was already dropped.
        grid: from ``grid_of``; rounded up, the product of the numbers is N.
        size: height and width of the photo in pixels.
        low: the lower clamp; a number, or a tensor that broadcasts against the scores.

    Returns:
        ``(..., height, width)``, for clips ``(..., T', height, width)``, float32 in [0, 1]. Each image and each clip is
        normalised separately, so the frames of a clip can be compared; a constant map is zeros.
    """
    maps = scores.float().nan_to_num(0).clamp_max(1)
    maps = maps.maximum(torch.as_tensor(low, dtype=maps.dtype, device=maps.device))
    maps = maps - maps.amin(-1, keepdim=True)
    maps = maps / maps.amax(-1, keepdim=True).clamp_min(torch.finfo(maps.dtype).tiny)
    *moments, rows, columns = map(math.ceil, grid)
    maps = maps.reshape(-1, 1, rows, columns)
    whole = round(size[0] * rows / grid[-2]), round(size[1] * columns / grid[-1])
    # Antialias matters only to photos of fewer pixels than patches, which would otherwise show a few of the patches.
    maps = F.interpolate(maps, whole, mode="bicubic", antialias=True)[..., : size[0], : size[1]].clamp(0, 1)
    return maps.reshape(*scores.shape[:-1], *moments, *size)


def colors(name: str) -> np.ndarray:
    """A matplotlib colour map as ``(256, 3)`` uint8, from low to high.

    Raises:
        InputError: matplotlib has no colour map of this name.
    """
    if name not in matplotlib.colormaps:
        raise InputError(
            f"unknown colour map {name!r}; take one of matplotlib's, such as jet, viridis, inferno or turbo"
        )
    return matplotlib.colormaps[name](np.arange(256), bytes=True)[:, :3]


def overlay(photo: Image.Image, heatmap: np.ndarray, colormap: str = "jet") -> Image.Image:
    """The photo (60 %) under its heat map (40 %).

    Args:
        photo: RGB, of width W and height H.
        heatmap: ``(H, W)`` in [0, 1].
        colormap: a name that matplotlib knows.

    Returns:
        RGB of the photo's size.
    """
    levels = np.rint(heatmap * 255).astype(np.uint8)  # as many as the colours, and a large photo still fits in memory
    return Image.blend(photo, Image.fromarray(colors(colormap)[levels]), 1 - PHOTO_SHARE)
