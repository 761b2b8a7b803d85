from __future__ import annotations

import json

import numpy as np
import pytest
import torch
from tiny import sharp_images, sharp_model

import iared2
from iared2.cli import main
from iared2.errors import InputError
from iared2.export.static import Adaptive, FixedCount, export
from iared2.model.decide import top_k
from iared2.model.dither import pattern

# torch 2.10, of itself
pytestmark = [
    pytest.mark.filterwarnings("ignore:.isinstance.treespec, LeafSpec:FutureWarning"),
    pytest.mark.filterwarnings("ignore:The given buffer is not writable"),
]
COUNTS = (50, 30, 12)
KWARGS = {"img_size": 64, "patch_size": 8, "embed_dim": 48, "num_heads": 3, "depth": 3, "num_classes": 5}
FAMILIES = {
    "deit_tiny_patch16_224": {},
    "vit_small_patch14_reg4_dinov2": {},  # registers, layer scale
    "vit_medium_patch16_gap_256": {},  # average pooling, no class token
    "vit_base_patch16_siglip_224": {},  # attention pooling
    "vit_base_patch16_rope_mixed_224": {},  # rotary, angles per block and head
    "timesformer_joint_small_patch16_224": {"img_size": (4, 32, 32), "patch_size": (1, 8, 8)},  # clips
}


def make(name="deit_tiny_patch16_224", dropped="gone", spread=0.0):
    torch.manual_seed(0)
    model = iared2.from_timm(name, **{**KWARGS, **FAMILIES[name], "dropped": dropped}).eval()
    with torch.no_grad():
        for interpreter in model.interpreters:  # at birth the scores of an image hardly differ
            interpreter.query.weight.mul_(30)
    model.spread = spread
    return model


def images(n, size=(3, 64, 64)):
    return torch.randn(n, *size, generator=torch.Generator().manual_seed(1))


def by_count(scores, alive, group):
    return top_k(scores, alive, torch.full((len(scores),), COUNTS[group]))


def by_few(scores, alive, group):
    return top_k(scores, alive, torch.full((len(scores),), (15, 9, 4)[group]))


def spread_by_count(scores, alive, group):
    """The rule of `Decision.spread` by another way, over 8 × 8 patches."""
    return by_count(scores.double().logit() - 0.8 * pattern((8, 8)).logit(), alive, group)


MERGED = [(name, "merged") for name in ("deit_tiny_patch16_224", "vit_small_patch14_reg4_dinov2")]


SPREAD = [("deit_tiny_patch16_224", "merged", 0.8), ("vit_small_patch14_reg4_dinov2", "gone", 0.8)]


@pytest.fixture(scope="module", params=[*((name, "gone") for name in FAMILIES), *MERGED, *SPREAD], ids=str)
def fixed(request):
    model = make(*request.param)
    rule = spread_by_count if model.spread else by_count
    with torch.no_grad():
        return model, FixedCount(model, COUNTS), model.trace(images(4, model.pretrained_cfg["input_size"]), rule)


def run_onnx(path, x):
    onnxruntime = pytest.importorskip("onnxruntime")
    session = onnxruntime.InferenceSession(path)
    assert [i.name for i in session.get_inputs()] == ["images"]
    assert [o.name for o in session.get_outputs()] == ["logits", "patch_ids"]
    return session.run(None, {"images": x.numpy()})


def check(logits, ids, output, n):
    torch.testing.assert_close(torch.as_tensor(logits).detach(), output.logits[:n], atol=1e-5, rtol=0)
    for image, kept in zip(ids.tolist(), output.kept[-1, :n], strict=True):
        assert sorted(image) == kept.nonzero()[:, 0].tolist()


def test_fixed_count_is_the_models_own_top_k(fixed):
    _, form, output = fixed
    check(*form(images(4, form.input_size)), output, 4)


def test_both_forms_of_every_family(family):
    model, x = sharp_model(family), sharp_images(4)
    with torch.no_grad():
        output = model.trace(x, by_few)
        check(*FixedCount(model, (15, 9, 4))(x), output, 4)
        if model.backbone.global_pool == "token":
            model.threshold = [float(s[s > 0].median()) + 1e-5 for s in model.trace(x).scores]
            logits, ids = Adaptive(model)(x[:1])
            check(logits, ids[None], model.trace(x[:1]), 1)


@pytest.mark.parametrize("batch_size", [1, None])
def test_torch_export(fixed, tmp_path, batch_size):
    _, form, output = fixed
    export(form, tmp_path / "m.pt2", batch_size)
    extra = {"iared2": ""}
    program = torch.export.load(tmp_path / "m.pt2", extra_files=extra).module()
    for n in (1,) if batch_size else (1, 2, 4):
        check(*program(images(4, form.input_size)[:n]), output, n)
    assert json.loads(extra["iared2"])["input_size"] == list(form.input_size)
    assert [p.name for p in tmp_path.iterdir()] == ["m.pt2"]


