"""Files -> models: our own format, the authors' checkpoint, and foreign backbone weights."""

from __future__ import annotations

import importlib.resources
import math
import os
import re
from collections.abc import Callable
from contextlib import redirect_stdout
from functools import partial
from io import StringIO
from pathlib import Path
from typing import Any
from zipfile import ZipFile, is_zipfile

import torch
from safetensors.torch import load_file
from timm.models import adapt_input_conv, clean_state_dict, eva, vision_transformer
from timm.models.eva import Eva
from timm.models.vision_transformer import VisionTransformer
from torch import Tensor, nn

from ..errors import InputError
from ..model import file as saved
from ..model.hugging_face import fetch, is_hub_name
from ..model.quantize import dequantized
from ..model.reduced import ReducedVisionTransformer
from ..model.restore import checked, configure, filled, load_strictly, restored
from ..model.text import without_text
from ..model.video_transformer import VideoTransformer
from ..runtime.archive import is_exported
from .build import from_timm

BOX = "box"
"""The name under which ``load`` finds the model that comes with the package."""
WRAPPERS = "state_dict_ema", "model_ema", "state_dict", "model", "model_state", "module", "encoder"
"""Keys under which checkpoints of training programs keep their weights, the best first."""
MAX_PATCH = 128
"""Limit for the patches of foreign weights, in pixels."""


def load(
    path: Path | str | None = None, backbone: nn.Module | Path | str | None = None, pretrained: bool = False
) -> ReducedVisionTransformer:
    """Load a reduced model, in evaluation mode, on the CPU.

    Args:
        path: a file of ``model.save``, a folder with such a ``model.safetensors`` (a run of ``iared2 train``) or of
            ``model.save_pretrained``, or a file in the layout of the authors' interpretation tool; detected by content,
            not by name. ``"user/model"`` or ``"user/model@revision"``, where there is no such path and nothing
            is called ``user``: a model on the Hugging Face Hub, from the cache or the network. None, or the string
            ``"box"``: the model in the box, even if there is a file of that name; for the file, use ``"./box"``. Or a
            file of ``model.save_policy``, which needs one of the following.
        backbone: the timm model on whose weights the policy was trained, which is used unchanged, or a file of these
            weights.
        pretrained: these are timm's own weights: download them.

    Raises:
        InputError: no such file, not a checkpoint, or a tensor is missing, unexpected, of the wrong shape or kind, or
            not finite. Or a backbone is missing, superfluous, or not the one of the policy.
    """
    if path is None or path == BOX:
        path = box_folder()
    elif isinstance(path, str) and is_hub_name(path):
        path = fetch(path)
    path = Path(path, "model.safetensors") if os.path.isdir(path) else Path(path)
    tensors, config = saved.read(path) if saved.is_safetensors(path) else ({}, None)
    if config and saved.FINGERPRINT in config:
        return _load_policy(path, tensors, config, backbone, pretrained).eval()
    if backbone is not None or pretrained:
        raise InputError(f"{path} is not a policy alone: it has its own backbone, so give no other")
    if config is None and is_exported(path):
        raise InputError(f"{path} is exported: give it to iared2.runtime.Engine, or iared2 predict --engine")
    if config is None:
        return _load_authors(path).eval()
    return restored(ReducedVisionTransformer, path, tensors, config).eval()


def _load_policy(
    path: Path, tensors: dict[str, Tensor], config: dict[str, Any], backbone: Any, pretrained: bool
) -> ReducedVisionTransformer:
    tensors, arguments = checked(path, tensors, config)
    if (backbone is not None) == pretrained:
        raise InputError(
            f"{path} is a policy alone: give backbone=, the {arguments['backbone']} on whose weights it was trained or"
            " a file of them, or pretrained=True to download timm's"
        )
    tensors = {name.removeprefix(saved.POLICY): tensor for name, tensor in tensors.items()}
    if isinstance(backbone, nn.Module):
        model = from_timm(backbone, **{key: arguments[key] for key in ("groups", "interpreter", "dropped")})
        load_strictly(model.interpreters, tensors, path)
    else:
        model = filled(ReducedVisionTransformer, arguments, tensors, path, lambda model: model.interpreters)
        if pretrained:
            model.backbone = from_timm(**arguments, pretrained=True).backbone
        else:
            load_backbone_weights(model.backbone, backbone)
    found, expected = saved.fingerprint(model.backbone), config[saved.FINGERPRINT]
    if len(found) != len(expected) or any(abs(a / b - 1) > 0.01 for a, b in zip(found, expected, strict=True) if b):
        raise InputError(f"{path} is a policy for other weights than those of this backbone")
    return configure(model, config)


def box_folder() -> str:
    """The folder of the model that comes with the package."""
    return str(importlib.resources.files("iared2") / BOX)


def load_backbone_weights(backbone: Any, path: Path | str) -> None:
    """Load foreign weights, or the backbone of a model of ours (``.pth``, ``.safetensors``), into a timm backbone.

    timm converts the weights as for its own pretrained models: layouts of other programs (OpenCLIP, DINOv2, DINOv3,
    EVA, DeiT-III …), position embeddings of another grid, patches of another size, another number of channels. A head
    with another number of classes is not loaded.

    Raises:
        InputError: no such file, or the weights do not fit.
    """
    tensors = read_foreign(Path(path))
    if any(name.startswith("backbone.") for name in tensors):
        tensors = without_text(
            {n.removeprefix("backbone."): t for n, t in tensors.items() if n.startswith("backbone.")}
        )
    load_strictly(backbone, fitted(tensors, backbone), path)


