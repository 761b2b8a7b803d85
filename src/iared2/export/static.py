"""Static forms of a model for runtimes that know no Python: ``torch.export`` and ONNX.

`FixedCount` keeps the same number of patches of every image, the best-scored ones: top-k and gathers, shapes that are
known beforehand, any batch size. `Adaptive` keeps what the threshold keeps; then the number of tokens depends on the
image, so it takes one image at a time. For adaptive batches without torch, stages.py writes one graph per part.

Neither has a second pass (`Decision.confidence`): a graph does not go back. Both run timm's own blocks on dense tokens:
with equal lengths, or a single image, nothing is ragged.
"""

from __future__ import annotations

import argparse
import copy
import importlib.util
import json
import math
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ..atomic import whole
from ..errors import InputError, missing
from ..model import backbone as vit
from ..model.block import attentions, run_module
from ..model.decide import EPS, first_grid
from ..model.reduced import ReducedVisionTransformer
from ..pretrained.checkpoint import load
from .embed import Embed
from .int8 import in_8_bits, packages
from .stages import MAX_WEIGHTS, export_stages


class _Dense(nn.Module):
    """What both forms share: a copy of the model, in float32 on the CPU, and its scores on dense tokens."""

    def __init__(self, model: ReducedVisionTransformer) -> None:
        super().__init__()
        model = copy.deepcopy(model).eval().requires_grad_(False).float().cpu()
        self.backbone: Any = model.backbone
        self.interpreters: Any = model.interpreters
        self.groups, self.num_heads = model.groups, attentions(model.backbone.blocks[0])[0].num_heads
        self.prefix, self.merged = model.backbone.num_prefix_tokens, model.dropped == "merged"
        self.decision = model.decision
        grid = first_grid(model.decision, model.grid_size)
        self.embed, self.num_patches = Embed(model, grid), math.prod(grid)
        places = torch.empty(self.num_patches)
        self.offsets = self.decision.offsets(places) if model.spread else None  # a constant of the graph
        cfg = model.pretrained_cfg
        self.input_size = tuple(cfg["input_size"])
        self.about = {name: cfg.get(name) for name in ("input_size", "mean", "std", "interpolation")}
        self.about["class_names"] = model.class_names
        self.eval()

    def choose(self, x: Tensor, ids: Tensor, group: int) -> Tensor | None:
        """``x (B, S, C)`` of the patches ``ids (B, S − P)`` -> ``(B, k)``: which of them stay; None for all."""
        raise NotImplementedError

    def forward(self, images: Tensor) -> tuple[Tensor, Tensor]:
        """``(B, in_chans, height, width) -> logits (B, K), patch_ids (B, number left)``."""
        x, rotary = self.embed(images)
        sizes = torch.ones_like(x[..., 0])
        ids = torch.arange(x.shape[1] - self.prefix, device=x.device).expand(x.shape[0], -1)
        for group, indices in enumerate(self.groups):
            if (keep := self.choose(x, ids, group)) is not None:
                ids = ids.gather(1, keep)
                x, sizes = self.drop(x, sizes, keep)
            # whole: torch 2.10 cannot tell whether an unknown number of tokens is 1, and would be broadcast
            bias = sizes.log()[:, None, None].expand(-1, self.num_heads, x.shape[1], -1) if self.merged else None
            rows = F.pad(ids + self.prefix, (self.prefix, 0)) if rotary is not None else None
            for index in indices:
                here = None if rotary is None else rotary[index % len(rotary)][rows]
                x = run_module(self.backbone.blocks[index], x, here, bias)
        return self.backbone.forward_head(self.backbone.norm(x)), ids

    def score(self, x: Tensor, group: int) -> Tensor:
        """``x (B, S, C) -> (B, S − P)`` informativeness of the patches."""
        return self.interpreters[group].score_dense(x.float(), self.prefix, vit.has_class_token(self.backbone))

    def standing(self, x: Tensor, ids: Tensor, group: int) -> Tensor:
        """`Decision.standing` of the patches ``ids (B, S − P)``."""
        scores = self.score(x, group)
        return scores if self.offsets is None else scores.logit(eps=EPS) - self.offsets[ids]

    def drop(self, x: Tensor, sizes: Tensor, keep: Tensor) -> tuple[Tensor, Tensor]:
        """``x (B, S, C)``, and of how many patches each is the mean ``(B, S)``: what ``keep (B, k)`` names is left."""
        prefix, patches = x[:, : self.prefix], x[:, self.prefix :]
        kept = patches.gather(1, keep[..., None].expand(-1, -1, x.shape[2]))
        if not self.merged:
            return torch.cat([prefix, kept], 1), sizes[:, : self.prefix + keep.shape[1]]
        alike = F.normalize(patches, dim=2) @ F.normalize(kept, dim=2).mT  # (B, n, k)
        # place 0 takes what has nowhere to go; a patch that stays goes to itself
        place = F.pad(alike, (1, 0), value=-2.0).argmax(2)
        number = torch.arange(1, keep.shape[1] + 1, device=x.device)
        place = place.scatter(1, keep, number.expand_as(keep))
        shares = (place[..., None] == number) * sizes[:, self.prefix :, None]  # (B, n, k)
        total = shares.sum(1)
        kept = shares.mT @ patches / total[..., None]
        return torch.cat([prefix, kept], 1), torch.cat([sizes[:, : self.prefix], total], 1)


