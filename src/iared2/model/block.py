"""What a block of timm is made of: the description by which one packed runner runs every kind.

A block adds branches to its tokens, ``x + drop_path(after(layer(before(x))))``. The branches with attention come first
and read the same x; the branches with an MLP read the sum. ``before`` is a norm, or nothing in a post-norm block;
``after`` is a layer scale, or the norm of a post-norm block. Only attention reads other rows, so everything before it
and after it runs on packed rows as it would on images. Each block keeps its own layers.

`Layers` calls them as timm does. onednn.py has a faster subclass.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from timm.layers import Attention, AttentionRope, apply_rot_embed_cat
from timm.models.eva import EvaAttention, EvaBlock, EvaBlockPostNorm
from timm.models.vision_transformer import Block, ParallelScalingBlock, ParallelThingsBlock, ResPostBlock
from torch import Tensor, nn

NOTHING = nn.Identity().eval()


class Branch(NamedTuple):
    """One residual branch: ``x + drop_path(after(layer(before(x))))``.

    Attributes:
        before: the norm before the layer.
        layer: attention or MLP. `ParallelScalingBlock` is its own attention.
        after: layer scale, as a module or as a vector ``(C,)``, or a norm.
        drop_path: stochastic depth.
    """

    before: nn.Module
    layer: Any
    after: nn.Module | Tensor
    drop_path: nn.Module


class Parts(NamedTuple):
    """The branches of a block."""

    attns: Sequence[Branch]
    mlps: Sequence[Branch]


def _pre_norm(block: Any) -> Parts:
    attn = Branch(block.norm1, block.attn, block.ls1, block.drop_path1)
    return Parts((attn,), (Branch(block.norm2, block.mlp, block.ls2, block.drop_path2),))


def _eva(block: Any) -> Parts:
    after1, after2 = (NOTHING if gamma is None else gamma for gamma in (block.gamma_1, block.gamma_2))
    attn = Branch(block.norm1, block.attn, after1, block.drop_path1)
    return Parts((attn,), (Branch(block.norm2, block.mlp, after2, block.drop_path2),))


def _post_norm(block: Any) -> Parts:
    attn = Branch(NOTHING, block.attn, block.norm1, block.drop_path1)
    return Parts((attn,), (Branch(NOTHING, block.mlp, block.norm2, block.drop_path2),))


def _parallel(block: Any) -> Parts:
    attns = tuple(Branch(part.norm, part.attn, part.ls, part.drop_path) for part in block.attns)
    return Parts(attns, tuple(Branch(part.norm, part.mlp, part.ls, part.drop_path) for part in block.ffns))


def _fused(block: Any) -> Parts:  # its MLP reads the same x as its attention, through the same projection
    return Parts((Branch(block.in_norm, block, block.ls, block.drop_path),), ())


KINDS: dict[type, Callable[[Any], Parts]] = {
    Block: _pre_norm,
    EvaBlock: _eva,
    ResPostBlock: _post_norm,
    EvaBlockPostNorm: _post_norm,
    ParallelThingsBlock: _parallel,
    ParallelScalingBlock: _fused,
}
ATTENTIONS = Attention, EvaAttention, AttentionRope, ParallelScalingBlock


def parts(block: Any) -> Parts:
    """The description of a block of one of `KINDS`."""
    return KINDS[type(block)](block)


def attentions(block: Any) -> list[Any]:
    """The attention modules of a block; they have ``num_heads``, and `head_dim`."""
    return [branch.layer for branch in parts(block).attns]


def head_dim(attn: Any) -> int:
    """Width of a head; older versions of timm do not have it as an attribute everywhere."""
    return round(attn.scale**-2)


def is_touched(module: nn.Module) -> bool:
    """Whether the module has a hook or its own ``forward``: then the module itself must be called."""
    hooks = module._forward_hooks or module._forward_pre_hooks or module._backward_hooks or module._backward_pre_hooks
    return bool(hooks) or "forward" in vars(module)


def bypassed(block: Any) -> Iterator[nn.Module]:
    """The modules of a block that are not called as modules when it runs on packed rows."""
    yield block
    for branch in parts(block).attns:
        yield from (branch.layer, branch.layer.attn_drop, branch.drop_path)
    for branch in parts(block).mlps:
        yield branch.drop_path
    if type(block) is ParallelThingsBlock:
        yield from (*block.attns, *block.ffns)
    if type(block) is ParallelScalingBlock:
        yield block.ls  # called once for attention and once for the MLP


def run_module(block: Any, x: Tensor, rotary: Tensor | None, bias: Tensor | None) -> Tensor:
    """``x (B, S, C) -> (B, S, C)``: timm's own forward pass of a block.

    Args:
        block: the block.
        x: dense tokens.
        rotary: ``(B, S, 1 or H, 2·head_dim)`` of `PackedTokens.rotary`, or None.
        bias: of the logits of attention, or None.
    """
    if rotary is None:
        return block(x, attn_mask=bias)
    patches = rotary[:, block.attn.num_prefix_tokens :]  # timm rotates nothing else
    return block(x, rope=patches.transpose(1, 2), attn_mask=bias)


class Layers:
    """How the layers of a block run: as timm's modules."""

    def linear(self, layer: Any, x: Tensor, bias: Tensor | None = None) -> Tensor:
        """``layer(x)``, or with a bias that is not the layer's own."""
        return layer(x) if bias is None else F.linear(x, layer.weight, bias)

    def project(self, layer: Any, rows: Tensor, branch: Branch, x: Tensor, scale: Tensor | None) -> Tensor:
        """``x`` plus the last layer of attention, on the rows that it reads; ``scale (T, 1)`` of stochastic depth."""
        drop = getattr(branch.layer, "proj_drop", NOTHING)
        return add(x, drop(layer(rows)), branch.after, scale)

    def mlp(self, branch: Branch, y: Tensor, x: Tensor, scale: Tensor | None) -> Tensor:
        """``x`` plus an MLP of ``y``."""
        return add(x, branch.layer(y), branch.after, scale)


