"""Scores of patches -> a heat map over the photo, as in the authors' tool.

Deviation from the tool: it clamps at 0.48 always, just below its threshold of 0.5, because its scores crowd there. A
model with a lower threshold would show nothing that way, so `upsample` takes the clamp as an argument and `clamp_below`
gives it for a threshold: 0.48, or 0.02 below the threshold where that is lower.
"""

from __future__ import annotations

import matplotlib
import numpy as np
import torch
from PIL import Image
from torch import Tensor
from torch.nn import functional as F

from ..errors import InputError

CLAMP = 0.48
PHOTO_SHARE = 0.6  # of the overlay; the rest is colour


def clamp_below(threshold: float) -> float:
    """The lower clamp of the heat map of a group with this threshold."""
    return min(CLAMP, threshold - 0.02)


def upsample(scores: Tensor, grid_size: tuple[int, ...], size: tuple[int, int], low: float = CLAMP) -> Tensor:
    """Clamp to [low, 1], min-max normalise, resize.

    Args:
        scores: ``(..., N)`` scores of one group, in (0, 1), and 0 where the patch was already gone: the lowest.
        grid_size: rows and columns of patches, N = rows × columns; of a clip T', rows and columns, N their product.
        size: height and width of the photo in pixels; the grid covers all of it.
        low: the lower clamp.

    Returns:
        ``(..., height, width)``, of clips ``(..., T', height, width)``, float32 in [0, 1]. Each image and each clip is
        normalised by itself, so that the moments of a clip can be compared; a constant map is zeros.
    """
    maps = scores.float().clamp(low, 1)
    maps = maps - maps.amin(-1, keepdim=True)
    maps = maps / maps.amax(-1, keepdim=True).clamp_min(torch.finfo(maps.dtype).tiny)
    *moments, rows, columns = grid_size
    maps = maps.reshape(-1, 1, rows, columns)
    # Antialias matters only to photos of fewer pixels than patches, which would otherwise show a few of the patches.
    maps = F.interpolate(maps, size, mode="bicubic", antialias=True).clamp_(0, 1)
    return maps.reshape(*scores.shape[:-1], *moments, *size)


def colors(name: str) -> np.ndarray:
    """A matplotlib colour map as ``(256, 3)`` uint8, from low to high.

    Raises:
        InputError: matplotlib has none of this name.
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
