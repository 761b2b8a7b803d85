"""Blocks for inference on a CPU: oneDNN's linear layers, with GELU and the residual sum fused into them.

The plain implementation is ``backbone.run_block``; a test compares the two. In float32, torch multiplies matrices with
MKL, which on AMD processors reaches less than half the speed of oneDNN (docs/speed.md). In bfloat16, both use oneDNN,
and the gain comes from fused sums and from weights that are laid out once (`PackedWeights`) instead of at every call.

The operators are those that ``torch.compile`` generates for a CPU. They are not part of torch's public interface. If
they are missing, or an argument does not fit, the plain block runs.
"""

from __future__ import annotations

import os
from collections.abc import Iterable, Iterator, Sequence
from typing import Any
from weakref import WeakKeyDictionary

import torch
from timm.layers import GluMlp, LayerScale, Mlp, SwiGLU
from torch import Tensor, nn
from torch.utils.flop_counter import register_flop_formula

from .attention import Attend, attend
from .block import PLAIN, Branch, Layers, add, after_attention, before_attention, bypassed, is_touched, parts
from .tokens import PackedTokens

ACTIVATIONS: dict[type, str] = {nn.GELU: "gelu", nn.SiLU: "swish"}
"""Activations that oneDNN fuses into the layer before them, and its names for them."""
MLPS = Mlp, GluMlp, SwiGLU
"""MLPs whose layers run with oneDNN. Another one runs as a module."""

CHUNK_BYTES = 16 << 20
"""Size of the hidden layer of the images that run at once, see `run_blocks`."""


def _is_available() -> bool:
    ops = torch.ops.mkldnn
    return torch.backends.mkldnn.is_available() and all(
        hasattr(ops, op) for op in ("_linear_pointwise", "_reorder_linear_weight", "_is_mkldnn_bf16_supported")
    )


AVAILABLE = _is_available()
BF16 = AVAILABLE and torch.ops.mkldnn._is_mkldnn_bf16_supported()

if AVAILABLE:  # else torch's counter would not count these layers

    @register_flop_formula([torch.ops.mkldnn._linear_pointwise])
    def _linear_flops(x: torch.Size, *_: Any, out_shape: torch.Size, **__: Any) -> int:
        return 2 * x[-1] * out_shape.numel()


def _has_kernel(x: Tensor) -> bool:
    return AVAILABLE and x.device.type == "cpu" and (x.dtype == torch.float32 or (BF16 and x.dtype == torch.bfloat16))


class PackedWeights:
    """The weights of some linear layers in oneDNN's layout: 10 to 15 % faster, but a second copy in memory.

    A layer whose weight is replaced, changed, moved or reloaded falls back to the weight itself. All layers do if a
    block runs with a graph, since it is being trained. Two changes cannot be detected: ``weight.data.copy_()``, and a
    fused optimiser that trains the timm model on its own. Pack again after those. Copies of a model are not packed.
    """

    def __init__(self) -> None:
        self._of: WeakKeyDictionary[nn.Linear, tuple[Tensor, int, Tensor]] = WeakKeyDictionary()

    def __len__(self) -> int:
        return len(self._of)

    def __reduce__(self) -> tuple[type, tuple[()]]:
        return PackedWeights, ()

    def pack(self, blocks: Iterable[Any]) -> None:
        """Lay out the weights of the layers that `run_block` runs with oneDNN, if it has a kernel for them."""
        for layer in _layers(blocks):
            if _has_kernel(layer.weight) and not layer.weight.is_inference():
                weight = layer.weight.detach()
                self._of[layer] = weight, weight._version, torch.ops.mkldnn._reorder_linear_weight(weight, None)

    def forget(self, blocks: Iterable[Any]) -> None:
        """Undo `pack` for these blocks: changes by fused optimisers cannot be detected."""
        if self._of:
            for layer in _layers(blocks):
                self._of.pop(layer, None)

    def weight(self, layer: nn.Linear) -> Tensor:
        """The packed weight if there is one and the weight is still the same."""
        entry = self._of.get(layer)
        if entry is None:
            return layer.weight
        now, (weight, version, packed) = layer.weight, entry
        layouts = [(w.data_ptr(), w.shape, w.stride()) for w in (now, weight)]
        if layouts[0] == layouts[1] and now._version == version:
            return packed
        del self._of[layer]
        return now


NOTHING_PACKED = PackedWeights()


def forget_shapes(capacity: int = 8) -> None:
    """Keep kernels for so many shapes only, in this process, unless the user has set the variables.

    Torch and oneDNN each keep the last 1,024, with their buffers, and ragged batches hardly repeat a shape: for the
    model in the box, 640 MB more after 20,000 photos than after 2,000. Eight are enough for the layers of one group.
    Has an effect only before the first use of oneDNN.
    """
    for name in ("LRU_CACHE_CAPACITY", "ONEDNN_PRIMITIVE_CACHE_CAPACITY"):
        os.environ.setdefault(name, str(capacity))


def can_run(block: Any, x: Tensor) -> bool:
    """Whether `run_block` gives the result of the plain block.

    This requires eager inference on a CPU in float32 or bfloat16. Layers that are fused must carry no hook and be
    unchanged, and no part of the block may be in training mode (Monte Carlo dropout, stochastic depth).
    """
    return (
        _has_kernel(x)
        and not (torch.is_grad_enabled() or torch.is_autocast_enabled("cpu"))
        and bool(torch.backends.mkldnn.enabled)
        and not torch.compiler.is_compiling()
        and not any(module.training or is_touched(module) for module in _fused(block))
    )


