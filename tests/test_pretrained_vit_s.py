"""The converter of experiments/pretrained_vit_s.py on a tiny graph of the same layout."""

from __future__ import annotations

import sys
from pathlib import Path

import timm
import torch
from onnx import helper, numpy_helper

sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "experiments"))

from pretrained_vit_s import WITHIN_BLOCK, state_dict_of


def tiny():
    torch.manual_seed(0)
    size = {"img_size": 28, "embed_dim": 12, "depth": 2, "num_heads": 2, "num_classes": 0}
    model = timm.create_model("vit_small_patch14_dinov2", **size)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.copy_(torch.randn_like(parameter))
    return model


def graph_of(model: torch.nn.Module):
    """As torch's exporter writes a Dinov2Model: linear weights have no name but their node's, and lie transposed."""
    values, nodes = {}, []
    tensors = model.state_dict()

    def linear(module: str, weight: torch.Tensor, bias: torch.Tensor) -> None:
        values[number := f"onnx::MatMul_{len(values)}"] = weight.T
        values[f"backbone.{module}.bias"] = bias
        path = "/backbone/" + module.replace("encoder.layer.", "encoder/layer#").replace(".", "/").replace("#", ".")
        nodes.append(helper.make_node("MatMul", ["x", number], ["y"], name=path + "/MatMul"))

    values["backbone.embeddings.cls_token"] = tensors["cls_token"]
    for kind in ("weight", "bias"):
        values[f"backbone.embeddings.patch_embeddings.projection.{kind}"] = tensors[f"patch_embed.proj.{kind}"]
        values[f"backbone.layernorm.{kind}"] = tensors[f"norm.{kind}"]
    values["onnx::Concat_1"], values["onnx::Reshape_2"] = tensors["pos_embed"].split([1, 4], dim=1)
    nodes.append(
        helper.make_node("Reshape", ["onnx::Reshape_2", "shape"], ["p"], name="/backbone/embeddings/Reshape_1")
    )
    nodes.append(helper.make_node("Concat", ["onnx::Concat_1", "p"], ["q"], name="/backbone/embeddings/Concat_6"))
    for i in range(2):
        block, attn = f"encoder.layer.{i}.", f"encoder.layer.{i}.attention.attention."
        weights = tensors[f"blocks.{i}.attn.qkv.weight"].chunk(3), tensors[f"blocks.{i}.attn.qkv.bias"].chunk(3)
        for part, weight, bias in zip(("query", "key", "value"), *weights, strict=True):
            linear(attn + part, weight, bias)
        nodes.append(
            helper.make_node("MatMul", ["q", "k"], ["a"], name=f"/backbone/encoder/layer.{i}/attention/MatMul")
        )
        for theirs, ours in WITHIN_BLOCK.items():
            if ours in ("attn.proj.", "mlp.fc1.", "mlp.fc2."):
                weight, bias = (tensors[f"blocks.{i}.{ours}{kind}"] for kind in ("weight", "bias"))
                linear(block + theirs.rstrip("."), weight, bias)
            else:
                for kind in ("weight", "bias") if theirs.endswith(".") else ("",):
                    values[f"backbone.{block}{theirs}{kind}"] = tensors[f"blocks.{i}.{ours}{kind}"]
    initializers = [numpy_helper.from_array(value.numpy(), name) for name, value in values.items()]
    initializers.append(numpy_helper.from_array(torch.zeros(3).numpy(), "decoder.bn1.weight"))  # of its saliency head
    return helper.make_graph(nodes, "g", [], [], initializers)


def test_every_tensor_comes_back_under_timms_name():
    model = tiny()
    found = state_dict_of(graph_of(model))
    expected = model.state_dict()
    assert found.keys() == expected.keys()
    for name, tensor in expected.items():
        assert torch.equal(found[name], tensor), name
