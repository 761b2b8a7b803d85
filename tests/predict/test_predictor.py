"""A photo in, arrays out: the whole photo, upright, whatever it comes as; and files that are whole or not there."""

from __future__ import annotations

import base64
import io
import json
import os
from concurrent.futures import ThreadPoolExecutor
from html.parser import HTMLParser
from pathlib import Path

import numpy as np
import pytest
import skimage.data
import torch
from PIL import Image
from sklearn.datasets import load_sample_images

import iared2
from iared2 import InputError, ReducedVisionTransformer
from iared2.predict.photo import Interpretation, Predictor

GRID = 6, 4
RESULT_FILES = [path.name for path in Interpretation.files("")]
PHOTOS = {
    "astronaut": skimage.data.astronaut(),
    "cat": skimage.data.chelsea(),
    "coffee": skimage.data.coffee(),
    **dict(zip(("temple", "flower"), load_sample_images().images, strict=True)),
}


@pytest.fixture
def model() -> ReducedVisionTransformer:
    torch.manual_seed(0)
    size = {"img_size": (48, 32), "patch_size": 8, "embed_dim": 48, "depth": 6, "num_heads": 3}
    return iared2.from_timm("deit_tiny_patch16_224", num_classes=7, **size)


@pytest.fixture
def predictor(model: ReducedVisionTransformer) -> Predictor:
    return Predictor(model)


def plant(model: ReducedVisionTransformer, monkeypatch: pytest.MonkeyPatch, *scores: np.ndarray) -> None:
    """Make the interpreters give these scores (N,), and 0 where a patch is gone."""
    monkeypatch.setattr(
        model, "score", lambda packed, group: torch.tensor(scores[group], dtype=torch.float32) * packed.alive
    )


@pytest.mark.parametrize("name", PHOTOS)
def test_arrays(predictor: Predictor, name: str) -> None:
    photo = PHOTOS[name]
    result = predictor(photo)
    assert result.scores.shape == result.kept.shape == (3, 24)
    assert ((result.scores > 0) == np.vstack([np.ones((1, 24), bool), result.kept[:-1]])).all()
    assert np.array_equal(result.kept, result.scores > 0.5)
    assert result.keep_ratio == pytest.approx(result.kept.sum(1) / 24)
    assert 0 < result.macs < result.dense_macs
    assert result.milliseconds > 0
    assert np.array_equal(result.photo, photo)
    assert result.heatmap().shape == photo.shape[:2]
    assert result.overlay().size == result.photo.size
    assert [p for _, p in result.top5] == sorted((p for _, p in result.top5), reverse=True)


def test_agrees_with_the_model(predictor: Predictor, model: ReducedVisionTransformer) -> None:
    photo = Image.fromarray(PHOTOS["cat"])
    squashed = np.asarray(photo.resize((32, 48), Image.Resampling.BICUBIC), dtype=np.float32) / 255
    cfg = model.pretrained_cfg
    normalised = (squashed - np.array(cfg["mean"], np.float32)) / np.array(cfg["std"], np.float32)
    with torch.no_grad():
        output = model.trace(torch.from_numpy(normalised).permute(2, 0, 1)[None])
    result = predictor(photo)
    assert np.allclose(result.scores, output.scores[:, 0], atol=1e-5)
    assert dict(result.top5) == pytest.approx(
        {str(c): p for c, p in enumerate(output.logits[0].softmax(0).tolist()) if str(c) in dict(result.top5)}, abs=1e-5
    )
    assert result.macs == output.macs[0]


def test_the_same_photo_from_anywhere(predictor: Predictor, tmp_path: Path) -> None:
    photo = Image.fromarray(PHOTOS["coffee"])
    photo.save(tmp_path / "a.png")
    results = [predictor(p) for p in (photo, np.asarray(photo), tmp_path / "a.png", str(tmp_path / "a.png"))]
    for result in results:
        assert np.array_equal(result.scores, results[0].scores)
    assert [r.file for r in results] == [None, None, str(tmp_path / "a.png"), str(tmp_path / "a.png")]


