"""A recipe: one TOML file that describes a run, parsed into small frozen dataclasses."""

from __future__ import annotations

import dataclasses
import difflib
import sys
import typing
from collections.abc import Sequence
from dataclasses import dataclass, field
from itertools import pairwise
from pathlib import Path
from reprlib import repr as short
from typing import Any

from ..data.images import DataConfig
from ..data.videos import ClipConfig
from ..errors import InputError
from ..model.baselines import KINDS as BASELINES
from ..model.reduced import ReducedVisionTransformer
from .augment import AugmentConfig
from .policy_gradient import PolicyConfig
from .reward import RewardConfig

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
    """How patches are scored: "sigmoid" as published, or "attention": relative to each other, starting as the attention
    of the class token in the following block."""
    dropped: str = "gone"
    """"gone": dropped patches are removed, as published; "merged": into the most similar kept patches."""
    timm: dict[str, Any] = field(default_factory=dict)
    """Arguments for timm.create_model: img_size, patch_size, embed_dim, drop_path_rate …"""
    mean: tuple[float, ...] = ()
    """Channel means of the input normalisation; empty: the backbone's own."""
    std: tuple[float, ...] = ()
    """Channel standard deviations of the input normalisation; empty: the backbone's own."""


@dataclass(frozen=True)
class StageConfig:
    """Length and optimisation of one stage. Linear warm-up, cosine decay to ``min_lr`` within the stage."""

    epochs: float = 10
    """Passes over the training set; 0 leaves the stage out. A fraction is allowed."""
    batch_size: int = 128
    """Images per optimiser step and process."""
    optimizer: str = "adamw"
    """Name in timm: "adamw", or "muon", which trains from scratch in fewer steps."""
    grad_accum_steps: int = 1
    """Number of parts into which the batch is split to save memory."""
    lr: float = 1e-3
    """Peak learning rate."""
    min_lr: float = 1e-6
    """Learning rate at the end."""
    weight_decay: float = 0.0
    """Decoupled weight decay; not on biases, norms and embeddings."""
    warmup_epochs: float = 0.0
    """Epochs of linear warm-up."""
    clip_grad: float = 0.0
    """Maximum norm of the gradient; 0: no clipping."""
    layer_decay: float = 1.0
    """Factor on the learning rate from each block to the one before it."""
    label_smoothing: float = 0.0
    """Share of the target spread over all classes. Not in the policy stage, like the next two."""
    mixup: float = 0.0
    """Mixup alpha; 0: none."""
    cutmix: float = 0.0
    """CutMix alpha; 0: none."""
    ema_decay: float = 0.0
    """Decay of a moving average of the backbone, which replaces it at the end; 0: none. Not in the policy stage."""
    distill: float = 0.0
    """Fine-tuning only: share of the dense model's prediction in the target, 0…1."""
    distill_features: float = 0.0
    """Fine-tuning only: weight of the squared error of the features before the classifier to those of the dense model,
    as a share of their squared length."""
    vectors_only: bool = False
    """Fine-tuning only: train biases, norms and layer scales alone. They need a learning rate of about 3e-4."""
    patch_drop: float = 0.0
    """Dense stage only: share of patches per image that are left out at random, falling to 0 at the end of the stage.
    Saves time at first."""
    augment: AugmentConfig = field(default_factory=AugmentConfig)
    """Augmentation of the images in this stage."""


@dataclass(frozen=True)
class Recipe:
    """A training run. The defaults are the published schedule of Algorithm 1 (method.md section 3)."""

    seed: int = 0
    """Every random draw of the run is a function of this."""
    precision: str = "no"
    """Autocast: "no" (float32) or "bf16", which an x86 processor without AVX-512 replaces by float32."""
    compile: bool = False
    """Compile the blocks, for a GPU. The first steps take a minute."""
    checkpoint_minutes: float = 5.0
    """Minutes between checkpoints; one is also written after every epoch."""
    eval_epochs: int = 1
    """Evaluate on held-out images every so many epochs, and at the end of each stage; 0: only then."""
    model: ModelConfig = field(default_factory=ModelConfig)
    data: DataConfig = field(default_factory=DataConfig)
    clips: ClipConfig = field(default_factory=ClipConfig)
    reward: RewardConfig = field(default_factory=RewardConfig)
    policy: PolicyConfig = field(default_factory=PolicyConfig)
    backbone: StageConfig = field(default_factory=lambda: StageConfig(epochs=0))
    """Dense training before Algorithm 1: from scratch, or with a new head."""
    policy_gradient: StageConfig = field(default_factory=lambda: StageConfig(epochs=10))
    """The policy stage of each group."""
    finetune: StageConfig = field(default_factory=lambda: StageConfig(epochs=20, lr=1e-5))
    """The fine-tuning stage of each group."""


