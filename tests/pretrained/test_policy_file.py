"""A file of the policy alone: `model.save_policy` and ``iared2.load(path, backbone)``."""

from __future__ import annotations

import copy

import pytest
import timm
import torch
from tiny import sharp_model
from torch import nn

import iared2
from iared2.model import file as saved
from iared2.model.decide import Decision

FAMILY = (
    "deit_tiny_patch16_224",
    {"img_size": 32, "patch_size": 8, "embed_dim": 32, "depth": 3, "num_heads": 2, "num_classes": 3},
)


@pytest.fixture
def model():
    model = sharp_model(FAMILY, interpreter="attention")
    with torch.no_grad():
        for p in model.interpreters.parameters():
            p += 0.1 * torch.randn_like(p)
    model.decision = Decision((0.6, 0.5, 0.4), spread=1.0, max_tokens=9)
    model.class_names = ("a", "b", "c")
    return model


@pytest.fixture
def images():
    return torch.randn(5, 3, 32, 32, generator=torch.Generator().manual_seed(0))


@pytest.mark.parametrize("source", ["module", "weights", "half", "int8", "model of ours"])
def test_policy_and_backbone_are_the_model_again(model, images, tmp_path, source):
    model.save_policy(tmp_path / "policy.safetensors")
    backbone: object = copy.deepcopy(model.backbone)
    if source == "weights":
        torch.save(model.backbone.state_dict(), tmp_path / "backbone.pth")
        backbone = tmp_path / "backbone.pth"
    elif source != "module":
        model.save(tmp_path / "model.safetensors", half=source == "half", int8=source == "int8")
        backbone = tmp_path / "model.safetensors"
    found = iared2.load(tmp_path / "policy.safetensors", backbone)
    assert not found.training
    assert found.decision == model.decision
    assert found.class_names == model.class_names
    exact = source not in ("half", "int8")
    for name, tensor in model.interpreters.state_dict().items():
        assert torch.equal(found.interpreters.state_dict()[name], tensor)
    with torch.inference_mode():
        torch.testing.assert_close(found(images), model(images), rtol=0, atol=0 if exact else 0.1)
    if source == "module":
        assert found.backbone is backbone
    assert (tmp_path / "policy.safetensors").stat().st_size < 4 * sum(
        p.numel() for p in model.interpreters.parameters()
    ) + 3000


def test_another_backbone_is_refused(model, tmp_path):
    path = tmp_path / "policy.safetensors"
    model.save_policy(path)
    other = copy.deepcopy(model.backbone)
    nn.init.normal_(other.blocks[1].mlp.fc1.weight, std=0.5)
    head = copy.deepcopy(model.backbone)
    head.reset_classifier(4)
    deeper = timm.create_model(FAMILY[0], **{**FAMILY[1], "depth": 4})
    for backbone in (other, head, deeper):
        with pytest.raises(iared2.InputError, match="for other weights"):
            iared2.load(path, backbone)
    with pytest.raises(iared2.InputError, match=r"ResNet|support"):
        iared2.load(path, timm.create_model("resnet10t"))
    with pytest.raises(iared2.InputError, match="does not fit the model"):
        iared2.load(path, timm.create_model(FAMILY[0], **{**FAMILY[1], "embed_dim": 64}))


def test_what_is_missing_or_too_much_is_said(model, tmp_path):
    path = tmp_path / "policy.safetensors"
    model.save_policy(path)
    with pytest.raises(iared2.InputError, match="is a policy alone: give backbone="):
        iared2.load(path)
    with pytest.raises(iared2.InputError, match="is a policy alone"):
        iared2.load(path, model.backbone, pretrained=True)
    with pytest.raises(iared2.InputError, match="no checkpoint"):
        iared2.load(path, tmp_path / "missing.pth")
    model.save(tmp_path / "model.safetensors")
    with pytest.raises(iared2.InputError, match="not a policy alone"):
        iared2.load(tmp_path / "model.safetensors", model.backbone)


@pytest.mark.parametrize(
    ("edit", "message"),
    [
        (lambda config: config.update(fingerprint="x"), "fingerprint"),
        (lambda config: config.update(fingerprint=[]), "for other weights"),
        (lambda config: config.update(fingerprint=[float("nan")] * 4), "fingerprint"),
        (lambda config: config.update(depth=9), "depth"),
        (lambda config: config.update(groups=2), "does not fit|thresholds|numbers"),
    ],
)
def test_a_damaged_file_is_one_clear_line(model, tmp_path, edit, message):
    path = tmp_path / "policy.safetensors"
    model.save_policy(path)
    tensors, config = saved.read(path)
    edit(config)
    saved.write(path, tensors, config)
    with pytest.raises(iared2.InputError, match=message) as error:
        iared2.load(path, model.backbone)
    assert "\n" not in str(error.value)
