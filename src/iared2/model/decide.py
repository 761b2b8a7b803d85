"""Scores -> which patches stay.

A decision is a function ``(scores, alive, group) -> keep``: scores ``(B, N)``, the rest bool of that shape. The loop in
reduced.py does not know which one it runs. `Decision` is the one that is deployed, a value that a model holds and a
file saves. Every decision here keeps a subset of ``alive``: a dropped patch never comes back.

Not in the paper: `Decision.spread`, which makes the threshold depend on the position of a patch, and what makes two
passes of one (second_pass.py): `Decision.scale`, by which the first one is smaller, and `Decision.confidence`, which
says whose answer is computed again with every patch.
"""

from __future__ import annotations

import math
import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from numbers import Integral
from typing import Any, TypeVar

import numpy as np
import torch
from torch import Tensor

from .. import keyed
from ..errors import InputError
from .dither import pattern

Decide = Callable[[Tensor, Tensor, int], Tensor]
Number = TypeVar("Number", int, float)

SITE_SAMPLE = 1 << 20  # sites of keyed draws; block indices (stochastic depth) lie below
SITE_RANDOM = 2 << 20
DEFAULT_THRESHOLD = 0.5
EPS = 1e-6  # scores that have rounded to 0 or 1 have no logit


@dataclass(frozen=True, init=False)
class Decision:
    """The decision that is deployed: thresholds or counts, one number for all groups or one per group.

    Attributes:
        thresholds: a patch stays if its score is above its group's threshold. ``t <= 0`` keeps every patch and
            ``t >= 1`` none, by definition: a sigmoid can round to exactly 0 or 1. None where counts decide.
        num_keep: every image keeps so many patches in each group, its best-scored ones. None where thresholds decide.
        max_tokens: at most so many patches of an image, the best-scored ones, leave each group; None: no limit. Bounds
            the worst case, which thresholds do not.
        spread: s ≥ 0. A patch stays if ``logit score > logit threshold + s · logit d``, where d is the `pattern` of the
            grid, in (0, 1) and the same for every image and group; counts and limit order the patches by
            ``logit score − s · logit d``. 0 is the paper. With 1 and the threshold 0.5, a region keeps the share of its
            patches that is its mean score, as if they were drawn with their scores as probabilities.
        confidence: 0…1. Images whose `margin` is below this are `unsure`: they take a second pass with every patch,
            from the first group that drops (second_pass.py). 0: none does; 1: all do, by definition.
        scale: above 0, up to 1: of the rows and columns of patches of an image, the part that the first pass has, to
            which the image is made smaller. Scores, counts and limit are of these patches. The second pass sees the
            image as it is.
        grid_size: of the first pass, over which d is laid; a model sets it. Not a part of the value.

    Raises:
        InputError: thresholds and counts, a threshold that is not a number, a count or spread that is not 0 or more, a
            confidence outside [0, 1] or beside ``max_tokens``, which a second pass would not keep, or a scale outside
            (0, 1].
    """

    thresholds: tuple[float, ...] | None
    num_keep: tuple[int, ...] | None
    max_tokens: int | None
    spread: float
    confidence: float
    scale: float
    grid_size: tuple[int, ...] | None = field(compare=False, repr=False)

    def __init__(
        self,
        thresholds: float | Sequence[float] | Tensor | None = None,
        num_keep: int | Sequence[int] | Tensor | None = None,
        max_tokens: int | None = None,
        spread: float = 0.0,
        confidence: float = 0.0,
        scale: float = 1.0,
        grid_size: Sequence[int] | None = None,
    ) -> None:
        if thresholds is not None and num_keep is not None:
            raise InputError("a decision takes thresholds or num_keep, not both")
        if thresholds is None and num_keep is None:
            thresholds = DEFAULT_THRESHOLD
        # frozen from here on
        object.__setattr__(self, "thresholds", None if thresholds is None else _thresholds(thresholds))
        object.__setattr__(self, "num_keep", None if num_keep is None else _counts("num_keep", num_keep))
        object.__setattr__(self, "max_tokens", None if max_tokens is None else _counts("max_tokens", [max_tokens])[0])
        object.__setattr__(self, "spread", _number("spread", spread))
        object.__setattr__(self, "confidence", _number("confidence", confidence, 1.0))
        object.__setattr__(self, "scale", _number("scale", scale, 1.0))
        if not self.scale:
            raise InputError("scale=0 leaves no patch: give a number above 0, up to 1")
        if self.confidence and self.max_tokens is not None:
            raise InputError(
                "confidence > 0 runs every patch of some images, which max_tokens forbids: set confidence=0, or no"
                " max_tokens"
            )
        object.__setattr__(self, "grid_size", grid_size and tuple(grid_size))

    def for_model(self, grid_size: Sequence[int], num_groups: int) -> Decision:
        """The same decision with one number per group, for images of this grid of patches.

        Raises:
            InputError: it has other than 1 or ``num_groups`` numbers.
        """
        numbers = self.thresholds or self.num_keep or ()
        if len(numbers) not in (1, num_groups):
            name = "num_keep" if self.num_keep else "threshold"
            raise InputError(f"{name}={list(numbers)}: give one number, or {num_groups}, one per group")
        repeats = num_groups // len(numbers)
        thresholds, num_keep = (n and n * repeats for n in (self.thresholds, self.num_keep))
        return self.but(thresholds=thresholds, num_keep=num_keep, grid_size=first_grid(self, grid_size))

    def at(self, thresholds: float | Sequence[float] | Tensor) -> Decision:
        """These thresholds in place of its own, or of its counts; the rest stays."""
        return self.but(thresholds=thresholds, num_keep=None)

    def whole(self) -> Decision:
        """Every patch in one pass, of the image as it is, without a limit: the dense model."""
        return self.but(thresholds=0.0, num_keep=None, max_tokens=None, confidence=0.0, scale=1.0)

    def but(self, **parts: Any) -> Decision:
        """The same decision with other parts."""
        return replace(self, **parts)

    def __call__(self, scores: Tensor, alive: Tensor, group: int) -> Tensor:
        """``scores (B, N)``, ``alive (B, N)`` bool -> ``keep (B, N)`` bool."""
        standing = self.standing(scores)
        if self.num_keep is not None:
            keep = top_k(standing, alive, _of(self.num_keep, group))
        else:
            assert self.thresholds is not None
            threshold = _of(self.thresholds, group)
            keep = alive if threshold <= 0 else alive & (standing > self.level(threshold))
        return keep if self.max_tokens is None else top_k(standing, keep, self.max_tokens)

    def first_drop(self, num_patches: int) -> int:
        """The first group that may drop some of ``num_patches``, 0…D − 1; D if none does."""
        numbers = self.thresholds or self.num_keep or ()
        if self.max_tokens is not None and self.max_tokens < num_patches:
            return 0
        drops = (n < num_patches if self.num_keep else n > 0 for n in numbers)
        return next((group for group, drop in enumerate(drops) if drop), len(numbers))

    def unsure(self, logits: Tensor) -> Tensor:
        """``logits (B, K) -> (B,)`` bool, the images that take a second pass; see ``confidence``."""
        margins = margin(logits)
        return torch.ones_like(margins, dtype=torch.bool) if self.confidence >= 1 else margins < self.confidence

    def standing(self, scores: Tensor) -> Tensor:
        """``(B, N)`` that orders the patches and is compared with `level`: scores, or with ``spread`` `logits`."""
        return self.logits(scores) if self.spread else scores

    def logits(self, scores: Tensor) -> Tensor:
        """``logit score − spread · logit d (B, N)``; `sample` draws with the sigmoid of them."""
        logits = scores.logit(eps=EPS)
        return logits - self.offsets(logits) if self.spread else logits

    def offsets(self, like: Tensor) -> Tensor:
        """``spread · logit d (N,)``, for scores like these ``(..., N)``.

        Raises:
            InputError: the decision has no grid, or one of another number of patches.
        """
        if math.prod(self.grid_size or ()) != like.shape[-1]:
            raise InputError(
                f"spread={self.spread:g} is laid over a grid of {self.grid_size}, not over {like.shape[-1]} patches:"
                " give a decision its grid_size, or set it in model.decision"
            )
        return (self.spread * pattern(self.grid_size or ()).logit()).to(like, non_blocking=True)

    def level(self, threshold: float) -> float:
        """What `standing` is compared with, for a threshold above 0."""
        if threshold >= 1:
            return math.inf
        return math.log(threshold / (1 - threshold)) if self.spread else threshold

    def threshold_at(self, level: float) -> float:
        """The threshold whose `level` this is: 0 and 1 for −∞ and ∞."""
        return torch.tensor(level, dtype=torch.float64).sigmoid().item() if self.spread else min(max(level, 0.0), 1.0)


