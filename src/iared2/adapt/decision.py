"""Which choice of patches suits a model, and how far it can drop: found on photos without labels."""

from __future__ import annotations

import math
from bisect import bisect_left
from collections.abc import Callable, Iterator
from contextlib import suppress
from dataclasses import dataclass
from itertools import chain

import torch
from torch import Tensor

from ..errors import InputError
from ..evaluate.agreement import Agreement, agreement
from ..model.calibrate import BATCH_SIZE, gmacs_of, solve
from ..model.decide import first_grid
from ..model.reduced import ReducedVisionTransformer
from ..model.schedule import Schedule, search, tried, with_second_pass

GROUPS = 6
SEARCH_PHOTOS, TRIALS = 128, 12
PROBE = 0.8
"""Share of the MACs at which choices are compared if only ``max_drop`` is given."""
NEAR = 0.05
"""A schedule suits budgets that are so near, as a share of the MACs."""
LEAST, STEPS = 0.2, 6
"""Bisection: the share of the MACs below which nothing is tried, and its steps."""
TOLERANCE = 5e-3
"""Of a budget; with equal counts, one patch of one group may be more than that."""
FIRST_PASS = 0.9, 0.8, 0.7, 0.6
"""MACs of a first pass that are tried, as shares of those of a single pass."""
SCALES, SMALLER_PASS = (0.75, 0.625), (0.85, 0.7, 0.55)
"""First passes of smaller photos that are tried: `Decision.scale`, and shares of the MACs of all of their patches."""


@dataclass(frozen=True)
class Target:
    """What was asked for: one of the two."""

    max_drop: float | None
    macs: float | None

    def allows(self, found: Agreement) -> bool:
        """Whether so many photos may change: the upper 95 % bound of their share is below ``max_drop``."""
        return self.max_drop is None or found.bound < self.max_drop

    def better(self, one: Schedule, other: Schedule) -> bool:
        """Whether one that is allowed is better than another."""
        if self.macs is None:
            return one.macs < other.macs
        return one.divergence < other.divergence


@dataclass(frozen=True)
class Half:
    """Photos, and what the dense model says of them.

    Attributes:
        images: ``(n, in_chans, height, width)``, on the device of the model.
        dense: ``(n, K)``.
        classes: whether this is logits.
    """

    images: Tensor
    dense: Tensor
    classes: bool

    @property
    def kind(self) -> str:
        """What may change, in words."""
        return "answers" if self.classes else "nearest neighbours"

    def agreement(self, found: Schedule) -> Agreement:
        """How far a schedule that was tried on all of them agrees with the dense model."""
        return agreement(self.dense, found.output, self.classes)


@dataclass(frozen=True)
class Choice:
    """One way to choose patches.

    Attributes:
        name: in words.
        model: whose scores choose.
        equal_counts: every image keeps the same number of patches, so that a batch is not ragged; false: the scores of
            a trained policy decide how many.
    """

    name: str
    model: ReducedVisionTransformer
    equal_counts: bool = True


def choices(model: ReducedVisionTransformer, own: bool) -> Iterator[Choice]:
    """Untrained choices on the same backbone, and with ``own`` the model's own first.

    The attention of the class token with a spread, and without it the same patches of every photo, evenly; dropped
    patches are merged into kept ones or gone.
    """
    if own:
        yield Choice(f"its own policy, dropped patches {model.dropped}", model, equal_counts=False)
    for dropped, spread in (("merged", 0.5), ("merged", 2.0), ("gone", 2.0)):
        with suppress(InputError):  # attention that no interpreter can start as
            made = _untrained(model, "attention", dropped, spread)
            yield Choice(f"attention, spread {spread:g}, dropped patches {dropped}", made)
    for dropped in ("merged", "gone"):
        made = _untrained(model, "sigmoid", dropped, 1.0)
        with torch.no_grad():
            for name, parameter in made.interpreters.named_parameters():
                if ".query." in name:  # a score of 0.5 for every patch; training can start from it
                    parameter.zero_()
        yield Choice(f"evenly, dropped patches {dropped}", made)


def _untrained(
    model: ReducedVisionTransformer, interpreter: str, dropped: str, spread: float
) -> ReducedVisionTransformer:
    groups = min(GROUPS, len(model.backbone.blocks))
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        made = ReducedVisionTransformer(model.backbone, groups, interpreter=interpreter, dropped=dropped)
    made.spread = spread
    made.model_args, made.class_names, made.engine = model.model_args, model.class_names, model.engine
    made.packed_weights = model.packed_weights
    return made.eval()


