"""benchmarks/gpu.py, every row, on a tiny model and a CPU: no time is judged."""

from __future__ import annotations

import json
import sys
from pathlib import Path

import pytest
import torch

sys.path.insert(0, str(Path(__file__).resolve().parents[2] / "benchmarks"))
import gpu
import gpu_ways

TIMED = ["batch-256", "backends", "baselines", "batch-1024", "patches-1568", "training", "patches-256"]
TIMED += ["merging", "cudnn"]


@pytest.fixture(autouse=True)
def few_rounds(monkeypatch):
    monkeypatch.setattr(gpu.speed, "MIN_ROUNDS", 2)
    monkeypatch.setattr(gpu.speed, "WARM_UP", 0)


def run(path, *more):
    status = gpu.main(["--device", "cpu", "--tiny", "--seconds", "0", "--json", str(path), *more])
    return status, json.loads(path.read_text())


def test_every_timed_row(tmp_path, capsys):
    status, report = run(tmp_path / "gpu.json", "--rows", *TIMED)
    assert status == 0, capsys.readouterr().out
    assert list(report["rows"]) == TIMED
    assert set(gpu.ROWS) - set(TIMED) == {"parity", "engine"}
    for name, row in report["rows"].items():
        if name == "training":
            assert {"policy_step_ms", "finetune_step_ms", "dense_step_ms", "peak_mb"} <= row.keys()
            continue
        ways = {way["name"]: way for way in row["ways"]}
        # what needs CUDA or a package is said, and nothing else is missing
        assert all("CUDA graph" in way or "FA3" in way or "FA4" in way for way in row["skipped"]), row["skipped"]
        dense = ways[gpu.speed.DENSE_COMPILED]
        for way in row["ways"]:
            ratio = way["images_per_second"] / max(w["images_per_second"] for n, w in ways.items() if n in DENSE)
            assert way["efficiency"] == pytest.approx(ratio * way["gmacs"] / dense["gmacs"])
    backends = {way["name"]: way for row in ("backends", "cudnn") for way in report["rows"][row]["ways"]}
    for backend in (gpu.FLASH, gpu.CUDNN, gpu.CHOICE, gpu.BUCKETS):
        assert backends[f"{gpu.speed.OURS_COMPILED}, {backend}"]["difference"] < 0.01
    kernels = report["rows"]["batch-256"]["kernels"][gpu.speed.DENSE]
    assert any("attention" in name for name in kernels["attention"])


DENSE = {gpu.speed.DENSE, gpu.speed.DENSE_COMPILED}


def test_what_fails_is_recorded_and_the_rest_is_measured_and_kept(tmp_path, monkeypatch, capsys):
    written = []

    def second(bench):
        written.extend(json.loads((tmp_path / "gpu.json").read_text())["rows"])
        raise RuntimeError("no kernel\nfor this device")

    rows = {"first": lambda bench: {"a": 1}, "second": second, "third": lambda bench: {"b": 2}}
    monkeypatch.setattr(gpu, "ROWS", rows)
    status, report = run(tmp_path / "gpu.json")
    assert status == 1
    assert written == ["first"], "written after every row"
    assert report["rows"]["second"]["error"] == "RuntimeError: no kernel"
    assert report["rows"]["third"]["b"] == 2
    assert "failed: second" in capsys.readouterr().out
    _, report = run(tmp_path / "gpu.json", "--minutes", "0")
    assert all("not started" in row["error"] for row in report["rows"].values())


def test_a_way_that_fails_is_skipped_with_its_reason():
    bench = gpu_ways.Bench(torch.device("cpu"), 0, tiny=True)

    def broken(images):
        raise NotImplementedError("not on this device")

    with torch.compiler.set_stance("force_eager"):
        result = gpu.deit_256(bench).compare([gpu.speed.OURS], {"broken": (broken, 1.0)}, reference=gpu.speed.OURS)
    assert result["skipped"] == {"broken": "NotImplementedError: not on this device"}
    ways = {way["name"]: way for way in result["ways"]}
    assert ways[gpu.speed.OURS]["difference"] == 0
    assert ways[gpu.speed.DENSE]["difference"] > 0.001, "the dense model drops nothing"


def test_tests_of_a_gpu_are_a_row(monkeypatch, tmp_path):
    """In a process of their own; what they record is kept."""
    file = tmp_path / "test_made_up.py"
    file.write_text(
        "import os, pytest\n"
        "def test_good(record_property): record_property('error', os.environ['IARED2_TEST_DEVICE'])\n"
        "def test_bad(): assert 1 == 2, 'not equal'\n"
        "def test_not_here(): pytest.skip('needs CUDA')\n"
    )
    result = gpu.tests(str(file), gpu_ways.Bench(torch.device("cpu"), 0, tiny=True))
    assert result["passed"] == ["test_good"]
    assert "not equal" in result["failed"]["test_bad"]
    assert "needs CUDA" in result["skipped"]["test_not_here"]
    assert result["recorded"] == {"test_good": {"error": "cpu"}}