PLAIN = Layers()


def add(x: Tensor, y: Tensor, after: nn.Module | Tensor, scale: Tensor | None = None) -> Tensor:
    """``x + scale · after(y)``."""
    y = applied(after, y)
    return x + (y if scale is None else y * scale)


def applied(after: nn.Module | Tensor, y: Tensor) -> Tensor:
    """``after(y)``, `Branch.after` being a module or a vector."""
    return after * y if isinstance(after, Tensor) else after(y)


def before_attention(
    block: Any, x: Tensor, rotary: Tensor | None = None, layers: Layers = PLAIN
) -> tuple[Tensor, Tensor, Tensor, list[Tensor]]:
    """The first half of a block. Attentions in parallel are one attention with more heads.

    Args:
        block: the block.
        x: ``(T, C)`` the tokens.
        rotary: ``(T, 1 or H, 2·head_dim)``, sine and cosine for each row, or None.
        layers: how layers run.

    Returns:
        q, k, v ``(T, H, head_dim)``, and for each attention the rows that `after_attention` needs besides.
    """
    qkv, rest = [], []
    for branch in parts(block).attns:
        *heads, other = _heads(branch.layer, branch.before(x), rotary, layers)
        qkv.append(heads)
        rest.append(other)
    q, k, v = qkv[0] if len(qkv) == 1 else (torch.cat(rows, 1) for rows in zip(*qkv, strict=True))
    return q, k, v, rest


def _heads(attn: Any, y: Tensor, rotary: Tensor | None, layers: Layers) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    rest = y  # a gate reads it
    if type(attn) is ParallelScalingBlock:
        rest, *rows = layers.linear(attn.in_proj, y).split(attn.in_split, -1)
    elif getattr(attn, "q_proj", None) is not None:
        rows = [layers.linear(layer, y) for layer in (attn.q_proj, attn.k_proj, attn.v_proj)]
    else:
        bias = None
        if getattr(attn, "q_bias", None) is not None:
            bias = torch.cat([attn.q_bias, attn.k_bias, attn.v_bias])
        rows = list(layers.linear(attn.qkv, y, bias).chunk(3, -1))
    q, k, v = (row.unflatten(1, (-1, head_dim(attn))) for row in rows)
    q, k = attn.q_norm(q), attn.k_norm(k)
    if rotary is not None:
        q, k = (apply_rot_embed_cat(row, rotary, half=attn.rotate_half) for row in (q, k))
    if (groups := q.shape[1] // k.shape[1]) > 1:  # each key is read by several queries
        k, v = (row.repeat_interleave(groups, 1) for row in (k, v))
    return q, k, v, rest


def after_attention(
    block: Any,
    x: Tensor,
    rest: Sequence[Tensor],
    y_attn: Tensor,
    scales: Sequence[Tensor | None] | None = None,
    layers: Layers = PLAIN,
) -> Tensor:
    """The second half of a block: projection, residual sums, MLP. ``(T, C)``.

    Args:
        block: the block.
        x: ``(T, C)`` the tokens.
        rest: of `before_attention`.
        y_attn: ``(T, H, head_dim)``.
        scales: ``(T, 1)`` of stochastic depth for each branch, or None for 1.
        layers: how layers run.
    """
    attns, mlps = parts(block)
    scales = scales or [None] * (len(attns) + len(mlps))
    heads = y_attn.split([branch.layer.num_heads for branch in attns], 1)
    for branch, other, rows, scale in zip(attns, rest, heads, scales, strict=False):
        for layer, read in _last_layers(branch.layer, rows.flatten(1), other, layers):
            x = layers.project(layer, read, branch, x, scale)
    entering = x
    for branch, scale in zip(mlps, scales[len(attns) :], strict=True):
        x = layers.mlp(branch, branch.before(entering), x, scale)
    return x


def _last_layers(attn: Any, y: Tensor, rest: Tensor, layers: Layers) -> list[tuple[Any, Tensor]]:
    """The linear layers whose sum is the output of attention ``y (T, C)``, and the rows that each reads."""
    if type(attn) is ParallelScalingBlock:
        hidden = rest if attn.mlp_bias is None else rest + attn.mlp_bias
        hidden = attn.mlp_drop(attn.mlp_act(hidden))
        if getattr(attn, "out_proj", None) is not None:
            return [(attn.out_proj, torch.cat([y, hidden], 1))]
        return [(attn.attn_out_proj, y), (attn.mlp_out_proj, hidden)]
    y = attn.norm(y)
    if getattr(attn, "gate", None) is not None:
        y = y * layers.linear(attn.gate, rest).sigmoid()
    return [(attn.proj, y)]
