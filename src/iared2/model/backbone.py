"""A timm VisionTransformer or Eva as embed, blocks and head.

Reads timm's modules, never changes them: no subclass, no hook, no renamed parameter. block.py says what a block is made
of. Here, the blocks run on packed rows.
"""

from __future__ import annotations

import copy
from collections.abc import Sequence
from functools import cache
from itertools import pairwise, repeat
from typing import Any

import timm
import torch
import torch.nn.functional as F
from timm.layers import DropPath, PatchEmbed, resample_abs_pos_embed
from timm.models.deit import VisionTransformerDistilled
from timm.models.eva import Eva
from timm.models.vision_transformer import VisionTransformer
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from .. import keyed
from ..errors import InputError
from . import onednn
from .attention import Attend, attend, key_biases
from .block import (
    ATTENTIONS,
    KINDS,
    after_attention,
    attentions,
    before_attention,
    bypassed,
    is_touched,
    parts,
    run_module,
)
from .tokens import PackedTokens
from .video_transformer import TubeletEmbed

ROTARY = "RotaryEmbeddingCat", "RotaryEmbeddingDinoV3", "RotaryEmbeddingMixed", "RotaryEmbeddingMRope"
"""Rotary embeddings that `rotary_table` can read; by name, since older versions of timm lack the last one."""


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
        raise InputError(
            f"timm cannot {what} {name} with {timm_kwargs or 'its defaults'!s:.200}: {reason:.200}"
        ) from error


def check_supported(backbone: Any) -> None:
    """Refuse models that packed execution would compute wrongly.

    Raises:
        InputError: says which part of the model is not supported and why.
    """
    name = type(backbone).__name__

    def refuse(why: str) -> None:
        raise InputError(f"{name} is not supported: {why}. Use a timm VisionTransformer or Eva with standard blocks.")

    family = next((kind for kind in (VisionTransformer, Eva) if isinstance(backbone, kind)), None)
    if family is None:
        refuse("it is not a timm VisionTransformer or Eva (hierarchical and convolutional models have other tokens)")
    for method in ("forward", "forward_features", "pool", "forward_head"):
        distilled = method == "forward_head" and isinstance(backbone, VisionTransformerDistilled)
        if getattr(type(backbone), method) is not getattr(family, method) and not distilled:
            refuse(f"it overrides {method}()")
    for i, block in enumerate(backbone.blocks):
        if type(block) not in KINDS:
            refuse(f"block {i} is a {type(block).__name__}, which may mix tokens in other ways than attention")
        for attn in attentions(block):
            if type(attn) not in ATTENTIONS:
                refuse(f"the attention of block {i} is a {type(attn).__name__}, not timm's Attention")
    if type(backbone.patch_embed) not in (PatchEmbed, TubeletEmbed):
        refuse(f"its patch embedding is a {type(backbone.patch_embed).__name__}")
    rope = getattr(backbone, "rope", None)
    if rope is not None and type(rope).__name__ not in ROTARY:
        refuse(f"its rotary embedding is a {type(rope).__name__}")
    if not isinstance(backbone.patch_drop, nn.Identity | None):
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


def pools_patches(backbone: Any) -> bool:
    """Whether the head pools patch tokens, so that an image must keep at least one."""
    return backbone.global_pool != "token"


def has_class_token(backbone: Any) -> bool:
    """Whether the first prefix token is a class token."""
    return backbone.cls_token is not None


def embed(backbone: Any, images: Tensor) -> tuple[Tensor, Tensor | None]:
    """Images to dense tokens.

    Args:
        backbone: the timm model.
        images: ``(B, in_chans, height, width)``, or clips ``(B, in_chans, T, height, width)``.

    Returns:
        ``(B, S, C)``, prefix tokens first, and `PackedTokens.rotary`, or None if the model has no rotary embedding.
    """
    if images.ndim != 4 and not isinstance(backbone.patch_embed, TubeletEmbed):
        raise InputError(f"the model takes images (B, channels, height, width), not {tuple(images.shape)}")
    x, rotary = backbone._pos_embed(backbone.patch_embed(images)), None
    if isinstance(backbone, Eva):
        x, rope = x
        rotary = None if rope is None else rotary_table(rope, backbone.num_prefix_tokens)
    return backbone.norm_pre(x), rotary


def rotary_table(rope: Tensor, num_prefix_tokens: int) -> Tensor:
    """timm's ``(N, 2·head_dim)`` or ``(L, H, N, 2·head_dim)`` as `PackedTokens.rotary`; prefix tokens do not rotate."""
    rope = (rope[None, None] if rope.ndim == 2 else rope).transpose(1, 2)
    angle_0 = torch.cat([torch.zeros_like(rope[:1, :1, :1, ::2]), torch.ones_like(rope[:1, :1, :1, ::2])], -1)
    return torch.cat([angle_0.expand(len(rope), num_prefix_tokens, *rope.shape[2:]), rope], 1)


