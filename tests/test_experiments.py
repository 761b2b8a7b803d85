"""The experiments run from their commands to their tables, on noise for a few steps, and their measures are right."""

from __future__ import annotations

import json
import sys
import warnings
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
from accelerate.state import AcceleratorState
from pictures import jpeg
from tiny import sharp_model

import iared2
from iared2.train.recipe import read_recipe

ROOT = Path(__file__).resolve().parents[1]
SMALL = {"img_size": 64, "patch_size": 16, "embed_dim": 48, "depth": 4, "num_heads": 3}


@pytest.fixture(scope="module")
def experiments() -> Iterator[Any]:
    """The module experiments/tables.py; its neighbours are then modules of their own names."""
    sys.path.insert(0, str(ROOT / "experiments"))
    try:
        import tables

        yield tables
    finally:
        sys.path.remove(str(ROOT / "experiments"))


@pytest.fixture(autouse=True)
def fresh_accelerator() -> Iterator[None]:
    """Accelerate holds on to the first precision of a process."""
    AcceleratorState._reset_state(reset_partial_state=True)
    yield
    AcceleratorState._reset_state(reset_partial_state=True)


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Files like Tiny-ImageNet's: the 40 classes of the recipe and two others, noise, a box a photo."""
    folder = tmp_path_factory.mktemp("data")
    classes = [*read_recipe(ROOT / "recipes" / "tiny_imagenet_cpu.toml").data.classes, "sock", "broom"]
    (folder / "classes.json").write_text(json.dumps(classes))
    for file, each in (("train-00000-of-00001.parquet", 20), ("validation.parquet", 1)):
        labels = list(range(len(classes))) * each
        cells = [{"bytes": jpeg(i, 64), "path": f"{i}.jpg"} for i in range(len(labels))]
        columns = {"image": cells, "label": labels, "bbox": [[8, 16, 47, 63]] * len(labels)}
        label = {"names": classes, "_type": "ClassLabel"}
        features = {"image": {"_type": "Image"}, "label": label}
        table = pa.table(columns).replace_schema_metadata({"huggingface": json.dumps({"info": {"features": features}})})
        pq.write_table(table, folder / file)
    return folder


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


