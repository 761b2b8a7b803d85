"""The engine without torch equals the model, whatever a batch has, and trusts nothing in a file."""

from __future__ import annotations

import ast
import copy
import json
import subprocess
import sys
import zipfile
from itertools import pairwise
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from tiny import sharp_images, sharp_model

import iared2
from iared2.cli import main
from iared2.data.batches import model_transform
from iared2.errors import InputError
from iared2.evaluate.speed.runtimes import ways
from iared2.evaluate.speed.workload import drawn
from iared2.export import stages
from iared2.export.stages import export_stages
from iared2.model.merge import merge as model_merge
from iared2.model.tokens import PackedTokens
from iared2.runtime import Engine
from iared2.runtime.layout import MAX_PADDING, MAX_ROWS, padded, rounded, split, top_k
from iared2.runtime.merge import merge

# torch 2.10, of itself
pytestmark = [
    pytest.mark.filterwarnings("ignore:.isinstance.treespec, LeafSpec:FutureWarning"),
    pytest.mark.filterwarnings("ignore:The given buffer is not writable"),
]
SIZE = {"img_size": (48, 32), "patch_size": 8, "embed_dim": 48, "num_heads": 3, "num_classes": 7, "depth": 3}
KINDS = {  # one of each way in which a stage can differ
    "class token": ("deit_tiny_patch16_224", {}),
    "relative": ("deit_tiny_patch16_224", {"interpreter": "attention"}),
    "layer scale, registers": ("vit_small_patch14_reg4_dinov2", {}),
    "attention pooling": ("vit_base_patch16_siglip_224", {}),
    "rotary, average pooling": ("eva02_tiny_patch14_224", {}),
    "angles per block": ("vit_base_patch16_rope_mixed_224", {}),
    "merged": ("deit_tiny_patch16_224", {"dropped": "merged"}),
    "merged, relative, registers": ("vit_small_patch14_reg4_dinov2", {"dropped": "merged", "interpreter": "attention"}),
    "merged, rotary, average pooling": ("eva02_tiny_patch14_224", {"dropped": "merged"}),
}
MARGIN = 5e-6


@pytest.fixture(params=["openvino", "onnxruntime"])
def backend(request):
    pytest.importorskip(request.param, reason=f"{request.param} is missing: pip install 'iared2[test]'")
    return request.param


@pytest.fixture(scope="module", params=KINDS)
def exported(request, tmp_path_factory):
    """A model whose decisions differ between images, its file, images, and what the model says of them."""
    name, kwargs = KINDS[request.param]
    model, images = sharp_model((name, {**SIZE, **kwargs})), sharp_images(9)
    model.calibrate(images, keep=(0.8, 0.5, 0.2))
    model.threshold = [t + 1e-5 for t in model.thresholds]  # not a score itself, lest rounding decides
    path = tmp_path_factory.mktemp("engine") / "m.zip"
    export_stages(model, path)
    with torch.no_grad():
        return model, path, images, model.trace(images)


@pytest.fixture(scope="module")
def small(tmp_path_factory):
    """A model of a class token, and its file."""
    model = sharp_model(("deit_tiny_patch16_224", SIZE))
    model.class_names = tuple("abcdefg")
    model.calibrate(sharp_images(9), keep=(0.8, 0.5, 0.2))
    path = tmp_path_factory.mktemp("engine") / "m.zip"
    export_stages(model, path)
    return model, path


def is_close_to_a_threshold(model, output):
    """``(B,)``: where rounding may decide otherwise."""
    gaps = (output.scores - torch.tensor(model.thresholds)[:, None, None]).abs()
    return ((gaps < MARGIN) & (output.scores > 0)).any(0).any(-1)


def check(found, output, logits=1e-4):
    assert np.array_equal(found.kept, output.kept.numpy())
    np.testing.assert_allclose(found.scores, output.scores.numpy(), atol=1e-5)
    np.testing.assert_allclose(found.logits, output.logits.numpy(), atol=logits, rtol=0)
    assert 0 <= found.padding <= MAX_PADDING


def test_engine_equals_the_model(exported, backend):
    model, path, images, output = exported
    clear = ~is_close_to_a_threshold(model, output)
    assert clear.sum() >= 7
    assert len(set(output.kept[-1].sum(-1).tolist())) > 2, "lengths must differ"
    images = images[clear]
    with torch.no_grad():
        output = model.trace(images)
    engine = Engine(path, backend, threads=1)
    check(engine(images.numpy()), output)
    for number in (0, 1):  # a batch of one, after a large one
        with torch.no_grad():
            check(engine(images[number : number + 1].numpy()), model.trace(images[number : number + 1]))


