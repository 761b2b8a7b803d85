"""Everything about speed on a GPU, in one command of at most 8 minutes on an H100 (docs/speed.md, "On a GPU").

PYTHONPATH=src python benchmarks/gpu.py --json gpu.json

Rows run in order of value. The JSON file is written after each of them, so an interrupted run keeps what it has
measured. What cannot run here (a backend of attention, a compiler) is recorded with the reason, and the rest goes on.
The ways of one row take turns in one process, with the dense model among them. Scores are drawn (workload.py).
"""

from __future__ import annotations

import argparse
import json
import os
import re
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from functools import cache, partial
from pathlib import Path
from typing import Any
from xml.etree import ElementTree

import torch
from gpu_ways import (
    BUCKETS,
    CHOICE,
    CUDNN,
    FLASH,
    MASKED_COMPILED,
    OTHER_COUNTS,
    PADDED_COMPILED,
    Bench,
    Case,
    backend,
    flash_impl,
    flash_impls,
    graphed,
    profiled,
    reason,
    under,
)
from merging import merging, merging_gmacs, r_for
from torch import Tensor

from iared2.atomic import write
from iared2.device import usable_device
from iared2.errors import InputError
from iared2.evaluate.speed import inference as speed
from iared2.evaluate.speed.command import machine
from iared2.evaluate.speed.inference import Ways
from iared2.export.static import FixedCount

ROOT = Path(__file__).resolve().parents[1]
DEIT, VIT_14 = "deit_small_patch16_224", "vit_small_patch14_dinov2"
LEAST = 18_000
"""Images/s below which the dense compiled DeiT-S is to be distrusted; 20 to 30 thousand are expected on an H100."""


@cache
def deit_256(bench: Bench) -> Case:
    """The case that several rows share."""
    return Case(bench, DEIT, 256, (224, 224))


def tests(file: str, bench: Bench) -> dict[str, Any]:
    """The tests of tests/cuda in this file, on this device; what they recorded with ``record_property`` is kept."""
    with tempfile.TemporaryDirectory() as folder:
        xml = Path(folder, "tests.xml")
        command = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", f"--junitxml={xml}", file]
        command += [
            "-o",
            "junit_family=xunit1",
            "-W",
            "default",
        ]  # a family with properties; versions warn of this and that
        path = os.pathsep.join(filter(None, [str(ROOT / "src"), os.environ.get("PYTHONPATH")]))
        environment = os.environ | {"IARED2_TEST_DEVICE": str(bench.device), "PYTHONPATH": path}
        try:
            done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, timeout=150)
        except subprocess.TimeoutExpired as error:
            return {"error": reason(error)}
        if not xml.exists():
            return {"error": (done.stderr or done.stdout)[-2000:]}
        results: dict[str, Any] = {"passed": [], "failed": {}, "skipped": {}, "recorded": {}}
        for case in ElementTree.parse(xml).iter("testcase"):
            name = case.get("name", "")
            bad = case.find("failure") if case.find("failure") is not None else case.find("error")
            skip = case.find("skipped")
            if bad is not None:
                results["failed"][name] = (bad.get("message") or "")[:500]
            elif skip is not None:
                results["skipped"][name] = skip.get("message")
            else:
                results["passed"].append(name)
            for found in case.iter("property"):
                results["recorded"].setdefault(name, {})[found.get("name")] = found.get("value")
    return results


def batch_256(bench: Bench) -> dict[str, Any]:
    """DeiT-S, the row that everything is judged by: dense and ours, eager and compiled, and where the time goes."""
    case = deit_256(bench)
    more = {speed.OURS_COMPILED + OTHER_COUNTS: (case.other_counts, case.workload.gmacs)}
    result = case.compare([speed.OURS, speed.OURS_COMPILED, speed.WHOLE], more)
    rates = {way["name"]: way["images_per_second"] for way in result["ways"]}
    gpu = torch.cuda.get_device_name(bench.device) if bench.device.type == "cuda" else ""
    if re.search("H[12]00", gpu) and rates.get(speed.DENSE_COMPILED, 0) < LEAST:
        result["warning"] = f"dense compiled DeiT-S should reach {LEAST} images/s on this GPU: distrust the baseline"
    result["kernels"] = profiled(case, {**case.dense, **{n: case.ours[n] for n in (speed.OURS, speed.OURS_COMPILED)}})
    with torch.inference_mode():
        result["interpreters"] = speed.interpreters_share(case.model, case.workload.images, case.workload.decide)
    return result


