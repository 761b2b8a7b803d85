"""A timm VisionTransformer as embed, blocks and head.

Reads timm's modules, never changes them: no subclass, no hook, no renamed parameter. ``run_block`` is timm's
``Block.forward`` for packed rows. It uses the block's own layers, so layer scale, query-key norm, gated MLPs,
scaled norms and dropout are supported.
"""

from __future__ import annotations

from functools import cache
from itertools import pairwise
from typing import Any

import timm
import torch
from timm.layers import Attention, DropPath, PatchEmbed
from timm.models.deit import VisionTransformerDistilled
from timm.models.vision_transformer import Block, VisionTransformer
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from .. import keyed
from ..errors import InputError
from . import onednn
from .attention import Attend, attend, key_biases
from .tokens import PackedTokens
from .video_transformer import TubeletEmbed


def create(name: str, pretrained: bool = False, **timm_kwargs: Any) -> Any:
    """A timm model by its name.

    Raises:
        InputError: unknown name, arguments that timm refuses, or weights that are not available.
    """
    if not timm.is_model(name):
        close = timm.list_models(f"*{name.split('_patch')[0]}*")[:3]
        raise InputError(f"timm has no model {name!r}" + (f"; did you mean {', '.join(close)}?" if close else ""))
    try:
        return timm.create_model(name, pretrained=pretrained, **timm_kwargs)
    except Exception as error:  # timm and custom layers raise anything; OSError: no network
        reason = str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
        what = "load the pretrained weights of" if pretrained and isinstance(error, OSError) else "build"
        raise InputError(f"timm cannot {what} {name} with {timm_kwargs or 'its defaults'}: {reason}") from error


def check_supported(backbone: Any) -> None:
    """Refuse models that packed execution would compute wrongly.

    Raises:
        InputError: says which part of the model is not supported and why.
    """
    name = type(backbone).__name__

    def refuse(why: str) -> None:
        raise InputError(f"{name} is not supported: {why}. Use a timm VisionTransformer with standard blocks.")

    if not isinstance(backbone, VisionTransformer):
        refuse("it is not a timm VisionTransformer (hierarchical, rotary and convolutional models have other tokens)")
    for method in ("forward", "forward_features", "pool"):
        if getattr(type(backbone), method) is not getattr(VisionTransformer, method):
            refuse(f"it overrides {method}()")
    if not isinstance(backbone, VisionTransformerDistilled) and (
        type(backbone).forward_head is not VisionTransformer.forward_head
    ):
        refuse("it overrides forward_head()")
    for i, block in enumerate(backbone.blocks):
        if type(block) is not Block:
            refuse(f"block {i} is a {type(block).__name__}, not timm's pre-norm Block")
        if type(block.attn) is not Attention:
            refuse(f"the attention of block {i} is a {type(block.attn).__name__}, not timm's Attention")
    if type(backbone.patch_embed) not in (PatchEmbed, TubeletEmbed):
        refuse(f"its patch embedding is a {type(backbone.patch_embed).__name__}")
    if not isinstance(backbone.patch_drop, nn.Identity):
        refuse("patch_drop_rate > 0 drops patches behind the interpreters' back")
    if not backbone.global_pool:
        refuse("global_pool='' returns every token, but the reduced model does not have them all")


def split_blocks(depth: int, groups: int) -> list[range]:
    """The block indices of each group. If ``groups`` does not divide the depth, the first groups have one more block.

    Raises:
        InputError: fewer blocks than groups.
    """
    if not 1 <= groups <= depth:
        raise InputError(f"groups={groups} does not fit a backbone of {depth} blocks: give 1 to {depth}")
    size, rest = divmod(depth, groups)
    bounds = [g * size + min(g, rest) for g in range(groups + 1)]
    return [range(a, b) for a, b in pairwise(bounds)]


def pools_patches(backbone: VisionTransformer) -> bool:
    """Whether the head pools patch tokens, so that an image must keep at least one."""
    return backbone.global_pool != "token"


def embed(backbone: VisionTransformer, images: Tensor) -> Tensor:
    """``(B, in_chans, height, width)``, or clips ``(B, in_chans, T, height, width)`` -> ``(B, S, C)``, prefix first."""
    if images.ndim != 4 and not isinstance(backbone.patch_embed, TubeletEmbed):
        raise InputError(f"the model takes images (B, channels, height, width), not {tuple(images.shape)}")
    x = backbone.patch_embed(images)
    return backbone.norm_pre(backbone._pos_embed(x))


def run_blocks(
    backbone: VisionTransformer,
    indices: range,
    packed: PackedTokens,
    engine: str = "auto",
    weights: onednn.PackedWeights = onednn.NOTHING_PACKED,
) -> PackedTokens:
    """Run the blocks ``indices`` on the packed rows.

    Args:
        backbone: the timm model; its flag of activation checkpointing is respected.
        indices: of the blocks, in order.
        packed: the tokens.
        engine: see `ReducedVisionTransformer`. "compiled" compiles everything between one attention and the next, once
            for all blocks and any number of tokens.
        weights: weights that oneDNN has already laid out.

    Raises:
        InputError: "onednn" cannot run here.
    """
    blocks = [backbone.blocks[index] for index in indices]
    if engine in ("auto", "onednn"):
        if all(onednn.can_run(block, packed.x) for block in blocks):
            return packed.with_x(onednn.run_blocks(blocks, packed, weights))
        if engine == "onednn":
            raise InputError(
                'engine="onednn" runs inference on a CPU in float32 or bfloat16, without gradients, autocast or hooks;'
                ' set engine="auto"'
            )
    if torch.is_grad_enabled():
        weights.forget(blocks)
    x = packed.x
    for index, block in zip(indices, blocks, strict=True):
        if backbone.grad_checkpointing and torch.is_grad_enabled():
            x = checkpoint(run_block, block, x, packed, index, engine == "compiled", use_reentrant=False)
        else:
            x = run_block(block, x, packed, index, engine == "compiled")
    return packed.with_x(x)


