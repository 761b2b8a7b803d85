"""A batch of photos -> a table: the same as the Predictor says, in every library that calls it."""

from __future__ import annotations

import copy
import io
import pickle
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import skimage.data
import torch
from pictures import jpeg, write_parquet
from PIL import Image
from tiny import sharp_model

import iared2
from iared2 import BatchPredictor, InputError, Predictor

SIZE = {"img_size": 32, "patch_size": 8, "embed_dim": 48, "depth": 3, "num_heads": 3}


@pytest.fixture(scope="module")
def model() -> iared2.ReducedVisionTransformer:
    made = sharp_model(("deit_tiny_patch16_224", SIZE), num_classes=7)
    made.class_names = tuple("abcdefg")
    return made


@pytest.fixture(scope="module")
def photos() -> list[Image.Image]:
    return [Image.fromarray(image) for image in (skimage.data.chelsea(), skimage.data.coffee(), skimage.data.camera())]


def encoded(photo: Image.Image) -> bytes:
    buffer = io.BytesIO()
    photo.save(buffer, "PNG")
    return buffer.getvalue()


def assert_close(one: Any, other: Any) -> None:
    """Rows that are equal but for the rounding of floating-point numbers, which depends on the rest of the batch."""
    assert type(one) is type(other)
    if isinstance(one, (list, dict)):
        assert len(one) == len(other)
        for key in one if isinstance(one, dict) else range(len(one)):
            assert_close(one[key], other[key])
    else:
        assert one == (pytest.approx(other, abs=1e-3) if isinstance(one, float) else other)


def test_rows_are_those_of_the_predictor(model, photos):
    rows = BatchPredictor(model, "cpu", embedding=True, scores=True)({"image": photos}).to_pylist()
    predictor = Predictor(model)
    for photo, row in zip(photos, rows, strict=True):
        expected = predictor(photo)
        assert [(best["class"], best["index"]) for best in row["top5"]] == [(n, ord(n) - 97) for n, _ in expected.top5]
        assert [best["probability"] for best in row["top5"]] == pytest.approx([p for _, p in expected.top5], abs=1e-6)
        assert row["kept"] == expected.kept.sum(1).tolist()
        assert row["macs"] == expected.macs
        assert row["error"] is None
        assert np.array_equal(np.array(row["scores"], np.float16), expected.scores.astype(np.float16))
        with torch.inference_mode():
            inputs = predictor.prepare(photo.convert("RGB"))
            features = model.forward_head(model.forward_features(inputs), pre_logits=True)[0]
        assert row["embedding"] == pytest.approx(features.tolist(), abs=1e-5)
    assert len({tuple(row["kept"]) for row in rows}) > 1, "photos that are told apart"


def test_a_second_pass(model, photos):
    twice = copy.deepcopy(model)
    predictor = Predictor(twice)
    margins = sorted(p.top5[0][1] - p.top5[1][1] for p in map(predictor, photos))
    twice.confidence = sum(margins[:2]) / 2
    rows = BatchPredictor(twice, "cpu", embedding=True)({"image": photos}).to_pylist()
    assert sorted(row["second_pass"] for row in rows) == [False, False, True]
    for photo, row in zip(photos, rows, strict=True):
        expected = predictor(photo)
        assert (row["macs"], row["second_pass"]) == (expected.macs, expected.second_pass)
        assert row["top5"][0]["probability"] == pytest.approx(expected.top5[0][1], abs=1e-6)
        with torch.inference_mode():
            inputs = predictor.prepare(photo.convert("RGB"))
            features = twice.forward_head(twice.forward_features(inputs), pre_logits=True)[0]
        assert row["embedding"] == pytest.approx(features.tolist(), abs=1e-5)


def test_every_kind_of_photo_has_the_same_row(model, photos):
    rgb = [photo.convert("RGB") for photo in photos]
    predict = BatchPredictor(model, "cpu", scores=True)
    expected = predict({"image": rgb})
    arrays = np.empty(3, object)
    arrays[:] = [np.asarray(photo) for photo in rgb]
    kinds = [photos, arrays, [encoded(photo) for photo in rgb], [{"bytes": encoded(photo)} for photo in photos]]
    for kind in kinds:
        assert predict({"image": kind}).equals(expected)
    assert predict({"bytes": kinds[2]}).equals(expected), "as ray.data.read_binary_files calls it"
    small = np.stack([np.asarray(photo.resize((40, 40))) for photo in rgb])
    assert predict({"image": small}).equals(predict({"image": [Image.fromarray(image) for image in small]}))


def test_a_bad_photo_is_a_row_with_its_error(model, photos):
    predict = BatchPredictor(model, "cpu", embedding=True, scores=True)
    table = predict({"image": [b"no photo", photos[0], None, photos[1], jpeg(0)[:200]]})
    assert table.schema.equals(predict.schema)
    good = predict({"image": photos[:2]})
    assert table.take([1, 3]).equals(good)
    for row in (0, 2, 4):
        *rest, error = table.slice(row, 1).to_pylist()[0].values()
        assert rest == [None] * 6
        assert error
    assert table["error"].to_pylist()[2] == "there is no photo"
    none = predict({"image": [b"", b"x"]})
    assert none.schema.equals(predict.schema)
    assert none["macs"].null_count == 2
    assert predict({"image": []}).schema.equals(predict.schema)


def test_it_can_be_pickled(model, photos):
    """As `datasets.map` with several processes does."""
    predict = BatchPredictor(model, "cpu", scores=True)
    assert pickle.loads(pickle.dumps(predict))({"image": photos}).equals(predict({"image": photos}))


