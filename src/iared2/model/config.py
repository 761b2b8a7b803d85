"""A model -> the JSON from which ``iared2.load`` rebuilds it."""

from __future__ import annotations

import json
from typing import Any

import timm
import torch

from ..errors import InputError

TIMM_KEYS = "input_size", "mean", "std", "interpolation", "crop_pct"


def config_of(model: Any) -> dict[str, Any]:
    """What ``iared2.load`` needs besides the weights, as JSON types.

    Args:
        model: a `ReducedVisionTransformer`.

    Raises:
        InputError: the backbone has no timm name, or its name and arguments do not give this backbone.
    """
    backbone, cfg = model.backbone, model.pretrained_cfg
    if not cfg.get("architecture"):
        raise InputError(
            "this backbone has no timm name, so a file could not rebuild it: make it by iared2.from_timm(name)"
        )
    name = ".".join(filter(None, (cfg["architecture"], cfg.get("tag"))))
    # timm >= 1.0.31 keeps the arguments itself, and adds to them what later changes of the model imply
    args = {**model.model_args, **getattr(backbone, "_model_args", {})}
    args |= {"num_classes": model.num_classes, "global_pool": backbone.global_pool}
    args["img_size"] = backbone.patch_embed.img_size
    try:
        json.dumps(args)
    except TypeError as error:
        raise InputError(f"the arguments of {name} cannot be written to a file: {error}") from None
    with torch.device("meta"):
        twin = timm.create_model(name, pretrained=False, **args)
    if _description(twin) != _description(backbone):
        raise InputError(f"this backbone is not timm's {name} with {args}: make it by iared2.from_timm(name, ...)")
    return {
        "architecture": name,
        "model_args": args,
        "groups": model.num_groups,
        "interpreter": model.interpreter,
        "dropped": model.dropped,
        "threshold": model.thresholds,
        "num_keep": None if model.num_keep is None else [int(n) for n in model.num_keep],
        "max_tokens": None if model.max_tokens is None else int(model.max_tokens),
        "class_names": model.class_names,
        "pretrained_cfg": {key: cfg.get(key) for key in (*TIMM_KEYS, "holdout")},
    }


def _description(backbone: Any) -> list[Any]:
    """All that makes a backbone what it is but its weights: layers and settings, shapes, heads, pooling."""
    shapes = [(name, tensor.shape) for name, tensor in backbone.state_dict().items()]
    heads = [block.attn.num_heads for block in backbone.blocks]
    return [str(backbone), shapes, heads, backbone.global_pool, backbone.pool_include_prefix]
