"""Algorithm 1: for each group, train its interpreter, then the blocks that follow it.

Numbered deviations from the paper:

1. The policy stage's draws and every augmentation are functions of (seed, epoch, sample), so that a run which is killed
   and resumed ends with the same weights, bit for bit, on a CPU.
2. An optional first stage trains the dense backbone, for those who do not start from pretrained weights.
"""

from __future__ import annotations

import dataclasses
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from accelerate import Accelerator
from timm.data import Mixup, create_transform
from timm.data.mixup import mixup_target
from timm.optim import create_optimizer_v2
from timm.scheduler import CosineLRScheduler
from timm.utils import ModelEmaV3
from torch import Tensor, nn

from .. import keyed
from ..checkpoint import load_backbone_weights
from ..data import Batch, Samples, eval_batches, eval_transform, open_samples, steps_per_epoch, train_batches
from ..errors import InputError
from ..evaluate import measure
from ..model.reduced import ReducedVisionTransformer, from_timm
from .finetune import FinetuneStage, decide_up_to
from .log import RunLog
from .policy_gradient import PolicyGradientStage
from .recipe import AugmentConfig, Recipe, StageConfig
from .state import Position, load_optimizer_tensors, load_state, optimizer_tensors, save_state


@dataclass(frozen=True)
class Stage:
    """One stage of the run: ``backbone``, or ``policy_gradient`` / ``finetune`` of a group (1…D in ``name``)."""

    name: str
    group: int | None
    config: StageConfig

    @property
    def is_policy(self) -> bool:
        return self.name.startswith("policy_gradient")

    def module(self, model: ReducedVisionTransformer, recipe: Recipe) -> FinetuneStage | PolicyGradientStage:
        """The module whose call is one step's loss; freezes what this stage does not train."""
        if self.is_policy:
            assert self.group is not None
            return PolicyGradientStage(model, self.group, recipe.reward)
        return FinetuneStage(model, self.group, model.num_classes)


def stages_of(recipe: Recipe) -> list[Stage]:
    """The stages in the order in which they run; those of 0 epochs are left out."""
    stages = [Stage("backbone", None, recipe.backbone)]
    for group in range(recipe.model.groups):
        stages.append(Stage(f"policy_gradient {group + 1}", group, recipe.policy_gradient))
        stages.append(Stage(f"finetune {group + 1}", group, recipe.finetune))
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
    accelerator = Accelerator(mixed_precision=recipe.precision)
    samples, held_out = open_samples(recipe.data, "train"), open_samples(recipe.data, "eval")
    model = build_model(recipe, len(samples.class_names))
    model.class_names = samples.class_names

    try:
        output.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise InputError(f"cannot make the folder {output}: {error.strerror}") from None
    position, parts = Position(), {}
    if (output / "state.safetensors").exists():
        position, saved_recipe, parts = load_state(output / "state.safetensors")
        if saved_recipe != _comparable(recipe):
            raise InputError(f"{output} holds a run of another recipe; give another --output, or the same recipe")
        model.load_state_dict(parts["model"])

    log = RunLog(output, position.total_steps, accelerator.is_main_process)
    try:
        run = Run(recipe, output, accelerator, model, samples, held_out, log)
        for index, stage in enumerate(stages_of(recipe)):
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


