"""Inference time and memory: ours, the dense model, and other ways to run the same decisions."""

from __future__ import annotations

import math
import random
import statistics
import time
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass
from functools import partial
from typing import Any

import torch
from rich.table import Table
from torch import Tensor

from ... import keyed
from ...device import peak_memory, synchronize, timed
from ...model.decide import Decide, at_random, top_k
from ...model.reduced import ReducedVisionTransformer
from .baselines import masked, padded
from .workload import Workload

DENSE, DENSE_COMPILED = "dense, timm", "dense, timm, compiled"
OURS, OURS_COMPILED, WHOLE = "ours", "ours, compiled", "ours, nothing dropped"
RANDOM, TOP_K, MASKED, PADDED = "random, same counts", "top-k, same counts", "masked", "padded to the longest"
WARM_UP = 2
MIN_ROUNDS = 11


@dataclass
class Row:
    """Results of one way to run one batch."""

    name: str
    batch_size: int
    images_per_second: float
    """At the median."""
    p50_ms: float
    """Median milliseconds of a forward pass of the batch."""
    p95_ms: float
    spread: float
    """Interquartile range over median."""
    gmacs: float
    """Mean 10⁹ MACs per image."""
    speed_up: float
    """t_dense / t, with t_dense of the faster timm model."""
    efficiency: float
    """Speed-up over MACs_dense / MACs. Includes the effect of the engine if it is not timm's: see `Speed`."""
    rounds: int
    peak_mb: float | None
    """Peak memory of a forward pass of the batch without weights and images, 10⁶ bytes (`device.peak_memory`)."""


@dataclass
class Speed:
    """Results for one batch size."""

    rows: list[Row]
    efficiency_within: float
    """As efficiency, but against our own engine when it drops nothing: 1 means that dropping reduces time by the same
    factor as MACs."""
    interpreters: float
    """Share of the interpreters in our time."""

    def to_dict(self) -> dict[str, Any]:
        """The results as JSON types."""
        return asdict(self)


def measure(
    model: ReducedVisionTransformer,
    workload: Workload,
    *,
    seconds: float = 20.0,
    compiled: bool = True,
    more: Mapping[str, tuple[Callable[[Tensor], Tensor], float]] | None = None,
) -> Speed:
    """Time every baseline on one batch, taking turns.

    Args:
        model: in evaluation mode, with or without packed weights.
        workload: the batch.
        seconds: of measuring, without warm-up and compilation.
        compiled: also measure `torch.compile`, which takes a minute to start.
        more: further baselines, name -> (images -> logits, mean GMACs per image).
    """
    images, decide, num_keep = workload.images, workload.decide, workload.num_keep
    keys = keyed.sample_keys(0, 0, torch.arange(len(images))).to(images.device)
    dense, gmacs = model.dense_macs / 1e9, workload.gmacs

    def whole(x: Tensor) -> Tensor:
        packed = model.embed(x)
        for group in range(model.num_groups):  # no interpreter either
            packed = model.run_blocks(packed, group)
        return model.head(packed)

    def ours_compiled(x: Tensor) -> Tensor:
        engine, model.engine = model.engine, "compiled"
        try:
            return model(x, decide)
        finally:
            model.engine = engine

    baselines: dict[str, tuple[Callable[[Tensor], Tensor], float]] = {
        DENSE: (model.backbone, dense),
        OURS: (lambda x: model(x, decide), gmacs),
        WHOLE: (whole, dense),
        RANDOM: (lambda x: model(x, at_random(num_keep, keys)), gmacs),
        TOP_K: (lambda x: model(x, lambda scores, alive, group: top_k(scores, alive, num_keep[group])), gmacs),
    }
    if model.dropped == "gone":  # these two do not merge
        baselines[MASKED] = (lambda x: masked(model, x, decide)), dense
        baselines[PADDED] = (lambda x: padded(model, x, decide)), _padded_gmacs(model, num_keep)
    baselines |= more or {}
    if compiled:
        torch.compiler.reset()  # else a second batch size would be compiled for any, which is slower
        baselines[DENSE_COMPILED] = torch.compile(model.backbone, dynamic=False), dense
        baselines[OURS_COMPILED] = ours_compiled, gmacs

    with torch.inference_mode():
        times = take_turns({name: partial(run, images) for name, (run, _) in baselines.items()}, images.device, seconds)
        memory = {name: peak_memory(images.device, run, images) for name, (run, _) in baselines.items()}
        share = _interpreters(model, images, decide)
    medians = {name: statistics.median(t) for name, t in times.items()}
    t_dense = min(medians[DENSE], medians.get(DENSE_COMPILED, float("inf")))
    rows = []
    for name, (_, macs) in baselines.items():
        t, median, peak = sorted(times[name]), medians[name], memory[name]
        q1, _, q3 = statistics.quantiles(t, n=4)
        rows.append(
            Row(
                name=name,
                batch_size=len(images),
                images_per_second=len(images) / median,
                p50_ms=1000 * median,
                p95_ms=1000 * t[math.ceil(0.95 * len(t)) - 1],
                spread=(q3 - q1) / median,
                gmacs=macs,
                speed_up=t_dense / median,
                efficiency=t_dense / median * macs / dense,
                rounds=len(t),
                peak_mb=None if peak is None else peak / 1e6,
            )
        )
    return Speed(rows, medians[WHOLE] / medians[OURS] * gmacs / dense, share)