STEMS = {
    "class token": (("deit_tiny_patch16_224", {}), {"thresholds": (0.0, 0.5, 0.5)}, 1),
    "merged, registers": (
        ("vit_small_patch14_reg4_dinov2", {"dropped": "merged", "interpreter": "attention"}),
        {"num_keep": (24, 24, 9)},
        2,
    ),
    "angles per block": (("vit_base_patch16_rope_mixed_224", {}), {"num_keep": (24, 9, 4)}, 1),
    "average pooling, to the end": (("eva02_tiny_patch14_224", {}), {"thresholds": 0.0}, 3),
    "attention pooling": (("vit_base_patch16_siglip_224", {}), {"num_keep": (24, 24, 9), "max_tokens": 24}, 2),
    "a limit": (("deit_tiny_patch16_224", {}), {"num_keep": (24, 24, 9), "max_tokens": 23}, 0),
}


@pytest.mark.parametrize("kind", STEMS)
def test_first_groups_that_drop_nothing_are_one_graph(kind, tmp_path, backend):
    (name, kwargs), parts, stem = STEMS[kind]
    model, images = sharp_model((name, {**SIZE, **kwargs})), sharp_images(4)
    model.decision = type(model.decision)(**parts)
    export_stages(model, tmp_path / "m.zip")
    engine = Engine(tmp_path / "m.zip", backend, threads=1)
    assert engine.stem == stem
    with torch.no_grad():
        output = model.trace(images)
    found = engine(images.numpy())
    check(found, output)
    assert found.calls == 3 - stem or len(set(output.kept.sum(-1).flatten().tolist())) > 3
    if stem:
        with pytest.raises(InputError, match=f"group {stem} drops patches .* export a model"):
            engine(images.numpy(), lambda scores, alive, group: alive & (scores > 0.5 * (group + 1 == stem)))
        engine.num_keep, engine.max_tokens = (24,) * 3, None
        with torch.no_grad():
            expected = model.backbone(images).numpy()
        np.testing.assert_allclose(engine(images.numpy()).logits, expected, atol=1e-4)


def test_merging_equals_the_models():
    """Means of means, a patch that nobody joins, and an image that keeps none of its patches."""
    generator = torch.Generator().manual_seed(0)
    dense, prefix = torch.randn(5, 2 + 24, 16, generator=generator), 2
    packed = PackedTokens.from_dense(dense, prefix)
    x, row_of = dense.flatten(0, 1).numpy().copy(), np.arange(5 * 26).reshape(5, 26)
    sizes, alive = np.ones((5, 26), np.float32), np.ones((5, 24), bool)
    for share in (0.7, 0.5, 0.4):
        keep = alive & (torch.rand(5, 24, generator=generator) < share).numpy()
        keep[1], keep[2] = alive[1], alive[2] & (share == 0.7)
        packed = model_merge(packed, torch.from_numpy(keep))
        merge(x, row_of, sizes, alive, keep, prefix)
        alive = keep
        here = np.concatenate([np.ones((5, prefix), bool), alive], 1)
        np.testing.assert_allclose(x.reshape(5, 26, 16)[here], packed.to_dense(packed.x).numpy()[here], atol=1e-6)
        assert np.array_equal(sizes[here], packed.to_dense(packed.sizes).numpy()[here])
    assert sizes[here].max() > 3
    assert (here[:, prefix:] * sizes[:, prefix:]).sum(1).tolist() == [24, 24, 0, 24, 24]


@pytest.mark.slow
def test_the_model_in_the_box(tmp_path, backend):
    model = iared2.load()
    transform = model_transform(model.pretrained_cfg)
    files = sorted((Path(__file__).parents[1] / "examples").glob("*.jpg"))
    images = torch.stack([transform(Image.open(file).convert("RGB")) for file in files])
    export_stages(model, tmp_path / "m.zip")
    with torch.inference_mode():
        expected = model.trace(images)
    assert expected.kept[3:].float().mean() < 0.5
    check(Engine(tmp_path / "m.zip", backend, threads=1)(images.numpy()), expected)


