"""What the experiments share: train a variant unless it is there, measure it image by image, compare, write a table.

A *variant* is a recipe and settings. Its run is a folder; a finished one is not trained again, a killed one is resumed.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field, replace
from functools import cache, cached_property
from pathlib import Path
from typing import Literal

import numpy as np
import torch
from torch import Tensor

from iared2 import ReducedVisionTransformer
from iared2.data.batches import Batch
from iared2.data.cluttered import ClutteredImages, open_cluttered
from iared2.data.device_dataset import ResidentImages
from iared2.data.images import DataConfig, open_samples
from iared2.errors import InputError
from iared2.measure import view_keys
from iared2.model.baselines import KINDS as BASELINES
from iared2.model.calibrate import thresholds_for
from iared2.model.decide import Decide, by_share, margin
from iared2.train.curriculum import build_model, train
from iared2.train.recipe import Recipe, read_recipe
from iared2.train.state import load_state

RECIPES = Path(__file__).resolve().parents[1] / "recipes"
BOOTSTRAP = 5000
CANVASES = 4
"""On which each cluttered photo is evaluated; intervals are over photos."""
Part = Literal["train", "holdout", "eval"]


@dataclass(frozen=True)
class Lab:
    """Where things are, and at which size the experiments run.

    Attributes:
        data: as for ``iared2 train --data``.
        backbone: the dense model that every variant starts from.
        runs: folder of the runs.
        size: "tiny_imagenet", "tiny_imagenet_cpu" or "reference": the recipes of that name.
        settings: for every recipe, such as shorter stages.
        photos: number of validation photos to measure on; all by default.
    """

    data: str
    backbone: Path
    runs: Path
    size: str
    settings: tuple[str, ...] = ()
    photos: int | None = None

    def recipe(self, kind: str, settings: Sequence[str] = (), seed: int = 0) -> Recipe:
        """The recipe of ``kind`` "ours" or "paper"."""
        name = f"{self.size}.toml" if kind == "ours" else f"{self.size}_{kind}.toml"
        fixed = [f"model.checkpoint='{self.backbone}'", f"data.path='{self.data}'", f"seed={seed}"]
        return read_recipe(RECIPES / name, [*fixed, *self.settings, *settings])

    def run(self, name: str, kind: str, settings: Sequence[str] = (), seed: int = 0) -> Trained:
        """The finished run of a variant."""
        folder = self.runs / f"{name}-{seed}"
        recipe = self.recipe(kind, settings, seed)
        if not (folder / "done").exists():
            print(f"== {folder}", flush=True)
            train(recipe, folder)
            (folder / "done").touch()
        return Trained(folder, recipe, photos=self.photos)

    def dense(self) -> Trained:
        """The backbone as it is before Algorithm 1."""
        return Trained(None, self.recipe("paper"), photos=self.photos)


@dataclass(frozen=True)
class Measured:
    """One pass over the validation images.

    Attributes:
        correct: ``(n,)`` bool.
        macs: ``(n,)`` MACs.
        kept: ``(D, n, N)`` bool.
        scores: ``(D, n, N)``.
        dense_macs: of the backbone alone.
        draws: number of passes over the same images that the n rows hold.
    """

    correct: np.ndarray
    macs: np.ndarray
    kept: np.ndarray
    scores: np.ndarray
    dense_macs: int
    draws: int = 1

    @property
    def top1(self) -> float:
        return 100 * float(self.correct.mean())

    @property
    def share(self) -> float:
        """MACs as a share of the dense backbone's."""
        return float(self.macs.mean() / self.dense_macs)

    @property
    def keep_ratio(self) -> list[float]:
        return self.kept.mean((1, 2)).round(4).tolist()