@pytest.mark.parametrize("batch_size", [1, None])
def test_onnx(fixed, tmp_path, batch_size):
    _, form, output = fixed
    export(form, tmp_path / "m.onnx", batch_size)
    for n in (1,) if batch_size else (1, 2, 4):
        check(*run_onnx(tmp_path / "m.onnx", images(4, form.input_size)[:n]), output, n)
    assert [p.name for p in tmp_path.iterdir()] == ["m.onnx"]


@pytest.mark.parametrize(("dropped", "spread"), [("gone", 0.0), ("merged", 0.0), ("gone", 1.0)])
@pytest.mark.parametrize("suffix", [".pt2", ".onnx"])
def test_adaptive_keeps_what_the_threshold_keeps(tmp_path, suffix, dropped, spread):
    model, x = make(dropped=dropped, spread=spread), images(8)
    model.calibrate(x, keep=(0.8, 0.5, 0.2))
    model.threshold = [t + 1e-6 for t in model.thresholds]  # not a score itself, lest rounding decides
    export(Adaptive(model), tmp_path / f"m{suffix}")
    with torch.no_grad():
        outputs = [model.trace(image) for image in x.split(1)]
    assert len({int(o.kept[-1].sum()) for o in outputs}) > 2  # lengths differ, from one file
    for image, output in zip(x.split(1), outputs, strict=True):
        if suffix == ".onnx":
            logits, ids = run_onnx(tmp_path / "m.onnx", image)
        else:
            logits, ids = torch.export.load(tmp_path / "m.pt2").module()(image)
        check(logits, ids[None], output, 1)


@pytest.mark.parametrize("suffix", [".pt2", ".onnx"])
def test_the_adaptive_form_rotates_by_position(tmp_path, suffix):
    model, x = make("vit_base_patch16_rope_mixed_224"), images(3)
    model.calibrate(x, keep=(0.8, 0.5, 0.2))
    model.threshold = [t + 1e-6 for t in model.thresholds]
    export(Adaptive(model), tmp_path / f"m{suffix}")
    for image in x.split(1):
        if suffix == ".onnx":
            logits, ids = run_onnx(tmp_path / "m.onnx", image)
        else:
            logits, ids = torch.export.load(tmp_path / "m.pt2").module()(image)
        with torch.no_grad():
            check(logits, ids[None], model.trace(image), 1)


@pytest.mark.parametrize(("dropped", "spread"), [("gone", 0.0), ("merged", 0.0), ("gone", 1.0)])
def test_adaptive_survives_an_image_that_loses_everything(tmp_path, dropped, spread):
    model = make(dropped=dropped, spread=spread)
    model.threshold = [0.5, 1.0, 0.5]
    export(Adaptive(model), tmp_path / "m.onnx")
    logits, ids = run_onnx(tmp_path / "m.onnx", images(1))
    with torch.no_grad():
        np.testing.assert_allclose(logits, model(images(1)), atol=1e-5)
    assert len(ids) == 0


def test_the_model_stays_as_it_is(tmp_path):
    model = make().to(torch.bfloat16).train()
    export(FixedCount(model, COUNTS), tmp_path / "m.pt2")
    assert model.training
    assert all(p.requires_grad and p.dtype == torch.bfloat16 for p in model.parameters())


def test_command(tmp_path, capsys):
    model = make()
    model.class_names = tuple("abcde")
    model.save(tmp_path / "m.safetensors")
    arguments = ["-c", str(tmp_path / "m.safetensors"), str(tmp_path / "m.onnx"), "--num-keep", *map(str, COUNTS)]
    assert main(["export", *arguments]) == 0
    with torch.no_grad():
        check(*run_onnx(tmp_path / "m.onnx", images(2)), model.trace(images(2), by_count), 2)
    onnx = pytest.importorskip("onnx")
    about = {p.key: p.value for p in onnx.load(tmp_path / "m.onnx").metadata_props}
    assert json.loads(about["iared2"])["class_names"] == list("abcde")


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["m.bin", "--num-keep", "5"], "ends in .onnx or .pt2"),
        (["m.onnx", "--num-keep", "5", "6", "4"], "do not rise"),
        (["m.onnx", "--num-keep", "65"], "from 64 to 1"),
        (["m.onnx", "--num-keep", "5", "4"], "give 3 numbers"),
        (["m.onnx", "--adaptive", "--batch-size", "2"], "one image at a time"),
        (["m.onnx", "--num-keep", "5", "--batch-size", "0"], "1 or more"),
        (["no/such/folder/m.pt2", "--num-keep", "5"], "cannot write"),
    ],
)
def test_bad_arguments_are_one_line(tmp_path, monkeypatch, capsys, arguments, message):
    monkeypatch.chdir(tmp_path)
    make().save("m.safetensors")
    assert main(["export", "-c", "m.safetensors", *arguments]) == 1
    error = capsys.readouterr().err
    assert message in error
    assert "Traceback" not in error
    assert [p.name for p in tmp_path.iterdir()] == ["m.safetensors"]


def test_the_adaptive_form_refuses_a_head_that_pools():
    with pytest.raises(InputError, match="class token"):
        Adaptive(make("vit_medium_patch16_gap_256"))
