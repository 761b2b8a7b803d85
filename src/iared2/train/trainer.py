"""The stages of a run: batches -> steps -> logs and checkpoints. The step modules define what a stage computes."""

from __future__ import annotations

import math
import signal
import time
from collections.abc import Callable, Iterator
from contextlib import nullcontext
from dataclasses import dataclass, replace
from itertools import islice
from pathlib import Path
from typing import Any

import numpy as np
import torch
from accelerate import Accelerator
from timm.scheduler import CosineLRScheduler
from timm.utils import ModelEmaV3
from torch import Tensor, nn

from .. import keyed
from ..data.batches import Batch, eval_batches, model_transform, per_batch, steps_per_epoch, train_batches
from ..data.device_dataset import DeviceDataset
from ..data.images import Samples
from ..errors import InputError, Stopped
from ..measure import measure
from ..model.decide import Decide
from ..model.reduced import ReducedVisionTransformer
from .augment import AugmentConfig, TargetMaker
from .finetune import decide_up_to
from .log import RunLog
from .optimizer import load_optimizer_tensors, make_optimizer, optimizer_tensors
from .recipe import Recipe, StageConfig
from .state import Position, State
from .stop import Stop

STATE = "state.safetensors"
CALIBRATION_IMAGES = 1024  # shares are met to s / √n, with s between images: 0.1 gives 0.3 %, and 0.9 % for 128 clips
CALIBRATION_SEED = 0  # not the run's: what a budget means should not depend on it
EVAL_BATCH = 256
PLAIN = AugmentConfig(min_scale=1.0, hflip=0.0, color_jitter=0.0)

Images = Samples | DeviceDataset


@dataclass(frozen=True)
class Stage:
    """One stage of Algorithm 1.

    Attributes:
        name: with the group, such as "finetune 2".
        group: the last group that drops patches; None if nothing is dropped.
        config: length and optimisation.
        step: creates the module that computes loss and metrics, and freezes everything that it does not train.
        trained: the parameters that the optimiser trains.
        policy: whether it trains an interpreter: hard labels, no moving average.
        decide: the decision of a baseline; None: the model's own.
        budget: shares for which the model's thresholds, or counts, are set before the stage.
    """

    name: str
    group: int | None
    config: StageConfig
    step: Callable[[], nn.Module]
    trained: nn.Module
    policy: bool
    decide: Decide | None = None
    budget: tuple[float, ...] = ()

    @property
    def section(self) -> str:
        """Of the recipe."""
        return self.name.split()[0]


@dataclass(frozen=True)
class Learning:
    """The objects that run one stage; ``module`` is the step module, ``wrapped`` the same for all processes."""

    module: Any
    wrapped: nn.Module
    optimizer: Any
    scheduler: CosineLRScheduler
    ema: ModelEmaV3 | None
    make_targets: TargetMaker | None
    epoch_steps: int
    total: int


