from __future__ import annotations

import os

import pytest
import torch

import iared2
from iared2.model import file
from iared2.model.quantize import dequantized, quantized
from iared2.pretrained.checkpoint import load_backbone_weights

SIZE = {"img_size": 32, "patch_size": 8, "embed_dim": 96, "num_heads": 3, "depth": 3, "num_classes": 5}


@pytest.fixture(scope="module")
def model():
    torch.manual_seed(0)
    return iared2.from_timm("deit_tiny_patch16_224", interpreter="attention", **SIZE).eval()


def test_each_output_channel_is_rounded_to_127_steps(model):
    tensors = model.state_dict()
    for name, tensor in dequantized(quantized(tensors)).items():
        if tensor.numel() < 4096:
            torch.testing.assert_close(tensor.float(), tensors[name].half().float())
        else:
            rows = tensors[name].flatten(1) if len(tensor) > 1 else tensors[name].flatten(0, -2)
            step = rows.abs().amax(1, keepdim=True) / 127
            assert ((tensor.view(rows.shape) - rows).abs() <= 0.501 * step).all(), name


def test_a_file_of_8_bits_is_a_quarter_and_loads_as_a_model_or_a_backbone(model, tmp_path):
    paths = [tmp_path / "whole.safetensors", tmp_path / "small.safetensors"]
    model.save(paths[0])
    model.save(paths[1], int8=True)
    sizes = [os.path.getsize(path) for path in paths]
    assert sizes[1] < 0.35 * sizes[0]
    small, x = iared2.load(paths[1]), torch.randn(4, 3, 32, 32)
    assert all(p.dtype == torch.float32 for p in small.parameters())
    with torch.no_grad():
        logits, rounded = (m.trace(x, lambda scores, alive, group: alive).logits for m in (model, small))
        assert (logits - rounded).norm() < 0.05 * logits.norm()
    backbone = iared2.from_timm("deit_tiny_patch16_224", **SIZE).backbone
    load_backbone_weights(backbone, paths[1])
    assert torch.equal(backbone.blocks[1].mlp.fc1.weight, small.backbone.blocks[1].mlp.fc1.weight)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ("no tensor", "unexpected the tensor odd.scale"),
        ("another length", "does not fit its 8-bit weights"),
        ("not int8", "unexpected the tensor .*fc1.weight.scale"),
        ("integer", "does not fit its 8-bit weights"),
    ],
)
def test_a_scale_that_does_not_fit_is_refused(model, tmp_path, change, message):
    path, name = tmp_path / "m.safetensors", "backbone.blocks.0.mlp.fc1.weight"
    model.save(path, int8=True)
    tensors, config = file.read(path)
    if change == "no tensor":
        tensors["odd.scale"] = torch.ones(3)
    elif change == "another length":
        tensors[name + ".scale"] = torch.ones(7)
    elif change == "not int8":
        tensors[name] = tensors[name].float()
    else:
        tensors[name + ".scale"] = tensors[name + ".scale"].long()
    file.write(path, tensors, config)
    with pytest.raises(iared2.InputError, match=message):
        iared2.load(path)