def test_box_from_a_run_to_a_file_that_describes_itself(
    experiments: Any, data: Path, tmp_path: Path, monkeypatch: Any, capsys: Any
) -> None:
    import box

    torch.manual_seed(0)
    run, file, figures = tmp_path / "run", tmp_path / "box.safetensors", tmp_path / "figures" / "box.json"
    run.mkdir()
    model = iared2.from_timm(
        "vit_small_patch14_dinov2", groups=4, num_classes=42, **{**SMALL, "depth": 8}, interpreter="attention"
    )
    model.spread = 1.0
    torch.nn.init.normal_(model.backbone.head.weight, std=0.1)  # so that some answers are surer
    model.save(run / "model.safetensors")
    command = ["box.py", str(run), "--data", str(data), "-o", str(file), "--json", str(figures), "--macs", "0.7"]
    monkeypatch.setattr(sys, "argv", [*command, "--calibration-images", "32", "--batch-size", "16"])
    assert box.main() == 0
    shipped = iared2.load(file)
    assert shipped.class_names == tuple(json.loads((data / "classes.json").read_text()))
    cfg = shipped.pretrained_cfg
    assert (cfg["num_classes"], cfg["input_size"], cfg.get("hf_hub_id"), cfg.get("url")) == (
        42,
        (3, 64, 64),
        None,
        None,
    )

    samples = box.open_samples(box.DataConfig(path=str(data)), "eval")
    (batch,) = box.eval_batches(samples, box.model_transform(cfg), batch_size=64)
    with torch.inference_mode():
        out, dense = shipped.trace(batch.images), shipped.backbone(batch.images)
        before = iared2.load(run).backbone(batch.images)
    top1 = [f"{100 * (logits.argmax(1) == batch.labels).double().mean():.2f}" for logits in (dense, out.logits)]
    table = json.loads(figures.read_text())
    assert [row[1] for row in table["rows"][2:]] == top1
    share = out.macs.double().mean().item() / shipped.dense_macs
    assert share == pytest.approx(0.7, abs=0.05)
    assert table["rows"][3][4] == f"{100 * share:.1f} %"
    same = 100 * (dense.argmax(1) == before.argmax(1)).double().mean()
    assert f"{same:.1f} % of the answers are equal" in table["notes"][1]
    assert f"{file.stat().st_size / 1e6:.1f} MB" in table["notes"][2]
    assert table["title"].split("weights, on ")[1].startswith("42 validation photos")
    assert f"`{table['command']}`" in capsys.readouterr().out

    second = ["--macs", "0.8", "--first-pass", "1", "1", "0.4", "0.3", "--calibration-images", "32"]
    monkeypatch.setattr(sys, "argv", [*command, *second])
    assert box.main() == 0
    shipped = iared2.load(file)
    with torch.inference_mode():
        out, dense = shipped.trace(batch.images), shipped.backbone(batch.images)
    answers = out.logits.argmax(1)
    table = json.loads(figures.read_text())
    _, _, _, whole, _, both = table["rows"]
    assert 0 < out.unsure.double().mean() < 1
    assert whole[1] == f"{100 * (dense.argmax(1) == batch.labels).double().mean():.2f}"
    assert both[1] == f"{100 * (answers == batch.labels).double().mean():.2f}"
    share = out.macs.double().mean().item() / shipped.dense_macs
    assert 0.8 - 1 / 42 < share <= 0.8, "second passes use what the first leave, to one photo"
    assert both[4] == f"{100 * share:.1f} %"
    assert f"{100 * (answers == dense.argmax(1)).double().mean():.1f} % of the answers are equal" in table["notes"][0]
    assert f"{100 * out.unsure.double().mean():.1f} % of the photos" in table["notes"][1]

    again = tmp_path / "again.safetensors"
    monkeypatch.setattr(sys, "argv", [*command, *second, "-o", str(again)])
    sys.argv[1] = str(file)
    assert box.main() == 0
    first, twice = (iared2.load(one).state_dict() for one in (file, again))
    assert all(torch.equal(first[name], twice[name]) for name in first), "8 bits of 8 bits are the same"
    table = json.loads(figures.read_text())
    assert [row[0] for row in table["rows"]] == [
        f"{kind}, as shipped, 8 bits" for kind in ("dense backbone", "first pass alone", "reduced")
    ]
    assert not any("full precision" in note for note in table["notes"])

    for wrong, what in ((["--macs", "0.001"], "cannot be met"), ([*second, "--macs", "0.5"], "takes all of 50.0%")):
        monkeypatch.setattr(sys, "argv", [*command, *wrong])
        assert box.main() == 1
        assert what in capsys.readouterr().err


def test_boxes_of_the_free_photos(experiments: Any) -> None:
    import photos

    assert (
        photos.inside([0, 0, 50, 20], (100, 80), (4, 5)).reshape(4, 5).tolist()
        == [[True] * 3 + [False] * 2] + [[False] * 5] * 3
    )
    assert photos.inside([41, 30, 42, 80], (100, 80), (4, 5)).reshape(4, 5).sum(1).tolist() == [0, 1, 1, 1]
    drawn = json.loads(photos.BOXES.read_text(encoding="utf-8"))["photos"]
    assert len(drawn) == 10
    for one in drawn:
        image = photos.open_photo(one["name"], one["from"])
        left, top, right, bottom = one["box"]
        assert 0 <= left < right <= image.width, one["name"]
        assert 0 <= top < bottom <= image.height, one["name"]
        assert one["licence"]


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


def test_resizing_counts_photos_of_the_models_classes(tmp_path: Path, monkeypatch: Any) -> None:
    """One photo of three is of another class, and one was seen in training."""
    monkeypatch.syspath_prepend(str(ROOT / "experiments"))
    import resizing

    iared2.from_timm("deit_tiny_patch16_224", num_classes=6, **SMALL).save(tmp_path / "model.safetensors")
    labels = [70, 10, 20, 30, 40, 50]
    images = [{"bytes": jpeg(number, 40)} for number in range(6)]
    wnids = [f"n{label:08}" for label in labels]
    pq.write_table(pa.table({"image": images, "label": labels, "wnid": wnids}), tmp_path / "photos.parquet")
    classes = [{"imagenet1k_index": label} for label in (50, 40, 30, 20, 10, 60)]
    (tmp_path / "classes.json").write_text(json.dumps(classes))
    (tmp_path / "seen.json").write_text(json.dumps([{"sample": "n00000030_7.JPEG"}]))
    found = resizing.photos_of(tmp_path / "photos.parquet", tmp_path / "classes.json", tmp_path / "seen.json")
    assert [label for _, label in found] == [4, 3, 1, 0]
    command = [
        "resizing.py",
        *(str(tmp_path / name) for name in ("model.safetensors", "photos.parquet", "classes.json")),
    ]
    monkeypatch.setattr(
        sys, "argv", [*command, "--leave-out", str(tmp_path / "seen.json"), "-o", str(tmp_path / "out")]
    )
    resizing.main()
    table = json.loads((tmp_path / "out" / "resizing.json").read_text())
    assert table["title"].startswith("Right answers of 4 photos")
    assert [row[0] for row in table["rows"]] == list(resizing.WAYS)
    for _, *counts, kept in table["rows"]:
        assert all(0 <= int(top1) <= int(top5) <= 4 for top1, top5 in (count.split(" · ") for count in counts))
        assert 0 <= int(kept) <= 4


