"""Adaptive batches in OpenVINO and ONNX Runtime (`iared2.runtime.Engine`) against the dense model in the same runtime.

Two models: DeiT-S, whose counts are drawn, and the model in the box, which decides on photos. Efficiency is
(our images/s ÷ dense images/s) × (our MACs ÷ dense MACs): 1 if every saved MAC is saved time. All ways take turns on
one batch, in a new random order in each round, and medians count. The dense graph is compiled for its batch size alone.
"New counts" has other counts in every batch, so that hardly a size comes twice, and the mean of them. With one thread,
time is CPU seconds of this process, since others may use the core. The file is written after every row: a run that is
cut off is not lost.

taskset -c 0 python benchmarks/runtime.py --json docs/figures/runtime.json
"""

from __future__ import annotations

import argparse
import itertools
import random
import statistics
import sys
import time
from pathlib import Path
from tempfile import TemporaryDirectory

import numpy as np
import torch
from PIL import Image

from iared2.atomic import to_json, write
from iared2.data.batches import model_transform
from iared2.errors import InputError
from iared2.evaluate.speed.command import machine
from iared2.evaluate.speed.runtimes import NAMES, dense_graph
from iared2.evaluate.speed.workload import draw
from iared2.export.int8 import in_8_bits
from iared2.export.served import as_arrays, in_torch
from iared2.export.stages import export_stages
from iared2.pretrained.build import from_timm
from iared2.pretrained.checkpoint import load
from iared2.runtime import BACKENDS, Engine
from iared2.runtime.backends import loader

DEIT, BOX = "deit_small_patch16_224", "box"
TARGETS = {"fp32": {1: 0.95, 8: 1.0, 32: 1.05}, "bf16": {1: 0.85, 8: 0.95, 32: 1.0}, "int8": {}}
EXAMPLES = Path(__file__).parents[1] / "examples"
PARITY, NEAR = 64, 1e-4
MIN_ROUNDS = 5


class Drawn:
    """DeiT-S with random weights: the same images in every batch, and drawn counts."""

    def __init__(self, arguments):
        self.model, self.given = from_timm(DEIT).eval(), (arguments.keep, arguments.spread)
        with torch.no_grad():
            for parameter in self.model.backbone.parameters():  # at birth, norms and biases do nothing
                parameter += 0.01 * torch.randn_like(parameter) * (parameter.ndim == 1)

    def batch(self, batch_size, seed):
        """Images, and the decision on them, for torch and for an engine."""
        images = torch.randn(batch_size, *self.model.pretrained_cfg["input_size"], generator=torch.manual_seed(0))
        decide = draw(self.model, batch_size, *self.given, seed)
        return images.numpy(), decide, as_arrays(self.model, decide)


class Photos:
    """The model in the box with its own decision: other photos in every batch."""

    def __init__(self, arguments):
        self.model = load().eval()
        self.transform = model_transform(self.model.pretrained_cfg)
        self.files = sorted(
            path for path in Path(arguments.photos).iterdir() if path.suffix.lower() in (".jpg", ".jpeg")
        )

    def batch(self, batch_size, seed):
        """Images, the model's decision, and None: the engine decides."""
        numbers = range(seed * batch_size, (seed + 1) * batch_size)
        images = torch.stack([self.transform(self.photo(number)) for number in numbers]).numpy()
        return images, self.model.decision, None

    def photo(self, number):
        """A whole photo, or a crop of it when all have been used."""
        photo = Image.open(self.files[number % len(self.files)]).convert("RGB")
        if number < len(self.files):
            return photo
        draws = random.Random(number)
        width, height = (round(side * draws.uniform(0.5, 1)) for side in photo.size)
        left, top = draws.randint(0, photo.width - width), draws.randint(0, photo.height - height)
        return photo.crop((left, top, left + width, top + height))


def parity(case, path, backend):
    """How far the engine in fp32 is from the torch model on photos, and how many have a score near its threshold."""
    images, *_ = case.batch(PARITY, 0)
    with torch.inference_mode():
        expected = case.model.trace(torch.from_numpy(images))
    decision = case.model.decision
    at = torch.tensor(decision.thresholds)[:, None, None]
    near = (decision.logits(expected.scores).sigmoid() - at).abs() < NEAR
    near = (near & (expected.scores > 0) & (at > 0)).any(0).any(-1).numpy()
    found = Engine(path, backend, 1)(images)
    gaps = np.abs(found.logits - expected.logits.numpy()).max(1)
    return {
        "name": f"parity, {NAMES[backend]}",
        "photos": PARITY,
        "near_share": float(near.mean()),
        "worst_logit_gap": float(gaps[~near].max()),
        "worst_logit_gap_of_all": float(gaps.max()),
        "same_patches": float((found.kept == expected.kept.numpy()).all((0, 2)).mean()),
    }


