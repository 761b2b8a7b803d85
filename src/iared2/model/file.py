"""The file format: one safetensors file with the configuration as JSON in its header, so they stay together.

Owns the valid entries of a model's configuration. A file is not trusted: only what ``check`` returns is used to build
a model. It returns no path, no URL, no class, and no size without a bound.
"""

from __future__ import annotations

import json
import os
import re
from functools import cache
from pathlib import Path
from types import NoneType, UnionType
from typing import TYPE_CHECKING, Any, Literal, Union, get_args, get_origin, get_type_hints

import timm
import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from timm.models.eva import Eva
from timm.models.vision_transformer import VisionTransformer
from torch import Tensor

from ..atomic import whole
from ..errors import InputError
from .block import attentions
from .quantize import quantized
from .text import TextClassifier, embedding_of, set_head
from .video_transformer import VideoTransformer

if TYPE_CHECKING:
    from .reduced import ReducedVisionTransformer

LARGEST = 1 << 24
"""Bound of all numbers in a configuration."""
TIMM_ERRORS = ArithmeticError, AssertionError, AttributeError, LookupError, OSError, RuntimeError, TypeError, ValueError
"""Exceptions that timm raises for inconsistent arguments."""
LOADER = {
    *("pretrained", "pretrained_cfg", "pretrained_cfg_overlay", "checkpoint_path", "cache_dir", "pretrained_strict"),
    *("scriptable", "exportable", "no_jit", "use_naflex", "out_indices", "device", "dtype"),
}
"""Arguments that describe the source of weights, not the model; files of version 0.1.0 may contain them."""
POLICY = "interpreters."
"""Prefix of the tensors of the policy."""
FINGERPRINT = "fingerprint"
FAMILIES: dict[str, tuple[type, ...]] = {
    "timm.models.vision_transformer": (VisionTransformer,),
    "timm.models.deit": (VisionTransformer,),
    "timm.models.eva": (Eva,),
}
"""The modules of timm whose models are supported, and the classes whose arguments these take."""
CONFIG: dict[str, Any] = {
    "architecture": str,
    "model_args": dict,
    "groups": int,
    "interpreter": str,
    "dropped": str,
    "threshold": float | list[float] | None,
    "num_keep": list[int] | None,
    "max_tokens": int | None,
    "spread": float,
    "confidence": float,
    "scale": float,
    "class_names": list[str] | None,
    "text_classes": int | None,
    "pretrained_cfg": dict,
}
PRETRAINED_CFG: dict[str, Any] = {
    "input_size": list[int] | None,
    "mean": list[float] | None,
    "std": list[float] | None,
    "interpolation": Literal["bilinear", "bicubic", "nearest", "lanczos", "box", "hamming"] | None,
    "crop_pct": float | None,
    "holdout": float | None,  # share that training held out: data/images.py finds it again
}


def save(model: ReducedVisionTransformer, path: Path | str, half: bool = False, int8: bool = False) -> None:
    """Write weights and configuration to one file, whole or not at all.

    Args:
        model: the model.
        path: the file.
        half: store float16, at half the size. Loading gives float32 again, but rounded: evaluate the loaded model.
        int8: store matrices in 8 bits, at a quarter of the size (quantize.py); loading rounds as with ``half``.

    Raises:
        InputError: the file cannot be written, or the backbone cannot be rebuilt from its timm name.
    """
    tensors = model.state_dict()
    if half:
        tensors = {name: t.half() if t.is_floating_point() else t for name, t in tensors.items()}
    tensors = quantized(tensors) if int8 else tensors
    check_values(tensors, path)  # as they are stored: halves overflow
    write(path, tensors, config_of(model))


def save_policy(model: ReducedVisionTransformer, path: Path | str) -> None:
    """Write the interpreters alone, with the configuration of the model and a `fingerprint` of the backbone.

    Raises:
        InputError: as for `save`.
    """
    tensors = {name: t for name, t in model.state_dict().items() if name.startswith(POLICY)}
    check_values(tensors, path)
    config = {**config_of(model), FINGERPRINT: fingerprint(model.backbone)}
    if config["text_classes"]:  # they are not the policy's
        config |= {"text_classes": None, "class_names": None, "confidence": 0.0, "scale": 1.0}
    write(path, tensors, config)


def fingerprint(backbone: Any) -> list[float]:
    """Mean magnitudes of the weights of each block and of the head: alike for the same weights rounded to 8 bits."""
    parts = [list(part.parameters()) for part in (*backbone.blocks, backbone.head)]
    with torch.no_grad():
        means = [torch.cat([p.float().abs().flatten() for p in part]).mean().item() for part in parts if part]
    return [round(mean, 6) for mean in means]


