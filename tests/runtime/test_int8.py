"""Linear layers in 8 bits, for ONNX Runtime."""

from __future__ import annotations

import json
import zipfile

import numpy as np
import pytest
import torch
from exported import SIZE, changed
from timm.layers import Attention
from tiny import sharp_images, sharp_model
from torch import nn

from iared2.cli import main
from iared2.errors import InputError
from iared2.evaluate.speed.runtimes import dense_graph
from iared2.export.int8 import packages
from iared2.export.stages import export_stages
from iared2.export.static import FixedCount, export
from iared2.model.block import attentions
from iared2.runtime import Decided, Engine

pytest.importorskip("onnxruntime", reason="onnxruntime is missing: pip install 'iared2[test]'")
# torch 2.10, of itself
pytestmark = [
    pytest.mark.filterwarnings("ignore:.isinstance.treespec, LeafSpec:FutureWarning"),
    pytest.mark.filterwarnings("ignore:The given buffer is not writable"),
]
KINDS = {
    "fused qkv": "deit_tiny_patch16_224",
    "layer scale": "vit_small_patch14_reg4_dinov2",
    "no bias, gated": "eva02_tiny_patch14_224",
    "rotary": "vit_base_patch16_rope_mixed_224",
}
WIDE = {**SIZE, "embed_dim": 96}


def integer_products(graph):
    onnx, *_ = packages()
    return sum(node.op_type == "MatMulInteger" for node in onnx.load_from_string(graph).graph.node)


def linear_layers(model):
    """Of the blocks, where queries, keys and values are a layer each (`stages._separate`)."""
    fused = sum(type(attn) is Attention for block in model.backbone.blocks for attn in attentions(block))
    return sum(isinstance(module, nn.Linear) for module in model.backbone.blocks.modules()) + 2 * fused, fused


def fewer(scores, alive, group):
    """By position: scores behind rounded blocks are rounded, too."""
    return alive & (np.arange(alive.shape[1]) % (1, 2, 4)[group] == 0)


def like(found, expected):
    """Rounding to 8 bits changes an output by less than images differ by; much, since these models are sharp."""
    gap = np.abs(found - expected).mean() / np.abs(expected - expected.mean(0)).mean()
    assert 0 < gap < 0.35, gap


@pytest.mark.parametrize("name", KINDS.values(), ids=KINDS)
def test_every_linear_layer_of_the_blocks_is_in_8_bits_and_the_model_says_nearly_the_same(name, tmp_path):
    model, images = sharp_model((name, WIDE)), sharp_images(6).numpy()
    model.threshold = [0.0, 0.5, 0.5]  # the first group is in the stem
    for int8 in (False, True):
        export_stages(model, tmp_path / f"{int8}.zip", int8=int8)
    with zipfile.ZipFile(tmp_path / "True.zip") as folder:
        graphs = [folder.read(entry) for entry in folder.namelist() if entry.endswith(".onnx")]
    layers, fused = linear_layers(model)
    assert sum(map(integer_products, graphs)) == layers
    decide = Decided(fewer)
    exact, rounded = (Engine(tmp_path / f"{int8}.zip", "onnxruntime", threads=1) for int8 in (False, True))
    assert (exact.precision, rounded.precision) == ("fp32", "int8")
    like(rounded(images, decide).logits, exact(images, decide).logits)
    np.testing.assert_allclose(rounded(images).scores[0], exact(images).scores[0], atol=1e-5)  # no block before them

    assert integer_products(dense_graph(model, 2, int8=True)) == layers - 2 * fused
    export(FixedCount(model, (18, 11, 5)), tmp_path / "m.onnx", int8=True)
    assert integer_products((tmp_path / "m.onnx").read_bytes()) == layers - 2 * fused


