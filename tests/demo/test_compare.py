"""Before and after dropping: the figures are the predictor's, budgets are kept, and nobody's model is changed."""

from __future__ import annotations

import json
import zipfile
from pathlib import Path

import numpy as np
import pytest
import skimage.data
import torch
from PIL import Image

import iared2
from iared2 import Predictor
from iared2.demo.compare import MAX_SIDE, Choice, compare, write_archive
from iared2.explain.methods import heatmap

COFFEE = skimage.data.coffee()


@pytest.fixture
def predictor() -> Predictor:
    torch.manual_seed(0)
    size = {"img_size": (48, 32), "patch_size": 8, "embed_dim": 48, "depth": 6, "num_heads": 3}
    return Predictor(iared2.from_timm("deit_tiny_patch16_224", num_classes=7, **size))


@pytest.fixture
def files(tmp_path: Path) -> list[Path]:
    photos = {"coffee.png": COFFEE, "cat.png": skimage.data.chelsea(), "noise.png": skimage.data.gravel()}
    for name, photo in photos.items():
        Image.fromarray(photo).save(tmp_path / name)
    return [tmp_path / name for name in photos]


def test_is_what_the_predictor_says(predictor: Predictor, files: list[Path]) -> None:
    threshold = float(np.median(predictor(COFFEE).scores[0]))
    (one,), complaints = compare(predictor, files[:1], Choice(rule="threshold", threshold=threshold))
    before, after = predictor(COFFEE, 0.0), predictor(COFFEE, threshold)
    assert complaints == []
    assert before.kept.all()
    assert 0.4 < after.keep_ratio[0] < 0.6
    for found, expected in ((one.before, before), (one.after, after)):
        assert np.array_equal(found.scores, expected.scores)
        assert found.top5 == expected.top5
        assert (found.macs, found.file) == (expected.macs, "coffee.png")
    assert one.saved == 1 - after.macs / after.dense_macs
    assert np.array_equal(one.heat, after.heatmap())
    assert np.array_equal(one.overlay(), after.overlay())


@pytest.mark.filterwarnings("ignore:.isinstance.treespec, LeafSpec:FutureWarning", "ignore:The given buffer is not")
@pytest.mark.parametrize("engine", ["openvino", "onnxruntime"])
def test_a_runtime_says_the_same(predictor: Predictor, files: list[Path], engine: str) -> None:
    pytest.importorskip(engine, reason=f"{engine} is missing: pip install 'iared2[test]'")
    model = predictor.model
    model.threshold = (0.0, 0.501, 0.502)
    margins = [float(p[0][1] - p[1][1]) for p in (predictor(file).top5 for file in files)]
    model.confidence = (min(margins) + max(margins)) / 2
    served = Predictor(model, engine=engine)
    threshold = float(np.median(predictor(COFFEE).scores[0])) + 1e-5
    for choice in (Choice(), Choice(rule="threshold", threshold=threshold)):
        both = [compare(one, files, choice)[0] for one in (predictor, served)]
        assert {one.after.second_pass for one in both[0]} == {True, False}
        for mine, other in zip(*both, strict=True):
            for expected, found in ((mine.before, other.before), (mine.after, other.after)):
                np.testing.assert_allclose(found.scores, expected.scores, atol=1e-4)
                assert np.array_equal(found.kept, expected.kept)
                assert (found.macs, found.second_pass) == (expected.macs, expected.second_pass)
                assert [name for name, _ in found.top5] == [name for name, _ in expected.top5]
                probabilities = [[p for _, p in one.top5] for one in (found, expected)]
                np.testing.assert_allclose(*probabilities, atol=1e-5)
            np.testing.assert_allclose(other.heat, mine.heat, atol=1e-3)


def test_every_group(predictor: Predictor, files: list[Path]) -> None:
    after = predictor(COFFEE)
    for group in range(3):
        (one,), _ = compare(predictor, files[:1], Choice(group=group))
        assert np.array_equal(one.heat, after.heatmap(group))
    (one,), _ = compare(predictor, files[:1], Choice(group="all"))
    assert one.heat.shape == COFFEE.shape[:2]
    assert not any(np.allclose(one.heat, after.heatmap(group), atol=0.05) for group in range(3))


