"""How good is it: top-1, patches kept, multiply-adds and speed; reduced, dense, and dropping at random."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable
from dataclasses import asdict, dataclass, field
from typing import Any

import torch
from rich.console import Console
from rich.table import Table
from torch import Tensor

from . import keyed
from .data import Batch
from .model.decide import Decide, at_random
from .model.reduced import ReducedVisionTransformer

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
        decide: the decision; by default the model's threshold.
        reduce: sums over processes, such as ``Accelerator.reduce``.

    Returns:
        ``top1`` in percent, ``keep_ratio`` a list of D shares after each group, ``gmacs`` mean multiply-adds of an image in
        10⁹, ``images``, and ``skipped`` files that could not be read.
    """
    total = torch.zeros(4 + model.num_groups, dtype=torch.float64, device=device)
    for batch in batches:
        if len(batch.labels):
            with torch.inference_mode():
                output = model.trace(batch.images.to(device), decide)
            right = (output.logits.argmax(1) == batch.labels.to(device)).sum()
            sums = [right, output.macs.sum(), *output.keep_ratio.sum(1)]
            total[2:] += torch.stack([s.double() for s in sums])
        total[0] += len(batch.labels)
        total[1] += len(batch.skipped)
    images, skipped, right, macs, *kept = reduce(total, "sum").tolist()
    return {
        "top1": 100 * right / max(images, 1),
        "keep_ratio": [round(k / max(images, 1), 4) for k in kept],
        "gmacs": macs / max(images, 1) / 1e9,
        "images": int(images),
        "skipped": int(skipped),
    }


@dataclass
class Variant:
    """Figures of one way to run the model over a data set."""

    name: str
    top1: float = 0.0
    """Percent."""
    keep_ratio: list[float] = field(default_factory=list)
    """Share of patches alive after each group."""
    gmacs: float = 0.0
    """Mean multiply-adds of an image, 10⁹."""
    images_per_second: float = 0.0
    """Of the forward passes alone; the variants take turns on the same batches."""


@dataclass
class Evaluation:
    """The reduced model beside its rivals on the same images."""

    images: int
    skipped: list[str]
    variants: list[Variant]

    def to_dict(self) -> dict[str, Any]:
        return asdict(self)

    def print(self, console: Console | None = None) -> None:
        """A table for people."""
        table = Table("model", "top-1 %", "kept after each group", "GMACs", "images/s", title=f"{self.images} images")
        for v in self.variants:
            kept = " ".join(f"{ratio:.2f}" for ratio in v.keep_ratio)
            table.add_row(v.name, f"{v.top1:.2f}", kept, f"{v.gmacs:.3f}", f"{v.images_per_second:.1f}")
        (console or Console()).print(table)


def evaluate(
    model: ReducedVisionTransformer, batches: Iterable[Batch], device: torch.device | str = "cpu", seed: int = 0
) -> Evaluation:
    """Reduced model, dense backbone, and random dropping with the same number of patches for each image and group.

    Args:
        model: in evaluation mode, on ``device``.
        batches: of ``data.eval_batches``.
        seed: of the random baseline.
    """
    reduced, dense = Variant("reduced"), Variant("dense backbone")
    random = Variant("random dropping (not fine-tuned)")
    keep = torch.zeros(model.num_groups, dtype=torch.float64)
    seconds = dict.fromkeys(("reduced", "dense", "random"), 0.0)
    right = dict.fromkeys(seconds, 0)
    images, macs, skipped = 0, 0.0, []

    def timed(name: str, run: Callable[[], Any]) -> Any:
        start = time.perf_counter()
        with torch.inference_mode():
            result = run()
        if torch.device(device).type == "cuda":
            torch.cuda.synchronize(device)
        seconds[name] += time.perf_counter() - start
        return result

    for number, batch in enumerate(batches):
        skipped += [name for name, _ in batch.skipped]
        if not len(batch.labels):
            continue
        x, labels = batch.images.to(device), batch.labels.to(device)
        if number == 0:  # warm-up: the first pass pays for allocations and kernel choice
            with torch.inference_mode():
                model.trace(x), model.backbone(x)
        output = timed("reduced", lambda x=x: model.trace(x))
        keys = keyed.sample_keys(seed, RANDOM_EPOCH, batch.samples).to(device)
        decide = at_random(output.kept.sum(-1), keys)
        logits = {
            "reduced": output.logits,
            "dense": timed("dense", lambda x=x: model.backbone(x)),
            "random": timed("random", lambda x=x, decide=decide: model.trace(x, decide)).logits,
        }
        for name, values in logits.items():
            right[name] += int((values.argmax(1) == labels).sum())
        images += len(labels)
        macs += float(output.macs.sum())
        keep += output.keep_ratio.double().sum(1).cpu()

    for name, variant in zip(seconds, (reduced, dense, random), strict=True):
        variant.top1 = 100 * right[name] / max(images, 1)
        variant.images_per_second = images / max(seconds[name], 1e-9)
        variant.gmacs = model.dense_macs / 1e9 if name == "dense" else macs / max(images, 1) / 1e9
        variant.keep_ratio = [1.0] * model.num_groups if name == "dense" else (keep / max(images, 1)).tolist()
    return Evaluation(images, skipped, [reduced, dense, random])
