"""attend(): attention within each image of a packed batch, one backend per device.

CUDA in half precision runs one variable-length kernel over the whole batch. Everything else runs on views, once per
bucket of images of equal length (see tokens.py): ``scaled_dot_product_attention``, or two plain matrix products for
inference in bfloat16 on a CPU.
``attention_weights`` is the plain implementation, which returns the weights.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from inspect import signature
from itertools import repeat
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from .tokens import PackedTokens

EXTRA = 8
"""Channels that `with_bias_channel` adds to each head: the kernel needs a multiple of this number."""
FLASH_ONLY = True
"""Keep ragged batches from cuDNN, to which newer versions of torch send images of more than 128 tokens on Hopper GPUs.
cuDNN plans anew for every shape, and no two ragged batches have the same (pytorch#187770). In torch 2.14,
``num_splits=1`` would keep the forward pass alone, and cuDNN would get the backward pass of flash attention."""
Attend = Callable[[Tensor, Tensor, Tensor, PackedTokens, float], Tensor]


def attend(q: Tensor, k: Tensor, v: Tensor, packed: PackedTokens, dropout: float = 0.0) -> Tensor:
    """Softmax attention of every token to the tokens of its own image; the mean of m patches counts m times.

    Args:
        q, k, v: ``(T, H, head_dim)`` in the row order of ``packed``.
        packed: the layout of the rows.
        dropout: probability of dropping an attention weight, 0 outside training.

    Returns:
        ``(T, H, head_dim)``. Differentiable.
    """
    q, k = q.to(v.dtype), k.to(v.dtype)  # under autocast, query-key norm gives float32
    ragged = packed.lengths[0] != packed.lengths[-1]
    if ragged and dropout == 0 and _has_varlen_kernel(v, 0 if packed.sizes is None else EXTRA):
        return _attend_varlen(q, k, v, packed)
    out = []
    for *bucket, bias in zip(
        packed.buckets(q), packed.buckets(k), packed.buckets(v), key_biases(packed, v.dtype), strict=True
    ):
        q_rows, k_rows, v_rows = (rows.transpose(1, 2) for rows in bucket)  # (images, H, length, head_dim)
        if dropout == 0 and plain_is_faster(v_rows):
            logits = q_rows * q.shape[-1] ** -0.5 @ k_rows.transpose(2, 3)
            y = (logits if bias is None else logits.add_(bias)).softmax(-1) @ v_rows
        else:
            y = F.scaled_dot_product_attention(q_rows, k_rows, v_rows, attn_mask=bias, dropout_p=dropout)
        out.append(y.transpose(1, 2).flatten(0, 1))
    return out[0] if len(out) == 1 else torch.cat(out)


def key_biases(packed: PackedTokens, dtype: torch.dtype) -> Iterator[Tensor | None]:
    """The bias of the logits, the same for all queries: ``(images, 1, 1, length)``, or None, per bucket."""
    if packed.log_sizes is None:
        yield from repeat(None, len(packed.bucket_sizes))
    else:
        yield from (rows[:, None, None] for rows in packed.buckets(packed.log_sizes.to(dtype)))


def plain_is_faster(v: Tensor) -> bool:
    """Inference in bfloat16 on a CPU, for images of up to 512 tokens ``v (images, H, length, head_dim)``.

    There, torch's fused kernel takes twice as long as two plain matrix products (docs/speed.md); beyond, as long.
    """
    half = v.device.type == "cpu" and v.dtype == torch.bfloat16
    return half and v.shape[2] <= 512 and not torch.is_grad_enabled()


def attention_weights(q: Tensor, k: Tensor, packed: PackedTokens) -> Iterator[Tensor]:
    """The attention weights of ``attend``, in float32 (float64 for float64): one tensor per bucket.

    Args:
        q, k: ``(T, H, head_dim)`` in the row order of ``packed``.
        packed: the layout of the rows.

    Yields:
        ``(images, H, length, length)``, query × key; every row sums to 1.
    """
    dtype = torch.promote_types(q.dtype, torch.float32)
    for *bucket, bias in zip(packed.buckets(q), packed.buckets(k), key_biases(packed, dtype), strict=True):
        q_rows, k_rows = (rows.transpose(1, 2).to(dtype) for rows in bucket)
        logits = q_rows @ k_rows.mT * q.shape[-1] ** -0.5
        yield (logits if bias is None else logits + bias).softmax(-1)


def _has_varlen_kernel(v: Tensor, extra: int) -> bool:
    """Half precision, a head width that the kernel supports with the extra channels, and an Ampere or newer GPU."""
    half = v.is_cuda and v.dtype in (torch.float16, torch.bfloat16)
    return (
        half
        and v.shape[-1] % 8 == 0
        and v.shape[-1] + extra <= 256
        and torch.cuda.get_device_capability(v.device) >= (8, 0)
    )


def _attend_varlen(q: Tensor, k: Tensor, v: Tensor, packed: PackedTokens) -> Tensor:
    from torch.nn.attention.varlen import varlen_attn

    cu_seqlens, max_seqlen, width = packed.cu_seqlens, packed.max_seqlen, v.shape[-1]
    options: Any = {}
    # no window, to flash attention, since it is as wide as an image; cuDNN takes none, neither forward nor backward
    if FLASH_ONLY and "window_size" in signature(varlen_attn).parameters:  # torch 2.10 has flash attention alone
        options["window_size"] = (packed.num_tokens, packed.num_tokens)
    if packed.log_sizes is not None:
        q, k, v = with_bias_channel(q, k, v, packed.log_sizes)
    out = varlen_attn(q, k, v, cu_seqlens, cu_seqlens, max_seqlen, max_seqlen, **options)
    assert isinstance(out, Tensor)  # a pair only if return_aux asks for one
    return out[..., :width]


def with_bias_channel(q: Tensor, k: Tensor, v: Tensor, bias: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """``(T, H, head_dim + EXTRA)`` each: lets a kernel without a bias argument add ``bias (T,)`` of the keys.

    Logits are ``q · k / sqrt(head_dim)`` with the original width, though the kernel divides by the root of the new one.
    """
    width = q.shape[-1]
    scale = ((width + EXTRA) / width) ** 0.5
    q, k, v = F.pad(q * scale, (0, EXTRA)), F.pad(k, (0, EXTRA)), F.pad(v, (0, EXTRA))
    q[..., width], k[..., width] = (width + EXTRA) ** 0.5, bias[:, None].to(k.dtype)
    return q, k, v