def write(path: Path | str, tensors: dict[str, Tensor], config: dict[str, Any]) -> None:
    """Write tensors and configuration to ``path``, whole or not at all.

    Raises:
        InputError: the folder does not exist or cannot be written.
    """
    with whole(path, errors=SafetensorError) as file:
        write_tensors(file, tensors, {"iared2": json.dumps(config)})


def write_tensors(path: Path, tensors: dict[str, Tensor], header: dict[str, str]) -> None:
    """Write a safetensors file. Raises OSError and SafetensorError."""
    save_file({name: t.detach().cpu().contiguous() for name, t in tensors.items()}, path, header)


def is_safetensors(path: Path | str) -> bool:
    """Whether a file has the header of a safetensors file; its name does not matter.

    Raises:
        InputError: there is no such file, or it cannot be read.
    """
    if not os.path.isfile(path):
        raise InputError(f"there is no checkpoint {path}: give a file of model.save() or the folder of a training run")
    try:
        with open(path, "rb") as file:
            return file.read(9)[8:] == b"{"
    except OSError as error:
        raise InputError(f"{path} cannot be read: {error.strerror}") from None


def read(path: Path | str) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """Read what ``write`` wrote, or a ``model.safetensors`` whose configuration is in the ``config.json`` beside it.

    Raises:
        InputError: no such file, or not a file of this format.
    """
    try:
        with safe_open(path, "pt") as file:
            metadata = file.metadata() or {}
            # Transformers puts the name of the attribute before ours
            tensors = {name.removeprefix("iared2."): file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
        config = json.loads(metadata["iared2"]) if "iared2" in metadata else read_config(Path(path).parent)
    except (SafetensorError, OSError, ValueError, RecursionError) as error:
        raise InputError(f"{path} is not a readable safetensors file ({error})") from None
    if not isinstance(config, dict):
        raise InputError(
            f"{path} is a safetensors file, but not one that iared2 saved: it has no configuration, nor is there a"
            " config.json with one beside it"
        )
    return tensors, config


def read_config(folder: Path) -> Any:
    """The entry ``iared2`` of a folder's ``config.json``, not checked; None if there is none.

    Raises:
        InputError: the file cannot be read, or is no JSON.
    """
    path = folder / "config.json"
    if not path.is_file():
        return None
    try:
        if path.stat().st_size > LARGEST:
            raise ValueError(f"it is larger than {LARGEST:,} bytes")
        config = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError) as error:
        raise InputError(f"{path} cannot be read: {error}") from None
    return config.get("iared2") if isinstance(config, dict) else None


def check_values(tensors: dict[str, Any], path: Path | str) -> None:
    """Refuse everything but tensors of finite real numbers.

    Raises:
        InputError: names the tensor.
    """
    for name, tensor in tensors.items():
        is_plain = isinstance(tensor, Tensor) and tensor.layout is torch.strided and not tensor.is_meta
        if not is_plain or tensor.is_quantized or tensor.is_complex() or not tensor.numel():
            kind = getattr(tensor, "dtype", type(tensor).__name__)
            raise InputError(f"{path} cannot be used: {name!r:.100} is empty or no tensor of real numbers ({kind})")
        if tensor.is_floating_point() and (tensor.dtype.itemsize < 2 or not tensor.isfinite().all()):
            raise InputError(f"{path} cannot be used: {name!r:.100} is not finite (NaN or infinite), or of 8 bits")