def _of(numbers: tuple[Number, ...], group: int) -> Number:
    return numbers[group] if len(numbers) > 1 else numbers[0]


def _thresholds(values: Any) -> tuple[float, ...]:
    try:
        numbers = tuple(np.asarray(_plain(values), dtype=np.float64).ravel().tolist())
    except (TypeError, ValueError, OverflowError):
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


def _number(name: str, value: Any, most: float = sys.float_info.max) -> float:
    number = _plain(value)
    if not isinstance(number, (int, float)) or isinstance(number, bool) or not 0 <= number <= most:
        allowed = "a finite number, 0 or more" if most > 1 else "a number from 0 to 1"
        raise InputError(f"{name}={value}: give {allowed}")
    return float(number)


def _plain(values: Any) -> Any:
    """Numbers of Python in place of those of torch and numpy."""
    return values.tolist() if hasattr(values, "tolist") else values


def _is_count(value: Any) -> bool:
    return isinstance(value, Integral) and not isinstance(value, bool) and int(value) >= 0


def margin(logits: Tensor) -> Tensor:
    """``(B, K) -> (B,)`` float32, by how much the largest probability is above the next one; of one class, it is 1."""
    best = logits.detach().float().softmax(-1).topk(min(2, logits.shape[-1])).values
    return best[:, 0] - best[:, 1:].sum(1)


