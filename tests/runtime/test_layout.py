"""Where tokens lie in a call: padding, sizes, ties, merging."""

from __future__ import annotations

from itertools import pairwise

import numpy as np
import pytest
import torch

from iared2.model.merge import merge as model_merge
from iared2.model.tokens import PackedTokens
from iared2.runtime.layout import MAX_PADDING, MAX_ROWS, padded, rounded, split, top_k
from iared2.runtime.merge import merge

# torch 2.10, of itself
pytestmark = [
    pytest.mark.filterwarnings("ignore:.isinstance.treespec, LeafSpec:FutureWarning"),
    pytest.mark.filterwarnings("ignore:The given buffer is not writable"),
]


def test_padding_is_bounded_and_calls_are_few():
    generator = np.random.default_rng(0)
    for width in (48, 384):
        row_cost = 6 * width
        for batch in (1, 8, 32, 200):
            lengths = np.sort(generator.normal(70, 24, batch).clip(1, 197).astype(int)).tolist()
            bounds = split(lengths, row_cost)
            assert bounds[0] == 0
            assert bounds[-1] == batch
            for start, end in pairwise(bounds):
                own = lengths[start:end]
                work = row_cost * sum(own) + sum(n**2 for n in own)
                longest, done = padded(sum(own), sum(n**2 for n in own), len(own), own[-1], row_cost)
                assert longest >= own[-1]
                assert done == row_cost * rounded(sum(own)) + len(own) * longest**2
                assert start < end
                assert work >= (1 - MAX_PADDING) * done
                assert sum(own) <= MAX_ROWS
            if width == 384:
                assert len(bounds) - 1 <= 2 + batch // 12
    assert split([5000, 6000], 2304) == [0, 1, 2], "one image may have more rows than a call should"


def test_sizes_are_few():
    assert [rounded(n) for n in (1, 63, 127, 128, 129, 1000, 1024)] == [1, 63, 127, 128, 130, 1000, 1024]
    assert len({rounded(n) for n in range(1, 2049)}) < 400
    assert all(n <= rounded(n) <= n * 65 / 64 for n in range(1, 5000))


def test_ties_fall_to_the_lower_position():
    scores = np.array([[0.5, 0.9, 0.5, 0.5]], np.float32)
    assert top_k(scores, np.array([[True, False, True, True]]), 2).tolist() == [[True, False, True, False]]


def test_merging_equals_the_models():
    """Means of means, a patch that nobody joins, and an image that keeps none of its patches."""
    generator = torch.Generator().manual_seed(0)
    dense, prefix = torch.randn(5, 2 + 24, 16, generator=generator), 2
    packed = PackedTokens.from_dense(dense, prefix)
    x, row_of = dense.flatten(0, 1).numpy().copy(), np.arange(5 * 26).reshape(5, 26)
    sizes, alive = np.ones((5, 26), np.float32), np.ones((5, 24), bool)
    for share in (0.7, 0.5, 0.4):
        keep = alive & (torch.rand(5, 24, generator=generator) < share).numpy()
        keep[1], keep[2] = alive[1], alive[2] & (share == 0.7)
        packed = model_merge(packed, torch.from_numpy(keep))
        merge(x, row_of, sizes, alive, keep, prefix)
        alive = keep
        here = np.concatenate([np.ones((5, prefix), bool), alive], 1)
        np.testing.assert_allclose(x.reshape(5, 26, 16)[here], packed.to_dense(packed.x).numpy()[here], atol=1e-6)
        assert np.array_equal(sizes[here], packed.to_dense(packed.sizes).numpy()[here])
    assert sizes[here].max() > 3
    assert (here[:, prefix:] * sizes[:, prefix:]).sum(1).tolist() == [24, 24, 0, 24, 24]
