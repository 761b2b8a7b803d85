"""`iared2 export --adaptive-batch` and `iared2 bench --rivals`."""

from __future__ import annotations

import copy
import json

import numpy as np
import pytest
import torch
from exported import SIZE, check
from tiny import sharp_images, sharp_model

from iared2.cli import main
from iared2.errors import InputError
from iared2.evaluate.speed.runtimes import ways
from iared2.evaluate.speed.workload import drawn
from iared2.export import stages
from iared2.export.stages import export_stages
from iared2.runtime import Engine

# torch 2.10, of itself
pytestmark = [
    pytest.mark.filterwarnings("ignore:.isinstance.treespec, LeafSpec:FutureWarning"),
    pytest.mark.filterwarnings("ignore:The given buffer is not writable"),
]


def test_command(small, tmp_path, capsys):
    model = copy.deepcopy(small[0])
    model.spread, model.max_tokens = 0.5, 9
    model.save(tmp_path / "m.safetensors")
    assert main(["export", str(tmp_path / "m.zip"), "-c", str(tmp_path / "m.safetensors"), "--adaptive-batch"]) == 0
    pytest.importorskip("openvino", reason="openvino is missing: pip install 'iared2[test]'")
    engine = Engine(tmp_path / "m.zip")
    assert engine.class_names == tuple("abcdefg")
    assert engine.input_size == (3, 48, 32)
    for name in ("thresholds", "num_keep", "max_tokens", "spread", "confidence"):
        assert getattr(engine, name) == getattr(model, name)
    assert engine.mean == tuple(model.pretrained_cfg["mean"])
    assert sorted(path.name for path in tmp_path.iterdir()) == ["m.safetensors", "m.zip"]


def test_a_graph_has_as_many_groups_as_onnx_can_hold(tmp_path, monkeypatch):
    model = sharp_model(("deit_tiny_patch16_224", SIZE))
    model.threshold = 0.0
    group = sum(weight.nbytes for weight in model.backbone.blocks[0].parameters())
    for limit, stem in ((3 * group, 3), (3 * group - 1, 2), (group, 1)):
        monkeypatch.setattr(stages, "MAX_WEIGHTS", limit)
        stages.export_stages(model, tmp_path / "m.zip")
        assert Engine(tmp_path / "m.zip", "onnxruntime", threads=1).stem == stem
    monkeypatch.setattr(stages, "MAX_WEIGHTS", group - 1)
    with pytest.raises(InputError, match="build the model of more groups"):
        stages.export_stages(model, tmp_path / "m.zip")


def test_bench_against_the_runtimes(small, tmp_path, capsys):
    for package in ("openvino", "onnxruntime"):
        pytest.importorskip(package, reason=f"{package} is missing: pip install 'iared2[test]'")
    model, _ = small
    model.save(tmp_path / "m.safetensors")
    command = ["bench", "-c", str(tmp_path / "m.safetensors"), "--seconds", "0", "--no-compile", "--batch-size", "4"]
    assert main([*command, "--rivals", "openvino", "onnxruntime", "--json"]) == 0
    (speed,) = json.loads(capsys.readouterr().out)["speed"]
    rows = {row["name"]: row for row in speed["rows"]}
    dense = [row for name, row in rows.items() if name.startswith("dense")]
    assert {row["name"] for row in dense} == {"dense, timm", "dense, OpenVINO", "dense, ONNX Runtime"}
    assert len({row["gmacs"] for row in dense}) == 1
    assert max(row["speed_up"] for row in dense) == 1, "the fastest dense model is what all are compared with"
    for name in ("ours, OpenVINO", "ours, ONNX Runtime"):
        assert rows[name]["gmacs"] == rows["ours"]["gmacs"] < dense[0]["gmacs"]
    assert main([*command, "--rivals", "openvino", "--merge"]) == 1
    assert "without --merge" in capsys.readouterr().err


def test_the_rivals_compute_the_model(small, backend):
    model, _ = small
    images = sharp_images(4)
    workload = drawn(model, images, (0.8, 0.5, 0.2), 0.1)
    found = ways(model, workload, [backend], "fp32", 1)
    (dense, dense_gmacs), (ours, gmacs) = found.values()
    assert (dense_gmacs, gmacs) == (model.dense_macs / 1e9, workload.gmacs)
    with torch.no_grad():
        np.testing.assert_allclose(dense(images)[0], model.backbone(images).numpy(), atol=1e-4)
        check(ours(images), model.trace(images, workload.decide))
    assert ways(model, workload, ["onnxruntime"], "bf16", 1) == {}, "ONNX Runtime has no bf16 on a CPU"


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["m.onnx"], "ends in .zip"),
        (["no/folder/m.zip"], "no folder"),
        (["m.zip", "--batch-size", "2"], "leave --batch-size out"),
    ],
)
def test_what_cannot_be_exported_is_one_line(small, tmp_path, monkeypatch, capsys, arguments, message):
    monkeypatch.chdir(tmp_path)
    small[0].save("m.safetensors")
    assert main(["export", *arguments, "-c", "m.safetensors", "--adaptive-batch"]) == 1
    error = capsys.readouterr().err
    assert message in error
    assert len(error.splitlines()) == 1
    assert [path.name for path in tmp_path.iterdir()] == ["m.safetensors"]


def test_hooks_are_refused(tmp_path):
    model = sharp_model(("deit_tiny_patch16_224", SIZE))
    model.backbone.blocks[0].register_forward_hook(lambda *_: None)
    with pytest.raises(InputError, match="hooks"):
        export_stages(model, tmp_path / "m.zip")
