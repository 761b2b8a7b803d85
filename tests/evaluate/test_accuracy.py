from __future__ import annotations

import copy
import json

import numpy as np
import pyarrow.parquet as pq
import pytest
import torch
from pictures import write_parquet
from PIL import Image

import iared2
from iared2.cli import main
from iared2.data.batches import Batch
from iared2.evaluate import command
from iared2.evaluate.accuracy import evaluate
from iared2.measure import measure
from iared2.model.baselines import baseline_scores
from iared2.model.decide import Decision, by_share


@pytest.fixture(scope="module")
def model():
    torch.manual_seed(0)
    model = iared2.from_timm(
        "deit_tiny_patch16_224", img_size=16, patch_size=4, embed_dim=32, depth=3, num_heads=2, num_classes=2
    ).eval()
    model.threshold = [float(model.trace(images(8)).scores[0].quantile(0.5)), 0, 0]
    return model


def images(n, seed=0):
    return torch.randn(n, 3, 16, 16, generator=torch.Generator().manual_seed(seed))


def batches(model):
    """Two batches whose labels are the dense model's own predictions, and one whose files are all broken."""
    for seed, n in ((0, 8), (1, 5)):
        x = images(n, seed)
        yield Batch(x, model.backbone(x).argmax(1), torch.arange(n) + 8 * seed, [("broken.jpg", "why")] if seed else [])
    yield Batch(
        torch.empty(0), torch.empty(0, dtype=torch.int64), torch.empty(0, dtype=torch.int64), [("b.jpg", "why")]
    )


def test_the_three_variants(model):
    with torch.no_grad():
        result = evaluate(model, batches(model))
        reduced, dense, random = result.variants
        out = [model.trace(images(n, seed)) for seed, n in ((0, 8), (1, 5))]
    assert result.images == 13
    assert result.skipped == ["broken.jpg", "b.jpg"]
    assert dense.top1 == 100
    assert dense.gmacs == pytest.approx(model.dense_macs / 1e9)
    assert reduced.gmacs == pytest.approx(sum(o.macs.sum().item() for o in out) / 13 / 1e9)
    assert reduced.gmacs == random.gmacs < dense.gmacs
    ratio = torch.cat([o.keep_ratio for o in out], 1).mean(1)
    assert reduced.keep_ratio == pytest.approx(ratio.tolist())
    assert "not fine-tuned" in random.name
    assert all(v.images_per_second > 0 for v in result.variants)
    assert json.loads(json.dumps(result.to_dict()))["variants"][1]["top1"] == 100


def test_a_second_pass_is_in_all_that_drops(model):
    twice = copy.deepcopy(model)
    twice.confidence = 1.0
    with torch.no_grad():
        once, again = evaluate(model, batches(model)), evaluate(twice, batches(twice))
    assert [variant.top1 for variant in again.variants] == [100.0] * 3
    for before, after in zip(once.variants, again.variants, strict=True):
        assert after.keep_ratio == before.keep_ratio
        assert (after.gmacs > before.gmacs) == ("dense" not in before.name)


def test_budgets_are_measured_beside_the_models_own(model):
    thresholds = [float(model.trace(images(8)).scores[0].median()) + 1e-4, 0, 0]
    with torch.no_grad():
        result = evaluate(model, batches(model), budgets={"budget 0.5": Decision(thresholds)})
        out = [model.trace(images(n, seed), Decision(thresholds)) for seed, n in ((0, 8), (1, 5))]
    reduced, dense, random, at_budget, random_at_budget = result.variants
    assert [v.name for v in result.variants[3:]] == [f"{reduced.name}, budget 0.5", f"{random.name}, budget 0.5"]
    assert at_budget.gmacs == pytest.approx(sum(o.macs.sum().item() for o in out) / 13 / 1e9)
    assert at_budget.gmacs == random_at_budget.gmacs < reduced.gmacs < dense.gmacs
    assert list(at_budget.thresholds) == thresholds
    assert reduced.thresholds == model.thresholds
    (axes,) = result.figure().axes
    assert [len(line.get_xdata()) for line in axes.lines] == [2, 2, 1]
    twice = copy.deepcopy(model)
    twice.confidence = 1.0
    with torch.no_grad():
        again = evaluate(twice, batches(twice), budgets={"budget 0.5": Decision(thresholds)})
    assert again.variants[0].gmacs > reduced.gmacs
    assert again.variants[3].gmacs == at_budget.gmacs


