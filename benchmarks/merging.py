"""Bipartite token merging similar to ToMe (Bolya et al., ICLR 2023), implemented from the paper for comparison.

In every block, between attention and MLP, tokens are split into two sets. Each token of the first set proposes a merge
with the most similar token of the second, by the cosine of their keys (mean over heads). The ``r`` best proposals are
merged as means weighted by the number of patches per token. Attention adds the log of that size to its logits. The
class token never proposes. The linear layers are the fast ones of our own blocks.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from timm.layers import Mlp
from timm.models.vision_transformer import Block
from torch import Tensor, nn

from iared2.errors import InputError
from iared2.model import backbone as vit
from iared2.model import onednn
from iared2.model.attention import plain_is_faster


def merging(model: Any, images: Tensor, r: int) -> Tensor:
    """``(B, K)`` logits of ``model.backbone`` with ``r`` tokens merged in every block.

    Raises:
        InputError: not a plain ViT with a class token, for which this is written.
    """
    backbone = model.backbone
    block = backbone.blocks[0]
    plain = type(block) is Block and vit.has_class_token(backbone) and backbone.num_prefix_tokens == 1
    plain = plain and type(block.mlp) is Mlp
    if not plain or type(block.attn.q_norm) is not nn.Identity or getattr(block.attn, "gate", None) is not None:
        raise InputError("token merging is written for plain vision transformers with a class token alone")
    row = torch.empty(1, backbone.embed_dim, dtype=images.dtype)
    at_once = max(1, onednn.rows_at_once(block, row) // (backbone.patch_embed.num_patches + 1))
    pieces = images.split(at_once if images.device.type == "cpu" else len(images))  # in pieces, as ours
    return torch.cat([_merging(model, piece, r) for piece in pieces])


def _merging(model: Any, images: Tensor, r: int) -> Tensor:
    backbone, weights = model.backbone, model.packed_weights
    x, _ = vit.embed(backbone, images)
    size, bias = torch.ones_like(x[..., :1]), None
    for block in backbone.blocks:
        attn = block.attn
        qkv = onednn.linear(attn.qkv, block.norm1(x), weights)
        q, k, v = qkv.unflatten(2, (3, attn.num_heads, -1)).permute(2, 0, 3, 1, 4)
        if plain_is_faster(v):
            scores = q * q.shape[-1] ** -0.5 @ k.transpose(2, 3)
            y = (scores if bias is None else scores + bias).softmax(-1) @ v
        else:
            y = F.scaled_dot_product_attention(q, k, v, attn_mask=bias)
        x = onednn.linear_add(attn.proj, y.transpose(1, 2).flatten(2), block.ls1, x, weights)
        if fewer := min(r, (x.shape[1] - 1) // 2):
            x, size = merge(x, size, k.mean(1), fewer)
            bias = size.log().transpose(1, 2)[:, None]
        hidden = onednn.linear(block.mlp.fc1, block.norm2(x), weights, block.mlp.act)
        x = onednn.linear_add(block.mlp.fc2, hidden, block.ls2, x, weights)
    return backbone.forward_head(backbone.norm(x))


def merge(x: Tensor, size: Tensor, key: Tensor, r: int) -> tuple[Tensor, Tensor]:
    """``x (B, S, C)``, ``size (B, S, 1)``, ``key (B, S, d)`` -> the same with r tokens fewer, the class token first."""
    key = F.normalize(key, dim=-1)
    similarity = key[:, ::2] @ key[:, 1::2].transpose(1, 2)
    similarity[:, 0] = -torch.inf
    best, partner = similarity.max(-1)
    order = best.argsort(-1, descending=True)
    gone, stay = order[:, :r, None], order[:, r:, None].sort(1).values  # sorted: the class token stays first
    to = partner[..., None].gather(1, gone)
    weighted = torch.cat([x * size, size], -1)  # sums of both at once
    a, b = weighted[:, ::2], weighted[:, 1::2]
    width = weighted.shape[-1]
    b = b.scatter_add(1, to.expand(-1, -1, width), a.gather(1, gone.expand(-1, -1, width)))
    merged = torch.cat([a.gather(1, stay.expand(-1, -1, width)), b], 1)
    return merged[..., :-1] / merged[..., -1:], merged[..., -1:]


def merging_gmacs(model: Any, r: int) -> float:
    """10⁹ MACs per image, including the similarities."""
    backbone = model.backbone
    n, width = backbone.patch_embed.num_patches + backbone.num_prefix_tokens, backbone.embed_dim
    macs = backbone.patch_embed.num_patches * backbone.patch_embed.proj.weight.numel() + backbone.head.weight.numel()
    for block in backbone.blocks:
        fewer = n - min(r, (n - 1) // 2)
        hidden = block.mlp.fc1.out_features
        macs += n * 4 * width * width + 2 * n * n * width + fewer * 2 * width * hidden
        macs += (n // 2) * (n - n // 2) * block.attn.head_dim
        n = fewer
    return macs / 1e9


def r_for(model: Any, gmacs: float) -> int:
    """The r whose MACs are closest."""
    return min(range(model.backbone.patch_embed.num_patches), key=lambda r: abs(merging_gmacs(model, r) - gmacs))
