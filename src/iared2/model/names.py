"""What timm calls a model of ours, and what it wants to know. Imports nothing of ours: hub.py may run early."""

from __future__ import annotations

import re
from typing import Any

PREFIX = "iared2_"
"""What precedes timm's name of the backbone in the name of the reduced model."""
WHOLE = {"crop_pct": 1.0, "crop_mode": "squash"}
"""What timm calls it if an image is resized as a whole, without keeping its proportions: `data.batches` does so."""


def timm_name(config: dict[str, Any]) -> str:
    """The registered name of the architecture, without a tag."""
    return PREFIX + config["architecture"].split(".")[0]


def short_name(config: dict[str, Any]) -> str:
    """A name by the sizes that the model really has: ``iared2_vit_small_patch14_224``."""
    architecture, args = config["architecture"], config["model_args"]
    patch = args.get("patch_size") or re.findall(r"_patch(\d+)", architecture)[0]
    sizes = [value[0] if isinstance(value, (list, tuple)) else value for value in (patch, args["img_size"])]
    return "{}{}_patch{}_{}".format(PREFIX, "_".join(architecture.split("_")[:2]), *sizes)


def timm_config(config: dict[str, Any]) -> dict[str, Any]:
    """Entries of timm's ``PretrainedCfg``. Our transform takes the whole image, so the crop is 100 %, squashed."""
    known = {key: config["pretrained_cfg"].get(key) for key in ("input_size", "mean", "std", "interpolation")}
    return {key: value for key, value in known.items() if value is not None} | {
        **WHOLE,
        "fixed_input_size": True,
        "num_classes": config.get("text_classes") or config["model_args"]["num_classes"],
        "first_conv": "backbone.patch_embed.proj",
        "classifier": "backbone.head",
    }