def test_measure_agrees(model):
    with torch.no_grad():
        measured = measure(model, batches(model), "cpu")
        reduced = evaluate(model, batches(model)).variants[0]
    assert measured["top1"] == pytest.approx(reduced.top1, abs=1e-3)
    assert measured["gmacs"] == pytest.approx(reduced.gmacs)
    assert (measured["images"], measured["skipped"]) == (13, 2)


@pytest.fixture
def folder(tmp_path):
    for split in ("train", "val"):
        for name, value in (("dark", 30), ("light", 220)):
            (tmp_path / "data" / split / name).mkdir(parents=True)
            for i in range(3):
                pixels = np.full((20, 20, 3), value + i, np.uint8)
                Image.fromarray(pixels).save(tmp_path / "data" / split / name / f"{i}.png")
    return tmp_path / "data"


def test_random_patches_are_a_function_of_the_image_not_of_its_place(model):
    """The random baseline drew the same masks in every batch: 250 distinct ones over 1,000 photos."""
    model = copy.deepcopy(model)
    model.interpreters = torch.nn.ModuleList(baseline_scores("random", model, group) for group in range(3))
    whole = Batch(images(8, 0), torch.zeros(8, dtype=torch.int64), torch.arange(8) + 100, [])

    def kept_by(batches):
        seen = []

        def decide(scores, alive, group):
            keep = by_share((0.5, 0.5, 0.5))(scores, alive, group)
            seen.extend(keep if group == 0 else [])
            return keep

        measure(model, batches, "cpu", decide)
        return torch.stack(seen)

    masks = kept_by([whole])
    assert len({tuple(mask.tolist()) for mask in masks}) == 8
    parts = [
        Batch(whole.images[a : a + 2], whole.labels[a : a + 2], whole.samples[a : a + 2], []) for a in (0, 2, 4, 6)
    ]
    assert torch.equal(kept_by(parts), masks)


def test_command(model, folder, tmp_path, capsys):
    model.save(tmp_path / "m.safetensors")
    (folder / "val" / "dark" / "broken.png").write_bytes(b"no image")
    args = ["evaluate", "-c", str(tmp_path / "m.safetensors"), str(folder), "--workers", "0"]
    assert main([*args, "--threshold", "0", "--json", str(tmp_path / "figures.json")]) == 0
    printed = capsys.readouterr().out
    result = json.loads((tmp_path / "figures.json").read_text())
    assert result["images"] == 6
    assert len(result["skipped"]) == 1
    assert "random dropping" in printed
    assert result["variants"][0]["keep_ratio"] == [1, 1, 1]
    assert result["variants"][0]["top1"] == result["variants"][1]["top1"]
    assert main([*args, "--threshold", "0.5", "--spread", "1", "--json"]) == 0
    spread = json.loads(capsys.readouterr().out)["variants"][0]["keep_ratio"]
    assert spread[0] == pytest.approx(0.5, abs=0.1), "scores at birth are near 0.5"
    assert main([*args, "--spread", "-1"]) == 1
    assert "spread=-1.0: give a finite number, 0 or more" in capsys.readouterr().err
    assert main([*args, "--limit", "3", "--batch-size", "2", "--json"]) == 0
    result = json.loads(capsys.readouterr().out)
    assert result["images"] + len(result["skipped"]) == 3


def test_command_with_budgets_and_a_plot(model, folder, tmp_path, capsys):
    model.save(tmp_path / "m.safetensors")
    args = ["evaluate", "-c", str(tmp_path / "m.safetensors"), str(folder), "--workers", "0"]
    assert main([*args, "--budget", "0.7", "0.9", "--plot", str(tmp_path / "curve.png"), "--json"]) == 0
    variants = {v["name"]: v for v in json.loads(capsys.readouterr().out)["variants"]}
    assert len(variants) == 7
    assert variants["reduced, budget 0.7"]["gmacs"] < variants["reduced, budget 0.9"]["gmacs"]
    with Image.open(tmp_path / "curve.png") as plot:
        assert plot.width > 500
    assert main([*args, "--budget", "0.001"]) == 1
    assert "cannot be met" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("more", "message"),
    [
        (["--threshold", "0.5", "0.5"], "one number, or 3"),
        (["--device", "cuda:9"], "device cuda:9"),
        (["--json", "/no/such/folder/x.json"], "in a folder that is there"),
        (["--plot", "/no/such/folder/x.png"], "in a folder that is there"),
        (["--plot", "x.nonsense"], "--plot x.nonsense: unknown kind of picture"),
        (["--plot", "x.png", "--json", "./x.png"], "give two names"),
        (["--limit", "0"], "must be 1 or more"),
        (["--budget", "1.5"], "shares of the dense MACs"),
        (["--split", "nonsense"], "no split 'nonsense'"),
        (["--batch-size", "0"], "must be 1 or more"),
    ],
)
def test_bad_arguments_are_one_line(model, folder, tmp_path, capsys, more, message):
    model.save(tmp_path / "m.safetensors")
    assert main(["evaluate", "-c", str(tmp_path / "m.safetensors"), str(folder), "--workers", "0", *more]) == 1
    assert message in capsys.readouterr().err


