"""Localisation of decisions: share of the score and of the kept patches on the object, and pictures."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import torch
from lab import Trained
from matplotlib.figure import Figure
from PIL import Image

from iared2.data.batches import model_transform
from iared2.model.decide import Decide, keep_all, top_k

EXAMPLES = Path(__file__).resolve().parents[1] / "examples"


def maps(file: Path, runs: dict[str, Trained]) -> None:
    """The example photos over the scores of the second group, one row per run, each map scaled to its own range."""
    photos = [Image.open(path).convert("RGB") for path in sorted(EXAMPLES.glob("*.jpg"))]
    figure = Figure(figsize=(1.6 * len(photos), 1.6 * (1 + len(runs))), layout="constrained")
    axes = figure.subplots(1 + len(runs), len(photos))
    rows: dict[str, list[Any]] = {"": [photo.resize((256, 256)) for photo in photos]}
    for name, run in runs.items():
        images = torch.stack(list(map(model_transform(run.model.pretrained_cfg), photos)))
        with torch.inference_mode():
            scores = run.model.trace(images, keep_all).scores[1]
        rows[name] = list(scores.unflatten(1, run.model.grid_size).numpy())
    for line, (name, pictures) in zip(axes, rows.items(), strict=True):
        for place, picture in zip(line, pictures, strict=True):
            place.imshow(picture, cmap="jet")
            place.set_xticks([])
            place.set_yticks([])
        line[0].set_ylabel(name)
    figure.savefig(file, dpi=100)


def upside_down(keep: list[float]) -> Decide:
    """Keep the same number of patches, those with the lowest scores."""

    def decide(scores: torch.Tensor, alive: torch.Tensor, group: int) -> torch.Tensor:
        return top_k(-scores, alive, alive.new_full((1,), round(keep[group] * alive.shape[1]), dtype=torch.int64))

    return decide


def score_share(scores: np.ndarray, inside: np.ndarray) -> float:
    """Mean rank (0…1) of the patches in the box ÷ mean rank of all, over the patches alive; 1 is chance.

    NaN if no photo has two patches alive, one of them in the box.
    """
    ratios = []
    for s, box in zip(scores, inside, strict=True):
        alive = s > 0
        if alive.sum() < 2 or not box[alive].any():
            continue
        rank = s[alive].argsort().argsort() / (alive.sum() - 1)
        ratios.append((rank * box[alive]).sum() / box[alive].sum() / rank.mean())
    return float(np.mean(ratios)) if ratios else float("nan")


def centre_like(kept: torch.Tensor, grid: tuple[int, int]) -> torch.Tensor:
    """The same number of patches per image, those nearest to the centre: ``(B, N)`` bool."""
    axes = [torch.linspace(-1, 1, size) for size in grid]
    scores = -torch.cartesian_prod(*axes).square().sum(1).expand(len(kept), -1)
    return top_k(scores, torch.ones_like(kept), kept.sum(1))


def enrichment(kept: np.ndarray, inside: np.ndarray) -> float:
    """Share of kept patches in the box ÷ share of all patches in it, summed over images; NaN if none is kept."""
    return float((kept * inside).sum() / kept.sum() / inside.mean()) if kept.any() else float("nan")
