"""Random draws that are pure functions of their key: no state, so nothing to save, order or synchronise."""

from __future__ import annotations

import torch
from torch import Tensor

_M1, _M2, _M3 = -0x61C8864680B583EB, -0x40A7B892E31B1A47, -0x6B2FB644ECCEEE15  # splitmix64's constants, as int64


def _mix(x: Tensor) -> Tensor:
    x = x + _M1
    x = (x ^ ((x >> 30) & 0x3FFFFFFFF)) * _M2
    x = (x ^ ((x >> 27) & 0x1FFFFFFFFF)) * _M3
    return x ^ ((x >> 31) & 0x1FFFFFFFF)


def sample_keys(seed: int, epoch: int, samples: Tensor) -> Tensor:
    root = _mix(_mix(torch.tensor(seed, dtype=torch.int64)) + epoch).to(samples.device)
    return _mix(root ^ _mix(samples))


def uniform(keys: Tensor, site: int, n: int) -> Tensor:
    at = _mix(keys + _mix(torch.tensor(site, dtype=torch.int64)).to(keys.device))
    bits = _mix(at[:, None] + _mix(torch.arange(n, device=keys.device)))
    return ((bits >> 40) & 0xFFFFFF).float() / (1 << 24)


def python_seed(seed: int, epoch: int, sample: int) -> int:
    return int(sample_keys(seed, epoch, torch.tensor([sample]))[0]) & 0x7FFFFFFF


def permutation(seed: int, epoch: int, n: int) -> Tensor:
    return torch.randperm(n, generator=torch.Generator().manual_seed(python_seed(seed, epoch, -1)))
