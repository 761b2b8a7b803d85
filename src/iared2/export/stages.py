"""The network in parts for `iared2.runtime`: stem, one per group, head, each an ONNX graph of any batch.

Between the parts, `runtime.Engine` decides which patches stay. Here is what needs torch: the graphs and their file.

The stem embeds the images, or with `Decision.scale` takes their tokens, smaller ones or not. It also runs the first
groups, as long as they drop nothing: all images have the same length there, as in the dense model, and need neither a
gather nor a mask.

Shapes: b images of one call, L tokens of the longest, T rows. A group takes the rows of its images end to end, as
model/tokens.py has them, so its linear layers see no padding. Only attention and the interpreter of the next group read
them as a padded ``(b, L)``, by a gather, and with a bias that hides the padding.
"""

from __future__ import annotations

import copy
import importlib.util
import json
import math
import zipfile
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
from timm.layers import Attention
from torch import Tensor, nn

from ..atomic import whole
from ..errors import InputError, missing
from ..model import backbone as vit
from ..model.block import after_attention, attentions, before_attention, head_dim, is_touched
from ..model.decide import first_grid
from ..model.dither import pattern
from ..model.file import config_of
from ..model.macs import linear_macs
from ..model.reduced import ReducedVisionTransformer
from ..runtime.archive import EXTERNAL, FORMAT, MANIFEST
from .embed import Embed
from .int8 import in_8_bits, packages

MAX_WEIGHTS = (1 << 31) - (1 << 24)
ANY = torch.export.Dim.DYNAMIC


class Tokens(nn.Module):
    """The embedding alone, for a stem that takes tokens."""

    def __init__(self, model: ReducedVisionTransformer, grid_size: Sequence[int]) -> None:
        super().__init__()
        self.embed = Embed(model, grid_size)

    def forward(self, images: Tensor) -> Tensor:
        """``(B, in_chans, height, width) -> x (B, S, C)``."""
        return self.embed(images)[0]


class Stem(nn.Module):
    """The embedding, the blocks of the first ``depth`` groups on all tokens, and the scores of those and the next.

    Of a model with `Decision.scale`, there are images of two sizes, so the stem takes the tokens of either.
    """

    def __init__(self, model: ReducedVisionTransformer, depth: int) -> None:
        super().__init__()
        self.groups = model.groups[:depth]
        self.blocks = nn.ModuleList(model.backbone.blocks[index] for group in self.groups for index in group)
        self.embed = None if model.scale < 1 else Embed(model, model.grid_size)
        self.scorers = nn.ModuleList(Scorer(model, group) for group in range(min(depth + 1, model.num_groups)))

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """``(B, in_chans, height, width)``, clips, or tokens ``-> x (B, S, C), scores (depth + 1 or D, B, N)``."""
        rotary = None
        if self.embed is not None:
            x, rotary = self.embed(x)
        batch, tokens, _ = x.shape
        scores = []
        for group, scorer in enumerate(self.scorers):
            scores.append(scorer(x, None))
            if group < len(self.groups):
                x = x.flatten(0, 1)
                for index in self.groups[group]:
                    angles = None
                    if rotary is not None:
                        angles = rotary[index % len(rotary)].expand(batch, *rotary.shape[1:]).flatten(0, 1)
                    x = _block(
                        self.blocks[index],
                        x,
                        angles,
                        lambda y: y.unflatten(0, (-1, tokens)),
                        lambda y: y.flatten(0, 1),
                    )
                x = x.unflatten(0, (-1, tokens))
        return x, torch.stack(scores)


class Scorer(nn.Module):
    """The interpreter of one group, on padded tokens."""

    def __init__(self, model: ReducedVisionTransformer, group: int) -> None:
        super().__init__()
        self.interpreter: Any = model.interpreters[group]
        self.prefix, self.has_class_token = model.backbone.num_prefix_tokens, vit.has_class_token(model.backbone)

    def forward(self, x: Tensor, alive: Tensor | None) -> Tensor:
        """``x (b, L, C)``, and which of its patches are no padding ``(b, L − P)``; None: all -> ``(b, L − P)``."""
        return self.interpreter.score_dense(x, self.prefix, self.has_class_token, alive)


