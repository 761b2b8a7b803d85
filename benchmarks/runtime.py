"""Adaptive batches in OpenVINO and ONNX Runtime (`iared2.runtime.Engine`) against the dense model in the same runtime.

Efficiency is (our images/s ÷ dense images/s) × (our MACs ÷ dense MACs): 1 if every saved MAC is saved time. All ways
take turns on one batch, in a new random order in each round, and medians count. The dense graph is compiled for its
batch size alone. "New counts" draws other counts in every batch, so that hardly a size comes twice; its images are the
same. With one thread, time is CPU seconds of this process, since others may use the core.

python benchmarks/runtime.py --threads 1 --json docs/figures/runtime.json
"""

from __future__ import annotations

import argparse
import random
import statistics
import sys
import time
from pathlib import Path
from tempfile import TemporaryDirectory

import torch
from rich.progress import track

from iared2.atomic import to_json, write
from iared2.errors import InputError
from iared2.evaluate.speed.command import machine
from iared2.evaluate.speed.runtimes import NAMES, as_arrays, dense_graph
from iared2.evaluate.speed.workload import drawn
from iared2.export.stages import export_stages
from iared2.pretrained.build import from_timm
from iared2.runtime import BACKENDS, Engine
from iared2.runtime.backends import loader

TARGETS = {"fp32": {1: 0.95, 8: 1.0, 32: 1.05}, "bf16": {1: 0.85, 8: 0.95, 32: 1.0}}


def measure(model, path, graph, precision, batch_size, arguments):
    """Rows of the table for one precision and batch size."""
    images = torch.randn(batch_size, *model.pretrained_cfg["input_size"], generator=torch.Generator().manual_seed(0))
    workload, arrays = drawn(model, images, arguments.keep, arguments.spread), images.numpy()
    runs, engines = {}, {}

    def new_counts(seed):
        return as_arrays(drawn(model, images, arguments.keep, arguments.spread, seed))

    for backend in arguments.backends:
        if precision not in BACKENDS[backend]:
            continue
        name, dense = NAMES[backend], loader(backend, arguments.threads, precision)(graph)
        engine = engines[name] = Engine(path, backend, arguments.threads, precision)
        others = iter([*map(new_counts, range(1, arguments.rounds + 3))])
        runs[f"dense, {name}"] = lambda dense=dense: dense({"images": arrays})
        runs[f"ours, {name}"] = lambda engine=engine: engine(arrays, as_arrays(workload))
        runs[f"ours, {name}, new counts"] = lambda engine=engine, others=others: engine(arrays, next(others))
    outputs = {name: engine(arrays, as_arrays(workload)) for name, engine in engines.items()}
    ratio = workload.gmacs * 1e9 / model.dense_macs
    clock = time.process_time if arguments.threads == 1 else time.perf_counter
    times, shuffled = {name: [] for name in runs}, random.Random(0)
    for turn in track(range(arguments.rounds + 2), f"{precision}, batches of {batch_size}"):
        for name in shuffled.sample(list(runs), len(runs)):
            start = clock()
            runs[name]()
            if turn > 1:
                times[name].append(clock() - start)
    median = {name: statistics.median(t) for name, t in times.items()}
    fastest = min(t for name, t in median.items() if name.startswith("dense"))
    rows = []
    for name, t in median.items():
        ours = name.startswith("ours")
        output = outputs[name.split(", ")[1]] if ours else None
        macs = ratio if ours else 1.0
        own = median[f"dense, {name.split(', ')[1]}"]
        rows.append(
            {
                "precision": precision,
                "batch_size": batch_size,
                "name": name,
                "images_per_second": batch_size / t,
                "macs_ratio": macs,
                "speed_up": own / t,
                "efficiency": own / t * macs,
                "efficiency_fastest": fastest / t * macs,
                "padding": output.padding if ours else 0.0,
                "calls": output.calls if ours else 1,
            }
        )
    return rows


def main() -> None:
    """Print the table, and JSON as the last line."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("model", nargs="?", default="deit_small_patch16_224", help="timm name")
    parser.add_argument("--backends", nargs="+", choices=BACKENDS, default=["openvino"])
    parser.add_argument("--precisions", nargs="+", choices=TARGETS, default=["fp32", "bf16"])
    parser.add_argument("--batch-size", type=int, nargs="+", default=[1, 8, 32])
    parser.add_argument("--keep", type=float, nargs="+", default=[0.85, 0.6, 0.35])
    parser.add_argument("--spread", type=float, default=0.12)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--rounds", type=int, default=25)
    parser.add_argument("--json", help="also write the results to this file")
    arguments = parser.parse_args()
    torch.set_num_threads(arguments.threads)
    model, rows = from_timm(arguments.model).eval(), []
    with torch.no_grad():
        for parameter in model.backbone.parameters():  # at birth, norms and biases do nothing, and would be left out
            parameter += 0.01 * torch.randn_like(parameter) * (parameter.ndim == 1)
    folder = TemporaryDirectory()
    export_stages(model, path := Path(folder.name, "model.zip"))
    for batch_size in arguments.batch_size:
        graph = dense_graph(model, batch_size)
        for precision in arguments.precisions:
            found = measure(model, path, graph, precision, batch_size, arguments)
            rows += found
            for row in found:
                target = TARGETS[precision].get(batch_size, 0) if row["name"] == "ours, OpenVINO" else 0
                print(
                    f"{precision} B {batch_size:<3} {row['name']:<32} {row['images_per_second']:7.1f} images/s"
                    f"  MACs {row['macs_ratio']:.3f}  efficiency {row['efficiency']:.3f}"
                    + (f" (target {target:.2f})" if target else "")
                    + f"  padding {100 * row['padding']:.1f} %  calls {row['calls']}",
                    flush=True,
                )
    given = {name: value for name, value in vars(arguments).items() if name != "json"}
    text = to_json({"arguments": given, "machine": machine(torch.device("cpu")), "runtimes": rows})
    print(text)
    if arguments.json:
        write(arguments.json, text + "\n")


if __name__ == "__main__":
    try:
        main()
    except InputError as error:
        sys.exit(f"error: {error}")
