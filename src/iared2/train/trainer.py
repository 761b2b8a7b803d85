"""One stage: batches -> steps -> logs and checkpoints. It does not know which stage comes before or after."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from contextlib import nullcontext
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from accelerate import Accelerator
from timm.optim import create_optimizer_v2
from timm.scheduler import CosineLRScheduler
from timm.utils import ModelEmaV3
from torch import Tensor, nn

from .. import keyed
from ..data.batches import Batch, eval_batches, model_transform, steps_per_epoch, train_batches
from ..data.device_dataset import DeviceDataset
from ..data.images import Samples
from ..measure import measure
from ..model.decide import Decide
from ..model.reduced import ReducedVisionTransformer
from .augment import AugmentConfig, TargetMaker
from .finetune import decide_up_to
from .log import RunLog
from .state import Position, load_optimizer_tensors, optimizer_tensors, save_state

CALIBRATION_IMAGES = 1024
CALIBRATION_SEED = 0  # not the run's: what a budget means should not depend on it


Images = Samples | DeviceDataset


@dataclass(frozen=True)
class StageConfig:
    """How long and how fast one stage learns. Linear warm-up, cosine decay to ``min_lr`` within the stage."""

    epochs: float = 10
    """Passes over the training set; 0 leaves the stage out. A fraction is allowed."""
    batch_size: int = 128
    """Images of one optimiser step in each process."""
    optimizer: str = "adamw"
    """timm's name of it: "adamw", or "muon", which learns from scratch in fewer steps."""
    accumulate: int = 1
    """Split that batch into so many parts, one after the other, to save memory."""
    lr: float = 1e-3
    """Peak learning rate."""
    min_lr: float = 1e-6
    """Learning rate at the end."""
    weight_decay: float = 0.0
    """Decoupled weight decay; not on biases, norms and embeddings."""
    warmup_epochs: float = 0.0
    """Epochs of linear warm-up."""
    clip_grad: float = 0.0
    """Clip the norm of the gradient to this; 0: do not."""
    layer_decay: float = 1.0
    """Factor on the learning rate from each block to the one before it."""
    label_smoothing: float = 0.0
    """Share of the target spread over all classes. Not in the policy stage, like the next two."""
    mixup: float = 0.0
    """Mixup alpha; 0: none."""
    cutmix: float = 0.0
    """CutMix alpha; 0: none."""
    ema_decay: float = 0.0
    """End the stage with an exponential moving average of the backbone; 0: none. Not in the policy stage."""
    distill: float = 0.0
    """Fine-tuning only: share of the target that is what the dense model says, 0…1."""
    patch_drop: float = 0.0
    """Dense stage only: share of each image's patches left out at random, falling to 0 at the end of the stage. Saves
    time at first."""
    augment: AugmentConfig = field(default_factory=AugmentConfig)
    """Random changes of the images in this stage."""


@dataclass(frozen=True)
class Stage:
    """One stage of a run.

    Attributes:
        name: ``backbone``, ``policy_gradient i`` or ``finetune i``, i = 1…D.
        group: the last group that drops patches, 0…D−1; None: nothing is dropped.
        config: how it learns.
        step: makes the module whose call is one step, ``(images, targets, keys) -> (loss, metrics)``; freezes the rest.
        trained: the module whose unfrozen parameters learn.
        policy: labels stay hard, there is no moving average.
        decide: the decision, if it is not the model's own.
        budget: shares of the patches, D numbers, to which the model's thresholds, or counts, are set before the stage.
    """

    name: str
    group: int | None
    config: StageConfig
    step: Callable[[], nn.Module]
    trained: nn.Module
    policy: bool
    decide: Decide | None = None
    budget: tuple[float, ...] = ()


