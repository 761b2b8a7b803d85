"""Random draws that are pure functions of their key: no generator state, no order of execution.

A key is an int64; hashing is splitmix64 (Steele, Lea & Flood 2014), whose 64-bit arithmetic int64 tensors do modulo
2^64. Everything is integer work until one exact conversion at the end, so that every device draws the same numbers.
"""

from __future__ import annotations

import torch
from torch import Tensor

_GOLDEN = 0x9E3779B97F4A7C15 - (1 << 64)  # as signed integers, which is what int64 tensors hold
_MIX_1 = 0xBF58476D1CE4E5B9 - (1 << 64)
_MIX_2 = 0x94D049BB133111EB - (1 << 64)
_SITE_SEED, _SITE_ORDER = -1, -2  # callers' sites are not negative


def sample_keys(seed: int, epoch: int, samples: Tensor) -> Tensor:
    """One key per image: ``samples (B,)`` int64, positions in the data set -> ``(B,)`` int64."""
    key = _hash(torch.full_like(samples, seed))
    key = _hash(key + epoch)
    return _hash(key + samples)


def uniform(keys: Tensor, site: int, n: int) -> Tensor:
    """Uniform draws, one row per image.

    Args:
        keys: ``(B,)`` int64 of ``sample_keys``.
        site: 0 or more, identifies the place of use; the same key draws different numbers at another site.
        n: draws per image. The first ones are the same for any ``n``.

    Returns:
        ``(B, n)`` float32, multiples of 2^-24 in [0, 1).
    """
    counter = torch.arange(n, device=keys.device) * _GOLDEN
    bits = _hash(_at(keys, site)[:, None] + counter)
    return _shift(bits, 40).to(torch.float32) * 2.0**-24


def permutation(seed: int, epoch: int, n: int) -> Tensor:
    """A shuffle of ``range(n)``, ``(n,)`` int64 on the CPU."""
    return _at(sample_keys(seed, epoch, torch.arange(n)), _SITE_ORDER).argsort(stable=True)


def python_seeds(keys: Tensor) -> list[int]:
    """A seed in [0, 2^32) for each of ``keys (B,)``, valid for the generators of Python, numpy and torch."""
    return _shift(_at(keys, _SITE_SEED), 32).tolist()


def _at(keys: Tensor, site: int) -> Tensor:
    return _hash(keys ^ _hash(torch.tensor(site)).item())


def _hash(x: Tensor) -> Tensor:
    x = x + _GOLDEN
    x = (x ^ _shift(x, 30)) * _MIX_1
    x = (x ^ _shift(x, 27)) * _MIX_2
    return x ^ _shift(x, 31)


def _shift(x: Tensor, bits: int) -> Tensor:
    """A logical right shift; torch's own copies the sign bit."""
    return (x >> bits) & ((1 << (64 - bits)) - 1)
