"""Attention maps: of one block (raw), or the product over all blocks (rollout).

The weights are recomputed from the tokens that enter a block, with the block's own layers, without a hook and whether
or not timm fuses the attention. A value belongs to a patch, whatever its row; a dropped patch has 0.
"""

from __future__ import annotations

from itertools import islice
from typing import Any

import torch
from torch import Tensor

from ..model import backbone as vit
from ..model.attention import attention_weights
from ..model.block import before_attention
from ..model.tokens import PackedTokens
from .forward import backbone_of, tokens_by_block


def raw_attention(model: Any, images: Tensor, block: int) -> Tensor:
    """Attention of the class token in one block, mean over the heads.

    Without a class token: the mean over the patches alive as queries. Blocks after this one do not run.

    Args:
        model: reduced or dense, in evaluation mode.
        images: ``(B, in_chans, H, W)``, normalised.
        block: from 0.

    Returns:
        ``(B, N)`` in [0, 1], sum at most 1 (the rest goes to prefix tokens); 0 where the patch was dropped.
    """
    backbone = backbone_of(model)
    packed = next(islice(tokens_by_block(model, images), block, None))
    attended = _attended(_readers(backbone, packed), backbone, block, packed)
    return packed.to_dense(attended)[:, packed.num_prefix_tokens :]


def rollout(model: Any, images: Tensor) -> Tensor:
    """Attention rollout (Abnar & Zuidema 2020, eq. 1): the product over the blocks of ½ (mean over heads + identity).

    Only the row of the class token (or, without one, the mean over the patches alive) is computed, from the last block
    back to the first: one vector-matrix product per block instead of a matrix product.

    Args:
        model: reduced or dense, in evaluation mode.
        images: ``(B, in_chans, H, W)``, normalised.

    Returns:
        ``(B, N)`` in [0, 1], sum at most 1. 0 where the patch was dropped before the first block; a patch dropped later
        has its contribution up to then.
    """
    backbone = backbone_of(model)
    *entering, last = tokens_by_block(model, images)
    share = last.to_dense(_readers(backbone, last))  # (B, S)
    for block, packed in reversed([*enumerate(entering)]):
        rows = share.flatten()[packed.token_ids]
        share = packed.to_dense((rows + _attended(rows, backbone, block, packed)) / 2)
    return share[:, last.num_prefix_tokens :]


def _readers(backbone: Any, packed: PackedTokens) -> Tensor:
    """``(T,)`` weights of the tokens whose attention is requested; they sum to 1 per image."""
    position = packed.positions
    if vit.has_class_token(backbone):
        return (position == 0).float()
    alive = packed.alive.sum(1).clamp_min(1)[packed.token_ids // packed.num_tokens]
    return (position >= packed.num_prefix_tokens) / alive


def _attended(readers: Tensor, backbone: Any, block: int, packed: PackedTokens) -> Tensor:
    """``(T,)`` attention of the tokens weighted by ``readers (T,)``, mean over the heads."""
    q, k, _, _ = before_attention(backbone.blocks[block], packed.x, packed.rotary_rows(block))
    runs = zip(packed.buckets(readers), attention_weights(q, k, packed), strict=True)
    return torch.cat([(run[:, None].to(w) @ w.mean(1)).flatten() for run, w in runs]).float()