class Group(nn.Module):
    """The blocks of one group, and the scores of the next group, if there is one."""

    def __init__(self, model: ReducedVisionTransformer, group: int, rotary: Tensor | None) -> None:
        super().__init__()
        self.indices = model.groups[group]
        self.blocks = nn.ModuleList(model.backbone.blocks[index] for index in self.indices)
        self.scorer = Scorer(model, group + 1) if group + 1 < model.num_groups else None
        self.prefix = model.backbone.num_prefix_tokens
        self.register_buffer("rotary", rotary)

    def forward(
        self, x: Tensor, rows: Tensor, back: Tensor, bias: Tensor, positions: Tensor | None = None
    ) -> tuple[Tensor, ...]:
        """One call.

        Args:
            x: ``(T, C)`` the tokens; some last rows may be padding.
            rows: ``(b, L)`` int32, which row each token is; any row for padding.
            back: ``(T,)`` int32, where each row lies in ``rows``, flattened.
            bias: ``(b, L)``, the logarithm of the number of patches of which the token is the mean, or a large negative
                number for padding.
            positions: ``(T,)`` int32, in 0…S − 1: the place of each row in the image, for rotary embeddings.

        Returns:
            ``x (T, C)``, and the scores ``(b, L − P)`` of the next group; those of padding are undefined.
        """
        for index, block in zip(self.indices, self.blocks, strict=True):
            rotary = None
            if positions is not None:
                assert isinstance(self.rotary, Tensor)
                rotary = self.rotary[index % len(self.rotary)].index_select(0, positions)
            x = _block(
                block,
                x,
                rotary,
                lambda y: y.flatten(1).index_select(0, rows.flatten()).view(*rows.shape, *y.shape[1:]),
                lambda y: y.flatten(0, 1).flatten(1).index_select(0, back).unflatten(1, y.shape[2:]),
                bias,
            )
        if self.scorer is None:
            return (x,)
        padded = x.index_select(0, rows.flatten()).unflatten(0, rows.shape)
        return x, self.scorer(padded, bias[:, self.prefix :] >= 0)


def _block(
    block: Any,
    x: Tensor,
    rotary: Tensor | None,
    padded: Callable[[Tensor], Tensor],
    packed: Callable[[Tensor], Tensor],
    bias: Tensor | None = None,
) -> Tensor:
    """One block on rows ``x (T, C)``; ``padded`` makes ``(b, L, …)`` of ``(T, …)``, and ``packed`` the reverse."""
    q, k, v, rest = before_attention(block, x, rotary)
    q, k, v = map(padded, (q, k, v))  # (b, L, H, head_dim)
    scale = head_dim(attentions(block)[0]) ** -0.5
    logits = (q * scale).transpose(1, 2) @ k.permute(0, 2, 3, 1)  # (b, H, L, L)
    if bias is not None:
        logits = logits + bias[:, None, None]
    return after_attention(block, x, rest, packed((logits.softmax(-1) @ v.transpose(1, 2)).transpose(1, 2)))


class Head(nn.Module):
    """The final norm, pooling and the classifier."""

    def __init__(self, model: ReducedVisionTransformer) -> None:
        super().__init__()
        self.backbone = model.backbone

    def forward(self, x: Tensor) -> Tensor:
        """``x (b, L, C) -> logits (b, K)``: prefix tokens alone, or images of L tokens for a head that pools."""
        return self.backbone.forward_head(self.backbone.norm(x))