@pytest.mark.filterwarnings("ignore:.isinstance.treespec, LeafSpec:FutureWarning", "ignore:The given buffer is not")
def test_parity_counts_photos_near_a_threshold(tmp_path: Path, monkeypatch: Any) -> None:
    """The threshold is one of the scores, from which one photo is 0 away."""
    pytest.importorskip("onnxruntime", reason="onnxruntime is missing: pip install 'iared2[test]'")
    monkeypatch.syspath_prepend(str(ROOT / "experiments"))
    import parity

    model = sharp_model(("deit_tiny_patch16_224", {**SMALL, "num_classes": 6}))
    images = torch.randn(4, 3, 64, 64)
    for spread in (0.0, 1.0):
        model.threshold, model.spread = 0.0, spread
        output = model.trace(images)
        standing = model.decision.standing(output.scores[1])
        one = standing[2].sort().values[7]
        model.threshold = (0.0, (one.sigmoid() if spread else one).item(), 1.0)
        gap = parity.gaps(model, model.trace(images))
        assert gap.argmin() == 2
        assert gap[2] < 1e-6
        expected = (standing - one).abs().amin(1)
        assert (gap[expected > 1e-2] > 1e-4).all()
    for i in range(3):
        (tmp_path / f"{i}.jpg").write_bytes(jpeg(i, 40))
    model.threshold = (0.0, 0.5, 0.5)
    model.save(tmp_path / "model.safetensors")
    command = ["parity.py", str(tmp_path / "model.safetensors"), str(tmp_path / "0.jpg"), str(tmp_path / "2.jpg")]
    monkeypatch.setattr(sys, "argv", [*command, "--engine", "onnxruntime", "-o", str(tmp_path / "out")])
    parity.main()
    table = json.loads((tmp_path / "out" / "parity.json").read_text())
    assert table["title"] == "2 photos in float32."
    ((name, differ, off, logit, score),) = table["rows"]
    assert (name, differ, off) == ("onnxruntime", "0", "0")
    assert max(float(logit), float(score)) < 1e-4


def test_grids_ask_for_each_quarter_in_turn(experiments: Any, data: Path, tmp_path: Path, monkeypatch: Any) -> None:
    """The photo of the class that is asked for lies in the box, and its neighbours are of other classes."""
    import grids

    from iared2.data.images import DataConfig, open_samples
    from iared2.data.regions import open_regions

    samples = open_samples(DataConfig(path=str(data)), "eval")
    model = iared2.from_timm("deit_tiny_patch16_224", num_classes=len(samples.class_names), **SMALL)
    model.class_names = samples.class_names
    model.save(tmp_path / "model.safetensors")
    photos = [(samples[i][0].resize((32, 32)), int(samples.labels[i])) for i in range(20)]
    monkeypatch.setattr(grids, "known", lambda model, samples, side: iter(photos))
    output = tmp_path / "grids.parquet"
    command = ["grids.py", str(tmp_path / "model.safetensors"), "--data", str(data), "-o", str(output)]
    monkeypatch.setattr(sys, "argv", [*command, "--grids", "5"])
    assert grids.main() == 0
    regions = open_regions(output)
    assert regions.labels is not None
    by_label = {label: np.asarray(photo) for photo, label in photos}
    for i, (left, top) in enumerate([(0, 0), (32, 0), (0, 32), (32, 32), (0, 0)]):
        grid, mask = regions[i]
        assert mask[top : top + 32, left : left + 32].all()
        assert mask.sum() == 32 * 32
        part = np.asarray(grid.crop((left, top, left + 32, top + 32)))
        assert np.array_equal(part, by_label[int(regions.labels[i])])
    monkeypatch.setattr(sys, "argv", [*command, "--grids", "6"])
    assert grids.main() == 1