def _fused(block: Any) -> Iterator[nn.Module]:
    """The modules of a block that `run_block` does not call."""
    yield from bypassed(block)
    attns, mlps = parts(block)
    yield from (branch.after for branch in (*attns, *mlps) if isinstance(branch.after, nn.Module))
    yield from (branch.layer.proj_drop for branch in attns if hasattr(branch.layer, "proj_drop"))
    for mlp in (branch.layer for branch in mlps):
        yield mlp
        if type(mlp) in MLPS:
            yield from (mlp.act, mlp.drop1, mlp.norm, mlp.drop2)


def run_blocks(
    blocks: Sequence[Any], indices: Sequence[int], packed: PackedTokens, weights: PackedWeights = NOTHING_PACKED
) -> Tensor:
    """``(T, C)``: the tokens after some blocks; a large batch runs a few images at a time.

    glibc returns allocations of 32 MB and more to the system at once, so every layer of a large batch would map new
    pages. Also, the hidden layer of a few images stays in the cache (docs/speed.md).
    """
    parts = []
    for part in packed.split(rows_at_once(blocks[0], packed.x)):
        x = part.x
        for block, index in zip(blocks, indices, strict=True):
            x = run_block(block, x, part, index, weights)
        parts.append(x)
    return parts[0] if len(parts) == 1 else torch.cat(parts)


def rows_at_once(block: Any, x: Tensor) -> int:
    """Rows of ``x (T, C)`` whose hidden layer takes `CHUNK_BYTES`."""
    hidden = max((layer.out_features for layer in _layers([block])), default=4 * x.shape[1])
    return CHUNK_BYTES // (hidden * x.element_size())


def run_block(
    block: Any,
    x: Tensor,
    packed: PackedTokens,
    index: int,
    weights: PackedWeights = NOTHING_PACKED,
    attend: Attend = attend,
) -> Tensor:
    """``x (T, C) -> (T, C)``: one block in evaluation mode, without a graph; ``index`` selects its rotation."""
    layers = FusedLayers(weights)
    q, k, v, rest = before_attention(block, x, packed.rotary_rows(index), layers)
    return after_attention(block, x, rest, attend(q, k, v, packed, 0.0), layers=layers)


class FusedLayers(Layers):
    """The layers of a block in evaluation mode, run by oneDNN: activation, layer scale and residual sum are fused."""

    def __init__(self, weights: PackedWeights = NOTHING_PACKED) -> None:
        self.weights = weights

    def linear(self, layer: Any, x: Tensor, bias: Tensor | None = None) -> Tensor:
        """See `Layers`."""
        return linear(layer, x, self.weights, bias=bias)

    def project(self, layer: Any, rows: Tensor, branch: Branch, x: Tensor, scale: Tensor | None) -> Tensor:
        """See `Layers`; ``scale`` is None in evaluation mode."""
        return linear_add(layer, rows, branch.after, x, self.weights)

    def mlp(self, branch: Branch, y: Tensor, x: Tensor, scale: Tensor | None) -> Tensor:
        """See `Layers`."""
        mlp = branch.layer
        if type(mlp) not in MLPS:
            return super().mlp(branch, y, x, scale)
        if type(mlp) is Mlp:
            hidden = linear(mlp.fc1, y, self.weights, mlp.act)
        elif type(mlp) is SwiGLU:
            hidden = linear(mlp.fc1_g, y, self.weights, mlp.act) * self.linear(mlp.fc1_x, y)
        else:
            gate, rows = self.linear(mlp.fc1, y).chunk(2, -1)
            if mlp.gate_last:
                gate, rows = rows, gate
            hidden = mlp.act(gate) * rows
        return linear_add(mlp.fc2, mlp.norm(hidden), branch.after, x, self.weights)


def _layers(blocks: Iterable[Any]) -> Iterator[nn.Linear]:
    """The layers that `run_block` runs with oneDNN."""
    return (module for block in blocks for module in block.modules() if type(module) is nn.Linear)


def _fits(layer: Any, x: Tensor) -> bool:
    """Whether oneDNN supports the layer: type and precision; no adapter, no hook, no quantised weight."""
    return (
        type(layer) is nn.Linear
        and _has_kernel(x)
        and type(layer.weight) in (nn.Parameter, Tensor)
        and layer.weight.dtype == x.dtype
        and not (layer.training or is_touched(layer))
    )


def linear(
    layer: Any,
    x: Tensor,
    weights: PackedWeights = NOTHING_PACKED,
    act: nn.Module | None = None,
    bias: Tensor | None = None,
) -> Tensor:
    """``layer(x)``, or ``act(layer(x))``; with a ``bias`` in place of the layer's own."""
    if not _fits(layer, x):
        y = PLAIN.linear(layer, x, bias)
        return y if act is None else act(y)
    if act is not None and type(act) not in ACTIVATIONS:
        return act(linear(layer, x, weights, bias=bias))
    activation, algorithm = "none" if act is None else ACTIVATIONS[type(act)], getattr(act, "approximate", "")
    bias = layer.bias if bias is None else bias
    return torch.ops.mkldnn._linear_pointwise(x, weights.weight(layer), bias, activation, [], algorithm)


def linear_add(
    layer: Any, x: Tensor, after: nn.Module | Tensor, residual: Tensor, weights: PackedWeights = NOTHING_PACKED
) -> Tensor:
    """``residual + after(layer(x))``; ``after`` as in `Branch`."""
    if type(after) is nn.Identity and _fits(layer, x):
        return torch.ops.mkldnn._linear_pointwise.binary(x, residual, weights.weight(layer), layer.bias, "add")
    y = linear(layer, x, weights)
    if isinstance(after, LayerScale):
        after = after.gamma
    return torch.addcmul(residual, y, after) if isinstance(after, Tensor) else add(residual, y, after)
