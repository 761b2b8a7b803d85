"""The model in the box, whichever it is: it describes itself, loads fast, and is what the commands use by default."""

from __future__ import annotations

import json
import time
from pathlib import Path

import numpy as np
import pytest
import torch
from timm.data import create_transform, resolve_model_data_config

import iared2
from iared2.cli import main
from iared2.data.batches import model_transform
from iared2.data.photo import read_photo

BOX = Path(iared2.__file__).parent / "box"
PHOTOS = sorted(BOX.glob("*.jpg"))


@pytest.fixture(scope="module")
def model() -> iared2.ReducedVisionTransformer:
    return iared2.load()


def test_is_small_and_loads_fast(model: iared2.ReducedVisionTransformer) -> None:
    assert (BOX / "model.safetensors").stat().st_size <= 25e6
    start = time.process_time()
    iared2.load()
    assert time.process_time() - start < 1


def test_describes_itself(model: iared2.ReducedVisionTransformer, tmp_path: Path) -> None:
    assert model.class_names is not None
    assert len(set(model.class_names)) == len(model.class_names) == model.num_classes
    assert len(model.thresholds or model.num_keep or ()) == model.num_groups
    cfg = model.pretrained_cfg
    assert cfg["num_classes"] == model.num_classes
    assert not [key for key in ("url", "file", "hf_hub_id") if cfg.get(key)], "they lead to the weights it started from"
    card = (BOX / "README.md").read_text(encoding="utf-8")
    assert f"D = {model.num_groups} groups" in card
    assert "×".join(map(str, cfg["input_size"][1:])) in card
    model.save(tmp_path / "again.safetensors")
    assert iared2.load(tmp_path / "again.safetensors").pretrained_cfg == cfg


def test_timm_prepares_photos_as_the_predictor_does(model: iared2.ReducedVisionTransformer) -> None:
    timms = create_transform(**resolve_model_data_config(model))
    for photo in map(read_photo, PHOTOS):
        ours = iared2.Predictor(model).prepare(photo)
        assert torch.equal(ours, model_transform(model.pretrained_cfg)(photo)[None])
        assert torch.equal(ours, timms(photo)[None])


def test_is_what_commands_use(model: iared2.ReducedVisionTransformer, tmp_path: Path) -> None:
    assert main(["interpret", "-p", str(PHOTOS[0]), "-o", str(tmp_path / "out")]) == 0
    found = json.loads((tmp_path / "out" / "result.json").read_text())
    expected = iared2.Predictor(model)(PHOTOS[0])
    assert found["top5"][0]["class"] == expected.top5[0][0] in (model.class_names or ())
    assert [group["kept"] for group in found["groups"]] == expected.kept.tolist()
    assert main(["figure", "hierarchy", str(PHOTOS[0]), "-o", str(tmp_path / "figure.png")]) == 0


def test_reduces(model: iared2.ReducedVisionTransformer) -> None:
    """Fewer patches after each group, at fewer MACs in one pass, and other decisions on other photos."""
    results = [iared2.Predictor(model)(photo) for photo in PHOTOS]
    for result in results:
        assert (np.diff(result.keep_ratio) <= 0).all()
        assert result.macs < (1.3 if result.second_pass else 0.3) * result.dense_macs
        assert np.isfinite(result.scores).all()
    assert 0 < sum(result.second_pass for result in results) < len(PHOTOS)  # the cat is tabby or Egyptian
    assert len({result.kept.tobytes() for result in results}) == len(PHOTOS)