def measure(case, path, graph, precision, batch_size, arguments):
    """Rows of the table for one precision and batch size."""
    images, given, decide = case.batch(batch_size, 0)
    runs, outputs, engines = {}, {}, {}
    for backend in arguments.backends:
        if precision not in BACKENDS[backend]:
            continue
        name, dense = NAMES[backend], loader(backend, arguments.threads, precision)(graph)
        engine = engines[name] = Engine(path, backend, arguments.threads, precision)
        fixed, new = f"ours, {name}", f"ours, {name}, new counts"
        outputs |= {fixed: [(engine(images, decide), given)], new: []}
        runs[f"dense, {name}"] = lambda _, run=dense: run({"images": images})
        runs[fixed] = lambda _, run=engine: run(images, decide)
        runs[new] = lambda other, run=engine, to=outputs[new]: to.append((run(other[0], other[2]), other[1]))
    clock = time.process_time if arguments.threads == 1 else time.perf_counter
    times, shuffled, begun = {name: [] for name in runs}, random.Random(0), time.process_time()
    for turn in itertools.count(1):
        other = case.batch(batch_size, turn)
        for name in shuffled.sample(list(runs), len(runs)):
            start = clock()
            runs[name](other)
            times[name].append(clock() - start)
        if turn > MIN_ROUNDS and time.process_time() - begun > arguments.seconds:
            break
    typical, mean = {}, {name: statistics.fmean(t[1:]) for name, t in times.items()}
    for name, t in times.items():  # the first is a warm-up; the work of new counts differs, as do their MACs
        typical[name] = mean[name] if name.endswith("counts") else statistics.median(t[1:])
    rows = []
    for name, t in typical.items():
        backend, is_ours = name.split(", ")[1], name.startswith("ours")
        own = (mean if name.endswith("counts") else typical)[f"dense, {backend}"]
        row = {"precision": precision, "batch_size": batch_size, "name": name, "rounds": turn - 1}
        row |= {"images_per_second": batch_size / t, "speed_up": own / t, "macs_ratio": 1.0}
        if is_ours:
            found = [in_torch(one, engines[backend], case.model, rule).macs for one, rule in outputs[name]]
            row["macs_ratio"] = torch.cat(found[-turn + 1 :]).double().mean().item() / case.model.dense_macs
            output = outputs[name][-1][0]
            row |= {"padding": output.padding, "calls": output.calls}
        rows.append(row | {"efficiency": own / t * row["macs_ratio"]})
    return rows


def line(row):
    """A row for the screen."""
    if "photos" in row:
        return (
            f"{row['model']}: {row['name']}: {row['photos']} photos, {100 * row['near_share']:.1f} % near a threshold; "
            f"logits of the others to {row['worst_logit_gap']:.1e}, of all to {row['worst_logit_gap_of_all']:.1e}"
        )
    target = TARGETS[row["precision"]].get(row["batch_size"]) if row["name"] == "ours, OpenVINO" else None
    return (
        f"{row['model']} {row['precision']} B {row['batch_size']:<3} {row['name']:<32} {row['images_per_second']:7.1f}"
        f" images/s  MACs {row['macs_ratio']:.3f}  efficiency {row['efficiency']:.3f}"
        + (f" (target {target:.2f})" if target else "")
        + (f"  padding {100 * row['padding']:.1f} %  calls {row['calls']}" if "padding" in row else "")
    )


def main() -> None:
    """Print the table, and JSON as the last line."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--models", nargs="+", choices=[DEIT, BOX], default=[DEIT, BOX])
    parser.add_argument("--photos", default=str(EXAMPLES), help="folder of JPEG files for the box (default: examples)")
    parser.add_argument("--backends", nargs="+", choices=BACKENDS, default=["openvino"])
    parser.add_argument("--precisions", nargs="+", choices=TARGETS, default=["fp32", "bf16"])
    parser.add_argument("--batch-size", type=int, nargs="+", default=[1, 8, 32])
    parser.add_argument("--keep", type=float, nargs="+", default=[0.85, 0.6, 0.35], help="of DeiT-S")
    parser.add_argument("--spread", type=float, default=0.12, help="of the shares of DeiT-S between images")
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--seconds", type=float, default=12, help="of CPU time per batch size and precision, at least")
    parser.add_argument("--json", help="also write the results to this file")
    arguments = parser.parse_args()
    torch.set_num_threads(arguments.threads)
    given = {name: value for name, value in vars(arguments).items() if name not in ("json", "photos")}
    result = {"arguments": given, "machine": machine(torch.device("cpu")), "runtimes": []}

    def add(name, rows):
        for row in rows:
            result["runtimes"].append({"model": name, **row})
            print(line(result["runtimes"][-1]), flush=True)
        result["cpu_minutes"] = time.process_time() / 60
        if arguments.json:
            write(arguments.json, to_json(result) + "\n")

    for name in arguments.models:
        case = (Drawn if name == DEIT else Photos)(arguments)
        with TemporaryDirectory() as folder:
            paths = {precision: Path(folder, f"{precision}.zip") for precision in ("fp32", "int8")}
            for precision, path in paths.items():
                if precision == "fp32" or precision in arguments.precisions:
                    export_stages(case.model, path, int8=precision == "int8")
            if name == BOX:
                for backend in arguments.backends:
                    add(name, [parity(case, paths["fp32"], backend)])
            for batch_size in arguments.batch_size:
                graph = dense_graph(case.model, batch_size)
                for precision in arguments.precisions:
                    path = paths.get(precision, paths["fp32"])
                    dense = in_8_bits(graph) if precision == "int8" else graph
                    add(name, measure(case, path, dense, precision, batch_size, arguments))
    print(to_json(result))


if __name__ == "__main__":
    try:
        main()
    except InputError as error:
        sys.exit(f"error: {error}")
