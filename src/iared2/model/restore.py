"""Configuration and tensors -> model: built on the ``meta`` device first, and allocated only if the tensors fit.

The class of the model is an argument, so that the class itself can load files (hugging_face.py).
"""

from __future__ import annotations

import math
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

import torch
from timm.models import filter_pretrained_cfg
from torch import Tensor, nn

from ..errors import InputError
from . import backbone as vit
from . import file as saved
from .decide import Decision
from .names import WHOLE
from .quantize import dequantized
from .text import set_head

if TYPE_CHECKING:
    from .reduced import ReducedVisionTransformer

MAX_DEPTH, MAX_VALUES = 1000, 1 << 27
"""Limits for a model in a file: its blocks, and the numbers that it needs besides its weights."""

Model = TypeVar("Model", bound="ReducedVisionTransformer")


def build(
    kind: type[Model],
    backbone: str,
    *,
    groups: int = 3,
    pretrained: bool = False,
    interpreter: str = "sigmoid",
    dropped: str = "gone",
    text_classes: int | None = None,
    **timm_kwargs: Any,
) -> Model:
    """A model with untrained interpreters, from the name of its backbone; arguments: see `iared2.from_timm`.

    With ``text_classes``, it has a head for so many text features (text.py).

    Raises:
        InputError: see `iared2.from_timm`.
    """
    vision_transformer = vit.create(backbone, pretrained, **timm_kwargs)
    if text_classes:
        set_head(vision_transformer, text_classes)
    model = kind(vision_transformer, groups, interpreter=interpreter, dropped=dropped)
    model.model_args = timm_kwargs
    return model


def decision_of(config: dict[str, Any]) -> Decision:
    """The decision in a configuration that was checked.

    Raises:
        InputError: the numbers are no decision.
    """
    threshold = config["threshold"] if config["num_keep"] is None else None
    rest = {name: config[name] for name in ("num_keep", "max_tokens", "spread", "confidence", "scale")}
    return Decision(threshold, **rest)


def configure(model: Model, config: dict[str, Any]) -> Model:
    """Set what a configuration says beside the arguments of `build`: decision, class names, normalisation.

    Raises:
        InputError: the decision does not fit the model.
    """
    model.decision = decision_of(config)
    model.backbone.pretrained_cfg = {**model.backbone.pretrained_cfg, **config["pretrained_cfg"]}
    model.class_names = tuple(config["class_names"] or ()) or None
    return model


def checked(path: Path, tensors: dict[str, Any], config: dict[str, Any]) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """The tensors of a file that `file.read` read, as numbers, and the arguments for `build`; not that they fit.

    Raises:
        InputError: the file does not describe a model.
    """
    try:
        tensors, arguments = dequantized(tensors), saved.check(config)
        decision_of(config)
    except InputError as error:
        raise InputError(f"{path} does not describe a model: {error}") from None
    saved.check_values(tensors, path)
    return tensors, arguments


def restored(kind: type[Model], path: Path, tensors: dict[str, Any], config: dict[str, Any]) -> Model:
    """The model in a file that `file.read` read.

    Raises:
        InputError: see `checked`; or the file contradicts itself.
    """
    tensors, arguments = checked(path, tensors, config)
    return _own(configure(filled(kind, arguments, tensors, path), config))


def described(kind: type[Model], path: Path, config: Any) -> Model:
    """A model without its weights, on the ``meta`` device: its names, sizes and decision, and what counts its MACs.

    Args:
        kind: the class.
        path: where the configuration is from, for messages.
        config: what `file.config_of` returned, not trusted.

    Raises:
        InputError: it does not describe a model.
    """
    if config is None:
        raise InputError(
            f"{path} does not say which timm model it is: export it again, or run it by iared2.runtime.Engine if its"
            " backbone has no timm name"
        )
    try:
        if not isinstance(config, dict):
            raise InputError("there is no configuration")
        return _own(configure(on_meta(kind, saved.check(config)), config))
    except InputError as error:
        raise InputError(f"{path} does not describe a model: {error}; export it again") from None


def _own(model: Model) -> Model:
    """The model with a ``pretrained_cfg`` that describes its own weights."""
    # timm's entry of this name describes the weights of others
    cfg = filter_pretrained_cfg(model.backbone.pretrained_cfg, remove_source=True)
    model.backbone.pretrained_cfg = {**cfg, **WHOLE, "num_classes": model.num_classes, "license": None}
    return model


def filled(
    kind: type[Model],
    arguments: dict[str, Any],
    tensors: dict[str, Tensor],
    path: Path | str,
    part: Callable[[Model], nn.Module] = lambda model: model,
) -> Model:
    """Build a model from arguments of `build` and load weights into a part of it; allocated only if they fit.

    Raises:
        InputError: it cannot be built, is far larger than the file, or a tensor does not fit.
    """
    try:
        model = on_meta(kind, arguments)
    except InputError as error:
        raise InputError(f"{path} does not describe a model: {error}") from None
    expected = check_fit(part(model), tensors, path)
    # without a second model, whose random weights would take most of the time; copied, so that the file may change
    part(model).load_state_dict({n: t.to(expected[n].dtype, copy=True) for n, t in tensors.items()}, assign=True)
    if any(tensor.is_meta for tensor in (*model.parameters(), *model.buffers())):  # the file has not all of them
        model = build(kind, **arguments)
        part(model).load_state_dict(tensors)
    return model


def on_meta(kind: type[Model], arguments: dict[str, Any]) -> Model:
    """The model without memory for its weights; refused if it would need much memory besides them.

    Raises:
        InputError: it cannot be built, or is too large.
    """
    if (depth := arguments.get("depth", 1)) > MAX_DEPTH:
        raise InputError(f"{depth} blocks are more than {MAX_DEPTH}")
    with torch.device("meta"):
        model = build(kind, **arguments)
    # takes memory but is in no file: computed positions, and the input of the model
    size = model.pretrained_cfg["input_size"]
    if sum(b.numel() for b in model.buffers()) + math.prod(size) > MAX_VALUES:
        raise InputError(f"inputs of {size} are too large")
    return model


def load_strictly(model: nn.Module, tensors: dict[str, Tensor], path: Path | str) -> None:
    """``load_state_dict`` that names the tensor that does not fit, in one line, before any weight is changed.

    Raises:
        InputError: a tensor is missing, unexpected, or of the wrong shape or type.
    """
    check_fit(model, tensors, path)
    model.load_state_dict(tensors)


def check_fit(model: nn.Module, tensors: dict[str, Tensor], path: Path | str) -> dict[str, Tensor]:
    """Compare names, shapes and types of tensors with a model, and return those of the model.

    Raises:
        InputError: names the tensor that is missing, unexpected, or of the wrong shape or type.
    """
    expected, wrong = model.state_dict(), None
    missing, extra = sorted(expected.keys() - tensors.keys()), sorted(tensors.keys() - expected.keys())
    if missing or extra:
        first, *rest = missing or extra
        wrong = f"it {'lacks' if missing else 'has unexpected'} the tensor {first:.100}"
        wrong += f" and {len(rest)} more" if rest else ""
    for name in sorted(expected.keys() & tensors.keys()):
        have, want = tensors[name], expected[name]
        if have.shape != want.shape:
            wrong = wrong or f"{name} has shape {tuple(have.shape)}, expected {tuple(want.shape)}"
        if have.dtype != want.dtype and not (have.is_floating_point() and want.is_floating_point()):
            wrong = wrong or f"{name} has numbers of {have.dtype}, expected {want.dtype}"
    if wrong:
        raise InputError(f"{path} does not fit the model: {wrong}")
    return expected
