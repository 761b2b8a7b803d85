"""Weights in 8 bits for a smaller file: one scale per output channel, symmetric, rounded to nearest.

Only the file is smaller. Loading gives float32 again, but rounded: evaluate the loaded model.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from ..errors import InputError

SCALE = ".scale"
SMALLEST = 4096
"""Tensors with fewer values (biases, norms, tokens) are stored in float16: small, and more sensitive."""


def quantized(tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    """Matrices and convolutions as int8, each with a float32 ``NAME.scale (output channels,)``; the rest as float16."""
    found = {}
    for name, tensor in tensors.items():
        if tensor.ndim < 2 or tensor.numel() < SMALLEST or not tensor.is_floating_point():
            found[name] = tensor.half() if tensor.is_floating_point() else tensor
            continue
        # positions (1, N, C) have a scale per position
        rows = tensor.float().flatten(1) if len(tensor) > 1 else tensor.float().flatten(0, -2)
        scale = rows.abs().amax(1).clamp_min(torch.finfo(torch.float32).tiny) / 127
        found[name] = (rows / scale[:, None]).round().to(torch.int8).view(tensor.shape)
        found[name + SCALE] = scale
    return found


def dequantized(tensors: dict[str, Any]) -> dict[str, Any]:
    """The inverse of `quantized`, in float32; tensors of other types are as they are.

    Raises:
        InputError: a scale does not fit its tensor.
    """
    found = dict(tensors)
    for name, values in tensors.items():
        if not isinstance(values, Tensor) or values.dtype != torch.int8 or name + SCALE not in tensors:
            continue
        scale = found.pop(name + SCALE)
        if not scale.is_floating_point() or not scale.numel() or values.numel() % scale.numel():
            raise InputError(f"the scale of {name!r:.100} does not fit its 8-bit weights")
        rows = values.reshape(scale.numel(), -1) * scale.float().flatten()[:, None]
        found[name] = rows.view(values.shape)
    return found