def take_turns(runs: Mapping[str, Callable[[], Any]], device: torch.device, seconds: float) -> dict[str, list[float]]:
    """Seconds of each run, in rounds, so that other load on the machine affects all runs.

    Each round has its own order, since the previous run determines the content of the caches.
    """
    shuffled = random.Random(0)
    for run in runs.values():
        for _ in range(WARM_UP):
            run()
    times: dict[str, list[float]] = {name: [] for name in runs}
    start, rounds = time.perf_counter(), 0
    while rounds < MIN_ROUNDS or time.perf_counter() - start < seconds:
        for name in shuffled.sample(list(runs), len(runs)):
            times[name].append(timed(device, runs[name])[1])
        rounds += 1
    return times


def _padded_gmacs(model: ReducedVisionTransformer, num_keep: Tensor) -> float:
    longest = num_keep.amax(1, keepdim=True).cpu()
    return model.count_macs(longest).item() / 1e9


def _interpreters(model: ReducedVisionTransformer, images: Tensor, decide: Decide) -> float:
    """The interpreters' share of a forward pass, median of ten."""
    spent: list[float] = []

    def start(*_: Any) -> None:
        synchronize(images.device)
        spent.append(-time.perf_counter())

    def stop(*_: Any) -> None:
        synchronize(images.device)
        spent[-1] += time.perf_counter()

    hooks = [i.register_forward_pre_hook(start) for i in model.interpreters]
    hooks += [i.register_forward_hook(stop) for i in model.interpreters]
    shares = []
    try:
        for _ in range(WARM_UP + 10):
            spent.clear()
            total = timed(images.device, model, images, decide)[1]
            shares.append(sum(spent) / total)
    finally:
        for hook in hooks:
            hook.remove()
    return statistics.median(shares[WARM_UP:])


def table(speeds: list[Speed], title: str) -> Table:
    """The table to print."""
    table = Table(
        *("batch", "model", "images/s", "p50 ms", "p95 ms", "± %", "GMACs", "speed-up", "efficiency", "MB"), title=title
    )
    for speed in speeds:
        for row in speed.rows:
            cells = [f"{row.images_per_second:.1f}", f"{row.p50_ms:.1f}", f"{row.p95_ms:.1f}", f"{50 * row.spread:.1f}"]
            table.add_row(
                str(row.batch_size),
                row.name,
                *cells,
                f"{row.gmacs:.3g}",
                f"{row.speed_up:.2f}",
                f"{row.efficiency:.2f}",
                "–" if row.peak_mb is None else f"{row.peak_mb:.0f}",
            )
        table.add_section()
    return table
