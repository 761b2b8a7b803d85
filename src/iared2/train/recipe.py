"""A recipe: one TOML file that says everything about a run, read into small frozen dataclasses."""

from __future__ import annotations

import dataclasses
import difflib
import sys
import types
import typing
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from ..data.images import DataConfig
from ..data.videos import ClipConfig
from ..errors import InputError
from .policy_gradient import PolicyConfig
from .reward import RewardConfig
from .trainer import StageConfig

if sys.version_info >= (3, 11):
    import tomllib
else:
    import tomli as tomllib


@dataclass(frozen=True)
class ModelConfig:
    """The backbone and its groups."""

    backbone: str = "deit_small_patch16_224"
    """timm model name."""
    pretrained: bool = False
    """Start from timm's weights of that name."""
    checkpoint: str = ""
    """Start from the backbone weights in this file (safetensors, or a .pth read with weights_only)."""
    groups: int = 3
    """D, the number of groups."""
    interpreter: str = "sigmoid"
    """How patches are scored: "sigmoid" as published, or "attention": against each other, starting as the class token's
    attention in the block that follows."""
    dropped: str = "gone"
    """What becomes of dropped patches: "gone" as published, or "merged" into the kept ones they are most like."""
    timm: dict[str, Any] = field(default_factory=dict)
    """Arguments for timm.create_model: img_size, patch_size, embed_dim, drop_path_rate …"""
    mean: tuple[float, ...] = ()
    """Channel means of the input normalisation; empty: the backbone's own."""
    std: tuple[float, ...] = ()
    """Channel deviations of the input normalisation; empty: the backbone's own."""


@dataclass(frozen=True)
class Recipe:
    """A whole run. Defaults are the published schedule of Algorithm 1 (method.md section 3)."""

    seed: int = 0
    """Every random draw of the run is a function of this."""
    precision: str = "no"
    """Autocast: "no" (float32) or "bf16"."""
    compile: bool = False
    """Compile the blocks: for a GPU. The first steps take a minute."""
    checkpoint_minutes: float = 5.0
    """Time between checkpoints; one is also written after every epoch."""
    eval_epochs: int = 1
    """Measure on held-out images every so many epochs, and at the end of each stage; 0: only then."""
    model: ModelConfig = field(default_factory=ModelConfig)
    data: DataConfig = field(default_factory=DataConfig)
    clips: ClipConfig = field(default_factory=ClipConfig)
    reward: RewardConfig = field(default_factory=RewardConfig)
    policy: PolicyConfig = field(default_factory=PolicyConfig)
    backbone: StageConfig = field(default_factory=lambda: StageConfig(epochs=0))
    """Dense training before Algorithm 1: from scratch, or of a new head."""
    policy_gradient: StageConfig = field(default_factory=lambda: StageConfig(epochs=10))
    """Each group's policy stage."""
    finetune: StageConfig = field(default_factory=lambda: StageConfig(epochs=20, lr=1e-5))
    """Each group's fine-tuning stage."""


def read_recipe(path: Path | str, settings: typing.Sequence[str] = ()) -> Recipe:
    """Read a recipe file and apply ``section.key=value`` settings, values in TOML syntax.

    Raises:
        InputError: no such file, not TOML, an unknown key (with close matches) or a value of the wrong type.
    """
    try:
        tree = tomllib.loads(Path(path).read_text(encoding="utf-8"))
    except OSError as error:
        raise InputError(f"cannot read the recipe {path}: {error.strerror or error}") from None
    except (tomllib.TOMLDecodeError, UnicodeDecodeError) as error:
        raise InputError(f"the recipe {path} is not valid TOML: {error}") from None
    for setting in settings:
        name, equals, text = setting.partition("=")
        if not equals:
            raise InputError(f"--set {setting}: expected section.key=value")
        try:
            value = tomllib.loads(f"value = {text}")["value"]
        except tomllib.TOMLDecodeError:
            value = text  # a bare word is a string
        *sections, key = name.strip().split(".")
        node = tree
        for section in sections:
            node = node.setdefault(section, {})
            if not isinstance(node, dict):
                raise InputError(f"--set {setting}: {section} is a value, not a section")
        node[key] = value
    return from_tree(Recipe, tree, "")


def from_tree(cls: type, tree: Any, where: str) -> Any:
    """A frozen dataclass from nested dictionaries, strictly: unknown keys and wrong types are InputErrors."""
    if not isinstance(tree, dict):
        raise InputError(f"recipe: [{where}] must be a section")
    names = {f.name for f in dataclasses.fields(cls)}
    hints = typing.get_type_hints(cls)
    # a section that is not in the file keeps the defaults of *its place*, e.g. finetune.epochs = 20
    defaults = cls()
    values = {}
    for key, value in tree.items():
        name = f"{where}.{key}" if where else key
        if key not in names:
            close = difflib.get_close_matches(key, names, 1)
            raise InputError(f"recipe: unknown setting {name!r}" + (f"; did you mean {close[0]!r}?" if close else ""))
        values[key] = _convert(hints[key], value, getattr(defaults, key), name)
    return dataclasses.replace(defaults, **values)


def _convert(hint: Any, value: Any, default: Any, name: str) -> Any:
    if dataclasses.is_dataclass(hint):
        if not isinstance(value, dict):
            raise InputError(f"recipe: {name} must be a section")
        merged = from_tree(type(default), value, name)
        chosen = {key: getattr(merged, key) for key in value}
        return dataclasses.replace(default, **chosen)
    origin = typing.get_origin(hint) or hint
    if origin is tuple and isinstance(value, list):
        item = typing.get_args(hint)[0]
        return tuple(_convert(item, v, None, name) for v in value)
    if origin is float and isinstance(value, int) and not isinstance(value, bool):
        return float(value)
    if (
        isinstance(origin, types.UnionType)
        or not isinstance(value, origin)
        or (origin is int and isinstance(value, bool))
    ):
        raise InputError(f"recipe: {name} = {value!r} should be of type {getattr(origin, '__name__', origin)}")
    return value
