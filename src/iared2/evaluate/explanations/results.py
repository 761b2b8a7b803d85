"""The table of methods × measures: its columns, and estimates with intervals from per-image values.

    columns {name: (n,)}, one per measure and pixel count ── estimate: resample the images ──> {measure: Estimate}

The bootstrap is not scipy's, because pixel accuracy, mean accuracy and mean IoU are ratios of sums over images, and
every method must be measured on the same resamples. Does not depend on models, maps or data.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import asdict, dataclass
from typing import Any, NamedTuple

import numpy as np
import torch

from .measures import segmentation

RESAMPLES = 2000
LEVEL = 0.95
MAX_COUNTS = 1 << 22
"""Images × resamples in memory at once."""


class Measure(NamedTuple):
    """One column of the table."""

    name: str
    kind: str
    """"localisation", "segmentation" or "faithfulness"."""
    sign: int
    """1: higher is better, -1: lower is better, 0: neither, the measure only describes."""


MEASURES = (
    Measure("pointing game", "localisation", 1),
    Measure("energy in box", "localisation", 1),
    Measure("mass accuracy", "localisation", 1),
    Measure("rank accuracy", "localisation", 1),
    Measure("pixel accuracy", "segmentation", 1),
    Measure("mean accuracy", "segmentation", 1),
    Measure("mean IoU", "segmentation", 1),
    Measure("mAP", "segmentation", 1),
    Measure("sparsity", "segmentation", 0),
    Measure("insertion", "faithfulness", 1),
    Measure("deletion", "faithfulness", -1),
    Measure("probability lost", "faithfulness", -1),
    Measure("agreement", "faithfulness", 1),
)
COUNTS = "true negatives", "false positives", "false negatives", "true positives"


@dataclass(frozen=True)
class Estimate:
    """An estimate over the images with its 95 % bootstrap interval."""

    value: float
    low: float
    high: float


@dataclass
class MethodResult:
    """One row of the table."""

    method: str
    """The name as given, see ``read_method``."""
    milliseconds: float
    """Time of ``heatmap`` per image, including its forward pass; median over the batches."""
    measures: dict[str, Estimate]
    """By the name of the measure."""


@dataclass
class Benchmark:
    """The table, and how it was measured."""

    images: int
    skipped: dict[str, int]
    """Number of photos left out, by reason: "unreadable" and "no region"."""
    region: str
    """"box" or "mask"."""
    target: str
    """"label" or "top-1": the class that was explained."""
    steps: int
    """Steps of insertion and deletion; 0: faithfulness was not measured."""
    fill: str
    """Fill of the blanked patches."""
    seed: int
    forward_milliseconds: float
    """Time of the reduced model's forward pass per image, in the same batches."""
    keep_ratio: float
    """Share of the patches left after the last group: those not blanked, the same number for every method."""
    methods: list[MethodResult]

    def to_dict(self) -> dict[str, Any]:
        """The table as JSON types."""
        return asdict(self)

    @property
    def columns(self) -> list[Measure]:
        """The measures of the table. In a box, energy and mass are the same number, which is shown once."""
        left_out = {"mass accuracy"} if self.region == "box" else set()
        return [m for m in MEASURES if m.name in self.methods[0].measures.keys() - left_out]

    def leaders(self, measure: Measure) -> set[str]:
        """The best method, and those within its interval; none for a measure that only describes."""
        if not measure.sign:
            return set()
        figures = {row.method: row.measures[measure.name] for row in self.methods}
        first = max(figures.values(), key=lambda figure: measure.sign * figure.value)
        return {name for name, figure in figures.items() if first.low <= figure.value <= first.high}


def estimate(columns: dict[str, np.ndarray], seed: int = 0) -> dict[str, Estimate]:
    """Estimates over the images with intervals, by the percentile bootstrap over images (Efron 1979).

    Args:
        columns: ``(n,)`` each: the values per image, by the name of the measure, and the four pixel counts.
        seed: of the resamples. The same seed and number of images give the same resamples, so methods are paired.

    Returns:
        One estimate per measure of these columns, in the order of ``MEASURES``.
    """
    values = np.stack(list(columns.values()), 1)
    images = len(values)
    generator = np.random.default_rng(seed)
    share = np.full(images, 1 / images)
    chunk = max(1, MAX_COUNTS // images)
    resampled = np.concatenate(
        [
            generator.multinomial(images, share, min(chunk, RESAMPLES - start)) @ values / images
            for start in range(0, RESAMPLES, chunk)
        ]
    )
    points, spread = _figures(columns, values.mean(0)), _figures(columns, resampled)
    ends = (1 - LEVEL) / 2, (1 + LEVEL) / 2
    found = {name: (point, *np.quantile(spread[name], ends)) for name, point in points.items()}
    return {name: Estimate(*map(float, numbers)) for name, numbers in found.items()}


def _figures(names: Iterable[str], means: np.ndarray) -> dict[str, np.ndarray]:
    """Means over images ``(..., columns)`` -> each measure ``(...)``."""
    column = dict(zip(names, np.moveaxis(means, -1, 0), strict=True))
    counts = torch.from_numpy(np.stack([column[name] for name in COUNTS], -1)).unflatten(-1, (2, 2))
    column |= {name: value.numpy() for name, value in segmentation(counts).items()}
    return {measure.name: column[measure.name] for measure in MEASURES if measure.name in column}
