"""Other ways to run the same decisions: masked (nothing is removed), and padded to the longest image of the batch.

They use our linear layers, our pieces of a batch, our interpreters and the same decisions. Only the treatment of
dropped patches differs, so the benchmark shows the effect of removing them.
"""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from ...model import backbone as vit
from ...model import onednn
from ...model.attention import Attend, plain_is_faster
from ...model.decide import Decide
from ...model.reduced import ReducedVisionTransformer
from ...model.tokens import PackedTokens


def masked(model: ReducedVisionTransformer, images: Tensor, decide: Decide) -> Tensor:
    """``(B, K)`` logits; dropped patches are masked in attention and run through every layer, as in A-ViT."""
    packed = model.embed(images, decide=decide)
    alive = packed.alive
    for group in range(model.num_groups):
        scores = model.score(packed, group) * alive
        alive = model.decide(scores, alive, group, decide)
        tokens = torch.cat([alive.new_ones(len(alive), packed.num_prefix_tokens), alive], 1)
        packed = packed.with_x(_run_group(model, group, packed, tokens))
    return model.head(packed.select(alive))


def padded(model: ReducedVisionTransformer, images: Tensor, decide: Decide) -> Tensor:
    """``(B, K)`` logits; dropped patches are removed, and images padded to the longest of the batch, as in ATS."""
    packed = model.embed(images, decide=decide)
    for group in range(model.num_groups):
        scores, alive = model.score(packed, group), packed.alive
        packed = packed.select(model.decide(scores, alive, group, decide))
        place = torch.arange(packed.max_seqlen, device=images.device)
        lengths = torch.tensor(packed.lengths).to(images.device, non_blocking=True)
        tokens = place < lengths[:, None]  # (B, longest)
        rows = (packed.first_rows[:, None] + place).clamp_max(len(packed.x) - 1)
        rows, longest = rows.flatten(), (packed.max_seqlen,) * packed.num_images
        long = replace(packed, x=packed.x[rows], token_ids=packed.token_ids[rows], lengths=longest)
        valid = torch.nonzero_static(tokens.flatten(), size=len(packed.x))[:, 0]  # without another synchronisation
        packed = packed.with_x(_run_group(model, group, long, tokens)[valid])
    return model.head(packed)


def _run_group(model: ReducedVisionTransformer, group: int, packed: PackedTokens, tokens: Tensor) -> Tensor:
    """The blocks of a group on B images of L rows, of which ``tokens (B, L)`` are valid; in pieces, as ours."""
    blocks, x = model.backbone.blocks, packed.x
    at_once = onednn.rows_at_once(blocks[0], x) if x.device.type == "cpu" else len(x)
    pieces, first = [], 0
    for piece in packed.split(at_once):
        attend = _attend_where(tokens[first : first + len(piece.lengths)])
        first += len(piece.lengths)
        for index in model.groups[group]:
            piece = piece.with_x(_run_block(model, blocks[index], piece, index, attend))
        pieces.append(piece.x)
    return torch.cat(pieces)


def _attend_where(tokens: Tensor) -> Attend:
    """Attention of ``(B·L, H, head_dim)`` rows to the valid rows ``tokens (B, L)`` of their own image."""
    mask = tokens[:, None, None]
    bias = torch.zeros_like(mask, dtype=torch.float32).masked_fill(~mask, -torch.inf)

    def attend(q: Tensor, k: Tensor, v: Tensor, packed: PackedTokens, dropout: float) -> Tensor:
        q, k, v = (rows.unflatten(0, tokens.shape).transpose(1, 2) for rows in (q, k, v))
        if plain_is_faster(v):
            y = (q * q.shape[-1] ** -0.5 @ k.transpose(2, 3) + bias.to(q.dtype)).softmax(-1) @ v
        else:
            y = F.scaled_dot_product_attention(q, k, v, attn_mask=mask)
        return y.transpose(1, 2).flatten(0, 1)

    return attend


def _run_block(model: ReducedVisionTransformer, block: Any, packed: PackedTokens, index: int, attend: Attend) -> Tensor:
    """One block in evaluation mode with the given attention and the layers of ``model.engine``."""
    compiled = model.engine == "compiled"
    if not compiled and onednn.can_run(block, packed.x):
        return onednn.run_block(block, packed.x, packed, index, model.packed_weights, attend)
    return vit.run_block(block, packed.x, packed, index, compiled, attend)
