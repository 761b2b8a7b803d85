"""Converts video models: TimeSformer and VideoMAE of Hugging Face, TimeSformer of its original repository.

Tensors are renamed and reshaped, but not changed, so nothing is lost. One is added: VideoMAE's keys have no bias,
timm's have one, which is set to 0. No logit depends on it, so it gets no gradient.
"""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ..errors import InputError
from ..model.reduced import ReducedVisionTransformer
from ..model.restore import filled
from .build import from_timm
from .checkpoint import read_arguments, read_foreign

NAMES = {  # Hugging Face's -> timm's
    r"^(timesformer|videomae)\.": "",
    r"^embeddings\.": "",
    r"^patch_embeddings\.projection": "patch_embed.proj",
    r"^position_embeddings": "pos_embed",
    r"^time_embeddings": "time_embed",
    r"^encoder\.layer\.": "blocks.",
    r"attention\.attention": "attn",
    r"attn\.q_bias": "attn.query.bias",  # VideoMAE before transformers 5
    r"attn\.v_bias": "attn.value.bias",
    r"attention\.output\.dense": "attn.proj",
    r"layernorm_before": "norm1",
    r"layernorm_after": "norm2",
    r"intermediate\.dense": "mlp.fc1",
    r"output\.dense": "mlp.fc2",
    r"^layernorm": "norm",
    r"^classifier": "head",
}
QUERY = ".attn.query.weight"


def from_timesformer(
    model: Any = None,
    *,
    groups: int = 3,
    frames: int | None = None,
    size: int | tuple[int, int] | None = None,
    **timm_kwargs: Any,
) -> ReducedVisionTransformer:
    """Build a reduced model from a TimeSformer with joint space-time attention, with untrained interpreters.

    It takes clips ``(B, 3, T, height, width)``; patches are numbered by time, row and column.

    Args:
        model: a ``TimesformerForVideoClassification`` of Hugging Face; a path to a checkpoint of the original
            repository; or None for untrained weights.
        groups: D, the number of groups.
        frames: T, by default the model's; 8 for an untrained model.
        size: side of a frame in pixels, or its height and width; by default the model's, 224 for an untrained model.
        timm_kwargs: as for `from_timm`, with ``interpreter`` and ``dropped``. An untrained model has ``patch_size=16,
            embed_dim=768, depth=12, num_heads=12, num_classes=400`` by default. An original checkpoint does not contain
            ``num_heads``; by default, heads are 64 wide. ``drop_path_rate`` and so on work for any model.

    Returns:
        The model in evaluation mode, with the class names of ``model`` if it has any. Threshold 0 gives its logits.

    Raises:
        InputError: another kind of model, divided attention, no such file, or sizes that do not fit.
    """
    tensors, found, names, source = None, {}, None, ""
    if isinstance(model, (str, Path)):
        tensors, found, source = *_read_original(Path(model)), str(model)
    elif model is not None:
        tensors, found, names = _read_hugging_face(model, "timesformer")
        source = type(model).__name__
        if model.config.attention_type != "joint_space_time":
            raise InputError(
                f"this TimeSformer has {model.config.attention_type} attention, where a block sees only part of the"
                " patches: give one of joint_space_time"
            )
    frames_found, *size_found = found.pop("img_size", (8, 224, 224))
    asked = (frames_found if frames is None else frames, *(size_found if size is None else _pair(size)))
    if tensors is not None and asked != (frames_found, *size_found):
        raise InputError(
            f"{source} takes clips of {frames_found} frames of {size_found[0]} × {size_found[1]} pixels, not"
            f" {asked[0]} of {asked[1]} × {asked[2]}: leave frames and size out"
        )
    found |= timm_kwargs
    found["patch_size"] = (1, *_pair(found.get("patch_size", 16)))
    arguments = {"backbone": "timesformer_joint_base_patch16_224", "groups": groups, "img_size": asked, **found}
    return from_timm(**arguments).eval() if tensors is None else _make(arguments, tensors, names, source)