def export_stages(
    model: ReducedVisionTransformer, path: Path | str, stem: int | None = None, int8: bool = False
) -> None:
    """Write the file that `iared2.runtime.Engine` reads, whole or not at all: a zip of ONNX graphs and a manifest.

    Args:
        model: is copied. Weights are written as float32.
        path: ends in ``.zip``.
        stem: the number of first groups that never drop a patch, 0…D; they are faster in one graph. None: those in
            which the model's own decision drops nothing (`Decision.first_drop`). Fewer, if they have more than 2 GB.
        int8: the linear layers of the blocks in 8 bits, for ONNX Runtime (`int8.in_8_bits`).

    Raises:
        InputError: the model has hooks or a part that torch cannot export, another suffix, a package is missing, or the
            file cannot be written.
    """
    path = Path(path)
    if path.suffix != ".zip":
        raise InputError(f"{path}: an adaptive batch is a zip of ONNX graphs; give a file that ends in .zip")
    if not path.parent.is_dir():
        raise InputError(f"cannot write {path}: there is no folder {path.parent}")
    if importlib.util.find_spec("onnxscript") is None:
        raise missing("ONNX", "onnxscript", "export")
    if int8:
        packages()
    if any(map(is_touched, model.modules())):
        raise InputError("the model has hooks or replaced methods, which a graph would lose; remove them first")
    model = copy.deepcopy(model).eval().requires_grad_(False).float().cpu()
    if model.scale < 1 and getattr(model.backbone, "rope", None) is not None:
        raise InputError(
            f"scale={model.scale:g} and rotary positions: the graphs have those of one size; export it with scale=1"
        )
    first = first_grid(model.decision, model.grid_size)
    stem = model.decision.first_drop(math.prod(first)) if stem is None else stem
    while stem and _is_too_large(model.backbone.blocks[: model.groups[stem - 1].stop]):
        stem -= 1
    about = json.dumps(_manifest(model, stem, int8))
    for block in model.backbone.blocks:
        for attn in attentions(block):
            _separate(attn)
    graphs = {f"{name}.onnx": _graph(*parts) for name, parts in _stages(model, stem)}
    if int8:
        graphs = {name: in_8_bits(graph) for name, graph in graphs.items()}
    with whole(path, errors=RuntimeError) as file, zipfile.ZipFile(file, "w") as folder:  # stored, not compressed
        folder.writestr(MANIFEST, about)
        for name, graph in graphs.items():
            folder.writestr(name, graph)


def _separate(attn: Any) -> None:
    """Queries, keys and values from a layer each: no copy of a third of the columns, which takes 1 % of the time."""
    if type(attn) is Attention and type(attn.qkv) is nn.Linear:
        weights = attn.qkv.weight.chunk(3)
        biases = (None,) * 3 if attn.qkv.bias is None else attn.qkv.bias.chunk(3)
        for name, weight, bias in zip(("q_proj", "k_proj", "v_proj"), weights, biases, strict=True):
            layer = nn.Linear(weight.shape[1], len(weight), bias is not None)
            layer.load_state_dict({"weight": weight} if bias is None else {"weight": weight, "bias": bias})
            setattr(attn, name, layer)  # which block.py prefers
        del attn.qkv


def _stages(
    model: ReducedVisionTransformer, depth: int
) -> list[tuple[str, tuple[nn.Module, dict[str, Any], list[str]]]]:
    """Name, module, example inputs by name, and names of outputs of each stage."""
    images = torch.zeros(2, *model.pretrained_cfg["input_size"])
    with torch.no_grad():
        x, rotary = vit.embed(model.backbone, images)
    rows = torch.arange(14).view(2, 7) + model.backbone.num_prefix_tokens
    number = int(rows.max()) + 5
    inputs = {
        "x": x.new_zeros(number, x.shape[2]),
        "rows": rows.int(),
        "back": torch.zeros(number).int(),
        "bias": x.new_zeros(2, 7),
    }
    if rotary is not None:
        inputs["positions"] = torch.zeros(number).int()
    stem = Stem(model, depth), {"images": images} if model.scale == 1 else {"x": x}
    found: list[tuple[str, tuple[nn.Module, dict[str, Any], list[str]]]] = [("stem", (*stem, ["x_out", "scores"]))]
    if model.scale < 1:
        grids = {"small": first_grid(model.decision, model.grid_size), "embed": model.grid_size}
        found += [(name, (Tokens(model, grid), {"images": images}, ["x"])) for name, grid in grids.items()]
    for group in range(depth, model.num_groups):
        outputs = ["x_out", "scores"] if group + 1 < model.num_groups else ["x_out"]
        found.append((f"group{group + 1}", (Group(model, group, rotary), inputs, outputs)))
    return [*found, ("head", (Head(model), {"x": x}, ["logits"]))]


