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
from ...model.decide import Decide, at_random, keep_all, top_k
from ...model.reduced import ReducedVisionTransformer
from ...model.second_pass import Replayed, same_passes
from .baselines import masked, padded
from .workload import Workload

DENSE, DENSE_COMPILED = "dense, timm", "dense, timm, compiled"
OURS, OURS_COMPILED, WHOLE = "ours", "ours, compiled", "ours, nothing dropped"
RANDOM, TOP_K, MASKED, PADDED = "random, same counts", "top-k, same counts", "masked", "padded to the longest"
Way = Callable[[Tensor], Any]
"""Images -> logits."""
Ways = Mapping[str, tuple[Way, float]]
"""Name -> a way to run the batch, and its mean GMACs per image."""
INT8 = ", int8"
"""The end of the name of a way in 8 bits."""
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
    """t_dense / t, with t_dense of the fastest dense model; in 8 bits, of the fastest one in 8 bits."""
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
    more: Ways | None = None,
) -> Speed:
    """Time every baseline on one batch, taking turns.

    Args:
        model: in evaluation mode, with or without packed weights.
        workload: the batch.
        seconds: of measuring, without warm-up and compilation.
        compiled: also measure `torch.compile`, which takes a minute to start.
        more: further baselines.
    """
    images, dense = workload.images, model.dense_macs / 1e9
    ways = {**dense_ways(model, workload), **our_ways(model, workload), **(more or {})}
    if compiled:
        torch.compiler.reset()  # else a second batch size would be compiled for any, which is slower
        ways |= compiled_ways(model, workload)
    with torch.inference_mode():
        rows = compare(ways, images, dense, seconds)
        share = interpreters_share(model, images, workload.decide)
    seconds_of = {row.name: row.p50_ms for row in rows}
    return Speed(rows, seconds_of[WHOLE] / seconds_of[OURS] * workload.gmacs / dense, share)


def dense_ways(model: ReducedVisionTransformer, workload: Workload) -> Ways:
    """timm's model as it is."""
    return {DENSE: (model.backbone, model.dense_macs / 1e9)}


def compiled_ways(model: ReducedVisionTransformer, workload: Workload) -> Ways:
    """timm's model and ours by `torch.compile`."""
    return {
        DENSE_COMPILED: (torch.compile(model.backbone, dynamic=False), model.dense_macs / 1e9),
        OURS_COMPILED: (with_engine(model, "compiled", lambda x: model(x, workload.decide)), workload.gmacs),
    }


def our_ways(model: ReducedVisionTransformer, workload: Workload) -> Ways:
    """Our engine: the decision, nothing dropped, other choices of as many patches; and the same decision otherwise."""
    decide, num_keep, gmacs = workload.decide, workload.num_keep, workload.gmacs
    keys = keyed.sample_keys(0, 0, torch.arange(len(workload.images))).to(workload.images.device)
    dense = model.dense_macs / 1e9
    random = same_passes(model, decide, at_random(num_keep, keys))
    best = same_passes(model, decide, lambda scores, alive, group: top_k(scores, alive, num_keep[group]))
    ways: dict[str, tuple[Way, float]] = {
        OURS: (lambda x: model(x, decide), gmacs),
        WHOLE: (partial(undropped, model), dense),
        RANDOM: (lambda x: model(x, random), gmacs),
        TOP_K: (lambda x: model(x, best), gmacs),
    }
    if model.dropped == "gone" and not isinstance(decide, Replayed):  # these two do not merge, and have one pass
        ways[MASKED] = (lambda x: masked(model, x, decide)), dense
        ways[PADDED] = (lambda x: padded(model, x, decide)), _padded_gmacs(model, num_keep)
    return ways


def undropped(model: ReducedVisionTransformer, images: Tensor) -> Tensor:
    """The model's output with every patch, and without its interpreters."""
    packed = model.embed(images, decide=keep_all)
    for group in range(model.num_groups):
        packed = model.run_blocks(packed, group)
    return model.head(packed)


def with_engine(model: ReducedVisionTransformer, engine: str, run: Callable[[Tensor], Tensor]) -> Way:
    """``run`` with another ``model.engine``, which is set back afterwards."""

    def other(x: Tensor) -> Tensor:
        before, model.engine = model.engine, engine
        try:
            return run(x)
        finally:
            model.engine = before

    return other


def compare(ways: Ways, images: Tensor, dense_gmacs: float, seconds: float) -> list[Row]:
    """Time and memory of each way, taking turns.

    Speed-up is over the fastest whose name begins with "dense", in 8 bits or not as the way itself.
    """
    times = take_turns({name: partial(run, images) for name, (run, _) in ways.items()}, images.device, seconds)
    memory = {name: peak_memory(images.device, run, images) for name, (run, _) in ways.items()}
    medians = {name: statistics.median(t) for name, t in times.items()}
    rows = []
    for name, (_, macs) in ways.items():
        t, median, peak = sorted(times[name]), medians[name], memory[name]
        q1, _, q3 = statistics.quantiles(t, n=4)
        dense = (n for n in ways if n.startswith("dense") and n.endswith(INT8) == name.endswith(INT8))
        t_dense = min(medians[n] for n in dense)
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
                efficiency=t_dense / median * macs / dense_gmacs,
                rounds=len(t),
                peak_mb=None if peak is None else peak / 1e6,
            )
        )
    return rows


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


def interpreters_share(model: ReducedVisionTransformer, images: Tensor, decide: Decide) -> float:
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