def test_merging_changes_the_result(tmp_path, backend):
    """The engine that does not merge is the model that does not, and far from the one that does."""
    model, images = sharp_model(("deit_tiny_patch16_224", SIZE), dropped="merged"), sharp_images(3)
    model.num_keep = (18, 9, 4)
    export_stages(model, tmp_path / "m.zip")
    engine = Engine(tmp_path / "m.zip", backend, threads=1)
    with torch.no_grad():
        check(engine(images.numpy()), merged := model.trace(images))
        engine.merges, model.dropped = False, "gone"
        check(engine(images.numpy()), gone := model.trace(images))
    assert (merged.logits - gone.logits).abs().max() > 0.01


def test_bf16_is_close(small):
    openvino = pytest.importorskip("openvino", reason="openvino is missing: pip install 'iared2[test]'")
    model, path = small
    images = sharp_images(4)
    if "BF16" not in openvino.Core().get_property("CPU", "OPTIMIZATION_CAPABILITIES"):
        with pytest.raises(InputError, match="no bfloat16"):
            Engine(path, precision="bf16")
        return
    engine = Engine(path, precision="bf16", threads=1, threshold=0.0)
    with torch.no_grad():
        expected = model(images, lambda scores, alive, group: alive)
    found = engine(images.numpy()).logits
    np.testing.assert_allclose(found, expected.numpy(), atol=0.05 * expected.abs().max().item())
    assert np.abs(found - expected.numpy()).max() > 1e-4, "this was not bfloat16"


@pytest.mark.parametrize(
    "parts",
    [
        {"thresholds": 0.4, "spread": 1.0},
        {"num_keep": (15, 9, 4)},
        {"num_keep": (15, 9, 4), "spread": 0.7},
        {"thresholds": 0.3, "max_tokens": 6},
        {"thresholds": (0.0, 0.5, 1.0)},
        {"num_keep": 0},
    ],
    ids=str,
)
def test_every_decision_is_that_of_the_model(parts, small, backend):
    model, images = copy.deepcopy(small[0]), sharp_images(5)
    model.decision = type(model.decision)(**parts)
    engine = Engine(small[1], backend, threads=1)
    for name in ("thresholds", "num_keep", "max_tokens", "spread"):
        setattr(engine, name, getattr(model, name))
    with torch.no_grad():
        check(engine(images.numpy()), model.trace(images))


def test_a_head_that_pools_keeps_a_patch(tmp_path, backend):
    model, images = sharp_model(("vit_medium_patch16_gap_256", SIZE)), sharp_images(3)
    model.threshold = 1.0
    export_stages(model, tmp_path / "m.zip")
    with torch.no_grad():
        output = model.trace(images)
    assert output.kept[-1].sum(-1).tolist() == [1, 1, 1]
    check(Engine(tmp_path / "m.zip", backend, threads=1)(images.numpy()), output)


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


@pytest.mark.parametrize("name", ["vit_medium_patch16_gap_256", "vit_base_patch16_siglip_224"])
def test_a_first_batch_of_one_patch_spoils_nothing(name, tmp_path, backend):
    """OpenVINO keeps kernels from the first call; those for one token are wrong for eight."""
    model, images = sharp_model((name, SIZE)), sharp_images(3)
    model.num_keep = (23, 22, 20)
    export_stages(model, tmp_path / "m.zip")
    engine = Engine(tmp_path / "m.zip", backend, threads=1)
    for num_keep in ((1, 1, 1), (23, 22, 20), (9, 8, 1)):
        engine.num_keep = model.num_keep = num_keep
        with torch.no_grad():
            check(engine(images.numpy()), model.trace(images))


def test_another_decision(small, backend):
    model, path = small
    images, engine = sharp_images(4), Engine(path, backend, threads=1, threshold=0.0)
    found = engine(images.numpy())
    assert found.kept.all()
    with torch.no_grad():
        np.testing.assert_allclose(found.logits, model.backbone(images).numpy(), atol=1e-4)
    found = engine(images.numpy(), lambda scores, alive, group: np.arange(24) % (2 + group) == 0)
    assert found.kept.sum(-1).tolist() == [[12] * 4, [4] * 4, [2] * 4], "a dropped patch does not come back"
    engine.num_keep = (5, 4, 3)
    assert engine(images.numpy()).kept.sum(-1).tolist() == [[5] * 4, [4] * 4, [3] * 4]