def test_a_graph_of_fixed_counts_keeps_its_notes_and_nearly_its_logits(tmp_path):
    import onnxruntime

    model, images = sharp_model(("deit_tiny_patch16_224", WIDE)), sharp_images(6)
    form = FixedCount(model, (24, 24, 24))
    export(form, tmp_path / "m.onnx", None, int8=True)
    session = onnxruntime.InferenceSession(tmp_path / "m.onnx")
    logits, ids = session.run(None, {"images": images.numpy()})
    with torch.no_grad():
        like(logits, form(images)[0].numpy())
    assert ids.shape == (6, 24)
    assert "class_names" in session.get_modelmeta().custom_metadata_map["iared2"]


def test_what_does_not_go_with_it_is_one_line(small, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    small[0].save("m.safetensors")
    assert main(["export", "m.zip", "-c", "m.safetensors", "--adaptive-batch", "--int8"]) == 0
    assert main(["export", "m.pt2", "-c", "m.safetensors", "--num-keep", "5", "--int8"]) == 1
    assert "int8 is of ONNX" in capsys.readouterr().err
    assert main(["bench", "-c", "m.safetensors", "--rivals", "openvino", "--int8"]) == 1
    assert "add --rivals onnxruntime" in capsys.readouterr().err
    with pytest.raises(InputError, match=r"m.zip is a file of int8; export it without"):
        Engine("m.zip", "onnxruntime", precision="fp32")
    with pytest.raises(InputError, match="is a file of fp32; export it with --int8"):
        Engine(small[1], "onnxruntime", precision="int8")
    for word in (8, "int4"):
        with pytest.raises(InputError, match=r"precision=.* in its manifest is not usable"):
            Engine(changed(small[1], tmp_path / "x.zip", manifest={"precision": word}), "onnxruntime")
    pytest.importorskip("openvino", reason="openvino is missing: pip install 'iared2[test]'")
    for precision in (None, "bf16", "fp32"):
        with pytest.raises(InputError, match=r"m.zip is a file of int8, for onnxruntime: use that"):
            Engine("m.zip", "openvino", precision=precision)


def test_without_the_package_nothing_is_written(small, tmp_path, monkeypatch):
    monkeypatch.setitem(__import__("sys").modules, "onnxruntime.quantization", None)
    for write in (
        lambda: export_stages(small[0], tmp_path / "m.zip", int8=True),
        lambda: export(FixedCount(small[0], (18, 11, 5)), tmp_path / "m.onnx", int8=True),
    ):
        with pytest.raises(InputError, match=r"int8 needs the package onnxruntime.*\[export,onnxruntime\]"):
            write()
    assert not list(tmp_path.iterdir())


def test_what_onnxruntime_cannot_quantize_is_one_line(small, tmp_path, monkeypatch):
    def full(*_, **__):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("onnxruntime.quantization.quantize_dynamic", full)
    (tmp_path / "m.onnx").write_text("before")
    for write in (
        lambda: export_stages(small[0], tmp_path / "m.zip", int8=True),
        lambda: export(FixedCount(small[0], (18, 11, 5)), tmp_path / "m.onnx", int8=True),
    ):
        with pytest.raises(InputError, match=r"cannot quantize the model: .*No space left.*; export it without int8"):
            write()
    assert [path.name for path in tmp_path.iterdir()] == ["m.onnx"]
    assert (tmp_path / "m.onnx").read_text() == "before"


def test_bench_compares_with_the_dense_model_in_8_bits(small, tmp_path, capsys):
    small[0].save(tmp_path / "m.safetensors")
    command = ["bench", "-c", str(tmp_path / "m.safetensors"), "--seconds", "0", "--no-compile", "--batch-size", "4"]
    assert main([*command, "--rivals", "onnxruntime", "--int8", "--json"]) == 0
    (speed,) = json.loads(capsys.readouterr().out)["speed"]
    rows = {row["name"]: row["speed_up"] for row in speed["rows"]}
    assert rows["dense, ONNX Runtime, int8"] == 1, "8 bits are compared with 8 bits"
    assert max(rows["dense, ONNX Runtime"], rows["dense, timm"]) == 1
    assert {"ours, ONNX Runtime", "ours, ONNX Runtime, int8"} < rows.keys()