class FixedCount(_Dense):
    """A reduced model that keeps exactly ``num_keep[g]`` patches of every image in group g.

    Args:
        model: is copied.
        num_keep: D numbers that do not rise, from 1 to N.

    Raises:
        InputError: other numbers.
    """

    def __init__(self, model: ReducedVisionTransformer, num_keep: Sequence[int]) -> None:
        super().__init__(model)
        num_patches = self.num_patches
        if len(num_keep) != model.num_groups or any(
            not 1 <= b <= a for a, b in zip([num_patches, *num_keep], num_keep, strict=False)
        ):
            raise InputError(
                f"num_keep={list(num_keep)}: give {model.num_groups} numbers from {num_patches} to 1 that do not rise"
                + f" (patches of a first pass of scale={model.scale:g})" * (model.scale < 1)
            )
        self.num_keep = tuple(num_keep)

    def choose(self, x: Tensor, ids: Tensor, group: int) -> Tensor | None:
        """The best-scored ``num_keep[group]``."""
        num_keep = self.num_keep[group]
        return self.standing(x, ids, group).topk(num_keep).indices if num_keep < ids.shape[1] else None


class Adaptive(_Dense):
    """A reduced model of one image, with its thresholds as they are now.

    Args:
        model: is copied. Its head must not pool patches: an image may lose all of them.

    Raises:
        InputError: the head pools patches, or the model has ``max_tokens`` or ``num_keep``.
    """

    def __init__(self, model: ReducedVisionTransformer) -> None:
        super().__init__(model)
        if vit.pools_patches(model.backbone):
            raise InputError("the adaptive form needs a model whose head reads the class token; export fixed counts")
        if model.max_tokens is not None or model.thresholds is None:
            raise InputError(
                "the adaptive form has no max_tokens or num_keep: set them to None, or export fixed counts"
            )
        self.thresholds = model.thresholds

    def choose(self, x: Tensor, ids: Tensor, group: int) -> Tensor | None:
        """What scores above the threshold."""
        threshold = self.thresholds[group]
        if threshold <= 0:
            return None
        return (self.standing(x, ids, group) > self.decision.level(threshold))[0].nonzero().mT

    def forward(self, images: Tensor) -> tuple[Tensor, Tensor]:
        """``(1, in_chans, height, width) -> logits (1, K), patch_ids (number left,) int64``."""
        logits, ids = super().forward(images)
        return logits, ids[0]