@pytest.mark.parametrize("method", ["attention", "rollout", "gradcam", "integrated-gradients", "random", "center"])
def test_other_methods(predictor: Predictor, files: list[Path], method: str) -> None:
    """Of the model with the thresholds of this call, though its own say otherwise; it keeps those."""
    predictor.model.threshold = [0.1, 0.2, 0.3]
    threshold = float(np.quantile(predictor(COFFEE, 0.0).scores[0], 0.8))
    (one,), _ = compare(predictor, files[:1], Choice(method, rule="threshold", threshold=threshold))
    assert predictor.model.threshold == (0.1, 0.2, 0.3)
    predictor.model.threshold = threshold
    small = heatmap(predictor.model, predictor.prepare(Image.fromarray(COFFEE)), method)[0].numpy()
    assert one.heat.shape == COFFEE.shape[:2]
    assert one.heat.dtype == np.float32
    assert 0 <= one.heat.min() <= one.heat.max() <= 1
    shrunk = np.asarray(Image.fromarray(one.heat).resize(small.shape[::-1], Image.Resampling.BOX))
    assert np.abs(shrunk - small).mean() < 0.03


@pytest.mark.parametrize("rule", ["macs", "patches"])
@pytest.mark.parametrize("budget", [0.3, 0.7])
def test_the_photos_together_meet_a_budget(predictor: Predictor, files: list[Path], rule: str, budget: float) -> None:
    predictor.model.confidence = 1.0
    found, _ = compare(predictor, files, Choice(rule=rule, budget=budget))
    spent = {
        "macs": np.mean([one.after.macs / one.after.dense_macs for one in found]),
        "patches": np.mean([one.after.keep_ratio for one in found]),
    }[rule]
    assert budget - 0.1 < spent <= budget + 0.01
    assert len({one.after.thresholds for one in found}) == 1
    assert predictor.model.threshold == 0.5


def test_no_budget_to_keep_to(predictor: Predictor, files: list[Path]) -> None:
    (one,), _ = compare(predictor, files[:1], Choice(rule="patches", budget=1.0))
    assert one.after.kept.all()


def test_own_thresholds(predictor: Predictor, files: list[Path]) -> None:
    predictor.model.threshold = [0.4, 0.5, 0.6]
    (one,), _ = compare(predictor, files[:1], Choice())
    assert one.after.thresholds == (0.4, 0.5, 0.6)


def test_bad_files_are_named_and_left_out(predictor: Predictor, files: list[Path], tmp_path: Path) -> None:
    (tmp_path / "text.jpg").write_text("no photo")
    found, complaints = compare(predictor, [tmp_path / "text.jpg", files[0]], Choice())
    assert [one.name for one in found] == ["coffee.png"]
    assert [str(c) for c in complaints] == ["text.jpg: not an image that can be read here; convert it to JPEG or PNG"]
    assert compare(predictor, [], Choice()) == ([], [])


def test_large_photos_are_made_smaller(predictor: Predictor, tmp_path: Path) -> None:
    Image.fromarray(COFFEE).resize((2400, 1600)).save(tmp_path / "large.jpg")
    (one,), _ = compare(predictor, [tmp_path / "large.jpg"], Choice())
    assert one.overlay().size == (MAX_SIDE, round(MAX_SIDE * 2 / 3))


def test_archive(predictor: Predictor, files: list[Path], tmp_path: Path) -> None:
    found, _ = compare(predictor, files[:2], Choice("center"))
    write_archive(found, tmp_path / "a.zip")
    with zipfile.ZipFile(tmp_path / "a.zip") as archive:
        names = [
            f"{folder}/{name}"
            for folder in ("coffee", "cat")
            for name in ("heatmap.png", "hierarchy.png", "result.json")
        ]
        assert archive.namelist() == names
        with archive.open("cat/hierarchy.png") as file:
            assert np.array_equal(Image.open(file), found[1].after.hierarchy())
        with archive.open("cat/heatmap.png") as file:
            width, height = found[1].overlay().size
            assert np.array_equal(Image.open(file).crop((0, 0, width, height)), found[1].overlay())
        result = json.loads(archive.read("cat/result.json"))
    assert result["method"] == "center"
    assert result["before"]["groups"][0]["keep_ratio"] == 1
    assert result["after"] == json.loads(json.dumps(found[1].after.to_dict()))
    assert result["after"]["photo"]["file"] == "cat.png"
