"""Algorithm 1: for each group, train its interpreter, then the blocks that follow it.

Numbered deviations from the paper:

1. The policy stage's draws and every augmentation are functions of (seed, epoch, sample), so that a run which is killed
   and resumed ends with the same weights, bit for bit, on a CPU.
2. An optional first stage trains the dense backbone, for those who do not start from pretrained weights.
"""

from __future__ import annotations

import dataclasses
from functools import partial
from pathlib import Path
from typing import Any

import torch
from accelerate import Accelerator
from torch import Tensor

from ..checkpoint import load_backbone_weights
from ..data import open_samples
from ..errors import InputError
from ..model.reduced import ReducedVisionTransformer, from_timm
from .finetune import FinetuneStage
from .log import RunLog
from .loop import Run, Stage
from .policy_gradient import PolicyGradientStage
from .recipe import Recipe
from .state import Position, load_state


def stages_of(recipe: Recipe, model: ReducedVisionTransformer) -> list[Stage]:
    """The stages in the order in which they run; those of 0 epochs are left out."""
    classes, reward = model.num_classes, recipe.reward
    dense = partial(FinetuneStage, model, None, classes)
    stages = [Stage("backbone", None, recipe.backbone, dense, model.backbone, policy=False)]
    for i, interpreter in enumerate(model.interpreters):
        policy, finetune = partial(PolicyGradientStage, model, i, reward), partial(FinetuneStage, model, i, classes)
        stages += [
            Stage(f"policy_gradient {i + 1}", i, recipe.policy_gradient, policy, interpreter, policy=True),
            Stage(f"finetune {i + 1}", i, recipe.finetune, finetune, model.backbone, policy=False),
        ]
    return [stage for stage in stages if stage.config.epochs > 0]


def build_model(recipe: Recipe, num_classes: int) -> ReducedVisionTransformer:
    """The model of a recipe with a head of ``num_classes``, before any training."""
    torch.manual_seed(recipe.seed)
    config = recipe.model
    model = from_timm(
        config.backbone, groups=config.groups, pretrained=config.pretrained, num_classes=num_classes, **config.timm
    )
    if config.checkpoint:
        load_backbone_weights(model.backbone, config.checkpoint)
    if config.mean or config.std:
        model.backbone.pretrained_cfg = {**model.pretrained_cfg, "mean": config.mean, "std": config.std}
    return model


def train(recipe: Recipe, output: Path) -> Path:
    """Run a recipe, or go on with it where it was killed.

    Args:
        recipe: what to do.
        output: the run's folder: ``state.safetensors`` (resume), ``model.safetensors`` (result), ``metrics.jsonl`` and
            ``tensorboard/``.

    Returns:
        The path of the finished model.

    Raises:
        InputError: the data or the recipe is wrong, or ``output`` holds a run of another recipe.
    """
    if recipe.precision not in ("no", "bf16"):
        raise InputError(f'recipe: precision = {recipe.precision!r} should be "no" or "bf16"')
    accelerator = Accelerator(mixed_precision=recipe.precision)
    samples, held_out = open_samples(recipe.data, "train"), open_samples(recipe.data, "eval")
    model = build_model(recipe, len(samples.class_names))
    model.class_names = samples.class_names

    try:
        output.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise InputError(f"cannot make the folder {output}: {error.strerror}") from None
    position = Position()
    parts: dict[str, dict[str, Tensor]] = {}
    if (output / "state.safetensors").exists():
        position, saved_recipe, parts = load_state(output / "state.safetensors")
        if saved_recipe != _comparable(recipe):
            raise InputError(f"{output} holds a run of another recipe; give another --output, or the same recipe")
        model.load_state_dict(parts["model"])

    log = RunLog(output, position.total_steps, accelerator.is_main_process)
    try:
        run = Run(
            output, _comparable(recipe), accelerator, model, samples, held_out, log,
            recipe.seed, recipe.data.workers, recipe.checkpoint_minutes, recipe.eval_epochs,
        )  # fmt: skip
        for index, stage in enumerate(stages_of(recipe, model)):
            if index >= position.stage:
                position = run.stage(index, stage, position, parts)
                parts = {}
        path = output / "model.safetensors"
        if accelerator.is_main_process:
            model.eval().requires_grad_(True)
            model.save(path)
        log.say(f"done: {path}" + (f"  ({position.skipped} images could not be read)" if position.skipped else ""))
    finally:
        log.close()
    return path


def _comparable(recipe: Recipe) -> dict[str, Any]:
    """What must agree for a run to be resumed: all of the recipe but where the data lie and how fast they are read."""
    tree = dataclasses.asdict(recipe)
    tree.pop("checkpoint_minutes")
    tree["data"] = {k: v for k, v in tree["data"].items() if k not in ("path", "workers")}
    return _plain(tree)


def _plain(value: Any) -> Any:
    """As JSON gives it back: tuples become lists."""
    if isinstance(value, dict):
        return {k: _plain(v) for k, v in value.items()}
    return [_plain(v) for v in value] if isinstance(value, (list, tuple)) else value
