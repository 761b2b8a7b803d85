"""The engine without torch equals the model, whatever a batch has."""

from __future__ import annotations

import copy
from pathlib import Path

import numpy as np
import pytest
import torch
from exported import SIZE, check
from PIL import Image
from tiny import sharp_images, sharp_model

import iared2
from iared2.data.batches import model_transform
from iared2.errors import InputError
from iared2.export.served import as_arrays, trace
from iared2.export.stages import export_stages
from iared2.model.decide import Decision
from iared2.runtime import Decided, Engine

# torch 2.10, of itself
pytestmark = [
    pytest.mark.filterwarnings("ignore:.isinstance.treespec, LeafSpec:FutureWarning"),
    pytest.mark.filterwarnings("ignore:The given buffer is not writable"),
]
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


def is_close_to_a_threshold(model, output):
    """``(B,)``: where rounding may decide otherwise."""
    gaps = (output.scores - torch.tensor(model.thresholds)[:, None, None]).abs()
    return ((gaps < MARGIN) & (output.scores > 0)).any(0).any(-1)


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


@pytest.mark.parametrize("stem", [None, 0])
@pytest.mark.parametrize("kind", ["class token", "merged, registers", "attention pooling"])
def test_a_first_pass_of_smaller_images(kind, stem, tmp_path, backend):
    (name, kwargs), parts, _ = STEMS[kind]
    model, images = sharp_model((name, {**SIZE, **kwargs})), sharp_images(6)
    model.decision = type(model.decision)(**{**parts, "max_tokens": None, "scale": 0.5})
    if model.num_keep:
        model.num_keep = [min(n, 6) for n in model.num_keep]
    with torch.no_grad():
        best = model(images).softmax(1).topk(2).values
    margin = (best[:, 0] - best[:, 1]).sort().values
    model.confidence = ((margin[2] + margin[3]) / 2).item()
    export_stages(model, tmp_path / "m.zip", stem)
    engine = Engine(tmp_path / "m.zip", backend, threads=1)
    with torch.no_grad():
        output, dense = model.trace(images), model.backbone(images)
    assert output.unsure.sum() == 3
    for found in (engine(images.numpy()), engine(images.numpy(), as_arrays(model, model.decision))):
        check(found, output)
        assert np.array_equal(found.unsure, output.unsure.numpy())
    served = trace(engine, model, images, model.decision)
    for name in ("kept", "macs", "unsure"):
        assert torch.equal(getattr(served, name), getattr(output, name))
    whole = trace(engine, model, images, model.decision.whole())
    torch.testing.assert_close(whole.logits, dense, atol=1e-4, rtol=0)
    assert whole.kept.shape[-1] == 24
    if engine.stem == 0:  # any group may drop: also in one pass of the images as they are
        once = Decision(num_keep=(20, 15, 10), spread=0.5).for_model(model.grid_size, 3)
        with torch.no_grad():
            check(engine(images.numpy(), as_arrays(model, once)), model.trace(images, once))
    with pytest.raises(InputError, match=r"scale=0.7: .* has scale=0.5"):
        trace(engine, model, images, model.decision.but(scale=0.7))


def test_rotary_positions_are_of_one_size(tmp_path):
    model = sharp_model(("eva02_tiny_patch14_224", SIZE))
    model.scale = 0.5
    with pytest.raises(InputError, match=r"scale=0.5 and rotary positions"):
        export_stages(model, tmp_path / "m.zip")


@pytest.mark.parametrize("kind", ["class token", "merged, registers", "attention pooling"])
def test_a_second_pass(kind, tmp_path, backend):
    (name, kwargs), parts, _ = STEMS[kind]
    model, images = sharp_model((name, {**SIZE, **kwargs})), sharp_images(6)
    model.decision = type(model.decision)(**{**parts, "max_tokens": None})
    with torch.no_grad():
        best = model(images).softmax(1).topk(2).values
    margin = (best[:, 0] - best[:, 1]).sort().values
    model.confidence = ((margin[2] + margin[3]) / 2).item()
    export_stages(model, tmp_path / "m.zip")
    engine = Engine(tmp_path / "m.zip", backend, threads=1)
    assert engine.confidence == model.confidence
    with torch.no_grad():
        output = model.trace(images)
    for found in (engine(images.numpy()), engine(images.numpy(), as_arrays(model, model.decision))):
        check(found, output)
        assert np.array_equal(found.unsure, output.unsure.numpy())
        assert found.unsure.sum() == 3
    served = trace(engine, model, images, model.decision)
    for name in ("kept", "macs", "unsure"):
        assert torch.equal(getattr(served, name), getattr(output, name))
    assert not engine(images.numpy(), as_arrays(model, model.decision.but(confidence=0.0))).unsure.any()
    if engine.stem == 1:
        drops = lambda scores, alive, group: alive & (scores > 0.5 * (group > 0))  # noqa: E731
        with pytest.raises(InputError, match="group 3 needs every patch, and some were dropped before"):
            engine(images.numpy(), Decided(drops, engine._unsure, 2))
    engine.max_tokens = 8
    with pytest.raises(InputError, match="max_tokens forbids"):
        engine(images.numpy())
    engine.max_tokens, engine.confidence, engine.num_keep = None, 0.0, np.array([24, 24, 9])
    assert not engine(images.numpy()).unsure.any()


def test_a_model_without_classes_is_served_and_one_of_other_classes_is_not(tmp_path, backend):
    model, images = sharp_model(("vit_base_patch16_siglip_224", {**SIZE, "num_classes": 0})), sharp_images(3)
    model.num_keep = (18, 9, 4)
    export_stages(model, tmp_path / "m.zip")
    engine = Engine(tmp_path / "m.zip", backend, threads=1)
    with torch.no_grad():
        expected = model.trace(images)
    found = trace(engine, model, images, model.decision)
    torch.testing.assert_close(found.logits, expected.logits, atol=1e-4, rtol=0)
    assert torch.equal(found.macs, expected.macs)
    model.reset_classifier(5)
    with pytest.raises(InputError, match="has 48 outputs, and 5 were expected: export it again"):
        trace(engine, model, images, model.decision)


@pytest.mark.slow
def test_the_model_in_the_box(tmp_path, backend):
    model = iared2.load()
    transform = model_transform(model.pretrained_cfg)
    files = sorted((Path(__file__).parents[2] / "examples").glob("*.jpg"))
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
        {"num_keep": (24, 9, 4), "confidence": 1.0},
        {"thresholds": 0.4, "confidence": 1.0},
    ],
    ids=str,
)
def test_every_decision_is_that_of_the_model(parts, small, backend):
    model, images = copy.deepcopy(small[0]), sharp_images(5)
    model.decision = type(model.decision)(**parts)
    engine = Engine(small[1], backend, threads=1)
    for name in ("thresholds", "num_keep", "max_tokens", "spread", "confidence"):
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
