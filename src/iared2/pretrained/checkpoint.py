"""Files -> models: our own format, the authors' checkpoint, and foreign backbone weights."""

from __future__ import annotations

import importlib.resources
import math
import re
from pathlib import Path
from typing import Any

import torch
from timm.layers import resample_abs_pos_embed
from timm.models import load_state_dict as read_state_dict
from torch import Tensor, nn

from ..errors import InputError
from ..model import file as saved
from ..model.decide import Decision
from ..model.reduced import ReducedVisionTransformer
from .build import from_timm


def load(path: Path | str | None = None) -> ReducedVisionTransformer:
    """Load a reduced model, in evaluation mode, on the CPU.

    Args:
        path: a file of ``model.save``, a folder with such a ``model.safetensors`` (a run of ``iared2 train``), or a
            ``.pth`` in the layout of the authors' interpretation tool. None: the model in the box.

    Raises:
        InputError: no such file, not a checkpoint, or a tensor is missing, unexpected or of the wrong shape.
    """
    if path is None:
        path = Path(str(importlib.resources.files("iared2"))) / "box" / "model.safetensors"
    path = Path(path)
    if path.is_dir():
        path = path / "model.safetensors"
    if not path.is_file():
        raise InputError(f"there is no checkpoint {path}: give a file of model.save() or the folder of a training run")
    model = _load_authors(path) if path.suffix in (".pth", ".pt", ".bin") else _load_ours(path)
    return model.eval()


def _load_ours(path: Path) -> ReducedVisionTransformer:
    tensors, config = saved.read(path)
    try:
        kind = {key: config[key] for key in ("interpreter", "dropped") if key in config}  # the first files have none
        model = from_timm(config["architecture"], groups=config["groups"], **kind, **config["model_args"])
        num_keep, max_tokens = config.get("num_keep"), config.get("max_tokens")  # files of version 0.1.0 have none
        model.decision = Decision(config["threshold"] if num_keep is None else None, num_keep, max_tokens)
        model.backbone.pretrained_cfg = {**model.backbone.pretrained_cfg, **config["pretrained_cfg"]}
        if config["class_names"]:
            model.class_names = tuple(config["class_names"])
            if len(model.class_names) != model.num_classes:
                raise ValueError(f"{len(model.class_names)} class names for {model.num_classes} classes")
    except (InputError, KeyError, TypeError, ValueError, AttributeError) as error:
        raise InputError(f"the configuration in {path} does not describe a model ({error})") from None
    load_strictly(model, tensors, path)
    return model


def load_strictly(model: nn.Module, tensors: dict[str, Tensor], path: Path | str) -> None:
    """``load_state_dict`` that says in one line which tensor does not fit, before any weight is changed.

    Raises:
        InputError: a tensor is missing, unexpected or of the wrong shape.
    """
    expected = model.state_dict()
    missing, extra = expected.keys() - tensors.keys(), tensors.keys() - expected.keys()
    wrong = [n for n in sorted(expected.keys() & tensors.keys()) if expected[n].shape != tensors[n].shape]
    for what, names in (("lacks", sorted(missing)), ("has unexpected", sorted(extra))):
        if names:
            rest = f" and {len(names) - 1} more" if len(names) > 1 else ""
            raise InputError(f"{path} does not fit the model: it {what} the tensor {names[0]}{rest}")
    for name in wrong:
        have, want = tuple(tensors[name].shape), tuple(expected[name].shape)
        raise InputError(f"{path} does not fit the model: {name} has shape {have}, expected {want}")
    model.load_state_dict(tensors)


def load_backbone_weights(backbone: Any, path: Path | str) -> None:
    """Load foreign weights, or the backbone of a model of ours (``.pth``, ``.safetensors``), into a timm backbone.

    A head of other classes is left fresh; position embeddings of another grid, a square one, are resampled, as timm
    does it.

    Raises:
        InputError: no such file, or the weights do not fit.
    """
    tensors = read_foreign(Path(path))
    if any(name.startswith("backbone.") for name in tensors):
        tensors = {n.removeprefix("backbone."): t for n, t in tensors.items() if n.startswith("backbone.")}
    own = backbone.state_dict()
    positions = tensors.get("pos_embed")
    if (
        positions is not None
        and "pos_embed" in own
        and positions.ndim == 3
        and positions.shape != own["pos_embed"].shape
    ):
        prefix = 0 if backbone.no_embed_class else backbone.num_prefix_tokens
        grid, patches = list(backbone.patch_embed.grid_size), positions.shape[1] - prefix
        if patches > 0 and math.isqrt(patches) ** 2 == patches:  # timm takes the old grid for a square
            tensors["pos_embed"] = resample_abs_pos_embed(positions, grid, num_prefix_tokens=prefix)
    heads = [name for name in own if name.split(".")[0] in ("head", "head_dist")]
    if any(name not in tensors or own[name].shape != tensors[name].shape for name in heads):
        body = {name: tensor for name, tensor in tensors.items() if name.split(".")[0] not in ("head", "head_dist")}
        tensors = {**body, **{name: own[name] for name in heads}}
    load_strictly(backbone, tensors, path)