@dataclass
class Trainer:
    """Runs stages from a position on.

    Attributes:
        output: folder of the run.
        identity: the settings that a resumed run must share, as JSON types; written into every checkpoint.
        teacher: the dense model from which some stages learn.
        position: the position in the run; advances with every step.
        learning: of the current stage.
    """

    output: Path
    identity: dict[str, Any]
    recipe: Recipe
    accelerator: Accelerator
    model: ReducedVisionTransformer
    samples: Images
    held_out: Images
    teacher: nn.Module | None
    log: RunLog
    stop: Stop
    position: Position
    learning: Learning | None = None

    def run(self, stages: list[Stage], parts: dict[str, dict[str, Tensor]]) -> None:
        """Run the remaining stages.

        Args:
            stages: all stages of the run.
            parts: of the checkpoint from which the run resumes; empty at the start.

        Raises:
            Stopped: by a signal, after a checkpoint.
            InputError: the loss is not finite; the last checkpoint is kept.
        """
        saved = self.position if parts else None
        self.stop.held = self.accelerator.num_processes > 1  # several stop together, after a step
        try:
            while self.position.stage < len(stages):
                self.stage(stages[self.position.stage], parts)
                parts = {}
        except BaseException as error:
            if not self.stop.signal:
                raise
            # also if another process, which has stopped already, was waited for in vain
            if self.position != saved:
                self.save()
            stage = stages[min(self.position.stage, len(stages) - 1)]
            where = f"stopped at {stage.name}, step {self.position.step}; the same command resumes the run"
            error.with_traceback(None)  # it holds the readers of the data, which end now
            raise Stopped(self.stop.signal, where if self.accelerator.is_main_process else "") from None

    def stage(self, stage: Stage, parts: dict[str, dict[str, Tensor]]) -> None:
        """Run one stage from ``position`` to its end, with checkpoints on the way."""
        if stage.budget and not self.position.step:
            self.calibrate(stage.budget)
        self.learning = learning = self.prepare(stage, parts)
        self.log.start_stage(stage.name, learning.total, self.position.step, learning.epoch_steps)
        self.evaluate_if_due(stage, learning)  # the run may have been stopped just there
        learning.wrapped.train()
        saved = clock = time.monotonic()
        for epoch, batch in self.batches(stage.config, learning):
            with self.stop.whole():
                self.step(stage, learning, epoch, batch, clock)
            self.stop_together()
            if self.position.step < learning.total:  # what follows belongs to the end of the stage
                self.evaluate_if_due(stage, learning)
                now = time.monotonic()
                if not self.position.step % learning.epoch_steps or now - saved > 60 * self.recipe.checkpoint_minutes:
                    with self.stop.whole():
                        self.save()
                    saved = now
            clock = time.monotonic()

        if learning.ema:
            self.model.backbone.load_state_dict(learning.ema.module.state_dict())
        if self.teacher is not None and stage.group is None:
            self.teacher.load_state_dict(self.model.backbone.state_dict())
        self.evaluate(stage, learning)
        with self.stop.whole():
            self.learning = None
            self.accelerator.free_memory()  # it would hold on to the optimiser of every stage
            self.position = replace(self.position, stage=self.position.stage + 1, step=0, measured=False)
            self.save()

    def prepare(self, stage: Stage, parts: dict[str, dict[str, Tensor]]) -> Learning:
        """The objects that run the stage, on the device, in their state at ``position``."""
        config, model = stage.config, self.model
        epoch_steps = steps_per_epoch(self.samples, config.batch_size, self.accelerator.num_processes)
        total = max(1, round(config.epochs * epoch_steps))
        module = stage.step()
        model.zero_grad(set_to_none=True)  # what an earlier stage left must not count in this one's gradient norm
        optimizer = make_optimizer(stage.trained, config, stage.section)
        scheduler = CosineLRScheduler(
            optimizer,
            t_initial=total,
            lr_min=config.min_lr,
            warmup_t=round(config.warmup_epochs * epoch_steps),
            warmup_lr_init=config.min_lr,
            t_in_epochs=False,
        )
        wrapped, optimizer = self.accelerator.prepare(module, optimizer)  # from here on, all is on the device
        averaged = config.ema_decay and not stage.policy
        ema = ModelEmaV3(model.backbone, decay=config.ema_decay, use_warmup=True) if averaged else None
        mix = config.label_smoothing, config.mixup, config.cutmix
        make_targets = None if stage.policy else TargetMaker(*mix, model.num_classes)
        if self.position.step:
            load_optimizer_tensors(optimizer.optimizer, parts["optimizer"])
            if ema:
                ema.module.load_state_dict(parts["ema"])
        return Learning(module, wrapped, optimizer, scheduler, ema, make_targets, epoch_steps, total)

    def batches(self, config: StageConfig, learning: Learning) -> Iterator[tuple[int, Batch]]:
        """``(epoch, batch)`` for every remaining step of the stage."""
        done, steps = self.position.step, learning.epoch_steps
        for epoch in range(done // steps, -(-learning.total // steps)):
            first = max(done - epoch * steps, 0)
            keys = {"seed": self.recipe.seed, "epoch": self.keyed_epoch(epoch), "batch_size": config.batch_size}
            read = self.read_train(config.augment, start_step=first, **keys, **self.place)
            yield from ((epoch, batch) for batch in islice(read, min(learning.total - epoch * steps, steps) - first))

    def step(self, stage: Stage, learning: Learning, epoch: int, batch: Batch, clock: float) -> None:
        """One optimiser step, logged; ``clock`` is the time at which the previous step ended."""
        position, processes = self.position, self.accelerator.num_processes
        learning.scheduler.step_update(position.step)
        self.seed_generators()
        learning.module.progress = position.step / learning.total  # what changes over a stage follows this
        metrics = self.optimize(stage, learning, batch, self.keyed_epoch(epoch))
        if learning.ema:
            learning.ema.update(self.model.backbone, position.step)
        for name, reason in batch.skipped:
            self.log.warn(f"skipped {name}: {reason}")
        metrics["images_per_second"] = len(batch.labels) * processes / (time.monotonic() - clock)
        metrics["lr"] = max(group["lr"] for group in learning.optimizer.param_groups)
        skipped = position.skipped + round(metrics.pop("skipped") * processes)
        self.position = Position(position.stage, position.step + 1, position.total_steps + 1, skipped)
        self.log.step(stage.name, epoch, self.position.step, self.position.total_steps, metrics)

    def optimize(self, stage: Stage, learning: Learning, batch: Batch, epoch: int) -> dict[str, float]:
        """One optimiser step in ``grad_accum_steps`` parts; metrics averaged over parts and processes."""
        accelerator, config, wrapped = self.accelerator, stage.config, learning.wrapped
        images, targets = batch.images.to(accelerator.device), batch.labels.to(accelerator.device)
        keys = keyed.sample_keys(self.recipe.seed, epoch, batch.samples).to(accelerator.device)
        if learning.make_targets:
            images, targets = learning.make_targets(images, targets)
        learning.optimizer.zero_grad()
        totals: dict[str, Tensor] = {}
        parts = list(zip(*(t.chunk(config.grad_accum_steps) for t in (images, targets, keys)), strict=True))
        for number, part in enumerate(parts, start=1):
            share = len(part[0]) / len(images)
            accelerator.sync_gradients = number == len(parts)
            with nullcontext() if accelerator.sync_gradients else accelerator.no_sync(wrapped):
                with accelerator.autocast():
                    loss, metrics = wrapped(*part)
                accelerator.backward(loss * share)
            for name, value in metrics.items():
                totals[name] = totals.get(name, 0) + share * value
        totals["grad_norm"] = accelerator.clip_grad_norm_(wrapped.parameters(), config.clip_grad or float("inf"))
        totals["skipped"] = torch.tensor(float(len(batch.skipped)), device=accelerator.device)
        found = {name: float(value) for name, value in accelerator.reduce(totals, "mean").items()}
        if not math.isfinite(found["loss"] + found["grad_norm"]):
            raise InputError(
                f"{stage.name}, step {self.position.step + 1}: the loss or its gradient is not finite; set a smaller"
                f' {stage.section}.lr, clip_grad = 1.0 or precision = "no", and start anew. The last checkpoint is kept'
            )
        learning.optimizer.step()  # after all that can fail: until here, the weights are those of ``position``
        return found

    def evaluate_if_due(self, stage: Stage, learning: Learning) -> None:
        """`evaluate` at the end of every ``eval_epochs``-th epoch except the last."""
        every = self.recipe.eval_epochs * learning.epoch_steps
        if every and 0 < self.position.step < learning.total and not self.position.step % every:
            self.evaluate(stage, learning)
            learning.wrapped.train()

    def evaluate(self, stage: Stage, learning: Learning) -> None:
        """Evaluate the model with its own decision, which is deployed, on held-out images; once per step."""
        if self.position.measured:
            return
        model, live, held = self.model, None, self.stop.held
        self.stop.held = False  # may take long; no process waits for another one before the end
        try:
            if stage.policy and self.recipe.policy.joint:
                self.calibrate(stage.budget)  # scores have moved
            if learning.ema:  # judge the average, then put the live weights back
                with self.stop.whole():
                    live = {name: t.clone() for name, t in model.backbone.state_dict().items()}
                    model.backbone.load_state_dict(learning.ema.module.state_dict())
            decide = decide_up_to(model.eval(), stage.group, stage.decide)
            with self.accelerator.autocast():
                result = measure(model, self.read_eval(), self.accelerator.device, decide, self.accelerator.reduce)
        finally:
            self.stop.held = held
            if live is not None:
                with self.stop.whole():
                    model.backbone.load_state_dict(live)
        with self.stop.whole():
            self.log.evaluation(stage.name, self.position.total_steps, result)
            self.position = replace(self.position, measured=True)

    def calibrate(self, keep: tuple[float, ...]) -> None:
        """Set thresholds, or counts, that keep these shares of the patches of unaugmented training images."""
        if self.recipe.policy.equal_counts:
            self.model.num_keep = [round(share * math.prod(self.model.decision.grid_size or ())) for share in keep]
            return
        size = min(per_batch(CALIBRATION_IMAGES, self.model.pretrained_cfg), len(self.samples))
        batches = self.read_train(None, seed=CALIBRATION_SEED, epoch=0, batch_size=size)
        self.model.eval().to(self.accelerator.device)
        self.model.calibrate(next(iter(batches)).images, keep=keep)

    def read_train(self, augment: AugmentConfig | None, **keys: int) -> Iterator[Batch]:
        """`train_batches` of the samples; None: images as they are."""
        if isinstance(self.samples, Samples):
            transform = augment.transform(self.model) if augment else model_transform(self.model.pretrained_cfg)
            return train_batches(self.samples, transform, workers=self.recipe.data.workers, **keys)
        return self.samples.train_batches((augment or PLAIN).on_device(self.model), **keys)

    def read_eval(self) -> Iterator[Batch]:
        """`eval_batches` of the held-out images."""
        cfg = self.model.pretrained_cfg
        place = {"batch_size": per_batch(EVAL_BATCH, cfg, self.recipe.clips.test_clips), **self.place}
        if isinstance(self.held_out, Samples):
            return eval_batches(self.held_out, model_transform(cfg), workers=self.recipe.data.workers, **place)
        return self.held_out.eval_batches(cfg["mean"], cfg["std"], **place)

    @property
    def place(self) -> dict[str, int]:
        """Rank of this process, and number of processes."""
        return {"rank": self.accelerator.process_index, "world_size": self.accelerator.num_processes}

    def keyed_epoch(self, epoch: int) -> int:
        """The epoch of a stage as an epoch of the run, which keys the draws; no stage has 1000 epochs."""
        return 1000 * self.position.stage + epoch

    def seed_generators(self) -> None:
        """Seed the generators of timm's mixup and torch's dropout, so that a step does not depend on earlier steps."""
        epoch = -1 - self.keyed_epoch(self.accelerator.process_index)  # those of samples are not negative
        (number,) = keyed.python_seeds(keyed.sample_keys(self.recipe.seed, epoch, torch.tensor([self.position.step])))
        torch.manual_seed(number)
        np.random.seed(number)  # noqa: NPY002 (timm draws from the global generator)

    def stop_together(self) -> None:
        """Stop all processes after the same step if one of them received a signal."""
        if self.accelerator.num_processes > 1:
            flag = torch.tensor(float(bool(self.stop.signal)), device=self.accelerator.device)
            if self.accelerator.reduce(flag, "sum") > 0:
                self.stop.signal = self.stop.signal or signal.SIGTERM
                raise Stopped(self.stop.signal)

    def save(self) -> None:
        """Write the checkpoint from which a killed run resumes."""
        modules = {"model": self.model, "teacher": self.teacher}
        if self.learning and self.learning.ema:
            modules["ema"] = self.learning.ema.module
        parts = {name: module.state_dict() for name, module in modules.items() if module is not None}
        if self.learning:
            parts["optimizer"] = optimizer_tensors(self.learning.optimizer.optimizer)
        if self.accelerator.is_main_process:
            State(self.position, self.identity, self.model.decision, parts).save(self.output / STATE)
