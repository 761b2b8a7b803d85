"""Which tokens share a call of a graph, and where they lie in it."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

MAX_ROWS = 2048
"""Rows of one call, unless one image has more: beyond, the time per row rises in fp32 (docs/LOG.md)."""
CALL_COST = 25
"""What a call costs besides its rows, in rows."""
MAX_PADDING = 0.05
"""At most this share of the work of a call with several images is padding."""


SHORTEST = 2
"""Tokens of an image in attention, padded or repeated. A graph whose first call has one token returns wrong numbers for
eight and more from then on, in OpenVINO 2026.4 on a processor with AVX2."""


class Place:
    """Where the tokens of b images lie, end to end, from ``tokens (b, S)`` bool.

    Attributes:
        image, position: ``(T,)`` of each row, the place in the whole image.
        rank: ``(T,)`` the place among the remaining tokens of the image.
        rows, longest: T and the longest length, with padding; work and done: see `padded`.
    """

    def __init__(self, tokens: np.ndarray, prefix: int, row_cost: float) -> None:
        self.image, self.position = np.nonzero(tokens)
        lengths = tokens.sum(1)
        self.rank = np.arange(len(self.image)) - np.repeat(lengths.cumsum() - lengths, lengths)
        rows, pairs, longest = len(self.image), int((lengths**2).sum()), int(lengths.max())
        # one patch at least, padding if need be: the graphs have not been tried with none. And two tokens: see SHORTEST
        longest = max(longest, prefix + 1, SHORTEST)
        self.work = row_cost * rows + pairs
        self.rows, (self.longest, self.done) = rounded(rows), padded(rows, pairs, len(tokens), longest, row_cost)


def rounded(number: int) -> int:
    """Not below ``number``, and by at most 1/64 above: a runtime prepares kernels for each new size."""
    step = 1 << max(0, number.bit_length() - 7)
    return -(-number // step) * step


def padded(rows: int, pairs: int, number: int, longest: int, row_cost: float) -> tuple[int, float]:
    """The length to which ``number`` images are padded in attention, and the work with padding, in pairs of tokens.

    A multiple of 16 is faster than a length that is 5 % shorter (docs/LOG.md). Where it would be too much padding, as
    with few channels, the length is `rounded`.
    """
    long, done = 0, 0.0
    for long in (-(-longest // 16) * 16, rounded(longest)):
        done = row_cost * rounded(rows) + number * long**2
        if row_cost * rows + pairs >= (1 - MAX_PADDING) * done:
            break
    return long, done


def split(lengths: Sequence[int], row_cost: float) -> list[int]:
    """Bounds of the calls, from 0 to B, that take the least time on images of these ascending lengths.

    Args:
        lengths: tokens of each image, ascending.
        row_cost: MACs of the linear layers per row over those of attention per pair of rows.
    """
    best, start_of = [0.0], [0]
    for end in range(1, len(lengths) + 1):
        rows, pairs, options = 0, 0, []
        for start in range(end - 1, -1, -1):
            rows, pairs = rows + lengths[start], pairs + lengths[start] ** 2
            several = start < end - 1
            if several and rows > MAX_ROWS:
                break
            _, done = padded(rows, pairs, end - start, lengths[end - 1], row_cost)
            if not several or row_cost * rows + pairs >= (1 - MAX_PADDING) * done:
                options.append((best[start] + done + CALL_COST * row_cost, start))
        cost, start = min(options)
        best.append(cost)
        start_of.append(start)
    bounds = [len(lengths)]
    while bounds[-1]:
        bounds.append(start_of[bounds[-1]])
    return bounds[::-1]


def top_k(scores: np.ndarray, alive: np.ndarray, num_keep: int) -> np.ndarray:
    """``(B, N)`` bool: the best-scored living patches of each image; ties fall to the lower position."""
    ranked = np.where(alive, -scores, np.inf).argsort(1, kind="stable")
    rank = np.empty_like(ranked)
    np.put_along_axis(rank, ranked, np.arange(scores.shape[1])[None], 1)
    return alive & (rank < num_keep)