def choose(model: ReducedVisionTransformer, own: bool, half: Half, target: Target) -> Choice:
    """The choice that is closest to the dense model at the budget, on a few photos.

    Raises:
        InputError: no choice meets the budget.
    """
    few, budget = slice(SEARCH_PHOTOS // 2), target.macs or PROBE
    found, failed = {}, None
    for choice in choices(model, own):
        equal, dense = choice.equal_counts, half.dense[few]
        try:
            best = search(choice.model, half.images[few], budget, trials=2, equal_counts=equal, dense=dense)
            found[choice] = best.divergence
        except InputError as error:
            failed = error
    if failed and not found:
        raise failed
    return min(found, key=lambda choice: found[choice])


def find(choice: Choice, half: Half, target: Target) -> Schedule | None:
    """The best schedule of a choice for the target; None: none keeps what was asked for at fewer MACs."""
    few, budget, best = slice(SEARCH_PHOTOS), target.macs or PROBE, None
    for _ in range(1 if target.macs else 2):  # where to drop depends on how much
        equal, dense = choice.equal_counts, half.dense[few]
        shape = search(choice.model, half.images[few], budget, trials=TRIALS, equal_counts=equal, dense=dense).shares
        found = at_shape(choice, half, target, shape)
        if found and (best is None or target.better(found, best)):
            best = found
        if found is None or abs(found.first_macs - budget) < NEAR:
            break
        budget = found.first_macs
    return best


@torch.inference_mode()
def at_shape(choice: Choice, half: Half, target: Target, shape: tuple[float, ...]) -> Schedule | None:
    """`find` where the shape of the schedule is known: its shares at another budget."""
    at = _one_pass(choice, half, shape)
    if target.macs is not None:  # without second passes, whose number depends on the photos
        return _met(at, target.macs)
    best = _bisected(at, half, target)
    if half.classes and choice.model.max_tokens is None:
        whole = best.macs if best else 1.0
        for first in chain(map(at, [part * whole for part in FIRST_PASS]), _smaller_passes(choice, half, shape)):
            found = _secured(choice.model, half, target, first)
            if found and (best is None or target.better(found, best)):
                best = found
    return best


def _one_pass(choice: Choice, half: Half, shape: tuple[float, ...]) -> Callable[[float], Schedule]:
    """A share of the dense MACs -> one pass of it, with the shape at this budget and the scale of the model."""
    model = choice.model
    sample = [model.embed(chunk) for chunk in half.images.split(BATCH_SIZE)]
    num_patches = sample[0].num_patches

    def at(macs: float) -> Schedule:
        gmacs = macs * model.dense_macs / 1e9
        alpha = solve(lambda alpha: gmacs_of(model, num_patches, [share**alpha for share in shape]), gmacs)
        return tried(model, sample, half.dense, [share**alpha for share in shape], choice.equal_counts)

    return at


def _smaller_passes(choice: Choice, half: Half, shape: tuple[float, ...]) -> Iterator[Schedule]:
    """First passes of smaller photos (`Decision.scale`), with some of their patches."""
    model = choice.model
    before = model.decision
    for scale in SCALES:
        model.decision = before.but(scale=scale)
        try:
            at, patches = _one_pass(choice, half, shape), math.prod(first_grid(model.decision, model.grid_size))
            whole = gmacs_of(model, patches, [1.0] * model.num_groups) * 1e9 / model.dense_macs
            found = [at(part * whole) for part in SMALLER_PASS]
        finally:
            model.decision = before
        yield from found


def _met(at: Callable[[float], Schedule], macs: float) -> Schedule:
    """Of these MACs."""
    found, asked = at(macs), macs
    for _ in range(3):  # images differ and cost is convex, so the mean image costs less than the mean cost
        if abs(found.macs / macs - 1) < TOLERANCE:
            break
        asked *= macs / found.macs
        found = at(asked)
    return found


def _bisected(at: Callable[[float], Schedule], half: Half, target: Target) -> Schedule | None:
    """Of the fewest MACs that the target allows; None: none is."""
    low, high, best = LEAST, 1.0, None
    for _ in range(STEPS):
        middle = (low + high) / 2
        found = at(middle)
        if found.macs < 1 and target.allows(half.agreement(found)):
            high, best = middle, found
        else:
            low = middle
    return best


def _secured(model: ReducedVisionTransformer, half: Half, target: Target, first: Schedule) -> Schedule | None:
    """A first pass with as few second passes as the target allows; None: fewer MACs than the dense model's do not."""
    if first.decision.scale == 1 and first.decision.first_drop(model.num_patches) == model.num_groups:
        return None

    def found(number: int) -> Schedule:
        return with_second_pass(model, first, half.dense, number)

    # the more, the more answers are kept
    photos = range(len(half.dense))
    number = bisect_left(photos, True, key=lambda number: target.allows(half.agreement(found(number))))
    secured = found(number)
    return secured if secured.macs < 1 and target.allows(half.agreement(secured)) else None