RENAMED = {"accumulate": "grad_accum_steps", "graded": "soft_reward", "leave_one_out": "rloo"}
"""Settings of earlier versions, which are still read."""

NOT_TIMMS = ("backbone", "groups", "interpreter", "dropped", "num_classes")
"""Arguments of the model that are not set in model.timm."""

WORDS: dict[str, tuple[str, ...]] = {
    "precision": ("no", "bf16"),
    "interpreter": ReducedVisionTransformer.interpreter.words,
    "dropped": ReducedVisionTransformer.dropped.words,
    "label": ("true", "dense"),
    "decisions": ("learned", "gumbel", *BASELINES),
}
"""The values of settings that take one of a few words, by the name of the setting."""

RANGES: dict[str, tuple[float, float]] = {
    **dict.fromkeys(("hflip", "random_erasing", "color_jitter", "label_smoothing", "ema_decay", "distill"), (0, 1)),
    **dict.fromkeys(("drop_rate", "pos_drop_rate", "patch_drop_rate", "proj_drop_rate"), (0, 0.99)),
    **dict.fromkeys(("attn_drop_rate", "drop_path_rate", "holdout", "patch_drop"), (0, 0.99)),
    "min_scale": (1e-4, 1),
    "std": (1e-4, 1e4),
    **dict.fromkeys(("temperature", "layer_decay"), (1e-3, 1)),
    **dict.fromkeys(("batch_size", "grad_accum_steps"), (1, 2**17)),
    **dict.fromkeys(("groups", "depth", "samples", "test_clips"), (1, 1000)),
    **dict.fromkeys(("lr", "min_lr", "weight_decay", "mixup", "cutmix"), (0, 100)),
    **dict.fromkeys(("eval_epochs", "checkpoint_minutes", "clip_grad", "span"), (0, 10**6)),
    **dict.fromkeys(("epochs", "warmup_epochs"), (0, 999)),
    **dict.fromkeys(("tau", "gumbel_weight"), (0, 10**4)),
    "mean": (-(10**4), 10**4),
    **dict.fromkeys(("divergence", "distill_features"), (0, 10**4)),
    "keep": (1e-6, 1),
    "spread": (0, 10),
    "seed": (0, 2**31 - 1),
    "workers": (0, 256),
    "clutter": (0, 4096),
    "timm": (-(2**16), 2**16),
}
"""Minimum and maximum of numbers, by the name of the setting; for model.timm, by the name of the argument."""


def read_recipe(path: Path | str, settings: Sequence[str] = ()) -> Recipe:
    """Read a recipe file and apply ``section.key=value`` settings, values in TOML syntax.

    Raises:
        InputError: no such file, not TOML, an unknown key (with close matches) or a value of the wrong type.
    """
    if Path(path).exists() and not Path(path).is_file():  # a pipe, or a device, may never end
        raise InputError(f"the recipe {path} is not a file")
    try:
        tree = tomllib.loads(Path(path).read_text(encoding="utf-8"))
    except OSError as error:
        raise InputError(f"cannot read the recipe {path}: {error.strerror or error}") from None
    except (ValueError, RecursionError) as error:  # ValueError: also not UTF-8, or a number of 5,000 digits
        raise InputError(f"the recipe {path} is not valid TOML: {error}") from None
    for setting in settings:
        name, equals, text = setting.partition("=")
        if not equals:
            raise InputError(f"--set {setting}: expected section.key=value")
        try:
            value = tomllib.loads(f"value = {text}")["value"]
        except (ValueError, RecursionError):
            value = text  # a bare word is a string
        *sections, key = name.strip().split(".")
        node = tree
        for section in sections:
            node = node.setdefault(section, {})
            if not isinstance(node, dict):
                raise InputError(f"--set {setting}: {section} is a value, not a section")
        node[key] = value
    return _section(Recipe(), tree, "")


def _section(defaults: Any, tree: Any, where: str) -> Any:
    """``defaults`` with the values of ``tree``, strictly: unknown keys and wrong types are InputErrors."""
    if not isinstance(tree, dict):
        raise InputError(f"recipe: {where or 'it'} must be a section")
    hints = typing.get_type_hints(type(defaults))
    values: dict[str, Any] = {}
    for key, value in tree.items():
        name = f"{where}.{key}" if where else key
        if (new := RENAMED.get(key)) in hints:
            if new in tree:
                raise InputError(f"recipe: {name} is the old name of {new}; give only {new}")
            print(f"note: recipe: {name} is now called {new}", file=sys.stderr)
            key = new
        if key not in hints:
            close = difflib.get_close_matches(key, hints, 1)
            hint = f"; did you mean {close[0]!r}?" if close else ""
            raise InputError(f"recipe: unknown setting {name[:99]!r}{hint}")
        values[key] = _convert(hints[key], value, getattr(defaults, key), name)
    return dataclasses.replace(defaults, **values)