@dataclass(frozen=True)
class Run:
    """What every stage of one run shares."""

    recipe: Recipe
    output: Path
    accelerator: Accelerator
    model: ReducedVisionTransformer
    samples: Samples
    held_out: Samples
    log: RunLog

    def stage(self, index: int, stage: Stage, position: Position, parts: dict[str, dict[str, Tensor]]) -> Position:
        """Run one stage from ``position`` to its end, checkpointing on the way."""
        accelerator, config = self.accelerator, stage.config
        step_module = stage.module(self.model, self.recipe)
        optimizer = make_optimizer(self.model, stage)
        epoch_steps = steps_per_epoch(self.samples, config.batch_size, accelerator.num_processes)
        total = round(config.epochs * epoch_steps)
        scheduler = CosineLRScheduler(
            optimizer,
            t_initial=max(total, 1),
            lr_min=config.min_lr,
            warmup_t=round(config.warmup_epochs * epoch_steps),
            warmup_lr_init=config.min_lr,
            warmup_prefix=False,
            t_in_epochs=False,
        )
        ema = ModelEmaV3(self.model.backbone, decay=config.ema_decay, use_warmup=True) if config.ema_decay else None
        ddp, optimizer = accelerator.prepare(step_module, optimizer)
        if position.step:  # resuming in the middle of this stage
            load_optimizer_tensors(optimizer.optimizer, parts.get("optimizer", {}))
            if ema:
                ema.module.load_state_dict(parts["ema"])

        targets = TargetMaker(config, self.model.num_classes) if not stage.is_policy else None
        self.log.start_stage(stage.name, total, position.step)
        ddp.train()
        saved = clock = time.monotonic()
        for epoch, step, batch in self.batches(index, config, position.step, total, epoch_steps):
            scheduler.step_update(step)
            seed_step(self.recipe.seed, index, step, accelerator.process_index)
            metrics = self.optimize(ddp, optimizer, batch, targets, config, 1000 * index + epoch)
            if ema:
                ema.update(self.model.backbone, step)
            for name, reason in batch.skipped:
                self.log.say(f"skipped {name}: {reason}")
            now = time.monotonic()
            metrics["images_per_second"] = len(batch.labels) * accelerator.num_processes / (now - clock)
            metrics["lr"] = max(group["lr"] for group in optimizer.param_groups)
            clock = now
            position = Position(index, step + 1, position.total_steps + 1, position.skipped + len(batch.skipped))
            self.log.step(stage.name, epoch, step + 1, position.total_steps, metrics)

            end_of_epoch = (step + 1) % epoch_steps == 0 and step + 1 < total
            if end_of_epoch or now - saved > 60 * self.recipe.checkpoint_minutes:
                self.save(position, optimizer, ema)
                saved = time.monotonic()
            if end_of_epoch and self.recipe.eval_epochs and (epoch + 1) % self.recipe.eval_epochs == 0:
                self.evaluate(stage, position, step_module, ema)
                ddp.train()
                clock = time.monotonic()

        if ema:
            self.model.backbone.load_state_dict(ema.module.state_dict())
        self.evaluate(stage, position, step_module, None)
        position = Position(index + 1, 0, position.total_steps, position.skipped)
        self.save(position, None, None)
        return position

    def batches(
        self, index: int, config: StageConfig, done: int, total: int, epoch_steps: int
    ) -> Iterator[tuple[int, int, Batch]]:
        """``(epoch, step, batch)`` of the steps that are left."""
        accelerator = self.accelerator
        transform = train_transform(self.model, config.augment)
        step = done
        for epoch in range(done // epoch_steps, -(-total // epoch_steps)):
            loader = train_batches(
                self.samples,
                transform,
                seed=self.recipe.seed,
                epoch=1000 * index + epoch,
                batch_size=config.batch_size,
                start_step=step - epoch * epoch_steps,
                rank=accelerator.process_index,
                world_size=accelerator.num_processes,
                workers=self.recipe.data.workers,
            )
            for batch in loader:
                if step == total:
                    return
                yield epoch, step, batch
                step += 1

    def optimize(
        self,
        ddp: nn.Module,
        optimizer: Any,
        batch: Batch,
        targets: TargetMaker | None,
        config: StageConfig,
        epoch: int,
    ) -> dict[str, float]:
        """One optimiser step on a batch, in ``accumulate`` parts; metrics averaged over parts and processes."""
        accelerator = self.accelerator
        images, labels = batch.images.to(accelerator.device), batch.labels.to(accelerator.device)
        keys = keyed.sample_keys(self.recipe.seed, epoch, batch.samples).to(accelerator.device)
        if targets:
            images, labels = targets(images, labels)
        optimizer.zero_grad()
        totals: dict[str, Tensor] = {}
        parts = list(zip(*(t.chunk(config.accumulate) for t in (images, labels, keys)), strict=True))
        for number, part in enumerate(parts):
            share = len(part[0]) / len(images)
            with accelerator.no_sync(ddp) if number + 1 < len(parts) else accelerator.autocast():
                with accelerator.autocast():
                    loss, metrics = ddp(*part)
                accelerator.backward(loss * share)
            for name, value in metrics.items():
                totals[name] = totals.get(name, torch.zeros_like(value)) + share * value
        if config.clip_grad:
            totals["grad_norm"] = accelerator.clip_grad_norm_(ddp.parameters(), config.clip_grad)
        optimizer.step()
        return {name: float(value) for name, value in accelerator.reduce(totals, "mean").items()}

    def evaluate(self, stage: Stage, position: Position, step_module: nn.Module, ema: ModelEmaV3 | None) -> None:
        """Measure the thresholded model on held-out images: the decision that is deployed."""
        model = self.model
        weights = None
        if ema:  # judge the average, then put the live weights back
            weights = {name: t.clone() for name, t in model.backbone.state_dict().items()}
            model.backbone.load_state_dict(ema.module.state_dict())
        model.eval()
        decide = decide_up_to(model, stage.group)
        batches = eval_batches(
            self.held_out,
            model_eval_transform(model),
            batch_size=256,
            rank=self.accelerator.process_index,
            world_size=self.accelerator.num_processes,
            workers=self.recipe.data.workers,
        )
        with self.accelerator.autocast():
            result = measure(model, batches, self.accelerator.device, decide, self.accelerator.reduce)
        if weights is not None:
            model.backbone.load_state_dict(weights)
        self.log.evaluation(stage.name, position.total_steps, result)

    def save(self, position: Position, optimizer: Any, ema: ModelEmaV3 | None) -> None:
        """Write the checkpoint from which a killed run goes on."""
        if self.accelerator.is_main_process:
            parts = {"model": self.model.state_dict()}
            if optimizer is not None:
                parts["optimizer"] = optimizer_tensors(optimizer.optimizer)
            if ema is not None:
                parts["ema"] = ema.module.state_dict()
            save_state(self.output / "state.safetensors", position, _comparable(self.recipe), parts)


class TargetMaker:
    """Mixup, CutMix and label smoothing: images and labels -> images and class probabilities."""

    def __init__(self, config: StageConfig, num_classes: int) -> None:
        self.smoothing, self.num_classes = config.label_smoothing, num_classes
        self.mixup = None
        if config.mixup or config.cutmix:
            self.mixup = Mixup(config.mixup, config.cutmix, label_smoothing=self.smoothing, num_classes=num_classes)

    def __call__(self, images: Tensor, labels: Tensor) -> tuple[Tensor, Tensor]:
        if self.mixup:
            return self.mixup(images, labels)
        return images, mixup_target(labels, self.num_classes, smoothing=self.smoothing)


def make_optimizer(model: ReducedVisionTransformer, stage: Stage) -> torch.optim.Optimizer:
    """AdamW over the parameters that this stage trains."""
    trained: nn.Module = model.backbone
    if stage.is_policy:
        assert stage.group is not None
        trained = model.interpreters[stage.group]
    config = stage.config
    return create_optimizer_v2(
        trained,
        opt="adamw",
        lr=config.lr,
        weight_decay=config.weight_decay,
        layer_decay=config.layer_decay if config.layer_decay < 1 and not stage.is_policy else None,
    )


def train_transform(model: ReducedVisionTransformer, augment: AugmentConfig) -> Any:
    """timm's training transform for the model's input."""
    cfg = model.pretrained_cfg
    return create_transform(
        cfg["input_size"],
        is_training=True,
        scale=(augment.min_scale, 1.0),
        hflip=augment.hflip,
        color_jitter=augment.color_jitter or None,
        auto_augment=augment.auto_augment or None,
        re_prob=augment.random_erasing,
        interpolation="bicubic",
        mean=cfg["mean"],
        std=cfg["std"],
    )


def model_eval_transform(model: ReducedVisionTransformer) -> Any:
    """The whole image, resized to the model's input, normalised as it was in training."""
    cfg = model.pretrained_cfg
    return eval_transform(cfg["input_size"], cfg["mean"], cfg["std"])


def seed_step(seed: int, stage: int, step: int, rank: int) -> None:
    """Seed the generators that timm's mixup and torch's dropout draw from, so that a step does not depend on the past."""
    number = keyed.python_seeds(keyed.sample_keys(seed, 1000 * stage + rank, torch.tensor([step])))[0]
    torch.manual_seed(number)
    np.random.seed(number)


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