def run_block(
    block: Block, x: Tensor, packed: PackedTokens, index: int, compiled: bool = False, attend: Attend = attend
) -> Tensor:
    """``x (T, C) -> (T, C)``: one MSA-FFN block on rows laid out as ``packed``.

    ``index`` keys the block's draws of stochastic depth. A block that carries a hook, or whose attention does, runs as
    a timm module, once per bucket.
    """
    if any(map(onednn.is_touched, (block, block.attn, block.attn.attn_drop, block.drop_path1, block.drop_path2))):
        biases = key_biases(packed, x.dtype)
        buckets = [block(rows, attn_mask=bias) for rows, bias in zip(packed.buckets(x), biases, strict=True)]
        return torch.cat([rows.flatten(0, 1) for rows in buckets])
    before, after = before_attention, after_attention
    if compiled:
        before, after = _compiled(before), _compiled(after)
    q, k, v, y = before(block, x)
    y_attn = attend(q, k, v, packed, block.attn.attn_drop.p if block.attn.training else 0.0)
    scales = (drop_path_scale(d, packed, 2 * index + i, x) for i, d in enumerate((block.drop_path1, block.drop_path2)))
    return after(block, x, y, y_attn, *scales)


def before_attention(block: Block, x: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """``x (T, C)`` -> q, k, v ``(T, H, head_dim)`` and the normalised tokens ``(T, C)``."""
    attn = block.attn
    y = block.norm1(x)
    q, k, v = attn.qkv(y).unflatten(1, (3, attn.num_heads, attn.head_dim)).unbind(1)
    return attn.q_norm(q), attn.k_norm(k), v, y


def after_attention(
    block: Block, x: Tensor, y: Tensor, y_attn: Tensor, scale1: Tensor | None, scale2: Tensor | None
) -> Tensor:
    """The rest of the block: projection, residual sums, MLP.

    Args:
        block: the block.
        x, y: ``(T, C)`` the tokens, and the normalised tokens (a gate reads them).
        y_attn: ``(T, H, head_dim)``.
        scale1, scale2: ``(T, 1)`` of stochastic depth on the two branches, or None.
    """
    attn = block.attn
    y_attn = attn.norm(y_attn.flatten(1))
    if getattr(attn, "gate", None) is not None:
        y_attn = y_attn * attn.gate(y).sigmoid()
    branch = block.ls1(attn.proj_drop(attn.proj(y_attn)))
    x = x + (branch if scale1 is None else branch * scale1)
    branch = block.ls2(block.mlp(block.norm2(x)))
    return x + (branch if scale2 is None else branch * scale2)


@cache
def _compiled(half: Any) -> Any:
    """Created on first use: importing the compiler takes a second and starts threads."""
    # training needs a graph per mode: with and without gradients, autocast, dropout of each kind
    torch._dynamo.config.recompile_limit = max(torch._dynamo.config.recompile_limit, 64)
    return torch.compile(half, dynamic=True)


def drop_path_scale(drop_path: nn.Module, packed: PackedTokens, site: int, x: Tensor) -> Tensor | None:
    """Stochastic depth that drops whole images, not rows: timm's DropPath as a factor ``(T, 1)``; None for 1."""
    if not (isinstance(drop_path, DropPath) and drop_path.training and drop_path.drop_prob):
        return None
    if drop_path.drop_prob >= 1:
        return x.new_zeros(len(x), 1)
    if packed.keys is None:
        draws = torch.rand(packed.num_images, device=x.device)
    else:
        draws = keyed.uniform(packed.keys, site, 1)[:, 0]
    keep_prob = 1 - drop_path.drop_prob
    scale = (draws < keep_prob).to(x.dtype) / (keep_prob if drop_path.scale_by_keep else 1)
    return scale[packed.token_ids // packed.num_tokens, None]


def head(backbone: VisionTransformer, packed: PackedTokens, pre_logits: bool = False) -> Tensor:
    """Final norm, pooling over the remaining tokens and classifier: ``(B, K)``, in the order of the dense batch."""
    if not pools_patches(backbone):  # then only the prefix tokens are read, and only they need the norm
        return backbone.forward_head(backbone.norm(packed.prefix()), pre_logits=pre_logits)
    return pool_head(backbone, packed.with_x(backbone.norm(packed.x)), pre_logits)


def pool_head(backbone: VisionTransformer, packed: PackedTokens, pre_logits: bool = False) -> Tensor:
    """timm's own head on normalised rows, bucket by bucket."""
    return packed.unsort(
        torch.cat([backbone.forward_head(rows, pre_logits=pre_logits) for rows in packed.buckets(packed.x)])
    )
