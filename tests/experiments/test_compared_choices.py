"""Choices of patches against each other, frozen and fine-tuned, from the commands to their tables."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from tiny import SMALL

import iared2

ROOT = Path(__file__).resolve().parents[2]


def test_a_policy_against_choices_of_as_many_patches(
    experiments: Any, data: Path, tmp_path: Path, monkeypatch: Any
) -> None:
    import paper

    torch.manual_seed(0)
    file = tmp_path / "model.safetensors"
    model = iared2.from_timm("vit_small_patch14_dinov2", groups=3, num_classes=42, **{**SMALL, "depth": 6})
    model.class_names = tuple(json.loads((data / "classes.json").read_text()))
    model.spread, model.threshold = 1.0, (0.4, 0.5, 0.6)
    model.save(file)
    command = ["paper.py", str(file), "--data", str(data), "--backbone", str(file), "--photos", "30", "-o"]
    monkeypatch.setattr(sys, "argv", [*command, str(tmp_path / "out"), "--calibration-photos", "20", "--macs", "0.6"])
    paper.main()
    rows = json.loads((tmp_path / "out" / "paper.json").read_text())["rows"]
    names = [row[0] for row in rows]
    assert names[:3] == ["dense, before the run", "every patch", "policy, its own thresholds"]
    assert names[3:5] == names[-2:] == ["spread, as many", "random, as many"]
    assert rows[0][1] == rows[1][1], "the same weights"
    for policy, others in ((2, (3, 4)), (6, (7, 8))):
        costs = [float(rows[row][3].rstrip(" %")) for row in (policy, *others)]
        assert max(costs) - min(costs) <= 2
    assert abs(float(rows[6][3].rstrip(" %")) - 60) <= 2
    samples = paper.Photos(paper.open_samples(paper.DataConfig(path=str(data)), "eval"), model, 30)
    with torch.no_grad():
        expected = (model(samples.images.float()).argmax(1) == samples.labels).double().mean()
    assert rows[2][1] == f"{100 * expected:.1f}"


@pytest.mark.slow
def test_choices_from_command_to_table(data: Path, tmp_path: Path, monkeypatch: Any) -> None:
    """Untrained choices and a policy; a second call goes on with what is missing."""
    monkeypatch.syspath_prepend(str(ROOT / "experiments"))
    import choices

    torch.manual_seed(0)
    model = iared2.from_timm("deit_tiny_patch16_224", img_size=64, num_classes=42, groups=3, interpreter="attention")
    model.save(tmp_path / "backbone.safetensors")
    (tmp_path / "seed0").mkdir()
    model.save_policy(tmp_path / "seed0" / "policy.safetensors")
    command = ["choices.py", "--data", str(data), "--sharp", str(data / "validation.parquet")]
    command += ["--backbone", str(tmp_path / "backbone.safetensors"), "--model", "deit_tiny_patch16_224"]
    command += ["--size", "64", "--groups", "3", "--macs", "0.7", "--trials", "2", "--search-photos", "8"]
    command += [
        "--photos",
        "20",
        "--sharp-photos",
        "10",
        "-o",
        str(tmp_path / "out"),
        "--only",
        "spread",
        "shift, merged",
    ]
    for more in ([], ["learned: seed0", "--policy", str(tmp_path / "seed0" / "policy.safetensors")]):
        monkeypatch.setattr(sys, "argv", [*command, *more])
        choices.main()
    table = json.loads((tmp_path / "out" / "choices.json").read_text())
    assert [row[0] for row in table["rows"]] == ["spread", "shift, merged", "learned: seed0"]
    assert table["columns"][1:] == ["shares at 70 %", "photos, 70 %", "sharp, 70 %"]
    rows = json.loads((tmp_path / "out" / "rows.json").read_text())
    for row in (row["measured"] for row in rows.values()):
        assert row["0.7 photos"]["macs"] == pytest.approx(0.7, abs=0.05)
        assert (len(row["0.7 photos"]["kept"]), len(row["0.7 sharp"]["kept"])) == (20, 10)
    assert "on spread" in table["rows"][2][2] or "on shift" in table["rows"][2][2]

    command[command.index("-o") + 1] = str(tmp_path / "twice")
    monkeypatch.setattr(sys, "argv", [*command, "--first-pass", "0.8"])
    choices.main()
    twice = json.loads((tmp_path / "twice" / "second_rows.json").read_text())["spread"]["measured"]["0.7 photos"]
    # 56 % in the first pass, and one photo of 20 costs 5 % or less in the second
    assert 0.65 <= twice["macs"] <= 0.71
    assert "second passes" in (tmp_path / "twice" / "second.md").read_text()


@pytest.mark.slow
def test_late_from_command_to_table(data: Path, tmp_path: Path, monkeypatch: Any, capsys: Any) -> None:
    """Tuned blocks come closer to the dense model; a second call goes on with what is missing."""
    monkeypatch.syspath_prepend(str(ROOT / "experiments"))
    import late

    torch.manual_seed(0)
    model = iared2.from_timm("deit_tiny_patch16_224", img_size=64, num_classes=42, groups=3, interpreter="attention")
    model.save(tmp_path / "backbone.safetensors")
    (tmp_path / "seed0").mkdir()
    model.dropped = "merged"
    model.save_policy(tmp_path / "seed0" / "policy.safetensors")
    command = ["late.py", "--data", str(data), "--backbone", str(tmp_path / "backbone.safetensors"), "--size", "64"]
    command += ["--model", "deit_tiny_patch16_224", "--shares", "1", "0.5", "0.2", "--photos", "96", "--epochs", "20"]
    command += ["--eval-photos", "30", "--only", "spread, merged", "--lr", "3e-3", "-o", str(tmp_path / "out")]
    for more in ([], ["--policy", str(tmp_path / "seed0" / "policy.safetensors")]):
        monkeypatch.setattr(sys, "argv", [*command, *more])
        late.main()
    assert capsys.readouterr().out.count("step 40 of 40") == 2
    rows = json.loads((tmp_path / "out" / "rows.json").read_text())
    assert list(rows) == ["settings", "dense", "spread, merged", "learned: seed0"]
    monkeypatch.setattr(sys, "argv", [*command, "--epochs", "3"])
    with pytest.raises(iared2.InputError, match="rows of other settings"):
        late.main()
    with pytest.raises(iared2.InputError, match="has 30 photos, not 31"):
        late.tokens(tmp_path / "out" / "eval.safetensors", [], 31, model, 1)
    for name in ("spread, merged", "learned: seed0"):
        frozen, (tuned,) = rows[name]["frozen"], rows[name]["tuned"]
        assert tuned["divergence"] < 0.8 * frozen["divergence"]
        assert tuned["macs"] == pytest.approx(frozen["macs"], rel=1e-9)
        assert 0.5 < tuned["macs"] < 0.8
    table = json.loads((tmp_path / "out" / "late.json").read_text())
    assert [row[0] for row in table["rows"]] == ["spread, merged", "learned: seed0"]
    assert "on spread, merged" in table["notes"][2]

    # of four photos, one costs half of a pass more: with second passes, the frozen model keeps more answers
    command[command.index("-o") + 1] = str(tmp_path / "twice")
    monkeypatch.setattr(sys, "argv", [*command, "--macs", "0.9", "--epochs", "1"])
    late.main()
    twice = json.loads((tmp_path / "twice" / "rows.json").read_text())["spread, merged"]["frozen"]
    once = rows["spread, merged"]["frozen"]
    assert once["macs"] < twice["macs"] <= 0.9
    assert all(a <= b for a, b in zip(once["kept"], twice["kept"], strict=True))
    assert twice["divergence"] < once["divergence"]