@dataclass(frozen=True)
class Trained:
    """A finished run (or, without a folder, the backbone)."""

    folder: Path | None
    recipe: Recipe
    photos: int | None = field(default=None, kw_only=True)

    @cached_property
    def model(self) -> ReducedVisionTransformer:
        """In evaluation mode, its thresholds calibrated on the holdout if it has a budget."""
        policy = self.recipe.policy
        model = build_model(self.recipe, self.num_classes, weights=self.folder is None).eval()
        if self.folder is not None:
            model.load_state_dict(load_state(self.folder / "state.safetensors").parts["model"])
            if policy.keep and not self.by_count:
                model.calibrate(self.sample(model), keep=policy.keep)
        return model

    @property
    def num_classes(self) -> int:
        return len(open_samples(self.recipe.data, "eval").class_names)

    def sample(self, model: ReducedVisionTransformer) -> Tensor:
        """Images that nothing was trained on: the holdout of the train split, on which thresholds are chosen."""
        return next(iter(self.batches("holdout", model, 1024))).images

    @property
    def decide(self) -> Decide:
        """The decision with which it was fine-tuned."""
        by_count, decision = self.by_count, self.model.decision
        return by_share(self.recipe.policy.keep, decision.standing) if by_count else decision

    @property
    def by_count(self) -> bool:
        """Whether every image keeps the same number of patches."""
        return self.recipe.policy.decisions in BASELINES or self.recipe.policy.equal_counts

    def at(self, share: float) -> Decide:
        """The learned decision at a share of the dense MACs: thresholds chosen on the holdout, or counts."""
        if self.by_count:
            return by_share(self.shares_at(share), self.model.decision.standing)
        gmacs = share * self.model.dense_macs / 1e9
        return self.model.decision.at(thresholds_for(self.model, self.sample(self.model), gmacs=gmacs))

    def shares_at(self, share: float) -> list[float]:
        """The recipe's shares to the one power at which they cost at most ``share`` of the dense MACs."""
        patches = self.model.num_patches
        for alpha in np.arange(0, 8, 0.002):
            shares = [keep**alpha for keep in self.recipe.policy.keep]
            counts = torch.tensor([[round(patches * s)] for s in shares])
            if int(self.model.count_macs(counts)) <= share * self.model.dense_macs:
                return shares
        raise InputError(f"no counts cost less than {share:.0%} of the dense MACs")

    def measure(self, decide: Decide | None = None, part: Part = "eval") -> Measured:
        """One pass over the images of a split, in float32."""
        decide = decide or self.decide
        found = []
        for batch in self.batches(part, self.model):
            with torch.inference_mode():
                out = self.model.trace(batch.images, decide, view_keys(batch))
            right = out.logits.argmax(1) == batch.labels
            found.append([t.numpy() for t in (right, out.macs, out.kept.transpose(0, 1), out.scores.transpose(0, 1))])
        correct, macs, kept, scores = (np.concatenate(parts) for parts in zip(*found, strict=True))
        draws = CANVASES if self.recipe.data.clutter else 1
        return Measured(correct, macs, kept.swapaxes(0, 1), scores.swapaxes(0, 1), self.model.dense_macs, draws)

    def batches(self, part: Part, model: ReducedVisionTransformer, batch_size: int = 250) -> Iterator[Batch]:
        """Batches of a split, normalised for the model."""
        cfg = model.pretrained_cfg
        images = split(self.recipe.data, part, cfg["input_size"][1], self.photos if part == "eval" else None)
        return images.eval_batches(cfg["mean"], cfg["std"], batch_size=batch_size)


@cache
def split(config: DataConfig, part: Part, size: int, number: int | None) -> ResidentImages | ClutteredImages:
    """The first ``number`` photos of a split, decoded once per process."""
    if config.clutter:  # few photos, used on several canvases: always all of them
        found = open_cluttered(config, part, config.clutter)
        photos, copy = found.photos, torch.arange(CANVASES).repeat_interleave(len(found))
        rows = photos.rows.repeat(CANVASES) + (copy << 32)  # a canvas is a function of the row
        several = ResidentImages(
            photos.images.repeat(CANVASES, 1, 1, 1), photos.labels.repeat(CANVASES), rows, photos.skipped
        )
        return replace(found, photos=several)
    samples = open_samples(config, part)
    few = replace(samples, rows=samples.rows[:number], labels=samples.labels[:number])
    return ResidentImages.read(few, (size, size))


def interval(difference: np.ndarray) -> tuple[float, float]:
    """95 % of paired bootstrap means of per-image differences, in points."""
    draws = np.random.default_rng(0).integers(len(difference), size=(BOOTSTRAP, len(difference)))
    low, high = np.quantile(100 * difference[draws].mean(1), [0.025, 0.975])
    return float(low), float(high)


def second_passes(logits: Tensor, macs: Tensor, budget: float, again: int) -> Tensor:
    """The least sure of some photos, as many as a second pass may have.

    Args:
        logits: ``(n, K)`` of the first pass.
        macs: ``(n,)`` of the first pass.
        budget: mean MACs of both passes.
        again: MACs of a second pass (`again_macs`).
    """
    number = int((budget * len(logits) - macs.sum().item()) / again)
    return margin(logits).argsort()[: max(number, 0)]


def versus(a: Sequence[Measured], b: Sequence[Measured]) -> str:
    """``a − b`` in points with its interval; the same images, averaged over pairs of seeds."""
    difference = np.mean([x.correct.astype(float) - y.correct for x, y in zip(a, b, strict=True)], axis=0)
    difference = difference.reshape(a[0].draws, -1).mean(0)
    low, high = interval(difference)
    return f"{100 * difference.mean():+.1f} ({low:+.1f} … {high:+.1f})"


def shares(keep: list[float]) -> str:
    """Percentages after each group."""
    return " · ".join(f"{100 * k:.0f} %" for k in keep)


def row(name: str, m: Measured, *more: str) -> list[str]:
    """What every table says of a model: name, top-1, patches alive, MACs."""
    return [name, f"{m.top1:.1f}", shares(m.keep_ratio), f"{100 * m.share:.0f} %", *more]


@dataclass(frozen=True)
class Table:
    """What an experiment found."""

    title: str
    command: str
    columns: list[str]
    rows: list[list[str]]
    notes: list[str]

    def markdown(self) -> str:
        lines = [f"{self.title}", "", f"`{self.command}`", "", f"| {' | '.join(self.columns)} |"]
        lines += ["|---" * len(self.columns) + "|", *(f"| {' | '.join(row)} |" for row in self.rows), ""]
        return "\n".join([*lines, *(f"- {note}" for note in self.notes), ""])

    def write(self, folder: Path, name: str) -> None:
        """``name.json`` and ``name.md``."""
        folder.mkdir(parents=True, exist_ok=True)
        text = {"experiment": name, **self.__dict__}
        (folder / f"{name}.json").write_text(json.dumps(text, ensure_ascii=False) + "\n", encoding="utf-8")
        (folder / f"{name}.md").write_text(self.markdown(), encoding="utf-8")
        print(self.markdown(), flush=True)