def backends(bench: Bench) -> dict[str, Any]:
    """Ours with each backend of ragged attention, by the profiler's names of the kernels that ran."""
    contexts: dict[str, Callable[[], Any]] = {name: partial(backend, name) for name in (FLASH, CHOICE, BUCKETS)}
    return compare_backends(bench, contexts | {name: partial(flash_impl, name) for name in flash_impls()})


def cudnn(bench: Bench) -> dict[str, Any]:
    """Ours with cuDNN also where torch does not choose it. The last row: an error of the GPU would fail all others."""
    return compare_backends(bench, {FLASH: partial(backend, FLASH), CUDNN: partial(backend, CUDNN)})


def compare_backends(bench: Bench, contexts: dict[str, Callable[[], Any]]) -> dict[str, Any]:
    """Ours, compiled, in each context, on one batch and on batches of other counts, for which cuDNN may plan anew."""
    case = deit_256(bench)
    run, gmacs = case.ours[speed.OURS_COMPILED]
    ways: dict[str, Any] = {}
    for name, context in contexts.items():
        ways[f"{speed.OURS_COMPILED}, {name}"] = under(context, run), gmacs
        ways[f"{speed.OURS_COMPILED}, {name}{OTHER_COUNTS}"] = under(context, case.other_counts), gmacs
    result = case.compare([speed.OURS_COMPILED], ways, reference=speed.OURS_COMPILED)
    ran = {name: way for name, way in ways.items() if name not in result["skipped"] and OTHER_COUNTS not in name}
    return result | {"kernels": profiled(case, ran)}


def baselines(bench: Bench) -> dict[str, Any]:
    """Padded, masked, and fixed counts (the mean of the ragged ones), which need no synchronisation: CUDA graphs."""
    case = deit_256(bench)
    num_keep = [round(float(counts.double().mean())) for counts in case.workload.num_keep]
    fixed = FixedCount(case.model, num_keep).to(bench.device, torch.bfloat16)
    gmacs = case.model.count_macs(torch.tensor(num_keep)[:, None]).item() / 1e9

    def logits(images: Tensor) -> Tensor:
        return fixed(images)[0]

    compiled = torch.compile(logits, dynamic=False)
    dense, dense_gmacs = case.dense[speed.DENSE_COMPILED]
    more: Ways = {
        "fixed counts": (logits, gmacs),
        "fixed counts, compiled": (compiled, gmacs),
        "fixed counts, compiled, CUDA graph": (graphed(compiled), gmacs),
        f"{speed.DENSE_COMPILED}, CUDA graph": (graphed(dense), dense_gmacs),
    }
    ours = [speed.OURS_COMPILED, speed.PADDED, PADDED_COMPILED, speed.MASKED, MASKED_COMPILED, speed.TOP_K]
    result = case.compare(ours, more)
    for way in result["ways"]:
        if "CUDA graph" in way["name"]:
            way["peak_mb"] = None  # a graph keeps its memory
    rates = {way["name"]: way["images_per_second"] for way in result["ways"]}
    if {speed.OURS_COMPILED, PADDED_COMPILED} <= rates.keys():
        result["ragged_over_padded"] = rates[speed.OURS_COMPILED] / rates[PADDED_COMPILED]
    return result | {"num_keep": num_keep}


def batch_1024(bench: Bench) -> dict[str, Any]:
    """DeiT-S at batch 1024."""
    return Case(bench, DEIT, 1024, (224, 224)).compare([speed.OURS, speed.OURS_COMPILED, PADDED_COMPILED])


def patches_1568(bench: Bench) -> dict[str, Any]:
    """DeiT-S on 448×896 pixels: as many tokens as a clip of 8 frames."""
    case = Case(bench, DEIT, 16, (448, 896), (0.6, 0.4, 0.2))
    return case.compare([speed.OURS, speed.OURS_COMPILED, PADDED_COMPILED])


def training(bench: Bench) -> dict[str, Any]:
    """A step of each stage of training on DeiT-S, and a dense step."""
    from iared2.evaluate.speed import training as train

    case = deit_256(bench)
    return train.measure(case.model, case.workload.images, 0.55, seconds=bench.seconds).to_dict()