def test_other_columns_stay(model, photos):
    batch = {
        "path": np.array(["a", "b"], object),
        "image": photos[:2],
        "box": np.zeros((2, 4), np.int32),
        "words": [["x"], ["y", "z"]],
        "macs": [1, 2],
    }
    table = BatchPredictor(model, "cpu")(batch)
    assert table.column_names == ["path", "box", "words", "top5", "kept", "macs", "second_pass", "error"]
    assert table["path"].to_pylist() == ["a", "b"]
    assert table["box"].to_pylist() == [[0] * 4] * 2
    assert table["words"].to_pylist() == [["x"], ["y", "z"]]
    assert min(table["macs"].to_pylist()) > 2
    with pytest.raises(InputError, match=r"the column mask cannot be kept .*; drop it first"):
        BatchPredictor(model, "cpu")({"image": photos[:1], "mask": photos[:1]})


def test_options(model, photos):
    everything = BatchPredictor(model, "cpu", threshold=0, image_column="photo")({"photo": photos, "image": [1, 2, 3]})
    assert everything["kept"].to_pylist() == [[16] * 3] * 3
    assert everything["image"].to_pylist() == [1, 2, 3]
    assert model.threshold == 0.5, "the model is not changed"
    with pytest.raises(InputError, match="no column image or bytes or img, there is photo; set image_column"):
        BatchPredictor(model, "cpu")({"photo": photos})
    with pytest.raises(InputError, match="threshold"):
        BatchPredictor(model, "cpu", threshold=[0.1, 0.2])


def test_another_image_size(model, photos):
    larger = copy.deepcopy(model)
    rows = BatchPredictor(larger, "cpu", scores=True, image_size=(48, 64))({"image": photos})
    assert larger.grid_size == (6, 8)
    expected = Predictor(larger)(photos[0])
    assert rows.column("kept").to_pylist()[0] == expected.kept.sum(1).tolist()
    assert len(rows.column("scores").to_pylist()[0][0]) == 48


def test_models_without_names_or_without_classes(photos):
    named = BatchPredictor(sharp_model(("deit_tiny_patch16_224", SIZE), num_classes=1000), "cpu")({"image": photos[:1]})
    best = named["top5"].to_pylist()[0]
    assert len(best) == 5
    assert all(len(entry["class"]) > 3 for entry in best), "ImageNet's"
    table = BatchPredictor(sharp_model(("deit_tiny_patch16_224", SIZE), num_classes=0), "cpu", embedding=True)(
        {"image": photos}
    )
    assert table["top5"].to_pylist() == [[]] * 3
    assert len(table["embedding"].to_pylist()[2]) == 48


def test_datasets_map(tmp_path: Path, model):
    datasets = pytest.importorskip("datasets")
    cells = [jpeg(0), jpeg(1), b"no photo", jpeg(3), jpeg(4)]
    file = write_parquet(tmp_path / "a.parquet", [3, 1, 4, 1, 5], images=cells)
    data = datasets.Dataset.from_parquet(str(file), cache_dir=str(tmp_path / "cache"))
    data = data.cast_column("image", datasets.Image(decode=False))  # decoding would stop at the bad one
    predict = BatchPredictor(model, "cpu", scores=True)
    found = data.map(predict, batched=True, batch_size=2)
    assert found.column_names == ["box", "label", "top5", "kept", "macs", "second_pass", "scores", "error"]
    assert found["label"][:] == [3, 1, 4, 1, 5]
    assert_close(found.remove_columns(["box", "label"]).to_list(), predict({"image": cells}).to_pylist())
    again = data.map(BatchPredictor(model, "cpu", scores=True), batched=True, batch_size=2)
    assert again._fingerprint == found._fingerprint, "found in the cache the second time"


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore")
def test_ray_data_with_two_actors(tmp_path: Path, model, monkeypatch):
    """The same rows as without Ray, from `read_images` and from `read_binary_files`."""
    ray = pytest.importorskip("ray", reason="needs the package ray: pip install '.[ray]'")
    pytest.importorskip("ray.data", reason="needs the packages of ray.data: pip install '.[ray]'")
    checkpoint = tmp_path / "model.safetensors"
    model.save(checkpoint)
    cells = {f"{number:03d}.jpg": jpeg(number, 40) for number in range(200)}
    (tmp_path / "photos").mkdir()
    for name, cell in cells.items():
        (tmp_path / "photos" / name).write_bytes(cell)
    expected = BatchPredictor(checkpoint, "cpu")({"path": list(cells), "image": list(cells.values())}).to_pylist()
    monkeypatch.setenv("RAY_worker_niceness", "0")  # 15 otherwise: on a busy machine, an actor takes minutes to start
    # two logical CPUs are for the readers: with two, the actors would hold both, and nothing would be read
    ray.init(num_cpus=4, include_dashboard=False, log_to_driver=False, object_store_memory=10**8)
    try:
        folder = str(tmp_path / "photos")
        for photos in (
            ray.data.read_images(folder, include_paths=True, mode="RGB"),
            ray.data.read_binary_files(folder, include_paths=True),
        ):
            data = photos.map_batches(
                BatchPredictor,
                fn_constructor_kwargs={"model": str(checkpoint), "device": "cpu"},
                batch_size=64,
                compute=ray.data.ActorPoolStrategy(size=2),
            )
            rows = sorted(data.take_all(), key=lambda row: row["path"])
            assert_close([{**row, "path": Path(row["path"]).name} for row in rows], expected)
    finally:
        ray.shutdown()
