"""Scores -> which patches stay.

A decision is a function ``(scores, alive, group) -> keep``, all of shape ``(B, N)``. The loop in reduced.py does not
know which one it runs. Every decision here keeps a subset of ``alive``: a dropped patch never comes back.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from numbers import Integral

import torch
from torch import Tensor

from .. import keyed
from ..errors import InputError

Decide = Callable[[Tensor, Tensor, int], Tensor]

SITE_SAMPLE = 1 << 20  # sites of keyed draws; block indices (stochastic depth) lie below
SITE_RANDOM = 2 << 20


def keep_all(scores: Tensor, alive: Tensor, group: int) -> Tensor:
    """Drop nothing."""
    return alive


def by_threshold(threshold: float | Sequence[float]) -> Decide:
    """Keep the patches whose score is above the threshold: the decision that is deployed.

    Args:
        threshold: one number, or one for each group. ``t <= 0`` keeps every patch and ``t >= 1`` none, by definition: a
            sigmoid can round to exactly 0 or 1.
    """

    def decide(scores: Tensor, alive: Tensor, group: int) -> Tensor:
        t = threshold if isinstance(threshold, (int, float)) else threshold[group]
        if t <= 0:
            return alive
        return alive & (scores > t) if t < 1 else torch.zeros_like(alive)

    return decide


def at_most(max_tokens: int | None, decide: Decide) -> Decide:
    """``decide``, but of what it keeps of an image only the ``max_tokens`` best-scored patches; None for all of it.

    Raises:
        InputError: ``max_tokens`` is not a whole number, or below 0.
    """
    if max_tokens is None:
        return decide
    if not isinstance(max_tokens, Integral) or isinstance(max_tokens, bool) or max_tokens < 0:
        raise InputError(f"max_tokens={max_tokens}: give a number of patches, 0 or more, or None for no limit")

    def capped(scores: Tensor, alive: Tensor, group: int) -> Tensor:
        keep = decide(scores, alive, group)
        return top_k(scores, keep, keep.new_full((len(keep),), min(max_tokens, keep.shape[1]), dtype=torch.int64))

    return capped


def by_share(keep: Sequence[float]) -> Decide:
    """Keep the best-scored share of each image's patches: one number a group, of all N patches."""
    return lambda scores, alive, group: by_count([round(k * alive.shape[1]) for k in keep])(scores, alive, group)


def by_count(num_keep: Sequence[int]) -> Decide:
    """Keep as many patches of every image, its best-scored living ones: one number a group.

    Raises:
        InputError: they are not whole numbers from 0 on, or, when it decides, fewer than there are groups.
    """
    if not all(isinstance(n, Integral) and not isinstance(n, bool) and n >= 0 for n in num_keep):
        raise InputError(f"num_keep={num_keep}: give a number of patches, 0 or more, for each group")

    def decide(scores: Tensor, alive: Tensor, group: int) -> Tensor:
        if group >= len(num_keep):
            raise InputError(f"num_keep={num_keep}: give as many numbers as the model has groups")
        return top_k(scores, alive, torch.full((1,), int(num_keep[group]), device=alive.device))

    return decide


def by_sampling(keys: Tensor) -> Decide:
    """Draw ``u ~ Bernoulli(score)`` for every patch: the policy while it is trained.

    Args:
        keys: ``(B,)`` int64, the images' keys (keyed.py).
    """
    return lambda scores, alive, group: sample(scores, alive, keys, group)


def sample(probability: Tensor, alive: Tensor, keys: Tensor, group: int, samples: int = 1) -> Tensor:
    """Draw which living patches stay, k times: ``(B, N)`` -> ``(k·B, N)``; row ``j·B + b`` is draw j of image b."""
    images, patches = probability.shape
    draws = keyed.uniform(keys, SITE_SAMPLE + group, samples * patches).view(images, samples, patches)
    return (alive[:, None] & (draws < probability[:, None])).transpose(0, 1).flatten(0, 1)


def at_random(num_keep: Tensor, keys: Tensor) -> Decide:
    """Keep given numbers of patches, drawn uniformly among the living: the paper's random baseline.

    Args:
        num_keep: ``(D, B)`` integers, patches of each image that leave each group.
        keys: ``(B,)`` int64, the images' keys.
    """

    def decide(scores: Tensor, alive: Tensor, group: int) -> Tensor:
        draws = keyed.uniform(keys, SITE_RANDOM + group, scores.shape[1])
        return top_k(draws, alive, num_keep[group])

    return decide


def top_k(scores: Tensor, alive: Tensor, num_keep: Tensor) -> Tensor:
    """Keep the ``num_keep (B,)`` best-scored living patches of each image; ties fall to the lower position."""
    ranked = scores.masked_fill(~alive, -torch.inf).argsort(dim=1, descending=True, stable=True)
    rank = torch.empty_like(ranked).scatter_(
        1, ranked, torch.arange(scores.shape[1], device=ranked.device).expand_as(ranked)
    )
    return alive & (rank < num_keep[:, None])