def fitted(tensors: dict[str, Tensor], backbone: Any) -> dict[str, Tensor]:
    """Weights of another backbone, converted by timm, and with this head if classes differ."""
    tensors, own = converted(tensors, backbone), backbone.state_dict()
    shapes, heads = ({name: t.shape for name, t in of.items() if _in_head(name)} for of in (tensors, own))
    if shapes != heads:
        body = {name: tensor for name, tensor in tensors.items() if not _in_head(name)}
        tensors = {**body, **{name: own[name] for name in heads}}
    return tensors


def _in_head(name: str) -> bool:
    return name.split(".")[0] in ("head", "head_dist")


def converted(tensors: dict[str, Tensor], backbone: Any) -> dict[str, Tensor]:
    """The tensors by timm's names and in the shapes of the backbone, as far as timm can convert them."""
    convert: Callable[..., dict[str, Tensor]]
    if isinstance(backbone, Eva):
        convert = eva.checkpoint_filter_fn
    elif isinstance(backbone, VisionTransformer) and not isinstance(backbone, VideoTransformer):
        convert = partial(vision_transformer.checkpoint_filter_fn, adapt_layer_scale=True)
    else:
        return tensors
    if any(max(t.shape[2:]) > MAX_PATCH for t in tensors.values() if t.ndim == 4):
        return tensors  # a resize takes memory by the square of the size
    old, new = tensors.get("pos_embed"), getattr(backbone, "pos_embed", None)
    try:
        with redirect_stdout(StringIO()):  # timm prints what it leaves out
            tensors = convert(dict(tensors), backbone)
        if old is not None and new is not None and old.shape == new.shape:
            tensors["pos_embed"] = old  # timm would take a grid of the same size for that of its own weights
        name, in_chans = "patch_embed.proj.weight", backbone.patch_embed.proj.in_channels
        if tensors[name].shape[1] != in_chans:
            tensors[name] = adapt_input_conv(in_chans, tensors[name])
    except Exception:  # from shapes that no model has; the caller names the tensor that does not fit
        pass
    return tensors


def read_foreign(path: Path) -> dict[str, Tensor]:
    """The tensors of a file of weights (``torch.save`` or safetensors), by name; never runs code in it.

    Raises:
        InputError: no such file, it cannot be read as weights, or they are not finite real numbers.
    """
    is_safetensors, size = saved.is_safetensors(path), os.path.getsize(path)
    try:
        if not is_safetensors and is_zipfile(path) and sum(f.file_size for f in ZipFile(path).infolist()) > size:
            raise ValueError("it is compressed: save it anew by torch.save")
        contents: Any = load_file(path) if is_safetensors else torch.load(path, "cpu", weights_only=True)
    except Exception as error:  # torch.load raises many kinds for a file that is no checkpoint
        reason = next(iter(str(error).strip().splitlines()), "")[:120]
        raise InputError(f"{path} cannot be read as weights alone ({type(error).__name__}: {reason})") from None
    if isinstance(contents, dict):
        contents = next((contents[key] for key in WRAPPERS if contents.get(key) is not None), contents)
    if not isinstance(contents, dict) or not contents or not all(isinstance(name, str) for name in contents):
        raise InputError(f"{path} cannot be used: it holds a {type(contents).__name__}, not tensors by their names")
    if sum(t.numel() for t in contents.values() if isinstance(t, Tensor)) > size:  # repeated by a stride of 0
        raise InputError(f"{path} cannot be used: it promises more numbers than it holds")
    contents = dequantized(contents)
    saved.check_values(contents, path)
    return {name: tensor.detach() for name, tensor in clean_state_dict(contents).items()}


def read_arguments(tensors: dict[str, Tensor], path: Path | str) -> dict[str, Any]:
    """timm's arguments for a square vision transformer with one class token, from the shapes of its tensors.

    The number of heads cannot be inferred from shapes: a head is assumed to be 64 wide.

    Raises:
        InputError: a required tensor is missing, or has the wrong number of dimensions.
    """
    for name, ndim in (("patch_embed.proj.weight", 4), ("pos_embed", 3), ("head.weight", 2)):
        if name not in tensors or tensors[name].ndim != ndim:
            raise InputError(f"{path} does not fit its layout: {name} is missing or not of {ndim} dimensions")
    width, _, *patch_size = tensors["patch_embed.proj.weight"].shape
    side = math.isqrt(tensors["pos_embed"].shape[1] - 1)
    return {
        "img_size": (side * patch_size[0], side * patch_size[1]),
        "patch_size": tuple(patch_size),
        "embed_dim": width,
        "depth": len({name.split(".")[1] for name in tensors if name.startswith("blocks.")}),
        "num_heads": max(width // 64, 1),
        "num_classes": tensors["head.weight"].shape[0],
    }


AGENT = re.compile(r"groups\.(\d{1,4})\.agent\.qk\.(weight|bias)")
BLOCK = re.compile(r"groups\.(\d{1,4})\.block_list\.(\d{1,4})\.(.+)")


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
    ours: dict[str, Tensor] = {}
    for name, tensor in tensors.items():
        if match := AGENT.fullmatch(name):
            if tensor.shape[:1] != (3 * width,):
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
    return filled(
        ReducedVisionTransformer, {"backbone": "deit_small_patch16_224", "groups": groups, **arguments}, ours, path
    )