def test_import_needs_no_torch():
    code = """
import sys
import iared2.runtime
found = sorted({name.split(".")[0] for name in sys.modules} & {"torch", "timm", "onnx", "openvino", "onnxruntime"})
ours = sorted(name for name in sys.modules if name.startswith("iared2."))
print(found, ours)
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.startswith("[] ['iared2.errors', 'iared2.runtime', 'iared2.runtime.archive', ")
    assert all(name.startswith(("iared2.errors", "iared2.runtime")) for name in ast.literal_eval(done.stdout[3:]))


def test_engine_needs_no_torch(small, backend):
    _, path = small
    code = f"""
import sys
import numpy as np
from iared2.runtime import Engine
engine = Engine({str(path)!r}, {backend!r}, threads=1)
print(engine(np.zeros((3, 3, 48, 32))).logits.shape, "torch" in sys.modules)
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "(3, 7) False"


def test_signals_are_handled_after_engines_are_gone(small, backend):
    """In the order in which OpenVINO, with a Core for each, leaves a stack for signals that is gone."""
    code = f"""
import gc, signal, subprocess, sys
from iared2.runtime import Engine
heard = []
signal.signal(signal.SIGCHLD, lambda *_: heard.append(1))
first = Engine({str(small[1])!r}, {backend!r}, threads=1)
second = Engine({str(small[1])!r}, {backend!r}, threads=1)
del first
gc.collect()
del second
gc.collect()
subprocess.run([sys.executable, "-c", ""], check=True)
print(bool(heard))
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert (done.returncode, done.stdout) == (0, "True\n"), done.stderr


def test_padding_is_bounded_and_calls_are_few():
    generator = np.random.default_rng(0)
    for width in (48, 384):
        row_cost = 6 * width
        for batch in (1, 8, 32, 200):
            lengths = np.sort(generator.normal(70, 24, batch).clip(1, 197).astype(int)).tolist()
            bounds = split(lengths, row_cost)
            assert bounds[0] == 0
            assert bounds[-1] == batch
            for start, end in pairwise(bounds):
                own = lengths[start:end]
                work = row_cost * sum(own) + sum(n**2 for n in own)
                longest, done = padded(sum(own), sum(n**2 for n in own), len(own), own[-1], row_cost)
                assert longest >= own[-1]
                assert done == row_cost * rounded(sum(own)) + len(own) * longest**2
                assert start < end
                assert work >= (1 - MAX_PADDING) * done
                assert sum(own) <= MAX_ROWS
            if width == 384:
                assert len(bounds) - 1 <= 2 + batch // 12
    assert split([5000, 6000], 2304) == [0, 1, 2], "one image may have more rows than a call should"


def test_sizes_are_few():
    assert [rounded(n) for n in (1, 63, 127, 128, 129, 1000, 1024)] == [1, 63, 127, 128, 130, 1000, 1024]
    assert len({rounded(n) for n in range(1, 2049)}) < 400
    assert all(n <= rounded(n) <= n * 65 / 64 for n in range(1, 5000))


def test_ties_fall_to_the_lower_position():
    scores = np.array([[0.5, 0.9, 0.5, 0.5]], np.float32)
    assert top_k(scores, np.array([[True, False, True, True]]), 2).tolist() == [[True, False, True, False]]


def test_command(small, tmp_path, capsys):
    model = copy.deepcopy(small[0])
    model.spread, model.max_tokens = 0.5, 9
    model.save(tmp_path / "m.safetensors")
    assert main(["export", str(tmp_path / "m.zip"), "-c", str(tmp_path / "m.safetensors"), "--adaptive-batch"]) == 0
    pytest.importorskip("openvino", reason="openvino is missing: pip install 'iared2[test]'")
    engine = Engine(tmp_path / "m.zip")
    assert engine.class_names == tuple("abcdefg")
    assert engine.input_size == (3, 48, 32)
    for name in ("thresholds", "num_keep", "max_tokens", "spread"):
        assert getattr(engine, name) == getattr(model, name)
    assert engine.mean == tuple(model.pretrained_cfg["mean"])
    assert sorted(path.name for path in tmp_path.iterdir()) == ["m.safetensors", "m.zip"]


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


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"backend": "tensorrt"}, "openvino, onnxruntime"),
        ({"backend": "onnxruntime", "precision": "bf16"}, "has fp32"),
        ({"threads": 0}, "1 or more"),
        ({"threshold": [0.1, 0.2]}, "one number, or 3"),
        ({"threshold": float("nan")}, "one number, or 3"),
    ],
)
def test_bad_arguments(small, arguments, message):
    with pytest.raises(InputError, match=message):
        Engine(small[1], **{"backend": "onnxruntime", **arguments})


def test_images_of_another_shape(small, backend):
    engine = Engine(small[1], backend, threads=1)
    for shape in ((2, 3, 32, 48), (3, 48, 32), (0, 3, 48, 32)):
        with pytest.raises(InputError, match=r"takes images \(B, 3, 48, 32\)"):
            engine(np.zeros(shape, np.float32))


def changed(path, target, manifest=None, graphs=None, **options):
    """A copy of the file with other entries; None leaves one out."""
    with zipfile.ZipFile(path) as old, zipfile.ZipFile(target, "w", **options) as new:
        for name in old.namelist():
            content = old.read(name)
            if name == "manifest.json":
                content = json.dumps({**json.loads(content), **(manifest or {})}).encode()
            content = {name: content, **(graphs or {})}[name]
            if content is not None:
                new.writestr(name, content)
    return target


DAMAGE = {
    "compressed": ({"compression": zipfile.ZIP_DEFLATED}, "compressed"),
    "no graph": ({"graphs": {"group2.onnx": None}}, "no group2.onnx"),
    "no manifest": ({"graphs": {"manifest.json": None}}, "no file of iared2 export"),
    "not JSON": ({"graphs": {"manifest.json": b"[" * 100_000}}, "no file of iared2 export"),
    "another version": ({"manifest": {"format": "iared2 adaptive batch 9"}}, "another version"),
    "another file": ({"graphs": {"head.onnx": b"\x0a\x08location\x12\x0b/etc/passwd"}}, "names another file"),
    "no graph in it": ({"graphs": {"head.onnx": b"nothing"}}, "head.onnx in .* cannot be used"),
    "huge": ({"manifest": {"num_patches": 10**30}}, "num_patches"),
    "not finite": ({"manifest": {"thresholds": [float("nan")] * 3}}, "thresholds"),
    "more groups than there are": ({"manifest": {"stem": 4}}, "stem"),
    "a word": ({"manifest": {"embed_dim": "48"}}, "embed_dim"),
    "names": ({"manifest": {"class_names": [1, 2]}}, "class_names"),
    "two decisions": ({"manifest": {"num_keep": [1, 1, 1]}}, "no decision, or two"),
    "no decision": ({"manifest": {"thresholds": None}}, "no decision, or two"),
    "too few": ({"manifest": {"pattern": [0.0]}}, "pattern"),
}


@pytest.mark.parametrize("damage", DAMAGE)
def test_a_damaged_file_is_one_line(small, tmp_path, damage, backend):
    changes, message = DAMAGE[damage]
    with pytest.raises(InputError, match=message) as error:
        Engine(changed(small[1], tmp_path / "m.zip", **changes), backend)
    assert len(str(error.value).splitlines()) == 1


def test_what_is_no_archive(small, tmp_path, backend):
    (tmp_path / "text.zip").write_text("text")
    (tmp_path / "cut.zip").write_bytes(small[1].read_bytes()[:-30])
    for name in ("absent.zip", "text.zip", "cut.zip", "."):
        with pytest.raises(InputError, match="cannot read"):
            Engine(tmp_path / name, backend)


def test_a_graph_of_another_model_is_noticed(small, tmp_path, backend):
    """The manifest says 24 patches of width 48; the graph returns others."""
    for manifest in ({"embed_dim": 96}, {"num_patches": 12, "pattern": [0.0] * 12}, {"num_prefix_tokens": 0}):
        engine = Engine(changed(small[1], tmp_path / "m.zip", manifest=manifest), backend, threads=1)
        with pytest.raises(InputError, match="a graph returned"):
            engine(np.zeros((2, 3, 48, 32), np.float32))
    with zipfile.ZipFile(small[1]) as folder:
        graphs = {"group2.onnx": folder.read("stem.onnx")}
    engine = Engine(changed(small[1], tmp_path / "m.zip", graphs=graphs), backend, threads=1)
    with pytest.raises(InputError, match=r"cannot be used|a graph returned"):
        engine(np.zeros((2, 3, 48, 32), np.float32))