def confidence_for(logits: Tensor, number: int) -> float:
    """The ``Decision.confidence`` with which so many of some images, the least sure, take a second pass.

    Where images are equally sure, all or none of them do.

    Args:
        logits: ``(B, K)``.
        number: 0…B.
    """
    margins = margin(logits).sort().values.double()
    if number in (0, len(margins)):
        return float(number > 0)
    # 1 would be all of them
    return min(margins[number - 1 : number + 1].mean().item(), math.nextafter(1.0, 0.0))


def on_grid(decide: Decide, grid_size: tuple[int, ...]) -> Decide:
    """A decision for images of this grid, which need not be the model's own; a function that decides, as it is."""
    return decide.but(grid_size=grid_size) if isinstance(decide, Decision) else decide


def first_grid(decide: Decide | None, grid_size: Sequence[int]) -> tuple[int, ...]:
    """The grid of patches of the first pass of images of this grid: smaller by `Decision.scale`, if it has one."""
    scale = getattr(decide, "scale", 1.0)
    return tuple(grid_size) if scale == 1 else tuple(max(1, round(scale * n)) for n in grid_size)


def keep_all(scores: Tensor, alive: Tensor, group: int) -> Tensor:
    """Drop nothing."""
    return alive


def by_share(keep: Sequence[float], standing: Callable[[Tensor], Tensor] = lambda scores: scores) -> Decide:
    """Keep a share of each image's patches, the best-scored or by `Decision.standing`: one number per group, of N."""
    return lambda scores, alive, group: top_k(standing(scores), alive, round(keep[group] * alive.shape[1]))


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
