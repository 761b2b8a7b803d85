"""Keyed draws are functions of their key alone, and look random."""

from __future__ import annotations

import pytest
import torch
from scipy import stats

from iared2.keyed import permutation, python_seeds, sample_keys, uniform

SAMPLES = torch.arange(6)


def splitmix64(state: int) -> int:
    """The published algorithm in Python's own integers."""
    mask = (1 << 64) - 1
    z = (state + 0x9E3779B97F4A7C15) & mask
    z = ((z ^ (z >> 30)) * 0xBF58476D1CE4E5B9) & mask
    z = ((z ^ (z >> 27)) * 0x94D049BB133111EB) & mask
    return z ^ (z >> 31)


def test_keys_are_splitmix64():
    """Pinned to the algorithm: int64 overflow and logical shifts come out as they do in 64 unsigned bits."""
    assert splitmix64(0) == 0xE220A8397B1DCDAF  # the reference implementation's first output for seed 0
    state = splitmix64(splitmix64(7) + 3)
    assert [key % (1 << 64) for key in sample_keys(7, 3, SAMPLES).tolist()] == [splitmix64(state + i) for i in range(6)]


def test_rows_follow_their_image():
    draws = uniform(sample_keys(0, 0, SAMPLES), 5, 9)
    order = torch.tensor([3, 0, 5])
    assert torch.equal(uniform(sample_keys(0, 0, SAMPLES[order]), 5, 9), draws[order])
    assert torch.equal(uniform(sample_keys(0, 0, SAMPLES), 5, 4), draws[:, :4])


@pytest.mark.parametrize(("seed", "epoch", "site"), [(1, 0, 0), (0, 1, 0), (0, 0, 1), (0, 0, 1 << 20)])
def test_every_part_of_the_key_matters(seed: int, epoch: int, site: int):
    draws = uniform(sample_keys(0, 0, SAMPLES), 0, 9)
    assert not (uniform(sample_keys(seed, epoch, SAMPLES), site, 9) == draws).any()
    assert draws.unique().numel() == draws.numel()  # images and positions, too


def test_draws_are_uniform():
    draws = uniform(sample_keys(0, 0, torch.arange(1000)), 0, 100).double()
    assert draws.min() >= 0
    assert draws.max() < 1
    n = draws.numel()
    assert abs(draws.mean() - 1 / 2) < 4 * (1 / 12 / n) ** 0.5
    assert abs(draws.var() - 1 / 12) < 4 * (1 / 180 / n) ** 0.5
    assert stats.kstest(draws.flatten().numpy(), "uniform").pvalue > 1e-3


def test_neighbours_are_not_correlated():
    keys = sample_keys(0, 0, torch.arange(1001))
    draws, elsewhere = uniform(keys, 0, 101), uniform(keys, 1, 101)
    later = uniform(sample_keys(0, 1, torch.arange(1001)), 0, 101)
    seeds = torch.tensor(python_seeds(keys)).double()
    pairs = {
        "samples": (draws[:-1], draws[1:]),
        "positions": (draws[:, :-1], draws[:, 1:]),
        "sites": (draws, elsewhere),
        "epochs": (draws, later),
        "augmentation": (seeds, draws[:, 0]),
    }
    for name, (a, b) in pairs.items():
        r = torch.corrcoef(torch.stack([a.flatten(), b.flatten()]).double())[0, 1]
        assert abs(r) < 4 / a.numel() ** 0.5, name


def test_low_bits_are_random_too():
    bits = (uniform(sample_keys(0, 0, torch.arange(1000)), 0, 100) * (1 << 24)).long()
    for bit in range(24):
        share = (bits >> bit & 1).double().mean()
        assert abs(share - 0.5) < 4 * 0.5 / bits.numel() ** 0.5, bit


def test_permutation():
    order = permutation(0, 0, 1000)
    assert torch.equal(order.sort().values, torch.arange(1000))
    assert torch.equal(order, permutation(0, 0, 1000))
    for other in (permutation(1, 0, 1000), permutation(0, 1, 1000), torch.arange(1000)):
        assert (order == other).float().mean() < 0.01
    # images at the front of the order do not draw small numbers
    first = uniform(sample_keys(0, 0, order[:100]), 0, 100)
    assert abs(first.mean() - 0.5) < 4 * (1 / 12 / first.numel()) ** 0.5


def test_python_seeds_fit_every_generator():
    seeds = python_seeds(sample_keys(0, 0, torch.arange(10000)))
    assert min(seeds) >= 0
    assert max(seeds) < 1 << 32
    assert max(seeds) > 1 << 31
    assert len(set(seeds)) > 9990
    assert python_seeds(sample_keys(0, 0, torch.tensor([17]))) == [seeds[17]]


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
def test_every_device_draws_the_same():
    keys = sample_keys(0, 0, torch.arange(100))
    on_gpu = uniform(sample_keys(0, 0, torch.arange(100, device="cuda")), 3, 50)
    assert torch.equal(on_gpu.cpu(), uniform(keys, 3, 50))