@pytest.mark.parametrize("how", ["file", "image"])
def test_exif_turns_the_map_with_the_photo(predictor: Predictor, tmp_path: Path, how: str) -> None:
    upright = Image.fromarray(PHOTOS["coffee"]).resize((200, 300))
    exif = Image.Exif()
    exif[0x0112] = 6
    upright.transpose(Image.Transpose.ROTATE_90).save(tmp_path / "a.png", exif=exif)
    with Image.open(tmp_path / "a.png") as lying:
        assert lying.size == (300, 200)
        result = predictor(tmp_path / "a.png" if how == "file" else lying)
    expected = predictor(upright)
    assert result.photo.size == (200, 300)
    assert np.array_equal(result.photo, expected.photo)
    assert np.array_equal(result.heatmap(), expected.heatmap())
    assert np.array_equal(result.hierarchy(), expected.hierarchy())


@pytest.mark.parametrize("size", [(300, 40), (40, 300), (1, 1)])
def test_the_whole_photo_is_seen_and_covered(
    predictor: Predictor, model: ReducedVisionTransformer, monkeypatch: pytest.MonkeyPatch, size: tuple[int, int]
) -> None:
    """A crop would not see the last pixel column, and a map of the crop would not reach it."""
    dark = Image.new("RGB", size)
    edge = dark.copy()
    edge.paste("white", (size[0] - max(size[0] // 10, 1), 0, *size))
    scores = predictor(dark).scores[0], predictor(edge).scores[0]
    assert not np.allclose(*scores, atol=1e-6)

    last = np.where(np.arange(24) == 23, 0.9, 0.6)
    plant(model, monkeypatch, last, last, last)
    heat = predictor(dark).heatmap()
    assert heat.shape == size[::-1]
    if size != (1, 1):
        assert heat[-1, -1] == heat.max() > 0.9
        assert heat[0, 0] == heat[-1, 0] == heat[0, -1] == 0


def test_groups_and_thresholds(
    predictor: Predictor, model: ReducedVisionTransformer, monkeypatch: pytest.MonkeyPatch
) -> None:
    n = np.arange(24)
    plant(model, monkeypatch, np.where(n < 12, 0.6, 0.4), np.where(n < 6, 0.3, 0.2), np.full(24, 0.9))
    model.threshold = [0.5, 0.25, 0.5]
    result = predictor(PHOTOS["coffee"])
    assert result.kept.sum(1).tolist() == [12, 6, 6]
    assert result.thresholds == (0.5, 0.25, 0.5)
    assert result.keep_ratio.tolist() == [0.5, 0.25, 0.25]
    first, second, third = (result.heatmap(g) for g in range(3))
    assert np.array_equal(result.heatmap(), second)
    assert second.max() > 0.9  # though all its scores lie below the authors' 0.48
    assert (first > 0.5).mean() == pytest.approx(0.5, abs=0.02)
    assert (third > 0.5).mean() == pytest.approx(0.25, abs=0.02)
    with pytest.raises(InputError, match="no group 3"):
        result.heatmap(3)

    model.threshold = 1.0  # nothing is left after the first group, so the second has nothing to show
    assert predictor(PHOTOS["coffee"]).heatmap().max() == 0


def test_a_threshold_for_one_call(predictor: Predictor, model: ReducedVisionTransformer) -> None:
    own = predictor(PHOTOS["coffee"])
    scores = np.sort(own.scores[0])
    one, each = float(scores[12]), [float(scores[6]), 0.0, 1.0]
    assert predictor(PHOTOS["coffee"], one).kept[0].sum() == 11
    result = predictor(PHOTOS["coffee"], each)
    assert result.kept.sum(1).tolist() == [17, 17, 0]
    assert result.thresholds == tuple(each)
    model.threshold = each
    assert np.array_equal(predictor(PHOTOS["coffee"]).scores, result.scores)
    for half in (0.5, np.float32(0.5), torch.tensor(0.5), model.decision.at(0.5)):
        assert predictor(PHOTOS["coffee"], half).macs == own.macs
    model.max_tokens = 3
    assert predictor(PHOTOS["coffee"], model.decision.whole()).kept.all()


@pytest.mark.parametrize("threshold", [[0.5, 0.5], [], float("nan"), [0.5, 0.5, float("inf")]])
def test_wrong_thresholds(predictor: Predictor, threshold: float | list[float]) -> None:
    with pytest.raises(InputError, match="one per group"):
        predictor(PHOTOS["coffee"], threshold)


def test_threads_do_not_see_each_others_thresholds(predictor: Predictor, model: ReducedVisionTransformer) -> None:
    thresholds = [0.0, *np.sort(predictor(PHOTOS["coffee"]).scores[0])[[4, 12, 20]].tolist(), 1.0]
    alone = {t: predictor(PHOTOS["coffee"], t) for t in thresholds}
    assert len({result.macs for result in alone.values()}) == 5
    with ThreadPoolExecutor(5) as pool:
        for t, result in zip(thresholds * 8, pool.map(predictor, [PHOTOS["coffee"]] * 40, thresholds * 8), strict=True):
            assert np.array_equal(result.kept, alone[t].kept)
            assert result.thresholds == alone[t].thresholds
    assert model.threshold == 0.5


def test_one_group_shows_its_own() -> None:
    model = iared2.from_timm("deit_tiny_patch16_224", groups=1, img_size=32, patch_size=8, embed_dim=48, depth=1)
    result = Predictor(model)(PHOTOS["cat"])
    assert np.array_equal(result.heatmap(), result.heatmap(0))


def test_class_names(predictor: Predictor, model: ReducedVisionTransformer) -> None:
    numbers = [int(name) for name, _ in predictor(PHOTOS["cat"]).top5]
    model.class_names = tuple("abcdefg")
    assert [name for name, _ in predictor(PHOTOS["cat"]).top5] == ["abcdefg"[n] for n in numbers]
    model.reset_classifier(2)
    assert len(predictor(PHOTOS["cat"]).top5) == 2
    model.reset_classifier(0)
    assert predictor(PHOTOS["cat"]).top5 == []
    model.reset_classifier(1000)
    with torch.no_grad():
        model.get_classifier().bias[281] += 100
    assert predictor(PHOTOS["cat"]).top5[0] == ("tabby, tabby cat", pytest.approx(1))


def test_half_precision(model: ReducedVisionTransformer) -> None:
    assert Predictor(model.bfloat16())(PHOTOS["cat"]).scores.dtype == np.float32


@pytest.mark.parametrize("device", ["gpu", "meta", "cuda:999"])
def test_unusable_device(model: ReducedVisionTransformer, device: str) -> None:
    with pytest.raises(InputError, match=f"device {device} cannot be used here") as caught:
        Predictor(model, device)
    assert "\n" not in str(caught.value)
    assert not any(p.is_meta for p in model.parameters())


def test_only_colour_models() -> None:
    model = iared2.from_timm(
        "deit_tiny_patch16_224", groups=1, img_size=32, patch_size=8, embed_dim=48, depth=1, in_chans=1
    )
    with pytest.raises(InputError, match="1 channels"):
        Predictor(model)


@pytest.mark.parametrize(
    "array",
    [np.zeros((4, 4, 3)), np.zeros(4, np.uint8), np.zeros((4, 4, 2), np.uint8), np.zeros((0, 4, 3), np.uint8)],
)
def test_other_arrays(predictor: Predictor, array: np.ndarray) -> None:
    with pytest.raises(InputError, match=r"the photo: .* is no photo: give .* a uint8 array") as caught:
        predictor(array)
    assert "\n" not in str(caught.value)


def test_grey_and_transparent_arrays(predictor: Predictor) -> None:
    grey = PHOTOS["cat"][..., 0]
    as_rgb = predictor(np.stack([grey] * 3, -1))
    for array in (grey, grey[..., None]):
        assert np.array_equal(predictor(array).scores, as_rgb.scores)
    clear = np.dstack([PHOTOS["cat"], np.zeros_like(grey)])  # white, whatever its colours are
    assert np.array_equal(predictor(clear).scores, predictor(np.full_like(PHOTOS["cat"], 255)).scores)


@pytest.fixture
def result(predictor: Predictor) -> Interpretation:
    return predictor(PHOTOS["cat"])


def test_json(result: Interpretation) -> None:
    found = json.loads(json.dumps(result.to_dict()))
    assert found["photo"] == {"file": None, "width": 451, "height": 300}
    assert [(t["class"], t["probability"]) for t in found["top5"]] == [(n, round(p, 6)) for n, p in result.top5]
    assert found["grid_size"] == [6, 4]
    for group, scores, kept in zip(found["groups"], result.scores, result.kept, strict=True):
        assert group["scores"] == pytest.approx(scores, abs=1e-6)
        assert group["kept"] == kept.tolist()
        assert group["keep_ratio"] == kept.mean()
        assert group["threshold"] == 0.5
    assert (found["macs"], found["dense_macs"]) == (result.macs, result.dense_macs)
    assert found["milliseconds"] > 0
    assert found["model"] == {"architecture": "deit_tiny_patch16_224", "input_size": [48, 32], "checkpoint": None}
    assert found["versions"].keys() == {"iared2", "torch", "timm", "python"}


def test_a_notebook_shows_pictures_and_text_that_is_only_text(tmp_path: Path, predictor: Predictor) -> None:
    predictor.model.class_names = ("<script>alert('x')</script>", "a & b", *"cdefg")
    file = tmp_path / "<b>café & co.png"
    Image.fromarray(PHOTOS["coffee"]).resize((3000, 2000)).save(file)
    result = predictor(file)
    text = result._repr_html_()

    elements: list[tuple[str, dict]] = []
    words: list[str] = []
    parser = HTMLParser()
    parser.handle_starttag = lambda tag, attributes: elements.append((tag, dict(attributes)))  # type: ignore
    parser.handle_data = words.append  # type: ignore[method-assign]
    parser.feed(text)
    assert {tag for tag, _ in elements} == {"figure", "img", "br", "figcaption", "table", "tr", "td"}
    heat, hierarchy = (attributes["src"] for tag, attributes in elements if tag == "img")
    pictures = [Image.open(io.BytesIO(base64.b64decode(src.partition("base64,")[2]))) for src in (heat, hierarchy)]
    assert all(src.startswith("data:image/png;base64,") for src in (heat, hierarchy))  # needs no file and no network
    assert [picture.width for picture in pictures] == [480, 960]
    assert len(text) < 2_000_000
    close = np.asarray(pictures[0].crop((0, 0, 300, 200)), float)
    figure = result.figure()
    figure.thumbnail((480, 960), Image.Resampling.LANCZOS)
    assert np.abs(close - np.asarray(figure)[:200, :300]).mean() < 1

    said = " ".join(words)
    assert said.startswith("<b>café & co.png: patches 1.00 → ")
    for name, probability in result.top5:
        assert f"{name} {100 * probability:.1f} %" in said
    assert f"MACs {100 * result.macs / result.dense_macs:.0f} % of dense" in said
    assert "photo: patches" in predictor(PHOTOS["cat"])._repr_html_()


def test_save(result: Interpretation, tmp_path: Path) -> None:
    folder = tmp_path / "new" / "folder"
    result.save(folder)
    assert {p.name for p in folder.iterdir()} == set(RESULT_FILES)
    figure, hierarchy, text = (folder / name for name in RESULT_FILES)
    with Image.open(figure) as image:
        assert np.array_equal(image, result.figure())
        assert np.array_equal(image.crop((0, 0, 451, 300)), result.overlay())
    with Image.open(hierarchy) as image:
        assert np.array_equal(image, result.hierarchy())
    assert json.loads(text.read_text()) == json.loads(json.dumps(result.to_dict()))


def test_save_leaves_other_files_alone(result: Interpretation, tmp_path: Path) -> None:
    (tmp_path / "notes.txt").write_text("mine")
    (tmp_path / "result.json").write_text("old")
    result.save(tmp_path, group=0, colormap="viridis")
    assert (tmp_path / "notes.txt").read_text() == "mine"
    assert json.loads((tmp_path / "result.json").read_text())["photo"]["width"] == 451
    with Image.open(tmp_path / "interpret-result.png") as image:
        assert np.array_equal(image, result.figure(0, "viridis"))


def test_a_failed_save_leaves_what_was_there(
    result: Interpretation, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The disk is full when the last file is written: nothing new is to be seen, and nothing half."""
    result.save(tmp_path)
    before = {p.name: p.read_bytes() for p in tmp_path.iterdir()}

    def full(*_: object, **__: object) -> None:
        raise OSError(28, os.strerror(28))

    monkeypatch.setattr(Path, "write_text", full)
    with pytest.raises(InputError, match="No space left"):
        result.save(tmp_path, group=0)
    assert {p.name: p.read_bytes() for p in tmp_path.iterdir()} == before


def test_save_where_nothing_can_be_written(result: Interpretation, tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    with pytest.raises(InputError, match="cannot write"):
        result.save(tmp_path / "file")
    with pytest.raises(InputError, match="colour map"):
        result.save(tmp_path / "new", colormap="rainbows")
    assert not (tmp_path / "new").exists()