def _convert(hint: Any, value: Any, default: Any, name: str) -> Any:
    if dataclasses.is_dataclass(hint):
        return _section(default, value, name)
    kind = typing.get_origin(hint) or hint
    if kind is tuple and isinstance(value, list):
        item = typing.get_args(hint)[0]
        return tuple(_convert(item, v, None, name) for v in value)
    if type(value) is int and abs(value) >= 2**63:
        raise InputError(f"recipe: {name} is too large a number")
    if kind is float and type(value) is int:
        return float(value)
    if type(value) is not kind:
        called = {tuple: "list", dict: "table", str: "string"}.get(kind, kind.__name__)
        raise InputError(f"recipe: {name} = {short(value)} should be of type {called}")
    return value


def check(recipe: Recipe) -> None:
    """Refuse invalid settings.

    Raises:
        InputError: names the setting and what to give instead.
    """
    _check_values(recipe)
    model, policy, groups = recipe.model, recipe.policy, recipe.model.groups
    learned, shares = policy.decisions == "learned", f"{groups} shares"
    falls = all(b <= a for a, b in pairwise(policy.keep))
    fixed = [key for key in model.timm if key in NOT_TIMMS or key.startswith(("pretrained", "checkpoint"))]
    rules = [
        (bool(fixed), f"model.timm cannot set {', '.join(fixed)}; [model] and the data do"),
        (len(model.mean) != len(model.std), "model.mean and model.std go together, one number per channel each"),
        (
            not (model.pretrained or model.checkpoint or recipe.backbone.epochs > 0),
            "Algorithm 1 needs a trained backbone; set model.pretrained, model.checkpoint or backbone.epochs",
        ),
        (
            not falls or len(policy.keep) not in (0, groups),
            f"policy.keep = {list(policy.keep)} should be {shares} in (0, 1] that do not rise",
        ),
        (policy.joint and not policy.keep, f"policy.joint needs policy.keep, {shares}"),
        (policy.joint and policy.decisions == "gumbel", 'policy.joint does not go with policy.decisions = "gumbel"'),
        (policy.equal_counts and not policy.keep, f"policy.equal_counts needs policy.keep, {shares}"),
        (not learned and not policy.keep, f"policy.decisions = {policy.decisions!r} needs policy.keep, {shares}"),
        (
            policy.decisions == "gumbel" and (model.dropped != "gone" or policy.equal_counts),
            'policy.decisions = "gumbel" masks patches of a batch; set model.dropped = "gone" and'
            " policy.equal_counts = false",
        ),
        (policy.rloo and policy.samples < 2, "policy.samples = 1 should be at least 2 for policy.rloo"),
    ]
    for name in ("backbone", "policy_gradient", "finetune"):
        stage: StageConfig = getattr(recipe, name)
        mixes = stage.mixup or stage.cutmix
        rules += [
            (stage.grad_accum_steps > stage.batch_size, f"[{name}] grad_accum_steps must be in 1…batch_size"),
            (
                any(0 < a < 1e-3 for a in (stage.mixup, stage.cutmix)),
                f"[{name}] mixup and cutmix are 0 or at least 0.001",
            ),
            (bool(mixes and stage.batch_size % 2), f"[{name}] mixes pairs of images; give an even batch_size"),
        ]
    for broken, message in rules:
        if broken:
            raise InputError(f"recipe: {message}")


def _check_values(value: Any, name: str = "", key: str = "") -> None:
    """Check that every number is finite and in its range, and every word is known; ``key`` is the setting."""
    if dataclasses.is_dataclass(value):
        value = vars(value)
    if isinstance(value, dict):
        for k, item in value.items():
            _check_values(item, f"{name}.{k}" if name else k, k if k in RANGES or key != "timm" else key)
    elif isinstance(value, (list, tuple)):
        for item in value:
            _check_values(item, name, key)
    elif isinstance(value, str):
        if "\0" in value or value not in WORDS.get(key, (value,)):
            choice = f"one of {', '.join(WORDS[key])}" if key in WORDS else "text"
            raise InputError(f"recipe: {name} = {short(value)} should be {choice}")
    elif isinstance(value, (int, float)) and not isinstance(value, bool):
        low, high = RANGES[key]
        if not low <= value <= high:  # so is what is not a number
            raise InputError(f"recipe: {name} = {value} should be in {low}…{high}")
    elif not isinstance(value, bool):
        raise InputError(f"recipe: {name} = {short(value)} should be a number, text, or a list of them")
