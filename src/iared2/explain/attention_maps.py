"""What the attention says: of one block (raw), or of all of them multiplied through (rollout).

The weights are computed anew from the tokens that enter a block, with the block's own layers: no hook, and it does not
matter whether timm would fuse the attention. A value belongs to a patch, wherever its row stands; a patch that is gone
has 0.
"""

from __future__ import annotations

from itertools import islice
from typing import Any

import torch
from torch import Tensor

from ..model import backbone as vit
from ..model.attention import attention_weights
from ..model.tokens import PackedTokens
from .forward import backbone_of, tokens_by_block


def raw_attention(model: Any, images: Tensor, block: int) -> Tensor:
    """What the class token attends to in one block, mean over the heads.

    Without a class token: the mean over the living patches as queries. Blocks after this one do not run.

    Args:
        model: reduced or dense, in evaluation mode.
        images: ``(B, in_chans, H, W)``, normalised.
        block: from 0.

    Returns:
        ``(B, N)`` in [0, 1], sum at most 1 (the rest goes to prefix tokens); 0 where the patch is gone.
    """
    backbone = backbone_of(model)
    packed = next(islice(tokens_by_block(model, images), block, None))
    attended = _attended(_readers(backbone, packed), backbone.blocks[block], packed)
    return packed.to_dense(attended)[:, packed.num_prefix_tokens :]


def rollout(model: Any, images: Tensor) -> Tensor:
    """Attention rollout (Abnar & Zuidema 2020, eq. 1): the product over the blocks of ½ (mean over heads + identity).

    Only what the class token (or, without one, the mean living patch) collects is followed, from the last block back to
    the first: a vector times a matrix a block, not a matrix times a matrix.

    Args:
        model: reduced or dense, in evaluation mode.
        images: ``(B, in_chans, H, W)``, normalised.

    Returns:
        ``(B, N)`` in [0, 1], sum at most 1. 0 where the patch was gone before the first block; one that left later has
        what flowed from it before.
    """
    backbone = backbone_of(model)
    *entering, last = tokens_by_block(model, images)
    share = last.to_dense(_readers(backbone, last))  # (B, S)
    for block, packed in zip(reversed(backbone.blocks), reversed(entering), strict=True):
        rows = share.flatten()[packed.token_ids]
        share = packed.to_dense((rows + _attended(rows, block, packed)) / 2)
    return share[:, last.num_prefix_tokens :]


def _readers(backbone: Any, packed: PackedTokens) -> Tensor:
    """``(T,)`` weights, sum 1 an image, of the tokens whose attention is asked for."""
    position = packed.token_ids % packed.num_tokens
    if backbone.has_class_token:
        return (position == 0).float()
    alive = packed.alive.sum(1).clamp_min(1)[packed.token_ids // packed.num_tokens]
    return (position >= packed.num_prefix_tokens) / alive


def _attended(readers: Tensor, block: Any, packed: PackedTokens) -> Tensor:
    """``(T,)`` what tokens weighted by ``readers (T,)`` attend to, mean over the heads."""
    q, k, _, _ = vit.before_attention(block, packed.x)
    runs = zip(packed.buckets(readers), attention_weights(q, k, packed), strict=True)
    return torch.cat([(run[:, None].to(w) @ w.mean(1)).flatten() for run, w in runs]).float()
