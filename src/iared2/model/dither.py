"""The pattern of `Decision.spread`: thresholds laid over the grid of patches, whose neighbours differ (ordered dither).

Void filling, the last part of void-and-cluster (Ulichney 1993): each next patch is the one farthest from all before it,
by the sum of 1 / r⁴ over a torus. So the first k are well spread for every k, on any grid. On powers of two the Bayer
order is as good. For 14 × 14 patches: mean distance from each of the first N/8, N/4, N/2 to its nearest, and how many
of the first N/8 lie in the quadrants, as a share of the even number (8 × 14 × 14 is alike):

    void filling 2.5, 1.6, 1.2   0.98 … 0.98        void-and-cluster 2.4, 1.4, 1.0   0.82 … 1.14
    R₂ sequence  2.2, 1.8, 1.1   0.82 … 1.14        Bayer, cut off   2.8, 2.0, 1.4   0.82 … 1.31
"""

from __future__ import annotations

import math
from functools import cache, reduce

import numpy as np
import torch
from torch import Tensor


def pattern(grid_size: tuple[int, ...]) -> Tensor:
    """``(N,)`` float64, each of the values (rank + 0.5) / N once, for a grid of any number of axes.

    Patches are numbered row by row, of clips moment by moment. The one in the middle has the lowest value.
    """
    return torch.from_numpy((_ranks(tuple(grid_size)) + 0.5) / math.prod(grid_size))


@cache
def _ranks(grid_size: tuple[int, ...]) -> np.ndarray:
    around = [np.minimum(np.arange(size), size - np.arange(size)) ** 2 for size in grid_size]
    # whole numbers: every machine breaks ties alike, and makes the same pattern
    repulsion = 2**40 // np.maximum(reduce(np.add.outer, around), 1) ** 2
    energy, ranks = np.zeros(grid_size, np.int64), np.empty(grid_size, np.int64)
    place = tuple(size // 2 for size in grid_size)
    for rank in range(energy.size):
        ranks[place] = rank
        energy += np.roll(repulsion, place, range(len(grid_size)))
        energy[place] = 2**62
        place = tuple(map(int, np.unravel_index(energy.argmin(), grid_size)))
    return ranks.ravel()
