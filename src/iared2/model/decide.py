"""Scores -> which patches stay.

A decision is a function ``(scores, alive, group) -> keep``: scores ``(B, N)``, the rest bool of that shape. The loop in
reduced.py does not know which one it runs. `Decision` is the one that is deployed, a value that a model holds and a
file saves. Every decision here keeps a subset of ``alive``: a dropped patch never comes back.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from numbers import Integral
from typing import Any, TypeVar

import numpy as np
import torch
from torch import Tensor

from .. import keyed
from ..errors import InputError

Decide = Callable[[Tensor, Tensor, int], Tensor]
Number = TypeVar("Number", int, float)

SITE_SAMPLE = 1 << 20  # sites of keyed draws; block indices (stochastic depth) lie below
SITE_RANDOM = 2 << 20
DEFAULT_THRESHOLD = 0.5


@dataclass(frozen=True, init=False)
class Decision:
    """The decision that is deployed: thresholds or counts, one number for all groups or one per group.

    Attributes:
        thresholds: a patch stays if its score is above its group's threshold. ``t <= 0`` keeps every patch and
            ``t >= 1`` none, by definition: a sigmoid can round to exactly 0 or 1. None where counts decide.
        num_keep: every image keeps so many patches in each group, its best-scored ones. None where thresholds decide.
        max_tokens: at most so many patches of an image, the best-scored ones, leave each group; None: no limit. Bounds
            the worst case, which thresholds do not.

    Raises:
        InputError: thresholds and counts, a threshold that is not a number, or a count that is not 0 or more.
    """

    thresholds: tuple[float, ...] | None
    num_keep: tuple[int, ...] | None
    max_tokens: int | None

    def __init__(
        self,
        thresholds: float | Sequence[float] | Tensor | None = None,
        num_keep: int | Sequence[int] | Tensor | None = None,
        max_tokens: int | None = None,
    ) -> None:
        if thresholds is not None and num_keep is not None:
            raise InputError("a decision takes thresholds or num_keep, not both")
        if thresholds is None and num_keep is None:
            thresholds = DEFAULT_THRESHOLD
        # frozen from here on
        object.__setattr__(self, "thresholds", None if thresholds is None else _thresholds(thresholds))
        object.__setattr__(self, "num_keep", None if num_keep is None else _counts("num_keep", num_keep))
        object.__setattr__(self, "max_tokens", None if max_tokens is None else _counts("max_tokens", [max_tokens])[0])

    def for_groups(self, num_groups: int) -> Decision:
        """The same decision with one number per group.

        Raises:
            InputError: it has other than 1 or ``num_groups`` numbers.
        """
        numbers = self.thresholds or self.num_keep or ()
        if len(numbers) not in (1, num_groups):
            name = "num_keep" if self.num_keep else "threshold"
            raise InputError(f"{name}={list(numbers)}: give one number, or {num_groups}, one per group")
        repeats = num_groups // len(numbers)
        return Decision(
            self.thresholds and self.thresholds * repeats, self.num_keep and self.num_keep * repeats, self.max_tokens
        )

    def at(self, thresholds: float | Sequence[float] | Tensor) -> Decision:
        """These thresholds in place of its own, or of its counts; ``max_tokens`` stays."""
        return Decision(thresholds, max_tokens=self.max_tokens)

    def __call__(self, scores: Tensor, alive: Tensor, group: int) -> Tensor:
        """``scores (B, N)``, ``alive (B, N)`` bool -> ``keep (B, N)`` bool."""
        if self.num_keep is not None:
            keep = top_k(scores, alive, _of(self.num_keep, group))
        else:
            assert self.thresholds is not None
            threshold = _of(self.thresholds, group)
            if threshold <= 0:
                keep = alive
            else:
                keep = alive & (scores > threshold) if threshold < 1 else torch.zeros_like(alive)
        return keep if self.max_tokens is None else top_k(scores, keep, self.max_tokens)


def _of(numbers: tuple[Number, ...], group: int) -> Number:
    return numbers[group] if len(numbers) > 1 else numbers[0]


def _thresholds(values: Any) -> tuple[float, ...]:
    try:
        numbers = tuple(np.asarray(_plain(values), dtype=np.float64).ravel().tolist())
    except (TypeError, ValueError):
        numbers = ()
    if not numbers or not all(map(math.isfinite, numbers)):
        raise InputError(f"threshold={values}: give a finite number, or one per group")
    return numbers


def _counts(name: str, values: Any) -> tuple[int, ...]:
    numbers = _plain(values)
    numbers = [numbers] if isinstance(numbers, Integral) else numbers
    if not isinstance(numbers, Sequence) or not numbers or not all(map(_is_count, numbers)):
        raise InputError(f"{name}={values}: give a number of patches, 0 or more" + ", or None" * (name == "max_tokens"))
    return tuple(int(n) for n in numbers)


def _plain(values: Any) -> Any:
    """Numbers of Python in place of those of torch and numpy."""
    return values.tolist() if hasattr(values, "tolist") else values


def _is_count(value: Any) -> bool:
    return isinstance(value, Integral) and not isinstance(value, bool) and int(value) >= 0


def keep_all(scores: Tensor, alive: Tensor, group: int) -> Tensor:
    """Drop nothing."""
    return alive


def by_share(keep: Sequence[float]) -> Decide:
    """Keep the best-scored share of each image's patches: one number per group, of all N patches."""
    return lambda scores, alive, group: top_k(scores, alive, round(keep[group] * alive.shape[1]))


def sample(probability: Tensor, alive: Tensor, keys: Tensor, group: int, samples: int = 1) -> Tensor:
    """Draw ``u ~ Bernoulli(probability)`` for every living patch, k times: ``(B, N)`` -> ``(k·B, N)`` bool.

    Row ``j·B + b`` is draw j of image b, whose key (keyed.py) is ``keys[b]``.
    """
    images, patches = probability.shape
    draws = keyed.uniform(keys, SITE_SAMPLE + group, samples * patches).view(images, samples, patches)
    return (alive[:, None] & (draws < probability[:, None])).transpose(0, 1).flatten(0, 1)


def at_random(num_keep: Tensor, keys: Tensor) -> Decide:
    """Keep as many patches as told, drawn uniformly among the living: the paper's random baseline.

    Args:
        num_keep: ``(D, B)`` integers, patches of each image that leave each group.
        keys: ``(B,)`` int64, the images' keys.
    """

    def decide(scores: Tensor, alive: Tensor, group: int) -> Tensor:
        draws = keyed.uniform(keys, SITE_RANDOM + group, scores.shape[1])
        return top_k(draws, alive, num_keep[group])

    return decide


def top_k(scores: Tensor, alive: Tensor, num_keep: int | Tensor) -> Tensor:
    """Keep the ``num_keep`` best-scored living patches per image; ties fall to the lower position.

    Args:
        scores: ``(B, N)``.
        alive: ``(B, N)`` bool.
        num_keep: one number, or ``(B,)`` or ``(1,)`` integers.
    """
    ranked = scores.masked_fill(~alive, -torch.inf).argsort(dim=1, descending=True, stable=True)
    rank = torch.empty_like(ranked).scatter_(
        1, ranked, torch.arange(scores.shape[1], device=ranked.device).expand_as(ranked)
    )
    return alive & (rank < (num_keep[:, None] if isinstance(num_keep, Tensor) else num_keep))