def embed_packed(backbone: Any, images: Tensor, keys: Tensor | None = None) -> PackedTokens:
    """`embed` as packed rows, none dropped; ``keys (B,)`` see `PackedTokens`."""
    x, rotary = embed(backbone, images)
    grid_size = grid_of(backbone, images.shape[2:])
    return PackedTokens.from_dense(x, backbone.num_prefix_tokens, keys=keys, rotary=rotary, grid_size=grid_size)


def smaller(backbone: Any, images: Tensor, grid_size: Sequence[int]) -> tuple[Any, Tensor]:
    """A view of the backbone that takes images of this grid, rows and columns, and the images made so small.

    The view shares all weights but the positions, which timm resamples, as in `Facade.set_input_size`.
    """
    view, embed = copy.copy(backbone), copy.copy(backbone.patch_embed)
    for kind in ("_parameters", "_modules"):  # its own names; what they stand for is shared
        setattr(view, kind, dict(getattr(view, kind)))
    view._modules["patch_embed"] = embed
    if getattr(backbone, "rope", None) is not None:
        view._modules["rope"] = copy.deepcopy(backbone.rope)  # a few angles
    size = [n * patch for n, patch in zip(grid_size, embed.patch_size, strict=True)]
    view.set_input_size(img_size=tuple(size))
    if torch.is_grad_enabled() and backbone.pos_embed is not None:  # timm's positions are new parameters: no gradient
        prefix = 0 if backbone.no_embed_class else backbone.num_prefix_tokens
        old = backbone.patch_embed.grid_size
        del view.pos_embed
        view.pos_embed = resample_abs_pos_embed(backbone.pos_embed, list(grid_size), list(old), prefix)
    small = F.interpolate(images.float(), size, mode="bicubic", antialias=True)  # in half precision, not on all devices
    return view, small.to(images.dtype)


def grid_of(backbone: Any, size: Sequence[int]) -> tuple[int, ...]:
    """The grid of patches of images of this size, height and width; of a clip, the model's own."""
    embed = backbone.patch_embed
    return tuple(embed.grid_size if isinstance(embed, TubeletEmbed) else embed.dynamic_feat_size(tuple(size)))


def run_blocks(
    backbone: Any,
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
            return packed.with_x(onednn.run_blocks(blocks, indices, packed, weights))
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
    block: Any, x: Tensor, packed: PackedTokens, index: int, compiled: bool = False, attend: Attend = attend
) -> Tensor:
    """``x (T, C) -> (T, C)``: one block on rows laid out as ``packed``.

    ``index`` keys the block's draws of stochastic depth and selects its rotation. A block that carries a hook, or whose
    attention does, runs as a timm module, once per bucket.
    """
    rotary = packed.rotary_rows(index)
    if any(map(is_touched, bypassed(block))):
        turns = repeat(None) if rotary is None else packed.buckets(rotary)
        biases = key_biases(packed, x.dtype)
        buckets = zip(packed.buckets(x), turns, biases, strict=False)
        return torch.cat([run_module(block, *bucket).flatten(0, 1) for bucket in buckets])
    before, after = before_attention, after_attention
    if compiled:
        before, after = _compiled(before), _compiled(after)
    q, k, v, rest = before(block, x, rotary)
    attns, mlps = parts(block)
    attn = attns[0].layer
    y_attn = attend(q, k, v, packed, attn.attn_drop.p if attn.training else 0.0)
    scales = [drop_path_scale(b.drop_path, packed, _site(index, i), x) for i, b in enumerate((*attns, *mlps))]
    return after(block, x, rest, y_attn, scales)


def _site(index: int, branch: int) -> int:
    """Of the draws of stochastic depth (keyed.py): different for all branches of all blocks."""
    return 2 * index + branch % 2 + (branch // 2 << 12)


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


def head(backbone: Any, packed: PackedTokens, pre_logits: bool = False) -> Tensor:
    """Final norm, pooling over the remaining tokens and classifier: ``(B, K)``, in the order of the dense batch."""
    if not pools_patches(backbone):  # then only the prefix tokens are read, and only they need the norm
        return backbone.forward_head(backbone.norm(packed.prefix()), pre_logits=pre_logits)
    return pool_head(backbone, packed.with_x(backbone.norm(packed.x)), pre_logits)


def pool_head(backbone: Any, packed: PackedTokens, pre_logits: bool = False) -> Tensor:
    """timm's own head on normalised rows, bucket by bucket."""
    return packed.unsort(
        torch.cat([backbone.forward_head(rows, pre_logits=pre_logits) for rows in packed.buckets(packed.x)])
    )
