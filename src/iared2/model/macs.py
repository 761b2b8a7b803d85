"""Multiply-adds of an image, counted from the numbers of patches that were alive.

What is counted: every matrix product (linear layers, patch embedding, attention's two products, the interpreters). Not
counted: biases, norms, activations, softmax, as is usual in this field. ``torch.utils.flop_counter`` counts the same
operations, two FLOPs a multiply-add; a test holds the two equal.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import torch
from timm.layers import AttentionPoolLatent
from timm.models.vision_transformer import VisionTransformer
from torch import Tensor, nn


def linear_macs(module: nn.Module) -> int:
    """Multiply-adds of one token through all linear layers of ``module``."""
    return sum(m.weight.numel() for m in module.modules() if isinstance(m, nn.Linear))


def embed_macs(backbone: VisionTransformer, num_patches: int) -> int:
    """Multiply-adds of the patch embedding of one image of ``num_patches`` patches."""
    return num_patches * backbone.patch_embed.proj.weight.numel()


def blocks_macs(blocks: Iterable[Any], num_tokens: Tensor) -> Tensor:
    """Multiply-adds of some transformer blocks for each of ``num_tokens`` (integers of any shape), prefix included."""
    n = num_tokens.to(torch.int64)
    macs = torch.zeros_like(n)
    for block in blocks:
        macs += n * linear_macs(block) + 2 * n * n * block.attn.num_heads * block.attn.head_dim
    return macs


def interpreter_macs(interpreter: Any, num_patches: Tensor) -> Tensor:
    """Multiply-adds of the cheap interpreter: query, ``Wᵀ q`` and ``b·q``, then H·C a patch; a rival's do not count."""
    if not hasattr(interpreter, "query"):
        return torch.zeros_like(num_patches, dtype=torch.int64)
    width = interpreter.query.in_features
    return 2 * width * width + width + num_patches.to(torch.int64) * interpreter.num_heads * width


def merge_macs(width: int, num_patches: Tensor, num_kept: Tensor) -> Tensor:
    """Multiply-adds of merge.py's cosines, each patch with each, where any patch goes, as if the image were alone."""
    n = num_patches.to(torch.int64)
    return torch.where(num_kept < n, n * n * width, 0)


def head_macs(backbone: VisionTransformer, num_tokens: Tensor) -> Tensor:
    """Multiply-adds of pooling and classifier for each of ``num_tokens`` final tokens, prefix included."""
    n = num_tokens.to(torch.int64)
    macs = torch.full_like(n, linear_macs(backbone.head) + linear_macs(getattr(backbone, "head_dist", nn.Identity())))
    pool = backbone.attn_pool
    if pool is None:
        return macs
    keys = n if backbone.pool_include_prefix else n - backbone.num_prefix_tokens
    if isinstance(pool, AttentionPoolLatent):
        queries = pool.latent_len
        per_latent = linear_macs(pool) - pool.kv.weight.numel()
        return macs + queries * per_latent + keys * pool.kv.weight.numel() + 2 * queries * keys * pool.q.out_features
    return macs + 2 * keys * keys * backbone.embed_dim  # AttentionPoolPrr: attention without weights


def dense_macs(backbone: Any) -> int:
    """Multiply-adds of an image through the timm backbone alone."""
    num_patches = backbone.patch_embed.num_patches
    tokens = torch.tensor(num_patches + backbone.num_prefix_tokens)
    return int(blocks_macs(backbone.blocks, tokens) + head_macs(backbone, tokens)) + embed_macs(backbone, num_patches)


def reduced_macs(model: Any, num_kept: Tensor, num_patches: int) -> Tensor:
    """``(B,)`` int64, as if each image were alone; see `ReducedVisionTransformer.count_macs`."""
    backbone = model.backbone
    tokens = num_kept + backbone.num_prefix_tokens
    total = head_macs(backbone, tokens[-1]) + embed_macs(backbone, num_patches)
    patches = torch.full_like(num_kept[0], num_patches)
    for group, interpreter in enumerate(model.interpreters):
        total += interpreter_macs(interpreter, patches)
        if model.dropped == "merged":
            total += merge_macs(backbone.embed_dim, patches, num_kept[group])
        total += blocks_macs([backbone.blocks[i] for i in model.groups[group]], tokens[group])
        patches = num_kept[group]
    return total