def export(form: FixedCount | Adaptive, path: Path | str, batch_size: int | None = 1, int8: bool = False) -> None:
    """Write a form to ``.onnx`` (needs the extra ``export``) or ``.pt2`` (``torch.export``), whole or not at all.

    The ONNX model takes ``images`` and returns ``logits`` and ``patch_ids``; both files carry how images are to be
    normalised and the names of the classes, as JSON under ``iared2``.

    Args:
        form: what to export.
        path: the suffix says which.
        batch_size: of the exported model; None for any. The adaptive form takes 1.
        int8: of ``.onnx``, the linear layers of the blocks in 8 bits, for ONNX Runtime (`int8.in_8_bits`).

    Raises:
        InputError: another suffix, a package is missing, a batch that the form does not take, int8 of ``.pt2`` or of
            more than 2 GB, or the file cannot be written.
    """
    path = Path(path)
    if path.suffix not in (".onnx", ".pt2"):
        raise InputError(f"{path}: give a file that ends in .onnx or .pt2")
    if isinstance(form, Adaptive) and batch_size != 1:
        raise InputError("the adaptive form takes one image at a time: the number of patches left depends on the image")
    if not path.parent.is_dir():
        raise InputError(f"cannot write {path}: there is no folder {path.parent}")
    if batch_size is not None and batch_size < 1:
        raise InputError(f"batch_size={batch_size}: give 1 or more, or None for any")
    onnx = path.suffix == ".onnx"
    if int8 and not onnx:
        raise InputError(f"int8 is of ONNX: give a file that ends in .onnx in place of {path}")
    if int8 and sum(weight.nbytes for weight in form.parameters()) > MAX_WEIGHTS:
        raise InputError(
            "the model has more than 2 GB of weights, the most that ONNX holds in one piece: leave int8 out"
        )
    if onnx and importlib.util.find_spec("onnxscript") is None:
        raise missing("ONNX", "onnxscript", "export")
    if int8:
        packages()
    images = torch.zeros(batch_size or 2, *form.input_size)
    shapes = None if batch_size else {"images": {0: torch.export.Dim.DYNAMIC}}
    program = torch.export.export(form, (images,), dynamic_shapes=shapes)
    about = json.dumps(form.about)
    if onnx:
        names: dict[str, Any] = {"input_names": ["images"], "output_names": ["logits", "patch_ids"]}
        onnx_program: Any = torch.onnx.export(program, dynamo=True, verbose=False, **names)
        onnx_program.model.metadata_props["iared2"] = about
        content = in_8_bits(onnx_program.model_proto.SerializeToString()) if int8 else b""
    with whole(path, errors=RuntimeError) as file:  # which torch's writer raises
        if int8:
            Path(file).write_bytes(content)
        elif onnx:
            onnx_program.save(file)  # above 1.5 GB with a second file for the weights beside it
        else:
            torch.export.save(program, file, extra_files={"iared2": about})


def run(arguments: argparse.Namespace) -> int:
    """Run ``iared2 export``."""
    model, batch_size = load(arguments.checkpoint), arguments.batch_size
    if arguments.adaptive_batch:
        if batch_size is not None:
            raise InputError("--adaptive-batch takes batches of any size: leave --batch-size out")
        export_stages(model, arguments.output, int8=arguments.int8)
    elif arguments.adaptive:
        export(Adaptive(model), arguments.output, 1 if batch_size is None else batch_size, arguments.int8)
    else:
        num_keep = arguments.num_keep * (model.num_groups if len(arguments.num_keep) == 1 else 1)
        export(FixedCount(model, num_keep), arguments.output, batch_size, arguments.int8)
    if model.scale < 1 and not arguments.adaptive_batch:
        print(
            f"the graph sees photos made smaller, as the model's first pass does (scale={model.scale:g})",
            file=sys.stderr,
        )
    if model.confidence and not arguments.adaptive_batch:
        print("the graph has no second pass, as the model has (confidence): --adaptive-batch has it", file=sys.stderr)
    print(f"wrote {arguments.output}")
    return 0
