"""How others run the same decisions: masked (nothing is removed), and padded to the longest image of the batch.

They have our linear layers, our interpreters and the same decisions; only what becomes of a dropped patch differs. So
what the benchmark shows is what removing it brings.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from ..model import backbone as vit
from ..model import onednn
from ..model.attention import Attend
from ..model.decide import Decide
from ..model.reduced import ReducedVisionTransformer
from ..model.tokens import PackedTokens


def masked(model: ReducedVisionTransformer, images: Tensor, decide: Decide) -> Tensor:
    """``(B, K)`` logits; dropped patches are masked in attention and run through every layer (A-ViT's way)."""
    packed = model.embed(images)
    alive = packed.alive
    for group in range(model.num_groups):
        scores = model.score(packed, group) * alive
        alive = model.keep_one(decide(scores, alive, group) & alive, scores, alive)
        tokens = torch.cat([alive.new_ones(len(alive), packed.num_prefix_tokens), alive], 1)
        packed = packed.with_x(_run_group(model, group, packed, packed.x, _attend_where(tokens)))
    return model.head(packed.select(alive))


def padded(model: ReducedVisionTransformer, images: Tensor, decide: Decide) -> Tensor:
    """``(B, K)`` logits; dropped patches are removed, and images filled up to the longest of the batch (ATS's way)."""
    packed = model.embed(images)
    for group in range(model.num_groups):
        scores, alive = model.score(packed, group), packed.alive
        packed = packed.select(model.keep_one(decide(scores, alive, group) & alive, scores, alive))
        lengths = torch.tensor(packed.lengths, device=images.device)
        tokens = torch.arange(packed.max_seqlen, device=images.device) < lengths[:, None]  # (B, longest)
        rows = (packed.first_rows[:, None] + torch.arange(packed.max_seqlen, device=images.device)).clamp_max(
            len(packed.x) - 1
        )
        x = _run_group(model, group, packed, packed.x[rows.flatten()], _attend_where(tokens))
        packed = packed.with_x(x[tokens.flatten()])
    return model.head(packed)


def _attend_where(tokens: Tensor) -> Attend:
    """Attention of ``(B·L, H, head_dim)`` rows to those of their own image that ``tokens (B, L)`` names."""

    def attend(q: Tensor, k: Tensor, v: Tensor, packed: PackedTokens, dropout: float) -> Tensor:
        q, k, v = (rows.unflatten(0, tokens.shape).transpose(1, 2) for rows in (q, k, v))
        y = F.scaled_dot_product_attention(q, k, v, attn_mask=tokens[:, None, None])
        return y.transpose(1, 2).flatten(0, 1)

    return attend


def _run_group(model: ReducedVisionTransformer, group: int, packed: PackedTokens, x: Tensor, attend: Attend) -> Tensor:
    for index in model.groups[group]:
        x = run_block(model.backbone.blocks[index], x, packed, index, attend)
    return x


def run_block(block: torch.nn.Module, x: Tensor, packed: PackedTokens, index: int, attend: Attend) -> Tensor:
    """One block by the fastest layers there are, with an attention of one's own."""
    if onednn.can_run(block, x):
        return onednn.run_block(block, x, packed, attend)
    return vit.run_block(block, x, packed, index, attend=attend)
