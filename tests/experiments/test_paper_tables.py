"""The paper's tables and the clips, from their commands to their files; their measures are right."""

from __future__ import annotations

import json
import sys
import warnings
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from tiny import SMALL

import iared2


@pytest.mark.slow
def test_tables_from_command_to_files(experiments: Any, data: Path, tmp_path: Path, monkeypatch: Any) -> None:
    torch.manual_seed(0)
    iared2.from_timm("deit_tiny_patch16_224", num_classes=40, **SMALL).save(tmp_path / "backbone.safetensors")
    settings = [
        "data.workers=0",
        *(f"{stage}.epochs=0.015" for stage in ("policy_gradient", "finetune")),
        *(f"{stage}.batch_size=8" for stage in ("policy_gradient", "finetune")),
        "model.timm={ img_size = 64, patch_size = 16, embed_dim = 48, depth = 4, num_heads = 3 }",
    ]
    names = "table1", "gumbel", "boxes", "cost"
    command = ["tables.py", *names, "--data", str(data), "--backbone", str(tmp_path / "backbone.safetensors")]
    command += ["--seeds", "1", "--runs", str(tmp_path / "runs"), "-o", str(tmp_path / "out")]
    command += [word for setting in settings for word in ("--set", setting)]
    monkeypatch.setattr(sys, "argv", command)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", UserWarning)  # of accelerate, of the schedule of so few steps
        assert experiments.main() == 0
        runs = {run.name: (run / "state.safetensors").stat().st_mtime_ns for run in (tmp_path / "runs").iterdir()}
        assert experiments.main() == 0
    assert {"paper-0", "paper-random-0", "ours-0", "ours-random-0", "ours-attention-0", "gumbel-0"} <= set(runs)
    for run, time in runs.items():
        assert (tmp_path / "runs" / run / "state.safetensors").stat().st_mtime_ns == time, "a finished run goes on"
    for name in names:
        table = json.loads((tmp_path / "out" / f"{name}.json").read_text())
        assert table["rows"]
        assert all(len(row) == len(table["columns"]) for row in table["rows"])
    rows = {row[0]: row for row in json.loads((tmp_path / "out" / "table1.json").read_text())["rows"]}
    assert rows["ours, seed 0"][2].startswith("100 %")
    assert rows["attention, seed 0"][4]

    monkeypatch.setattr(sys, "argv", [*command, "--set", "seed='x'"])
    assert experiments.main() == 1


@pytest.mark.slow
def test_moving_from_command_to_files(experiments: Any, data: Path, tmp_path: Path, monkeypatch: Any) -> None:
    import moving

    monkeypatch.setattr(moving, "PHOTOS", {"train": 256, "holdout": 16, "eval": 16})
    monkeypatch.setattr(sys, "argv", ["moving.py", "--data", str(data), "-o", str(tmp_path), "--epochs", "0.15"])
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", UserWarning)
        assert moving.main() == 0
    table = json.loads((tmp_path / "moving.json").read_text())
    assert [row[0] for row in table["rows"]] == [
        "dense",
        "ours",
        "ours at 39 %",
        "random, same count as ours",
        "paper",
        "random, same count as paper",
    ]
    assert (tmp_path / "moving.png").stat().st_size > 10_000


def test_measures(experiments: Any) -> None:
    import lab
    import looks
    import moving

    inside = np.zeros((2, 16))
    inside[:, [5, 6]] = 1
    kept = np.zeros((2, 16), bool)
    kept[0, [5, 6, 7, 8]] = kept[1, [0, 5, 6, 9]] = True
    assert looks.enrichment(kept, inside) == pytest.approx(0.5 / (2 / 16))
    scores = np.tile(np.linspace(0.1, 0.9, 16), (2, 1))
    assert looks.score_share(scores, inside) == pytest.approx(5.5 / 7.5)
    assert np.isnan(looks.score_share(scores * (1 - inside), inside)), "no patch alive lies in a box"
    assert np.isnan(looks.enrichment(np.zeros((2, 16), bool), inside))
    centre = looks.centre_like(torch.from_numpy(kept), (4, 4))
    assert centre.sum(1).tolist() == [4, 4]
    assert centre[0].view(4, 4)[1:3, 1:3].all()

    found = [
        lab.Measured(np.array(right), np.array([3, 5]), kept[None], scores[None], 8)
        for right in ([True, True], [True, False])
    ]
    assert (found[0].top1, found[1].top1, found[0].share, found[0].keep_ratio) == (100, 50, 0.5, [0.25])
    assert lab.versus(found[:1], found[1:]).startswith("+50.0 (+0.0 … +100.0)")

    truth = np.array([[1.0, 0.5, 0.1, 0, 0, 0]])
    assert moving.found_in(np.array([[True, True, False, True, False, False]]), truth) == pytest.approx(
        (1.5 / 1.6, 1.0, 1 / 3)
    )