@dataclass(frozen=True)
class Run:
    """What every stage of one run shares.

    Attributes:
        identity: what a resumed run must agree on, as JSON types; written into every checkpoint.
        teacher: the dense model that some stages learn from.
        seed, workers, checkpoint_minutes, eval_epochs, equal_counts: of the recipe.
    """

    output: Path
    identity: dict[str, Any]
    accelerator: Accelerator
    model: ReducedVisionTransformer
    samples: Images
    held_out: Images
    teacher: nn.Module | None
    log: RunLog
    seed: int
    workers: int
    checkpoint_minutes: float
    eval_epochs: int
    equal_counts: bool = False

    def stage(self, index: int, stage: Stage, position: Position, parts: dict[str, dict[str, Tensor]]) -> Position:
        """Run one stage from ``position`` to its end, checkpointing on the way.

        Args:
            index: of the stage in the run; keys its draws.
            position: how many of its steps are done.
            parts: optimiser and moving average, if it is resumed in the middle.

        Returns:
            The beginning of the next stage.
        """
        accelerator, config = self.accelerator, stage.config
        if stage.budget and not position.step:
            self.calibrate(stage.budget)
        epoch_steps = steps_per_epoch(self.samples, config.batch_size, accelerator.num_processes)
        total = max(1, round(config.epochs * epoch_steps))
        step_module: Any = stage.step()
        self.model.zero_grad(set_to_none=True)  # what an earlier stage left must not count in this one's gradient norm
        optimizer = make_optimizer(stage)
        scheduler = CosineLRScheduler(
            optimizer,
            t_initial=total,
            lr_min=config.min_lr,
            warmup_t=round(config.warmup_epochs * epoch_steps),
            warmup_lr_init=config.min_lr,
            t_in_epochs=False,
        )
        wrapped, optimizer = accelerator.prepare(step_module, optimizer)  # from here on, all is on the device
        ema, make_targets = None, None
        if config.ema_decay and not stage.policy:
            ema = ModelEmaV3(self.model.backbone, decay=config.ema_decay, use_warmup=True)
        if not stage.policy:
            make_targets = TargetMaker(config.label_smoothing, config.mixup, config.cutmix, self.model.num_classes)
        if position.step:
            load_optimizer_tensors(optimizer.optimizer, parts["optimizer"])
            if ema:
                ema.module.load_state_dict(parts["ema"])

        self.log.start_stage(stage.name, total, position.step)
        wrapped.train()
        saved = clock = time.monotonic()
        for epoch, step, batch in self.batches(index, config, position.step, total, epoch_steps):
            scheduler.step_update(step)
            self.seed_generators(index, step)
            step_module.progress = step / total  # what changes over a stage follows this
            metrics = self.optimize(wrapped, optimizer, batch, config, make_targets, 1000 * index + epoch)
            if ema:
                ema.update(self.model.backbone, step)
            for name, reason in batch.skipped:
                self.log.warn(f"skipped {name}: {reason}")
            now = time.monotonic()
            metrics["images_per_second"] = len(batch.labels) * accelerator.num_processes / (now - clock)
            metrics["lr"] = max(group["lr"] for group in optimizer.param_groups)
            skipped = position.skipped + round(metrics.pop("skipped") * accelerator.num_processes)
            position = Position(index, step + 1, position.total_steps + 1, skipped)
            self.log.step(stage.name, epoch, step + 1, position.total_steps, metrics)

            if step + 1 == total:
                break  # what follows belongs to the end of the stage
            end_of_epoch = (step + 1) % epoch_steps == 0
            if end_of_epoch and self.eval_epochs and (epoch + 1) % self.eval_epochs == 0:
                self.evaluate(stage, position, ema)
                wrapped.train()
            if end_of_epoch or now - saved > 60 * self.checkpoint_minutes:
                self.save(position, optimizer, ema)
                saved = time.monotonic()
            clock = time.monotonic()

        if ema:
            self.model.backbone.load_state_dict(ema.module.state_dict())
        if self.teacher is not None and stage.group is None:
            self.teacher.load_state_dict(self.model.backbone.state_dict())
        self.evaluate(stage, position)
        accelerator.free_memory()  # it would hold on to the optimiser of every stage
        position = Position(index + 1, 0, position.total_steps, position.skipped)
        self.save(position)
        return position

    def calibrate(self, keep: tuple[float, ...]) -> None:
        """Set the thresholds so that these shares of the patches stay of training images as they are; or the counts."""
        if self.equal_counts:
            num_patches = self.model.backbone.patch_embed.num_patches
            self.model.num_keep = [round(share * num_patches) for share in keep]
            return
        plain = AugmentConfig(min_scale=1.0, hflip=0.0, color_jitter=0.0)
        size = min(CALIBRATION_IMAGES, len(self.samples))
        order = {"seed": CALIBRATION_SEED, "epoch": 0, "batch_size": size}
        if isinstance(self.samples, Samples):
            batches = train_batches(self.samples, model_transform(self.model.pretrained_cfg), **order)
        else:
            batches = self.samples.train_batches(plain.on_device(self.model), **order)
        self.model.eval().to(self.accelerator.device)
        self.model.calibrate(next(iter(batches)).images, keep=keep)

    def batches(
        self, index: int, config: StageConfig, done: int, total: int, epoch_steps: int
    ) -> Iterator[tuple[int, int, Batch]]:
        """``(epoch, step, batch)`` from step ``done`` on, to the end of the epoch in which ``total`` lies."""
        place = {"rank": self.accelerator.process_index, "world_size": self.accelerator.num_processes}
        if isinstance(self.samples, Samples):
            transform = config.augment.transform(self.model)
            read = partial(train_batches, self.samples, transform, workers=self.workers, **place)
        else:
            read = partial(self.samples.train_batches, config.augment.on_device(self.model), **place)
        step = done
        for epoch in range(done // epoch_steps, -(-total // epoch_steps)):
            loader = read(
                seed=self.seed,
                epoch=1000 * index + epoch,
                batch_size=config.batch_size,
                start_step=step - epoch * epoch_steps,
            )
            for batch in loader:
                yield epoch, step, batch
                step += 1

    def optimize(
        self,
        wrapped: nn.Module,
        optimizer: Any,
        batch: Batch,
        config: StageConfig,
        make_targets: TargetMaker | None,
        epoch: int,
    ) -> dict[str, float]:
        """One optimiser step on a batch, in ``accumulate`` parts; metrics averaged over parts and processes."""
        accelerator = self.accelerator
        images, targets = batch.images.to(accelerator.device), batch.labels.to(accelerator.device)
        keys = keyed.sample_keys(self.seed, epoch, batch.samples).to(accelerator.device)
        if make_targets:
            images, targets = make_targets(images, targets)
        optimizer.zero_grad()
        totals: dict[str, Tensor] = {}
        parts = list(zip(*(t.chunk(config.accumulate) for t in (images, targets, keys)), strict=True))
        for number, part in enumerate(parts, start=1):
            share = len(part[0]) / len(images)
            accelerator.sync_gradients = number == len(parts)
            with nullcontext() if accelerator.sync_gradients else accelerator.no_sync(wrapped):
                with accelerator.autocast():
                    loss, metrics = wrapped(*part)
                accelerator.backward(loss * share)
            for name, value in metrics.items():
                totals[name] = totals.get(name, torch.zeros_like(value)) + share * value
        totals["grad_norm"] = accelerator.clip_grad_norm_(wrapped.parameters(), config.clip_grad or float("inf"))
        totals["skipped"] = torch.tensor(float(len(batch.skipped)), device=accelerator.device)
        optimizer.step()
        return {name: float(value) for name, value in accelerator.reduce(totals, "mean").items()}

    def evaluate(self, stage: Stage, position: Position, ema: ModelEmaV3 | None = None) -> None:
        """Measure the model with its own decision, the one that is deployed, on held-out images."""
        model = self.model
        live = None
        if ema:  # judge the average, then put the live weights back
            live = {name: t.clone() for name, t in model.backbone.state_dict().items()}
            model.backbone.load_state_dict(ema.module.state_dict())
        cfg = model.pretrained_cfg
        place = {"rank": self.accelerator.process_index, "world_size": self.accelerator.num_processes}
        if isinstance(self.held_out, Samples):
            batches = eval_batches(self.held_out, model_transform(cfg), batch_size=256, workers=self.workers, **place)
        else:
            batches = self.held_out.eval_batches(cfg["mean"], cfg["std"], batch_size=256, **place)
        decide = decide_up_to(model.eval(), stage.group, stage.decide)
        with self.accelerator.autocast():
            result = measure(model, batches, self.accelerator.device, decide, self.accelerator.reduce)
        if live is not None:
            model.backbone.load_state_dict(live)
        self.log.evaluation(stage.name, position.total_steps, result)

    def save(self, position: Position, optimizer: Any = None, ema: ModelEmaV3 | None = None) -> None:
        """Write the checkpoint from which a killed run goes on."""
        if self.accelerator.is_main_process:
            decision = {"threshold": torch.tensor(self.model.thresholds)}
            if self.model.num_keep is not None:
                decision["num_keep"] = torch.tensor(self.model.num_keep)
            parts = {"model": self.model.state_dict(), "decision": decision}
            if self.teacher is not None:
                parts["teacher"] = self.teacher.state_dict()
            if optimizer is not None:
                parts["optimizer"] = optimizer_tensors(optimizer.optimizer)
            if ema is not None:
                parts["ema"] = ema.module.state_dict()
            save_state(self.output / "state.safetensors", position, self.identity, parts)

    def seed_generators(self, index: int, step: int) -> None:
        """Seed what timm's mixup and torch's dropout draw from, so that a step does not depend on the steps before."""
        epoch = -1 - 1000 * index - self.accelerator.process_index  # apart from the epochs of samples, which are >= 0
        key = keyed.sample_keys(self.seed, epoch, torch.tensor([step]))
        (number,) = keyed.python_seeds(key)
        torch.manual_seed(number)
        np.random.seed(number)  # noqa: NPY002 (timm draws from the global generator)


def make_optimizer(stage: Stage) -> torch.optim.Optimizer:
    """Over what the stage trains; timm leaves out what is frozen and spares biases and norms the weight decay."""
    config = stage.config
    return create_optimizer_v2(
        stage.trained,
        opt=config.optimizer,
        lr=config.lr,
        weight_decay=config.weight_decay,
        layer_decay=config.layer_decay if config.layer_decay < 1 and not stage.policy else None,
    )