@pytest.mark.parametrize("option", ["--json", "--plot"])
def test_nothing_that_is_read_is_replaced(model, folder, tmp_path, capsys, option):
    run = tmp_path / "run"
    run.mkdir()
    model.save(run / "model.safetensors")
    photo, weights = folder / "val" / "dark" / "0.png", run / "model.safetensors"
    (run / "link.png").symlink_to(weights)
    (run / "metrics.png").touch()  # lies there, but is not read
    before = photo.read_bytes(), weights.read_bytes()
    args = ["evaluate", "-c", str(run), str(folder), "--workers", "0"]
    for target in (photo, run / "link.png"):
        assert main([*args, option, str(target)]) == 1
        assert "is read, and a result would replace it" in capsys.readouterr().err
    assert (photo.read_bytes(), weights.read_bytes()) == before
    assert main([*args, option, str(run / "metrics.png")]) == 0
    assert (run / "metrics.png").stat().st_size > 0


def test_a_limit_draws_at_random(model, folder, tmp_path, monkeypatch):
    """The first rows are of one class, since folders lie class by class."""
    model.save(tmp_path / "m.safetensors")
    seen, read = [], command.eval_batches
    monkeypatch.setattr(
        command, "eval_batches", lambda samples, *a, **k: seen.append(samples) or read(samples, *a, **k)
    )
    assert main(["evaluate", "-c", str(tmp_path / "m.safetensors"), str(folder), "--workers", "0", "--limit", "3"]) == 0
    assert len(seen[0]) == 3
    assert set(seen[0].labels) == {0, 1}
    assert seen[0].rows.tolist() == sorted(seen[0].rows)


def test_other_columns(model, tmp_path, capsys):
    model.save(tmp_path / "m.safetensors")
    file = write_parquet(tmp_path / "validation.parquet", [0, 1, 1])
    pq.write_table(pq.read_table(file).rename_columns({"image": "photo", "label": "kind"}), file)
    args = ["evaluate", "-c", str(tmp_path / "m.safetensors"), str(tmp_path), "--workers", "0", "--json"]
    assert main(args) == 1
    assert "no column 'image', there is photo, box, kind; give image_column or label_column" in capsys.readouterr().err
    assert main([*args, "--image-column", "photo", "--label-column", "kind"]) == 0
    assert json.loads(capsys.readouterr().out)["images"] == 3


def test_training_images_that_cannot_be_read(model, folder, tmp_path, capsys):
    model.save(tmp_path / "m.safetensors")
    for file in (folder / "train").rglob("*.png"):
        file.write_bytes(b"no image")
    args = ["evaluate", "-c", str(tmp_path / "m.safetensors"), str(folder), "--workers", "0"]
    assert main([*args, "--budget", "0.7"]) == 1
    assert "image after image cannot be read" in capsys.readouterr().err


def test_classes_go_by_name(model, folder, tmp_path, capsys):
    """A model that has its classes in another order than the folders is measured in its own."""
    top1 = {}
    for names in (("dark", "light"), ("light", "dark"), ("day", "night")):
        model.class_names = names
        model.save(tmp_path / "m.safetensors")
        status = main(["evaluate", "-c", str(tmp_path / "m.safetensors"), str(folder), "--workers", "0", "--json"])
        captured = capsys.readouterr()
        if names[0] == "day":
            assert status == 1
            assert "no class 'day'" in captured.err
        else:
            top1[names] = json.loads(captured.out)["variants"][1]["top1"]
    model.class_names = None
    assert sum(top1.values()) == 100
    assert len(set(top1.values())) == 2 or set(top1.values()) == {50}


def test_other_classes_than_the_models(model, folder, tmp_path, capsys):
    model.save(tmp_path / "m.safetensors")
    for i in range(2):
        (folder / "train" / f"more{i}").mkdir()
        Image.new("RGB", (8, 8)).save(folder / "train" / f"more{i}" / "a.png")
    assert main(["evaluate", "-c", str(tmp_path / "m.safetensors"), str(folder)]) == 1
    assert "4 classes, the model 2" in capsys.readouterr().err
