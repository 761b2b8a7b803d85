"""What the engine takes beside images, and what it returns."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np

Decide = Callable[[np.ndarray, np.ndarray, int], np.ndarray]
"""``(scores (B, N), alive (B, N) bool, group) -> keep (B, N)`` bool."""


@dataclass(frozen=True)
class Decided:
    """A function that decides, and with ``unsure`` a second pass, as `model.second_pass.Replayed` has it.

    Attributes:
        decide: the function.
        unsure: ``logits (B, K) -> (B,)`` bool, the images that are computed again with every patch.
        first: the group from which they are: the first one that drops patches.
        scale: of the first pass: 1, or below 1 that of the engine; then ``first`` does not matter.
    """

    decide: Decide
    unsure: Callable[[np.ndarray], np.ndarray] | None = None
    first: int = 0
    scale: float = 1.0


@dataclass(frozen=True)
class Output:
    """The result for one batch.

    Attributes:
        logits: ``(B, K)`` float32.
        scores: ``(D, B, N)`` float32 informativeness in (0, 1); 0 where the patch was already dropped.
        kept: ``(D, B, N)`` bool, the patches on which the blocks of each group ran.
        unsure: ``(B,)`` bool, the images whose logits are from a second pass; scores and kept are of the first.
        padding: share of the work in the groups' graphs that is padding, in 0…0.05 (`layout.MAX_PADDING`).
        calls: of the groups' graphs.
    """

    logits: np.ndarray
    scores: np.ndarray
    kept: np.ndarray
    unsure: np.ndarray
    padding: float
    calls: int