def read_foreign(path: Path) -> dict[str, Any]:
    """What a file of weights holds (``.pth``, ``.safetensors``), by name; code in it is never run.

    Raises:
        InputError: no such file, or it cannot be read as weights.
    """
    if not path.is_file():
        raise InputError(f"there is no checkpoint {path}")
    try:
        return read_state_dict(str(path), device="cpu", weights_only=True)
    except Exception as error:  # torch.load raises many kinds for a file that is no checkpoint
        reason = str(error).strip().splitlines()[0][:120]
        raise InputError(f"{path} cannot be read as weights alone ({type(error).__name__}: {reason})") from None


def read_arguments(tensors: dict[str, Tensor], path: Path | str) -> dict[str, Any]:
    """timm's arguments for a square vision transformer with one class token, from the shapes of its tensors.

    The number of heads is in no shape: a head is taken to be 64 wide.

    Raises:
        InputError: a tensor that would tell is missing, or of another number of dimensions.
    """
    for name, ndim in (("patch_embed.proj.weight", 4), ("pos_embed", 3), ("head.weight", 2)):
        if name not in tensors or tensors[name].ndim != ndim:
            raise InputError(f"{path} does not fit its layout: {name} is missing or not of {ndim} dimensions")
    width, _, *patch_size = tensors["patch_embed.proj.weight"].shape
    side = round((tensors["pos_embed"].shape[1] - 1) ** 0.5)
    return {
        "img_size": (side * patch_size[0], side * patch_size[1]),
        "patch_size": tuple(patch_size),
        "embed_dim": width,
        "depth": len({name.split(".")[1] for name in tensors if name.startswith("blocks.")}),
        "num_heads": max(width // 64, 1),
        "num_classes": tensors["head.weight"].shape[0],
    }


AGENT = re.compile(r"groups\.(\d+)\.agent\.qk\.(weight|bias)")
BLOCK = re.compile(r"groups\.(\d+)\.block_list\.(\d+)\.(.+)")


def _load_authors(path: Path) -> ReducedVisionTransformer:
    """The authors' ``ckpt.pth``: the blocks twice, the interpreters as ``groups.{g}.agent.qk`` (3C × C)."""
    tensors = read_foreign(path)
    if "groups.0.agent.qk.weight" not in tensors:
        raise InputError(
            f"{path} has no interpreters (groups.0.agent.qk.weight): it is not the authors' checkpoint layout"
        )
    arguments = read_arguments(tensors, path)
    width, depth = arguments["embed_dim"], arguments["depth"]
    groups = 1 + max(int(match[1]) for match in map(AGENT.fullmatch, tensors) if match)
    model = from_timm("deit_small_patch16_224", groups=groups, **arguments)
    ours: dict[str, Tensor] = {}
    for name, tensor in tensors.items():
        if match := AGENT.fullmatch(name):
            if not tensor.ndim or tensor.shape[0] != 3 * width:
                raise InputError(f"{path}: {name} has shape {tuple(tensor.shape)}, expected {3 * width} rows")
            query, key, _ = tensor.chunk(3)  # the value third was never used
            ours[f"interpreters.{match[1]}.query.{match[2]}"] = query
            ours[f"interpreters.{match[1]}.key.{match[2]}"] = key
        elif match := BLOCK.fullmatch(name):
            twin = f"blocks.{int(match[1]) * (depth // groups) + int(match[2])}.{match[3]}"
            if twin not in tensors or not torch.equal(tensors[twin], tensor):
                raise InputError(f"{path} contradicts itself: {name} differs from its twin {twin}")
        else:
            ours[f"backbone.{name}"] = tensor
    load_strictly(model, ours, path)
    return model