def _is_too_large(blocks: nn.Module) -> bool:
    return sum(weight.nbytes for weight in blocks.parameters()) > MAX_WEIGHTS


def _graph(stage: nn.Module, inputs: dict[str, Tensor], outputs: Sequence[str]) -> bytes:
    """One stage as ONNX, with every size dynamic that the batch determines."""
    sizes = {name: {0: ANY} for name in inputs}
    sizes |= {name: {0: ANY, 1: ANY} for name in ("rows", "bias") if name in inputs}
    if (isinstance(stage, Stem) and "x" in inputs) or (isinstance(stage, Head) and vit.pools_patches(stage.backbone)):
        sizes["x"] = {0: ANY, 1: ANY}
    if isinstance(stage, Head) and not vit.pools_patches(stage.backbone):
        inputs = {"x": inputs["x"][:, : stage.backbone.num_prefix_tokens]}
    if isinstance(stage, Group) and _is_too_large(stage.blocks):
        raise InputError(
            "a group has more than 2 GB of weights, the most that ONNX holds: build the model of more groups"
        )
    names: dict[str, Any] = {"input_names": list(inputs), "output_names": list(outputs)}
    try:
        program = torch.export.export(stage, tuple(inputs.values()), dynamic_shapes=tuple(sizes.values()))
        onnx: Any = torch.onnx.export(program, dynamo=True, verbose=False, **names)
    except (RuntimeError, KeyError) as error:  # of torch.export and torch.onnx
        reason = (str(error).strip() or type(error).__name__).splitlines()[0]
        raise InputError(
            f"torch cannot export the {type(stage).__name__.lower()} of this model: {reason:.300}"
        ) from error
    content = onnx.model_proto.SerializeToString()
    if EXTERNAL in content:
        raise InputError("the graph names a file, which the engine would refuse; rename the layers of the model")
    return content


def _manifest(model: ReducedVisionTransformer, stem: int, int8: bool) -> dict[str, Any]:
    """What the engine must know besides the graphs."""
    backbone, cfg, decision = model.backbone, model.pretrained_cfg, model.decision
    attns = attentions(backbone.blocks[0])
    first = first_grid(decision, model.grid_size)
    width = sum(attn.num_heads * head_dim(attn) for attn in attns)
    return {
        "format": FORMAT,
        **{name: cfg.get(name) for name in ("input_size", "mean", "std", "interpolation")},
        "class_names": model.class_names,
        "precision": "int8" if int8 else "fp32",
        "num_groups": model.num_groups,
        "stem": stem,
        "num_patches": math.prod(first),
        "whole_patches": model.num_patches,
        "scale": decision.scale,
        "num_prefix_tokens": backbone.num_prefix_tokens,
        "embed_dim": backbone.embed_dim,
        "pools": vit.pools_patches(backbone),
        "merges": model.dropped == "merged",
        "rotates": getattr(backbone, "rope", None) is not None,
        # MACs of the linear layers per row over those of attention per pair of rows
        "row_cost": linear_macs(backbone.blocks[0]) / (2 * width),
        "thresholds": decision.thresholds,
        "num_keep": decision.num_keep,
        "max_tokens": decision.max_tokens,
        "spread": decision.spread,
        "confidence": decision.confidence,
        "pattern": pattern(first).logit().tolist(),
        "model": _description(model),
    }


def _description(model: ReducedVisionTransformer) -> dict[str, Any] | None:
    """For `model.restore.described`; None if the backbone is not timm's."""
    try:
        return config_of(model)
    except InputError:
        return None
