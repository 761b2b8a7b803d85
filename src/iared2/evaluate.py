"""How good is it: top-1, patches kept, multiply-adds and speed; reduced, dense, and dropping at random."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable
from dataclasses import asdict, dataclass
from typing import Any

import torch
from rich.table import Table
from torch import Tensor

from . import keyed
from .batches import Batch
from .model.decide import Decide, at_random
from .model.reduced import Output, ReducedVisionTransformer

RANDOM_EPOCH = 1 << 30  # keys of the random baseline, apart from those of training


def measure(
    model: ReducedVisionTransformer,
    batches: Iterable[Batch],
    device: torch.device | str,
    decide: Decide | None = None,
    reduce: Callable[[Tensor, str], Tensor] = lambda total, how: total,
) -> dict[str, Any]:
    """One pass over held-out images.

    Args:
        model: in evaluation mode.
        batches: of ``data.eval_batches``.
        device: where the model is.
        decide: the decision; by default the model's threshold.
        reduce: sums over processes, such as ``Accelerator.reduce``.

    Returns:
        ``top1`` in percent, ``keep_ratio`` a list of D shares after each group, ``gmacs`` mean multiply-adds of an
        image in 10⁹, ``images``, and ``skipped``, the number of files that could not be read.
    """
    total = torch.zeros(4 + model.num_groups, dtype=torch.float64, device=device)
    for batch in batches:
        total[0] += len(batch.labels)
        total[1] += len(batch.skipped)
        if not len(batch.labels):  # none of its files could be read
            continue
        with torch.inference_mode():
            output = model.trace(batch.images.to(device), decide)
        right = (output.logits.argmax(1) == batch.labels.to(device)).sum()
        sums = [right, output.macs.sum(), *output.keep_ratio.sum(1)]
        total[2:] += torch.stack([s.double() for s in sums])
    images, skipped, right, macs, *kept = reduce(total, "sum").tolist()
    return {
        "top1": round(100 * right / max(images, 1), 4),
        "keep_ratio": [round(k / max(images, 1), 4) for k in kept],
        "gmacs": macs / max(images, 1) / 1e9,
        "images": int(images),
        "skipped": int(skipped),
    }


@dataclass
class Variant:
    """Figures of one way to run the model over a data set."""

    name: str
    top1: float
    """Percent."""
    keep_ratio: list[float]
    """Share of patches alive after each group."""
    gmacs: float
    """Mean multiply-adds of an image, 10⁹."""
    images_per_second: float
    """Of the forward passes alone; the variants take turns on the same batches."""


@dataclass
class Evaluation:
    """The reduced model beside its rivals on the same images."""

    images: int
    skipped: list[str]
    """Files that could not be read."""
    variants: list[Variant]

    def to_dict(self) -> dict[str, Any]:
        """JSON types."""
        return asdict(self)

    def table(self) -> Table:
        """For people."""
        title = f"{self.images} images" + (f", {len(self.skipped)} could not be read" if self.skipped else "")
        table = Table("model", "top-1 %", "kept after each group", "GMACs", "images/s", title=title)
        for v in self.variants:
            kept = " ".join(f"{ratio:.2f}" for ratio in v.keep_ratio)
            table.add_row(v.name, f"{v.top1:.2f}", kept, f"{v.gmacs:.4g}", f"{v.images_per_second:.1f}")
        return table


def evaluate(
    model: ReducedVisionTransformer, batches: Iterable[Batch], device: torch.device | str = "cpu", seed: int = 0
) -> Evaluation:
    """Reduced model, dense backbone, and random dropping with the same number of patches for each image and group.

    Args:
        model: in evaluation mode, on ``device``.
        batches: of ``data.eval_batches``.
        device: where the model is.
        seed: of the random baseline.
    """
    names = {
        "reduced": "reduced",
        "dense": "dense backbone",
        "random": "random dropping, same counts (not fine-tuned)",
    }
    seconds, right = dict.fromkeys(names, 0.0), dict.fromkeys(names, 0)
    keep = torch.zeros(model.num_groups, dtype=torch.float64)
    images, macs = 0, 0
    skipped: list[str] = []

    for number, batch in enumerate(batches):
        skipped += [file for file, _ in batch.skipped]
        if not len(batch.labels):
            continue
        x, labels = batch.images.to(device), batch.labels.to(device)
        output, _ = _timed(device, model.trace, x)
        keys = keyed.sample_keys(seed, RANDOM_EPOCH, batch.samples).to(device)
        runs: dict[str, tuple[Any, ...]] = {
            "reduced": (model.trace, x),
            "dense": (model.backbone, x),
            "random": (model.trace, x, at_random(output.kept.sum(-1), keys)),
        }
        if not images:  # warm-up: the first pass pays for allocations and the choice of kernels
            for run in runs.values():
                _timed(device, *run)
        for turn in range(len(runs)):  # in another order for each batch: the first shares the cores with the reader
            name = list(runs)[(number + turn) % len(runs)]
            result, spent = _timed(device, *runs[name])
            logits = result.logits if isinstance(result, Output) else result
            right[name] += int((logits.argmax(1) == labels).sum())
            seconds[name] += spent
        images += len(labels)
        macs += int(output.macs.sum())
        keep += output.keep_ratio.double().sum(1).cpu()

    def variant(name: str) -> Variant:
        is_dense = name == "dense"
        return Variant(
            name=names[name],
            top1=100 * right[name] / max(images, 1),
            keep_ratio=[1.0] * model.num_groups if is_dense else (keep / max(images, 1)).tolist(),
            gmacs=(model.dense_macs if is_dense else macs / max(images, 1)) / 1e9,
            images_per_second=images / max(seconds[name], 1e-9),
        )

    return Evaluation(images, skipped, [variant(name) for name in names])


def _timed(device: torch.device | str, run: Callable[..., Any], *args: Any) -> tuple[Any, float]:
    """The result and the seconds of one forward pass."""
    start = time.perf_counter()
    with torch.inference_mode():
        result = run(*args)
    if torch.device(device).type != "cpu":
        torch.accelerator.synchronize(device)
    return result, time.perf_counter() - start