def patches_256(bench: Bench) -> dict[str, Any]:
    """ViT-S/14 at 224×224."""
    return Case(bench, VIT_14, 256, (224, 224)).compare([speed.OURS, speed.OURS_COMPILED, PADDED_COMPILED])


def merged(bench: Bench) -> dict[str, Any]:
    """Dropped patches merged into kept ones, and ToMe-like merging at the same MACs."""
    case = Case(bench, DEIT, 256, (224, 224), dropped="merged")
    r = r_for(case.model, case.workload.gmacs)
    gmacs = merging_gmacs(case.model, r)

    def tome(images: Tensor) -> Tensor:
        return merging(case.model, images, r)

    more: Ways = {f"ToMe-like, r = {r}": (tome, gmacs)}
    more |= {f"ToMe-like, r = {r}, compiled": (torch.compile(tome, dynamic=False), gmacs)}
    return case.compare([speed.OURS, speed.OURS_COMPILED], more)


ROWS: dict[str, Callable[[Bench], dict[str, Any]]] = {
    "parity": partial(tests, "tests/cuda/test_parity.py"),
    "batch-256": batch_256,
    "backends": backends,
    "baselines": baselines,
    "batch-1024": batch_1024,
    "patches-1568": patches_1568,
    "engine": partial(tests, "tests/cuda/test_engine.py"),
    "training": training,
    "patches-256": patches_256,
    "merging": merged,
    "cudnn": cudnn,
}


def show(name: str, result: dict[str, Any]) -> None:
    """One row, for people."""
    print(f"{name}: {result['seconds']:.0f} s")
    for way in result.get("ways", ()):
        rate, efficiency = f"{way['images_per_second']:9.1f} images/s", f"efficiency {way['efficiency']:.2f}"
        peak = "" if way["peak_mb"] is None else f", {way['peak_mb']:.0f} MB"
        print(f"  {way['name']:58} {rate} ± {50 * way['spread']:.1f} %, {efficiency}{peak}")
    for field, value in result.items():
        if field not in ("ways", "seconds", "kernels") and value not in ({}, []):
            print(f"  {field}: {len(value) if field == 'passed' else value}")
    for way, found in result.get("kernels", {}).items():
        print(f"  kernels of {way}: {found['attention'] if isinstance(found, dict) else found}")


def main(given: list[str] | None = None) -> int:
    """Run the rows; see the module."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rows", nargs="+", choices=ROWS, default=list(ROWS), help="which, in the order given")
    parser.add_argument("--seconds", type=float, default=4.0, help="of measuring per row (default: 4)")
    parser.add_argument("--minutes", type=float, default=8.0, help="no row starts after so many (default: 8)")
    parser.add_argument("--device", default="cuda")
    parser.add_argument("--tiny", action="store_true", help="tiny models, nothing compiled: whether every row runs")
    parser.add_argument("--json", default="gpu.json", help="written after every row (default: gpu.json)")
    arguments = parser.parse_args(given)
    start, device = time.perf_counter(), usable_device(arguments.device)
    about = {"cudnn": torch.backends.cudnn.version(), "flash_impls": flash_impls()}
    report: dict[str, Any] = {"arguments": vars(arguments), "machine": machine(device) | about, "rows": {}}
    bench = Bench(device, arguments.seconds, arguments.tiny)
    with torch.compiler.set_stance("force_eager" if arguments.tiny else "default"):
        for name in arguments.rows:
            begun = time.perf_counter()
            if begun - start > 60 * arguments.minutes:
                result: dict[str, Any] = {"error": f"not started: {arguments.minutes:g} minutes are over"}
            else:
                try:
                    result = ROWS[name](bench)
                except Exception as error:  # the other rows still have their turn
                    result = {"error": reason(error)}
            result["seconds"] = round(time.perf_counter() - begun, 1)
            report["rows"][name] = result
            write(arguments.json, json.dumps(report, indent=1) + "\n")
            show(name, result)
            sys.stdout.flush()
            if device.type == "cuda":
                torch.cuda.empty_cache()
    failed = [name for name, result in report["rows"].items() if "error" in result or result.get("failed")]
    print(f"{arguments.json}: {len(report['rows'])} rows, of which failed: {', '.join(failed) or 'none'}")
    return bool(failed)


if __name__ == "__main__":
    try:
        sys.exit(main())
    except InputError as error:
        sys.exit(f"error: {error}")
