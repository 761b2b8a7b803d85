"""Training time: one step of each stage, a dense forward pass and a dense training step of the same batch."""

from __future__ import annotations

import statistics
from collections.abc import Callable
from copy import deepcopy
from dataclasses import asdict, dataclass
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.optim import AdamW

from ... import keyed
from ...device import peak_memory
from ...model.decide import keep_all
from ...model.reduced import ReducedVisionTransformer
from ...model.tokens import PackedTokens
from ...train.finetune import FinetuneStage
from ...train.policy_gradient import PolicyGradientStage
from ...train.reward import RewardConfig
from .inference import take_turns


@dataclass
class TrainingSpeed:
    """Medians in milliseconds, and their references."""

    batch_size: int
    group: int
    keep_ratio: float
    """Share of the patches that the group keeps, both sampled and greedy."""
    dense_forward_ms: float
    """timm's model, without a graph."""
    own_forward_ms: float
    """The same on our engine, nothing dropped."""
    policy_step_ms: float
    """Sampled and greedy decision, backward pass and optimiser."""
    dense_step_ms: float
    """timm's model, the same parameters trained as in the fine-tuning step."""
    finetune_step_ms: float
    macs_ratio: float
    """MACs of the reduced model over those of the dense one, in the fine-tuning step."""
    peak_mb: dict[str, float | None]
    """Peak memory of each run without weights, images and optimiser state, 10⁶ bytes (`device.peak_memory`)."""

    @property
    def policy_over_forward(self) -> float:
        return self.policy_step_ms / self.dense_forward_ms

    @property
    def finetune_over_dense(self) -> float:
        """Divided by the ratio of MACs: 1 means that the time of a step is proportional to its MACs."""
        return self.finetune_step_ms / self.dense_step_ms / self.macs_ratio

    def to_dict(self) -> dict[str, Any]:
        """The results as JSON types."""
        ratios = {
            "policy_over_forward": self.policy_over_forward,
            "policy_over_own_forward": self.policy_step_ms / self.own_forward_ms,
            "finetune_over_dense": self.finetune_over_dense,
        }
        return asdict(self) | ratios


def measure(
    model: ReducedVisionTransformer, images: Tensor, keep_ratio: float, *, group: int = 0, seconds: float = 60.0
) -> TrainingSpeed:
    """Time one step of every kind, taking turns.

    Args:
        model: any; each stage works on a copy of it.
        images: ``(B, in_chans, height, width)``.
        keep_ratio: share of the patches that the group keeps in every image.
        group: i, from 0.
        seconds: to spend.
    """
    labels = torch.zeros(len(images), dtype=torch.int64, device=images.device)
    keys = keyed.sample_keys(0, 0, torch.arange(len(images))).to(images.device)
    num_patches = model.num_patches
    num_keep = round(keep_ratio * num_patches)

    policy = PolicyGradientStage(_keeping(model, keep_ratio), [group], RewardConfig()).train()
    finetune = FinetuneStage(_keeping(model, keep_ratio), group).train()
    dense = FinetuneStage(deepcopy(model), group).train()  # for its choice of what learns
    whole = deepcopy(model).eval()

    def step(module: nn.Module, loss: Callable[[], Tensor]) -> Callable[[], None]:
        optimizer = AdamW([p for p in module.parameters() if p.requires_grad], lr=0.0)

        def run() -> None:
            optimizer.zero_grad()
            loss().backward()
            optimizer.step()

        return run

    runs: dict[str, Callable[[], Any]] = {
        "dense": torch.inference_mode()(partial(whole.backbone, images)),
        "own": torch.inference_mode()(partial(whole, images, keep_all)),
        "policy": step(policy, lambda: policy(images, labels, keys)[0]),
        "dense step": step(dense, lambda: F.cross_entropy(dense.model.backbone(images), labels)),
        "finetune": step(finetune, lambda: finetune(images, labels, keys)[0]),
    }
    times = take_turns(runs, images.device, seconds)
    memory = {name: peak_memory(images.device, run) for name, run in runs.items()}
    ms = {name: 1000 * statistics.median(t) for name, t in times.items()}
    kept = torch.full((model.num_groups, 1), num_keep)
    kept[:group] = num_patches
    ratio = model.count_macs(kept).item() / model.dense_macs
    return TrainingSpeed(
        batch_size=len(images),
        group=group,
        keep_ratio=keep_ratio,
        dense_forward_ms=ms["dense"],
        own_forward_ms=ms["own"],
        policy_step_ms=ms["policy"],
        dense_step_ms=ms["dense step"],
        finetune_step_ms=ms["finetune"],
        macs_ratio=ratio,
        peak_mb={name: None if peak is None else peak / 1e6 for name, peak in memory.items()},
    )


class _Sharp(nn.Module):
    """An interpreter whose threshold and samples both keep a given share per image: scores near 0 and 1."""

    def __init__(self, interpreter: nn.Module, keep_ratio: float) -> None:
        super().__init__()
        self.interpreter, self.keep_ratio = interpreter, keep_ratio
        self.relative = interpreter.relative

    def forward(self, packed: PackedTokens, has_class_token: bool = True) -> Tensor:
        scores = self.interpreter(packed, has_class_token)
        ranks = scores.detach().argsort(1).argsort(1)
        best = ranks >= round((1 - self.keep_ratio) * scores.shape[1])
        return torch.where(best, 0.99, 0.01) + 0.01 * (scores - 0.5)  # the graph of the policy stays


def _keeping(model: ReducedVisionTransformer, keep_ratio: float) -> ReducedVisionTransformer:
    """A copy of the model that keeps that share of every image."""
    model = deepcopy(model)
    model.interpreters = nn.ModuleList(_Sharp(interpreter, keep_ratio) for interpreter in model.interpreters)
    return model
