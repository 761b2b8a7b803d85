"""MACs (multiply-accumulate operations) per image, from the numbers of patches alive.

Counted: every matrix product (linear layers, patch embedding, the two products of attention, the interpreters). Not
counted: biases, norms, activations, softmax, as is usual in this field. ``torch.utils.flop_counter`` counts the same
operations, with two FLOPs per MAC; a test compares the two.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import TYPE_CHECKING, Any

import torch
from timm.layers import AttentionPoolLatent
from timm.models.vision_transformer import VisionTransformer
from torch import Tensor, nn

from .block import attentions, head_dim
from .text import TextClassifier

if TYPE_CHECKING:
    from .reduced import ReducedVisionTransformer


def linear_macs(module: nn.Module) -> int:
    """MACs per token of all linear layers in ``module``, and per patch of convolutions, including adapters."""
    layers = (m for m in module.modules() if isinstance(m, (nn.Linear, nn.Conv2d, nn.Conv3d)))
    return sum(layer.weight.numel() for layer in layers)


def embed_macs(backbone: VisionTransformer, num_patches: int) -> int:
    """MACs of the patch embedding for ``num_patches`` patches."""
    return num_patches * linear_macs(backbone.patch_embed.proj)


def blocks_macs(blocks: Iterable[Any], num_tokens: Tensor) -> Tensor:
    """MACs of some transformer blocks for each of ``num_tokens`` (integers of any shape), including prefix tokens."""
    n = num_tokens.to(torch.int64)
    macs = torch.zeros_like(n)
    for block in blocks:
        width = sum(attn.num_heads * head_dim(attn) for attn in attentions(block))
        macs += n * linear_macs(block) + 2 * n * n * width
    return macs


def interpreter_macs(interpreter: Any, num_patches: Tensor) -> Tensor:
    """MACs of the interpreter: query, ``Wᵀ q`` and ``b·q``, then H·C per patch; 0 for the scores of a baseline."""
    if not hasattr(interpreter, "query"):
        return torch.zeros_like(num_patches, dtype=torch.int64)
    width = interpreter.query.in_features
    return 2 * width * width + width + num_patches.to(torch.int64) * interpreter.num_heads * width


def merge_macs(width: int, num_patches: Tensor, num_kept: Tensor) -> Tensor:
    """MACs of the cosines between all patches in merge.py, for images that drop a patch, each counted separately."""
    n = num_patches.to(torch.int64)
    return torch.where(num_kept < n, n * n * width, 0)


def head_macs(backbone: VisionTransformer, num_tokens: Tensor) -> Tensor:
    """MACs of pooling and classifier for each of ``num_tokens`` final tokens, including prefix tokens."""
    n = num_tokens.to(torch.int64)
    macs = torch.full_like(n, linear_macs(backbone.head) + linear_macs(getattr(backbone, "head_dist", nn.Identity())))
    if isinstance(backbone.head, TextClassifier):
        macs += backbone.head.text_features.numel()
    pool = backbone.attn_pool
    if pool is None:
        return macs
    # Eva has no such switch: its pooling reads all tokens
    keys = n if getattr(backbone, "pool_include_prefix", True) else n - backbone.num_prefix_tokens
    if isinstance(pool, AttentionPoolLatent):
        queries, per_key = pool.latent_len, linear_macs(pool.kv)
        macs += queries * (linear_macs(pool) - per_key) + keys * per_key
        return macs + 2 * queries * keys * pool.num_heads * pool.head_dim
    return macs + 2 * keys * keys * backbone.embed_dim  # AttentionPoolPrr: attention without weights


def dense_macs(backbone: Any, num_patches: int) -> int:
    """MACs per image of ``num_patches`` patches of the timm backbone alone."""
    tokens = torch.tensor(num_patches + backbone.num_prefix_tokens)
    return int(blocks_macs(backbone.blocks, tokens) + head_macs(backbone, tokens)) + embed_macs(backbone, num_patches)


def second_pass_macs(model: ReducedVisionTransformer, first: int, num_patches: int) -> int:
    """MACs per image of a second pass (second_pass.py): the groups from ``first`` on with every patch, and the head."""
    tokens = torch.tensor(num_patches + model.backbone.num_prefix_tokens)
    blocks = [model.backbone.blocks[i] for group in model.groups[first:] for i in group]
    return int(blocks_macs(blocks, tokens) + head_macs(model.backbone, tokens))


def reduced_macs(model: ReducedVisionTransformer, num_kept: Tensor, num_patches: int) -> Tensor:
    """``(B,)`` int64, each image counted separately; see `ReducedVisionTransformer.count_macs`."""
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
