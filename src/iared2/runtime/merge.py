"""Merges each dropped patch into the most similar kept patch of its image: model/merge.py without torch."""

from __future__ import annotations

import numpy as np


def merge(
    x: np.ndarray, row_of: np.ndarray, sizes: np.ndarray, alive: np.ndarray, keep: np.ndarray, prefix: int
) -> None:
    """Replace each kept patch by the mean of all that are merged into it. Changes ``x`` and ``sizes`` in place.

    Args:
        x: ``(T, C)`` float32 rows.
        row_of: ``(B, S)``, where in ``x`` a token is.
        sizes: ``(B, S)`` float32, of how many patches each token is the mean.
        alive, keep: ``(B, N)`` bool, before and after the decision. An image that keeps no patch loses all of them.
        prefix: P.
    """
    leaves = alive & ~keep
    for image in np.flatnonzero(leaves.any(1) & keep.any(1)):
        there, gone = (np.flatnonzero(patches[image]) + prefix for patches in (keep, leaves))
        own, added = sizes[image, there], sizes[image, gone]
        kept, merged = x[row_of[image, there]], x[row_of[image, gone]]
        # the length of the dropped patch does not change which cosine is the largest
        unit = kept / np.linalg.norm(kept, axis=1, keepdims=True).clip(1e-12)
        target = (merged @ unit.T).argmax(1)
        shares = np.zeros((len(there), len(gone)), np.float32)
        shares[target, np.arange(len(gone))] = added
        sizes[image, there] = own + shares.sum(1)
        x[row_of[image, there]] = (kept * own[:, None] + shares @ merged) / sizes[image, there, None]
