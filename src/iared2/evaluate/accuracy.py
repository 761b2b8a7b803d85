"""Top-1, patches kept, MACs and speed of the reduced model, the dense backbone and random dropping."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any

import torch
from matplotlib.figure import Figure
from rich.table import Table
from torch import Tensor

from ..data.batches import Batch
from ..device import timed
from ..measure import by_video, counts, view_keys
from ..model.decide import Decision, at_random
from ..model.reduced import Output, ReducedVisionTransformer
from ..model.second_pass import same_passes


@dataclass
class Variant:
    """Results of one way to run the model on a data set."""

    name: str
    top1: float
    """Percent."""
    keep_ratio: list[float]
    """Share of patches alive after each group."""
    gmacs: float
    """Mean 10⁹ MACs per image."""
    images_per_second: float
    """Of the forward passes alone; the variants take turns on the same batches."""
    thresholds: Sequence[float] | None = None
    """Thresholds of the groups; None if thresholds do not decide."""


REDUCED, DENSE, RANDOM = "reduced", "dense backbone", "random dropping, same counts (not fine-tuned)"


@dataclass
class Evaluation:
    """The reduced model and its baselines on the same images, also at other budgets if there are any."""

    images: int
    skipped: list[str]
    """Files that could not be read."""
    variants: list[Variant]
    """Reduced, dense, random; then reduced and random at each budget."""

    def to_dict(self) -> dict[str, Any]:
        """The results as JSON types."""
        return asdict(self)

    def table(self) -> Table:
        """The table to print."""
        title = f"{self.images} images" + (f", {len(self.skipped)} could not be read" if self.skipped else "")
        table = Table("model", "top-1 %", "kept after each group", "GMACs", "images/s", title=title)
        for v in self.variants:
            kept = " ".join(f"{ratio:.2f}" for ratio in v.keep_ratio)
            table.add_row(v.name, f"{v.top1:.2f}", kept, f"{v.gmacs:.4g}", f"{v.images_per_second:.1f}")
        return table

    def figure(self) -> Figure:
        """A plot of accuracy against MACs."""
        figure = Figure(figsize=(5.5, 4), layout="constrained")
        axes = figure.add_subplot(xlabel="mean GMACs per image", ylabel="top-1 (%)")
        for name, style in ((REDUCED, "o-"), (RANDOM, "s--"), (DENSE, "k*")):
            points = sorted((v.gmacs, v.top1) for v in self.variants if v.name.startswith(name))
            axes.plot(*zip(*points, strict=True), style, label=name)
        axes.grid(alpha=0.3)
        axes.legend()
        return figure


def evaluate(
    model: ReducedVisionTransformer,
    batches: Iterable[Batch],
    device: torch.device | str = "cpu",
    seed: int = 0,
    budgets: Mapping[str, Decision] | None = None,
) -> Evaluation:
    """Reduced model, dense backbone, and random dropping with the same number of patches for each image and group.

    Args:
        model: in evaluation mode, on ``device``.
        batches: of ``batches.eval_batches``. For several views of a video, ``(B, V, 3, T, H, W)``, probabilities are
            averaged, MACs are summed, and shares of patches are means over the views.
        device: where the model is.
        seed: of the random baseline.
        budgets: name -> decision (`model.calibrate.decision_at`), evaluated in addition to the model's own, in one
            pass.
    """
    own = model.decision
    settings = {"": own} | {f", {name}": decision for name, decision in (budgets or {}).items()}
    sums: dict[str, Tensor] = {}  # correct, MACs, share of patches kept after each group, seconds
    images = 0
    skipped: list[str] = []

    def add(name: str, run: Callable[..., Output], *args: Any) -> None:
        with torch.inference_mode():
            output, seconds = timed(device, run, *args)
        output = by_video(output, views) if views > 1 else output
        found = counts(output, labels).cpu()
        sums[name] = sums.get(name, torch.zeros(len(found) + 1)) + torch.cat([found, torch.tensor([seconds])])

    def dense(x: Tensor) -> Output:
        everything = torch.ones(model.num_groups, len(x), 1, dtype=torch.bool, device=x.device)
        macs = torch.full((len(x),), model.dense_macs, device=x.device)
        return Output(model.backbone(x), everything, everything, macs, torch.zeros_like(macs, dtype=torch.bool))

    for number, batch in enumerate(batches):
        skipped += [file for file, _ in batch.skipped]
        if not len(batch.labels):
            continue
        x, labels, views = batch.inputs.to(device), batch.labels.to(device), batch.views
        keys = view_keys(batch, seed).to(device)
        runs: list[tuple[Any, ...]] = [(DENSE, dense, x)]
        for name, decide in settings.items():
            with torch.inference_mode():  # a pass for the counts alone: random dropping may run before the timed one
                num_keep = model.trace(x, decide).kept.sum(-1)
            random = same_passes(model, decide, at_random(num_keep, keys))
            runs += [(REDUCED + name, model.trace, x, decide), (RANDOM + name, model.trace, x, random)]
        if not images:  # warm-up: the first pass includes allocations and the choice of kernels
            with torch.inference_mode():
                for _, run, *args in runs:
                    run(*args)
        start = number % len(runs)  # in a new order for each batch: the first shares the cores with the reader
        for name, *timed_run in runs[start:] + runs[:start]:
            add(name, *timed_run)
        images += len(labels)

    variants = []
    n = max(images, 1)
    names = [REDUCED, DENSE, RANDOM] + [kind + budget for budget in list(settings)[1:] for kind in (REDUCED, RANDOM)]
    for name in names:
        right, macs, *shares, seconds = sums.get(name, torch.zeros(model.num_groups + 3)).tolist()
        decided = settings[name.removeprefix(REDUCED)].thresholds if name.startswith(REDUCED) else None
        speed = images / max(seconds, 1e-9)
        variants.append(Variant(name, 100 * right / n, [s / n for s in shares], macs / n / 1e9, speed, decided))
    return Evaluation(images, skipped, variants)
