"""Our models by name in timm: ``timm.create_model("iared2_…")``. Importing this module registers them.

``import iared2`` imports this module as soon as timm is imported (``iared2/__init__.py``), perhaps while a module of
the package imports timm. So the top of this file imports only modules that import nothing of the package but errors.

- ``iared2_<name>``, for each supported ``<name>`` of timm: untrained interpreters on timm's weights.
- The model in the box, by a name that follows from its file: `BOX_NAME`. Its weights are read from the package.
- ``hf-hub:user/model`` and ``local-dir:folder``, for what ``model.save_pretrained`` writes: timm reads the architecture
  from ``config.json``; everything else is read, and checked, by ``iared2.load``.
"""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import replace
from importlib.resources import files
from pathlib import Path
from typing import TYPE_CHECKING, Any

from safetensors import safe_open
from timm.layers import is_scriptable
from timm.models import (
    PretrainedCfg,
    adapt_input_conv,
    generate_default_cfgs,
    get_arch_pretrained_cfgs,
    list_models,
    register_model,
    resolve_pretrained_cfg,
)

from .errors import InputError
from .model import video_transformer  # noqa: F401  # registers the backbones for clips
from .model.names import PREFIX, WHOLE, short_name, timm_config

if TYPE_CHECKING:
    from .model.reduced import ReducedVisionTransformer

MODULES = "vision_transformer", "deit", "eva", "video_transformer"
"""timm's modules of supported models, and ours."""
UNSUPPORTED = "vit_dlittle_*", "vit_dpwee_*", "vit_dwee_*"
"""Models of these modules whose attention is another; `model.backbone.check_supported` says why."""
BOX_TAG = "box"
PATCHES = "patch_embed.proj.weight"
DECISION = "threshold", "num_keep", "max_tokens", "spread", "confidence", "scale"


def create(name: str, pretrained: bool = False, **kwargs: Any) -> ReducedVisionTransformer:
    """What ``timm.create_model(name)`` calls.

    Args:
        name: ``iared2_…``, without a tag.
        pretrained: load the weights.
        kwargs: ``pretrained_cfg`` and ``pretrained_cfg_overlay``, as timm gives them; ``threshold``, ``num_keep``,
            ``max_tokens``, ``spread``, ``confidence`` and ``scale``, see `ReducedVisionTransformer`; all others as for
            `iared2.from_timm`.

    Raises:
        InputError: the arguments cannot be served, or the weights cannot be read.
    """
    from .pretrained.build import from_timm

    cfg = resolve_pretrained_cfg(name, kwargs.pop("pretrained_cfg", None), kwargs.pop("pretrained_cfg_overlay", None))
    kwargs.pop("pretrained_model_args", None)  # timm repeats here what it read from config.json
    backbone = name.removeprefix(PREFIX)
    if kwargs.pop("features_only", False):
        raise InputError(
            f"{name}: features_only=True needs the features of every patch, and dropped patches have none: use the"
            f" model without {PREFIX!r}, or model.forward_features(images), where the rows of dropped patches are zero"
        )
    if is_scriptable():
        raise InputError(f"{name}: TorchScript cannot follow how many patches are left: use `iared2 export`")
    decision = {key: kwargs.pop(key) for key in DECISION if key in kwargs}
    if cfg.tag == BOX_TAG or cfg.source in ("hf-hub", "local-dir"):
        model = _trained(cfg, pretrained, kwargs)
    else:
        model = from_timm(backbone, pretrained=pretrained, pretrained_cfg=replace(cfg, architecture=backbone), **kwargs)
    thresholds, num_keep = decision.pop("threshold", None), decision.pop("num_keep", None)
    if thresholds is not None or num_keep is not None:  # they replace each other
        decision |= {"thresholds": thresholds, "num_keep": num_keep}
    model.decision = model.decision.but(**decision)
    return model


def _trained(cfg: PretrainedCfg, pretrained: bool, kwargs: dict[str, Any]) -> ReducedVisionTransformer:
    """A model that was saved by us, or with ``kwargs`` or without ``pretrained`` a new one with what fits of it."""
    from .model import file, restore
    from .model.hugging_face import fetch
    from .model.reduced import ReducedVisionTransformer
    from .pretrained.checkpoint import fitted, load

    cache_dir = kwargs.pop("cache_dir", None)
    source = cfg.file if cfg.source == "local-dir" else fetch(cfg.hf_hub_id, cache_dir=cache_dir)
    model = saved = load(source)
    if kwargs or not pretrained:
        config = file.config_of(saved)
        if kwargs.get("num_classes", saved.num_classes) == saved.num_classes:
            kwargs.pop("num_classes", None)  # of text features, timm's is another
        else:
            config |= {"text_classes": None, "class_names": None, "confidence": 0.0, "scale": 1.0}
        model = restore.build(ReducedVisionTransformer, **{**file.check(config), **kwargs})
        in_chans, *_ = model.pretrained_cfg["input_size"]  # before `configure` sets that of the file
        if model.num_groups == saved.num_groups:
            restore.configure(model, config)
        if pretrained:
            tensors = saved.backbone.state_dict()
            if in_chans != saved.pretrained_cfg["input_size"][0]:
                tensors[PATCHES] = adapt_input_conv(in_chans, tensors[PATCHES])
            restore.load_strictly(model.backbone, fitted(tensors, model.backbone), source)
            restore.load_strictly(model.interpreters, saved.interpreters.state_dict(), source)
    model.backbone.pretrained_cfg |= WHOLE
    return model


def _entrypoint(name: str) -> Callable[..., ReducedVisionTransformer]:
    def entrypoint(pretrained: bool = False, **kwargs: Any) -> ReducedVisionTransformer:
        return create(name, pretrained, **kwargs)

    entrypoint.__name__ = entrypoint.__qualname__ = name
    entrypoint.__doc__ = f"`create` of {name}."
    return entrypoint


def _box() -> tuple[str, PretrainedCfg]:
    """The name of the model in the box, and its configuration for timm, from the header of its file alone."""
    folder = Path(str(files("iared2") / "box"))
    with safe_open(folder / "model.safetensors", "np") as box:
        config = json.loads(box.metadata()["iared2"])
    known = {"file": str(folder), "source": "local-dir", "license": "apache-2.0"}
    return f"{short_name(config)}.{BOX_TAG}", PretrainedCfg(**timm_config(config), **known)


BOX_NAME, _box_cfg = _box()
_names = list_models(module=MODULES, exclude_filters=UNSUPPORTED)
default_cfgs = generate_default_cfgs(
    {BOX_NAME: _box_cfg}
    | {PREFIX + tagged: cfg for name in _names for tagged, cfg in get_arch_pretrained_cfgs(name).items()}
)
"""By the names of architectures; ``register_model`` looks here."""
for _name in sorted({BOX_NAME.split(".")[0], *(PREFIX + name for name in _names)}):
    register_model(_entrypoint(_name))