def from_videomae(model: Any, *, groups: int = 3, **timm_kwargs: Any) -> ReducedVisionTransformer:
    """Build a reduced model from a VideoMAE, with untrained interpreters.

    It takes clips ``(B, 3, T, height, width)``; a patch is a tubelet of two frames, and patches are numbered by time,
    row and column. There is no class token: the head pools the remaining patches.

    Args:
        model: a ``VideoMAEForVideoClassification`` of Hugging Face. For untrained weights:
            ``iared2.from_timm("videomae_base_patch16_224")``.
        groups: D, the number of groups.
        timm_kwargs: as for `from_timm`: ``interpreter``, ``drop_path_rate`` …

    Returns:
        The model in evaluation mode, with the class names of ``model`` if it has any. Threshold 0 gives its logits.

    Raises:
        InputError: another kind of model, or one that does not pool.
    """
    tensors, found, names = _read_hugging_face(model, "videomae")
    if model.fc_norm is None:
        raise InputError(
            "this VideoMAE classifies by its first patch (use_mean_pooling=False), which the policy may drop:"
            " give one that pools"
        )
    found["patch_size"] = (model.config.tubelet_size, *found["patch_size"])
    found["fc_norm_eps"] = model.fc_norm.eps
    for query in [name for name in tensors if name.endswith(QUERY)]:
        block = query.removesuffix(QUERY)
        for kind in ("weight", "bias"):
            q, k, v = (tensors.pop(f"{block}.attn.{part}.{kind}", None) for part in ("query", "key", "value"))
            if q is not None and v is not None:
                tensors[f"{block}.attn.qkv.{kind}"] = torch.cat([q, torch.zeros_like(q) if k is None else k, v])
    arguments = {"backbone": "videomae_base_patch16_224", "groups": groups, **found, **timm_kwargs}
    return _make(arguments, tensors, names, type(model).__name__)


def _make(
    arguments: dict[str, Any], tensors: dict[str, Tensor], class_names: tuple[str, ...] | None, source: str
) -> ReducedVisionTransformer:
    weight = tensors.get("patch_embed.proj.weight")
    if weight is not None and weight.ndim == 4:  # a tubelet of one frame was a patch
        tensors["patch_embed.proj.weight"] = weight.unsqueeze(2)
    model = filled(ReducedVisionTransformer, arguments, tensors, source, lambda model: model.backbone)
    model.start_interpreters()
    model.class_names = class_names
    return model.eval()


def _read_hugging_face(model: Any, kind: str) -> tuple[dict[str, Tensor], dict[str, Any], tuple[str, ...] | None]:
    """Tensors by timm's names, timm's arguments with the spatial ``patch_size``, and class names."""
    config = getattr(model, "config", None)
    if getattr(config, "model_type", None) != kind or not hasattr(model, "classifier"):
        raise InputError(
            f"from_{kind} takes a model of transformers' {kind} with a classifier (…ForVideoClassification), not a"
            f" {type(model).__name__}"
        )
    assert config is not None
    if config.hidden_act != "gelu":
        raise InputError(f"this {kind} has the activation {config.hidden_act}, not gelu: it is not supported")
    tensors = {}
    for name, tensor in model.state_dict().items():
        for theirs, timms in NAMES.items():
            name = re.sub(theirs, timms, name)
        tensors[name] = tensor
    arguments = {
        "img_size": (config.num_frames, *_pair(config.image_size)),
        "patch_size": _pair(config.patch_size),
        "in_chans": config.num_channels,
        "embed_dim": config.hidden_size,
        "depth": config.num_hidden_layers,
        "num_heads": config.num_attention_heads,
        "num_classes": config.num_labels,
        "mlp_ratio": config.intermediate_size / config.hidden_size,
        "qkv_bias": any(name.endswith(("attn.qkv.bias", "attn.query.bias")) for name in tensors),
        "norm_eps": config.layer_norm_eps,
        "pos_drop_rate": config.hidden_dropout_prob,
        "proj_drop_rate": config.hidden_dropout_prob,
        "attn_drop_rate": config.attention_probs_dropout_prob,
        "drop_path_rate": getattr(config, "drop_path_rate", 0.0),
    }
    labels = tuple(str(config.id2label[i]) for i in range(config.num_labels))
    return tensors, arguments, None if labels[:1] == ("LABEL_0",) else labels  # the name of one that has none


def _read_original(path: Path) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """Tensors and timm's arguments of a checkpoint of facebookresearch/TimeSformer."""
    tensors = {name.removeprefix("model."): tensor for name, tensor in read_foreign(path).items()}
    if any(".temporal_" in name for name in tensors):
        raise InputError(
            f"{path} has divided space-time attention (temporal_attn): give a checkpoint of joint attention"
        )
    if "time_embed" not in tensors or tensors["time_embed"].ndim != 3:
        raise InputError(f"{path} does not fit the layout of TimeSformer's repository: time_embed is missing or odd")
    arguments = read_arguments(tensors, path)
    arguments["img_size"] = (tensors["time_embed"].shape[1], *arguments["img_size"])
    return tensors, arguments


def _pair(size: Any) -> tuple[int, int]:
    height, width = size if isinstance(size, (list, tuple)) else (size, size)
    return height, width
