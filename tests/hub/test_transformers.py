"""Transformers' auto classes and pipeline on a local folder, offline, with the code that the folder contains."""

from __future__ import annotations

import json
import warnings
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from torch import Tensor

import iared2
from iared2 import InputError, ReducedVisionTransformer

transformers = pytest.importorskip("transformers", minversion="5.0")

TINY = {"img_size": 32, "patch_size": 8, "embed_dim": 48, "depth": 4, "num_heads": 3, "num_classes": 3}
PHOTO = Path(__file__).parents[2] / "examples" / "chelsea.jpg"


@pytest.fixture(autouse=True)
def offline(monkeypatch: pytest.MonkeyPatch, tmp_path_factory: pytest.TempPathFactory) -> None:
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    modules = str(tmp_path_factory.mktemp("modules"))
    monkeypatch.setattr("transformers.dynamic_module_utils.HF_MODULES_CACHE", modules)
    warnings.simplefilter("ignore")  # of transformers and its dependencies


@pytest.fixture
def model() -> ReducedVisionTransformer:
    torch.manual_seed(0)
    model = iared2.from_timm("deit_tiny_patch16_224", groups=2, **TINY).eval()
    model.class_names = ("cat", "dog", "bird")
    model.threshold = (0.49, 0.5)
    return model


@pytest.fixture
def images() -> Tensor:
    return torch.randn(2, 3, 32, 32, generator=torch.Generator().manual_seed(0))


def auto(folder: Any, **kwargs: Any) -> Any:
    return transformers.AutoModelForImageClassification.from_pretrained(folder, trust_remote_code=True, **kwargs)


def test_the_auto_class_gives_the_same_logits(model, images, tmp_path):
    model.save_pretrained(tmp_path)
    found = auto(tmp_path)
    output = found(images, labels=torch.tensor([0, 1]))
    assert torch.equal(output.logits, model(images))
    torch.testing.assert_close(output.loss, torch.nn.functional.cross_entropy(model(images), torch.tensor([0, 1])))
    assert found.config.id2label == {0: "cat", 1: "dog", 2: "bird"}
    assert found.iared2.decision == model.decision
    assert found.iared2.class_names == model.class_names
    assert not found.training


def test_every_way_gives_the_logits_of_the_box_bit_for_bit(tmp_path):
    """The old single file, a folder, timm's name, timm's folder, the auto class and the pipeline."""
    import timm

    import iared2.hub

    box = iared2.load()
    box.save(tmp_path / "single.safetensors")
    box.save_pretrained(tmp_path / "folder")
    pipe = transformers.pipeline("image-classification", model=str(tmp_path / "folder"), trust_remote_code=True)
    with Image.open(PHOTO) as photo:
        inputs = pipe.image_processor(photo.convert("RGB"), return_tensors="pt")["pixel_values"]
        torch.testing.assert_close(inputs[0], iared2.Predictor(box)._transform(photo.convert("RGB")), rtol=0, atol=0)
    with torch.inference_mode():
        logits = {
            "single file": iared2.load(tmp_path / "single.safetensors")(inputs),
            "from_pretrained": ReducedVisionTransformer.from_pretrained(tmp_path / "folder")(inputs),
            "timm": timm.create_model(iared2.hub.BOX_NAME, pretrained=True).eval()(inputs),
            "timm's folder": timm.create_model(f"local-dir:{tmp_path}/folder", pretrained=True).eval()(inputs),
            "auto": auto(tmp_path / "folder")(inputs).logits,
        }
        expected = box(inputs)
    for way, found in logits.items():
        assert torch.equal(found, expected), way
    labels = pipe(str(PHOTO), top_k=box.num_classes, function_to_apply="none")
    assert {one["label"]: one["score"] for one in labels} == dict(
        zip(box.class_names, expected[0].tolist(), strict=True)
    )


def test_the_pipeline_takes_lists_arrays_and_batches(model, tmp_path):
    model.save_pretrained(tmp_path)
    pipe = transformers.pipeline("image-classification", model=str(tmp_path), trust_remote_code=True)
    with Image.open(PHOTO) as photo:
        pictures = [photo.convert("RGB"), photo.convert("L"), str(PHOTO)]
        found = pipe(pictures, batch_size=3)
    assert [len(one) for one in found] == [3, 3, 3]
    single, listed = ({one["label"]: one["score"] for one in result} for result in (pipe(str(PHOTO)), found[2]))
    assert listed == pytest.approx(single)
    assert len(pipe.image_processor(np.zeros((40, 30, 3), np.uint8))["pixel_values"][0]) == 3


def test_what_transformers_saves_iared2_loads(model, images, tmp_path):
    model.save_pretrained(tmp_path / "ours")
    found = auto(tmp_path / "ours")
    found.iared2.threshold = 0.3
    with torch.no_grad():
        found.iared2.backbone.head.bias += 1
    found.save_pretrained(tmp_path / "theirs")
    loaded = iared2.load(tmp_path / "theirs")
    assert torch.equal(loaded(images), found(images).logits)
    assert loaded.threshold == 0.3
    assert torch.equal(auto(tmp_path / "theirs")(images).logits, found(images).logits)


def test_a_new_head_keeps_the_names_that_are_given(model, images, tmp_path):
    model.save_pretrained(tmp_path / "ours")
    names = {0: "fish", 1: "bee"}
    found = auto(tmp_path / "ours", id2label=names, label2id={}, ignore_mismatched_sizes=True)
    assert found(images).logits.shape == (2, 2)
    found.save_pretrained(tmp_path / "theirs")
    assert iared2.load(tmp_path / "theirs").class_names == ("fish", "bee")
    assert auto(tmp_path / "theirs").config.id2label == names


def test_other_precision(model, images, tmp_path):
    model.save_pretrained(tmp_path)
    found = auto(tmp_path, dtype=torch.bfloat16)
    assert found.dtype == found(images).logits.dtype == torch.bfloat16


def test_it_can_be_trained_with_checkpointing(model, images, tmp_path):
    model.save_pretrained(tmp_path)
    found = auto(tmp_path)
    found.gradient_checkpointing_enable()
    found.train()(images, labels=torch.tensor([0, 1])).loss.backward()
    assert found.iared2.backbone.grad_checkpointing
    assert found.iared2.backbone.head.weight.grad.abs().sum() > 0


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"embed_dim": 1 << 20, "num_heads": 1}, "does not fit the model"),
        ({"embed_dim": 1 << 40}, "embed_dim should not be"),
        ({"norm_layer": {"a": 1}}, "norm_layer should not be"),
    ],
)
def test_nothing_in_the_configuration_is_trusted(model, tmp_path, change, message):
    model.save_pretrained(tmp_path)
    config = json.loads((tmp_path / "config.json").read_text())
    config["iared2"]["model_args"] |= change
    (tmp_path / "config.json").write_text(json.dumps(config))
    with pytest.raises(InputError, match=message):
        auto(tmp_path)


def test_no_pickle_is_read(model, tmp_path):
    model.save_pretrained(tmp_path)
    (tmp_path / "model.safetensors").unlink()
    torch.save(model.state_dict(), tmp_path / "pytorch_model.bin")
    with pytest.raises(OSError, match=r"model\.safetensors"):
        auto(tmp_path)


def test_without_trust_the_code_does_not_run(model, tmp_path):
    model.save_pretrained(tmp_path)
    with pytest.raises(ValueError, match="trust_remote_code"):
        transformers.AutoModelForImageClassification.from_pretrained(tmp_path, trust_remote_code=False)
