"""Tests of a GPU. ``IARED2_TEST_DEVICE=cpu`` runs on a CPU those that are not about CUDA itself."""

from __future__ import annotations

import os
from collections.abc import Iterator

import pytest
import torch


@pytest.fixture(scope="session")
def device() -> torch.device:
    name = os.environ.get("IARED2_TEST_DEVICE", "cuda")
    if name.startswith("cuda") and not torch.cuda.is_available():
        pytest.skip("needs CUDA")
    return torch.device(name)


@pytest.fixture
def cuda(device: torch.device) -> torch.device:
    if device.type != "cuda":
        pytest.skip("is about CUDA itself")
    return device


@pytest.fixture(autouse=True)
def float32_is_float32() -> Iterator[None]:
    """By default, cuDNN computes the patch embedding with 10 bits of mantissa."""
    conv = torch.backends.cudnn.conv
    before, conv.fp32_precision = conv.fp32_precision, "ieee"
    yield
    conv.fp32_precision = before