def config_of(model: ReducedVisionTransformer) -> dict[str, Any]:
    """The configuration that ``iared2.load`` needs besides the weights, as JSON types.

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
    given = {**model.model_args, **getattr(backbone, "_model_args", {})}
    args = {key: value for key, value in given.items() if key in architectural(name)}
    text_classes = model.num_classes if isinstance(backbone.head, TextClassifier) else None
    num_classes = embedding_of(backbone)[1] if text_classes else model.num_classes
    args |= {"num_classes": num_classes, "global_pool": backbone.global_pool}
    args |= {"img_size": backbone.patch_embed.img_size, "in_chans": cfg["input_size"][0]}
    config = {
        "architecture": name,
        "model_args": args,
        "groups": model.num_groups,
        "interpreter": model.interpreter,
        "dropped": model.dropped,
        "threshold": model.thresholds,
        "num_keep": model.num_keep,
        "max_tokens": model.max_tokens,
        "spread": model.spread,
        "confidence": model.confidence,
        "scale": model.scale,
        "class_names": model.class_names,
        "text_classes": text_classes,
        "pretrained_cfg": {key: cfg.get(key) for key in PRETRAINED_CFG},
    }
    try:
        check(config)
        with torch.device("meta"):
            twin = timm.create_model(name, pretrained=False, **args)
            if text_classes:
                set_head(twin, text_classes)
    except (InputError, *TIMM_ERRORS) as error:
        raise InputError(f"this model cannot be written to a file, which could not rebuild it: {error}") from None
    if _description(twin) != _description(backbone):
        raise InputError(f"this backbone is not timm's {name} with {args}: make it by iared2.from_timm(name, ...)")
    return config


def check(config: dict[str, Any]) -> dict[str, Any]:
    """The arguments for `iared2.from_timm` in a configuration, checked: all known, of the right type, within bounds.

    Raises:
        InputError: an entry of the configuration is missing, unknown or invalid; names the entry.
    """
    # the first files did not have all of these
    late = {"interpreter": "sigmoid", "dropped": "gone", "num_keep": None, "max_tokens": None, "spread": 0.0}
    late |= {"confidence": 0.0, "scale": 1.0, "text_classes": None}
    config |= late | config
    if missing := CONFIG.keys() - config.keys():
        raise InputError(f"{min(missing)} is missing")
    _check_types(config, {**CONFIG, FINGERPRINT: list[float]})
    _check_types(config["pretrained_cfg"], PRETRAINED_CFG, "pretrained_cfg.")
    args = {key: value for key, value in config["model_args"].items() if key not in LOADER}

    architecture = config["architecture"]
    if not re.fullmatch(r"[\w.]+", architecture) or not timm.is_model(architecture):
        raise InputError(f"timm has no model {architecture!r:.100}")
    module = timm.model_entrypoint(architecture).__module__
    if module.startswith("timm.") and module not in FAMILIES:
        raise InputError(f"timm's {architecture} is not a plain vision transformer")
    _check_types(args, architectural(architecture), "model_args.")

    groups, names, text_classes = config["groups"], config["class_names"], config["text_classes"]
    num_classes = text_classes or args.get("num_classes")
    mean, std = (config["pretrained_cfg"].get(key) or [1.0] for key in ("mean", "std"))
    if len(mean) != len(std) or min(std) <= 0 or (args.get("in_chans", 3) == 3 and len(mean) != 3):
        raise InputError(f"pretrained_cfg.mean is {mean}, std {std}: give one number per channel, std above 0")
    if not 0 <= (config["pretrained_cfg"].get("holdout") or 0.0) < 1:
        raise InputError(f"pretrained_cfg.holdout is {config['pretrained_cfg']['holdout']}, not a share in [0, 1)")
    if names and len(names) != num_classes:
        raise InputError(f"{len(names)} class names for {num_classes} classes")
    for name in ("threshold", "num_keep"):
        if isinstance(config[name], (list, tuple)) and len(config[name]) != groups:
            raise InputError(f"{name} has {len(config[name])} numbers for {groups} groups")

    kept = ("groups", "interpreter", "dropped")
    if text_classes is not None:
        args["text_classes"] = text_classes
    return {"backbone": architecture, **{key: config[key] for key in kept}, **args}


@cache
def architectural(name: str) -> dict[str, Any]:
    """The arguments of a timm model that a file can contain, and their types, from the signatures."""
    kinds = FAMILIES.get(timm.model_entrypoint(name).__module__, (VisionTransformer, VideoTransformer))
    return {key: hint for kind in kinds for key, hint in get_type_hints(kind.__init__).items()}


def _check_types(values: dict[str, Any], hints: dict[str, Any], where: str = "") -> None:
    for name, value in values.items():
        if not _is(value, hints.get(name)):
            raise InputError(f"{where}{name} should not be {value!r:.80}")


def _is(value: Any, hint: Any) -> bool:
    """Whether a JSON value is of this type; never true for types that JSON lacks, such as a class."""
    kind, inner = get_origin(hint), get_args(hint)
    if kind in (Union, UnionType):
        return any(_is(value, one) for one in inner)
    if kind in (list, tuple):
        return isinstance(value, (list, tuple)) and all(_is(one, inner[0]) for one in value)
    if kind is Literal:
        return value in inner
    if isinstance(value, bool):
        return hint is bool
    if hint in (int, bool, float):
        lowest, highest = -LARGEST if hint is float else 0, 1 if hint is bool else LARGEST
        return isinstance(value, (int, float) if hint is float else int) and lowest <= value <= highest
    return hint in (str, dict, NoneType) and isinstance(value, hint)


def _description(backbone: Any) -> list[Any]:
    """Everything that defines a backbone except its weights: layers and settings, shapes, heads, pooling."""
    shapes = [(name, tensor.shape) for name, tensor in backbone.state_dict().items()]
    heads = [attn.num_heads for block in backbone.blocks for attn in attentions(block)]
    rope = {} if getattr(backbone, "rope", None) is None else vars(backbone.rope)
    angles = {key: value for key, value in rope.items() if key[0] != "_" and key != "training"}
    return [str(backbone), shapes, heads, angles, backbone.global_pool, getattr(backbone, "pool_include_prefix", None)]
