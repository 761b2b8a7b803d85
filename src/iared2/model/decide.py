"""Scores -> which patches stay.

A decision is a function ``(scores, alive, group) -> keep``, all of shape ``(B, N)``. The loop in reduced.py does not
know which one it runs. Every decision here keeps a subset of ``alive``: a dropped patch never comes back.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from .. import keyed

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


def by_sampling(keys: Tensor) -> Decide:
    """Draw ``u ~ Bernoulli(score)`` for every patch: the policy while it is trained.

    Args:
        keys: ``(B,)`` int64, the images' keys (keyed.py).
    """

    def decide(scores: Tensor, alive: Tensor, group: int) -> Tensor:
        draws = keyed.uniform(keys, SITE_SAMPLE + group, scores.shape[1])
        return alive & (draws < scores)

    return decide


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
