"""What is made of the reference model and measured on it: box, photos, sizes, parity, grids."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
from pictures import jpeg
from tiny import SMALL, sharp_model

import iared2

ROOT = Path(__file__).resolve().parents[2]


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
    monkeypatch.setattr(
        sys, "argv", [*command, "--engine", "onnxruntime", "onnxruntime:int8", "-o", str(tmp_path / "out")]
    )
    parity.main()
    table = json.loads((tmp_path / "out" / "parity.json").read_text())
    assert table["title"] == "2 photos, against torch in float32."
    (name, same, differ, off, logit, score), (rounded, *_) = table["rows"]
    assert (name, same, differ, off) == ("onnxruntime", "100.0", "0", "0")
    assert rounded == "onnxruntime:int8"
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
