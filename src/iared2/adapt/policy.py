"""Minutes of training of the interpreters, on a frozen backbone and with what the dense model says as the label."""

from __future__ import annotations

import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from itertools import count

import torch
from rich.console import Console
from rich.progress import BarColumn, Progress, TextColumn, TimeRemainingColumn
from torch import Tensor, nn

from .. import keyed
from ..model.reduced import ReducedVisionTransformer
from ..train.policy_gradient import PolicyConfig, PolicyGradientStage, dropping
from ..train.reward import RewardConfig

BATCH, SAMPLES, LR = 48, 8, 1e-4
WINDOW, PATIENCE = 20, 3
"""Rewards are averaged over ``WINDOW`` steps; see `stopped_rising`."""
SITE_MIRROR = 4 << 20  # a site of keyed draws, apart from those of model/decide.py and data/device_dataset.py


@dataclass(frozen=True)
class Training:
    """What was done: optimiser steps, mean rewards of each `WINDOW` of them, seconds, and whether time was left."""

    steps: int
    rewards: tuple[float, ...]
    seconds: float
    stopped_early: bool


def train(
    model: ReducedVisionTransformer,
    images: Tensor,
    shares: tuple[float, ...],
    equal_counts: bool,
    minutes: float,
    seed: int = 0,
) -> Training:
    """Train all interpreters of groups that drop patches, together (`PolicyConfig.joint`), at these shares.

    Args:
        model: only its interpreters change. It is in evaluation mode afterwards.
        images: ``(n, in_chans, height, width)``, on the device of the model; each step mirrors half of its images.
        shares: of the patches alive after each group, of every image or with ``equal_counts`` false of the batch.
        equal_counts: see ``shares``.
        minutes: at most.
        seed: of order, mirroring and draws.
    """
    reward = RewardConfig(label="dense", divergence=1.0)
    spread = model.spread
    policy = PolicyConfig(
        keep=shares, equal_counts=equal_counts, spread=spread, joint=True, samples=SAMPLES, rloo=True, temperature=0.5
    )
    columns = "policy", BarColumn(), TextColumn("{task.fields[shown]}"), TimeRemainingColumn()
    start, spent, steps = time.monotonic(), 0.0, 0
    window: list[float] = []
    rewards: list[float] = []
    with _as_before(model), Progress(*columns, console=Console(stderr=True), transient=True) as bar:
        stage = PolicyGradientStage(model, dropping(shares), reward, policy, model.backbone).train()
        trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
        optimizer = torch.optim.AdamW(trained, lr=LR, weight_decay=0.0)
        task = bar.add_task("policy", total=60 * minutes, shown="")
        for epoch, rows in _batches(len(images), seed):
            spent = time.monotonic() - start
            if spent >= 60 * minutes or stopped_rising(rewards):
                break
            stage.progress = spent / (60 * minutes)
            keys, batch = keyed.sample_keys(seed, epoch, rows).to(images.device), images[rows.to(images.device)]
            mirrored = keyed.uniform(keys, SITE_MIRROR, 1)[:, 0] < 0.5
            batch = torch.where(mirrored[:, None, None, None], batch.flip(-1), batch)
            loss, metrics = stage(batch, torch.zeros_like(keys), keys)
            optimizer.zero_grad()
            loss.backward()
            torch.nn.utils.clip_grad_norm_(trained, 1.0)
            optimizer.step()
            steps += 1
            window.append(metrics["reward"].item())
            bar.update(task, completed=spent, shown=f"step {steps}, reward {window[-1]:.3f}")
            if len(window) == WINDOW:
                rewards.append(sum(window) / WINDOW)
                window = []
    return Training(steps, tuple(rewards), spent, stopped_rising(rewards))


@contextmanager
def _as_before(model: nn.Module) -> Iterator[None]:
    """Parameters want a gradient afterwards if they did before, and have none."""
    asked = {name: parameter.requires_grad for name, parameter in model.named_parameters()}
    try:
        yield
    finally:
        for name, parameter in model.named_parameters():
            parameter.requires_grad_(asked[name])
        model.zero_grad(set_to_none=True)


def stopped_rising(rewards: Sequence[float]) -> bool:
    """Whether none of the last ``PATIENCE`` mean rewards is above the best one before them."""
    return len(rewards) > PATIENCE and max(rewards[-PATIENCE:]) <= max(rewards[:-PATIENCE])


def _batches(photos: int, seed: int) -> Iterator[tuple[int, Tensor]]:
    """Rows of shuffled passes without an end; the rest of a pass that fills no batch is left out."""
    size = min(BATCH, photos)
    for epoch in count():
        whole = keyed.permutation(seed, epoch, photos)[: photos // size * size]
        yield from ((epoch, rows) for rows in whole.split(size))
