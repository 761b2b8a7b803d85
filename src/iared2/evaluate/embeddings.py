"""What is left of the embeddings of a model without classes: cosines, nearest neighbours, and k-NN accuracy."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from matplotlib.figure import Figure
from rich.table import Table
from torch import Tensor

from ..data.batches import Batch
from ..device import timed
from ..errors import InputError
from ..model.decide import Decision
from ..model.reduced import ReducedVisionTransformer
from .accuracy import DENSE, REDUCED
from .agreement import NEIGHBOURS, Agreement, agreement, knn_top1


@dataclass
class EmbeddingVariant:
    """Results of one way to run the model."""

    name: str
    agreement: Agreement
    """With the dense model."""
    knn_top1: float | None
    """Percent, by the labels of the 10 nearest other images; None without labels."""
    keep_ratio: list[float]
    """Share of patches alive after each group."""
    gmacs: float
    """Mean 10⁹ MACs per image."""
    images_per_second: float
    """Of the forward passes alone; the variants take turns on the same batches."""


@dataclass
class EmbeddingEvaluation:
    """The dense and the reduced model on the same images, also at other budgets if there are any."""

    images: int
    skipped: list[str]
    """Files that could not be read."""
    variants: list[EmbeddingVariant]
    """Dense, reduced, then reduced at each budget."""

    def to_dict(self) -> dict[str, Any]:
        """The results as JSON types."""
        variants = [{**vars(v), "agreement": v.agreement.to_dict()} for v in self.variants]
        return {**vars(self), "variants": variants}

    def table(self) -> Table:
        """The table to print."""
        title = f"{self.images} images" + (f", {len(self.skipped)} could not be read" if self.skipped else "")
        columns = "cosine: mean, 1 %", f"{NEIGHBOURS} neighbours %", "k-NN top-1 %", "kept after each group"
        table = Table("model", *columns, "GMACs", "images/s", title=title)
        for v in self.variants:
            cosines = f"{v.agreement.cosine:.4f}, {v.agreement.cosine_p1:.4f}"
            knn = "–" if v.knn_top1 is None else f"{v.knn_top1:.2f}"
            kept = " ".join(f"{ratio:.2f}" for ratio in v.keep_ratio)
            shared = f"{100 * (v.agreement.neighbours or 0):.1f}"
            table.add_row(v.name, cosines, shared, knn, kept, f"{v.gmacs:.4g}", f"{v.images_per_second:.1f}")
        return table

    def figure(self) -> Figure:
        """A plot of the neighbours that are kept against MACs."""
        figure = Figure(figsize=(5.5, 4), layout="constrained")
        label = f"{NEIGHBOURS} nearest neighbours kept (%)"
        axes = figure.add_subplot(xlabel="mean GMACs per image", ylabel=label)
        points = sorted((v.gmacs, 100 * (v.agreement.neighbours or 0)) for v in self.variants)
        axes.plot(*zip(*points, strict=True), "o-")
        axes.grid(alpha=0.3)
        return figure


def evaluate_embeddings(
    model: ReducedVisionTransformer,
    batches: Iterable[Batch],
    device: torch.device | str = "cpu",
    budgets: Mapping[str, Decision] | None = None,
) -> EmbeddingEvaluation:
    """Compare the embeddings of a model without classes with those of its dense backbone.

    Args:
        model: in evaluation mode, on ``device``, with ``num_classes=0``.
        batches: of ``batches.eval_batches``; labels below 0 are unknown.
        device: where the model is.
        budgets: name -> decision, evaluated in addition to the model's own decision.

    Raises:
        InputError: fewer than two images can be read.
    """
    decisions = {REDUCED: model.decision}
    decisions |= {f"{REDUCED}, {name}": decision for name, decision in (budgets or {}).items()}
    features: dict[str, list[Tensor]] = {name: [] for name in (DENSE, *decisions)}
    costs: dict[str, list[Tensor]] = {name: [] for name in decisions}
    ratios: dict[str, list[Tensor]] = {name: [] for name in decisions}
    seconds = dict.fromkeys(features, 0.0)
    labels: list[Tensor] = []
    skipped: list[str] = []
    for number, batch in enumerate(batches):
        skipped += [file for file, _ in batch.skipped]
        if not len(batch.labels):
            continue
        x = batch.images.to(device)
        with torch.inference_mode():
            if not labels:  # warm-up
                model.backbone(x)
                model(x)
            order = list(features)
            for name in order[number % len(order) :] + order[: number % len(order)]:
                if name == DENSE:
                    output, spent = timed(device, model.backbone, x)
                else:
                    output, spent = timed(device, model.trace, x, decisions[name])
                    costs[name].append(output.macs.cpu())
                    ratios[name].append(output.keep_ratio.cpu())
                features[name].append(output.float().cpu() if name == DENSE else output.logits.float().cpu())
                seconds[name] += spent
        labels.append(batch.labels)
    images = sum(map(len, labels))
    if images < 2:
        raise InputError(f"{images} images can be read; neighbours need two at least")
    known, rows = torch.cat(labels), {name: torch.cat(parts) for name, parts in features.items()}
    variants = []
    for name, found in rows.items():
        macs = model.dense_macs if name == DENSE else torch.cat(costs[name]).double().mean().item()
        kept = torch.ones(model.num_groups) if name == DENSE else torch.cat(ratios[name], 1).mean(1)
        knn = knn_top1(found, known) if known.min() >= 0 else None
        close = agreement(rows[DENSE], found, classes=False)
        speed = images / max(seconds[name], 1e-9)
        variants.append(EmbeddingVariant(name, close, knn, kept.tolist(), macs / 1e9, speed))
    return EmbeddingEvaluation(images, skipped, variants)
