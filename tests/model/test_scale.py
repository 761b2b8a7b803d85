"""The first pass of a smaller image: `Decision.scale`."""

from __future__ import annotations

import copy

import pytest
import torch
import torch.nn.functional as F
from tiny import TINY, sharp_images, sharp_model
from torch.utils.flop_counter import FlopCounterMode

import iared2
from iared2 import InputError
from iared2.evaluate.speed.baselines import masked, padded
from iared2.explain.methods import interpreter_map
from iared2.export.static import Adaptive, FixedCount
from iared2.model.calibrate import decision_at
from iared2.model.decide import Decision, at_random, keep_all, margin
from iared2.model.schedule import search, with_second_pass
from iared2.model.second_pass import again_macs, same_passes

NAME = "deit_tiny_patch16_224"
HALF = 3, 2  # of 6 x 4 patches
SMALL = (24, 16)


def small(images):
    return F.interpolate(images, SMALL, mode="bicubic", antialias=True)


def scaled(family, confidence=0.0, **kwargs):
    model = sharp_model(family, **kwargs).requires_grad_(False)
    model.decision = Decision(0.3, spread=0.5, scale=0.5, confidence=confidence)
    return model


@pytest.mark.parametrize("dropped", ["gone", "merged"])
def test_the_first_pass_is_a_model_of_that_size_and_the_second_is_the_dense_one(family, dropped):
    model, images = scaled(family, dropped=dropped), sharp_images(6)
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    alone = copy.deepcopy(model)
    alone.scale = 1.0
    alone.set_input_size(SMALL)
    with torch.no_grad():
        once, dense, expected = model.trace(images), model(images, keep_all), alone.trace(small(images))
    for name in ("logits", "scores", "kept", "macs", "unsure"):
        torch.testing.assert_close(getattr(once, name), getattr(expected, name), atol=1e-5, rtol=0)
    assert once.kept.shape[-1] == 6
    assert not once.kept.all()

    margins = margin(once.logits).sort().values
    model.confidence = ((margins[2] + margins[3]) / 2).item()
    with torch.no_grad():
        twice = model.trace(images)
        assert torch.equal(model(images), twice.logits)
        one_by_one = torch.cat([model(image[None]) for image in images])
    assert twice.unsure.sum() == 3
    torch.testing.assert_close(twice.logits[twice.unsure], dense[twice.unsure], atol=1e-4, rtol=0)
    torch.testing.assert_close(twice.logits[~twice.unsure], once.logits[~twice.unsure], atol=1e-5, rtol=0)
    torch.testing.assert_close(one_by_one, twice.logits, atol=1e-4, rtol=0)
    assert torch.equal(twice.kept, once.kept)
    assert torch.equal(twice.macs, once.macs + twice.unsure * model.dense_macs)
    assert again_macs(model, model.decision, model.grid_size) == model.dense_macs
    torch.testing.assert_close(model(images, model.decision.whole()), dense)
    torch.testing.assert_close(model.backbone(images), dense, atol=1e-4, rtol=0)
    for name, tensor in model.state_dict().items():
        assert torch.equal(tensor, before[name]), name
    assert model.grid_size == (6, 4)


def test_its_macs_are_those_of_torchs_counter():
    model, images = scaled((NAME, TINY)), sharp_images(6)
    model.engine = "plain"
    model.confidence = margin(model(images)).sort().values[2:4].mean().item()
    output = model.trace(images)
    with FlopCounterMode(display=False) as counter, torch.nn.attention.sdpa_kernel(torch.nn.attention.SDPBackend.MATH):
        model(images)
    assert counter.get_total_flops() / 2 == output.macs.sum()


def test_other_choices_see_the_same_image():
    model, images = scaled((NAME, TINY), confidence=0.3), sharp_images(6)
    own = model.trace(images)
    random = at_random(own.kept.sum(-1), torch.arange(6))
    other = model.trace(images, same_passes(model, model.decision, random))
    assert torch.equal(other.kept.sum(-1), own.kept.sum(-1))
    assert not torch.equal(other.kept, own.kept)
    model.confidence = 0.0
    assert model.trace(images, same_passes(model, model.decision, random)).kept.shape[-1] == 6
    assert model.trace(images, random).kept.shape[-1] == 24, "a function alone sees the image as it is"


def test_images_of_another_size_have_it_too():
    model = scaled((NAME, {**TINY, "dynamic_img_size": True}), confidence=1.0)
    larger = sharp_images(2, 64, 48)
    output = model.trace(larger)
    assert output.kept.shape[-1] == 4 * 3
    torch.testing.assert_close(output.logits, model(larger, keep_all), atol=1e-5, rtol=0)
    assert (output.macs > model.dense_macs).all()


def test_a_smaller_pass_in_half_precision():
    model = scaled((NAME, TINY), confidence=1.0).bfloat16()
    assert model(sharp_images(2).bfloat16()).dtype == torch.bfloat16


def test_budgets_and_schedules_of_it():
    model, images = scaled((NAME, TINY)), sharp_images(12)
    share = 0.15  # of the dense MACs; every patch of the smaller image costs 0.22
    model.calibrate(images, gmacs=share * model.dense_macs / 1e9)
    assert model.trace(images).macs.double().mean() / model.dense_macs == pytest.approx(share, rel=0.05)
    dense = model(images, keep_all)
    found = search(model, images, share, trials=4)
    assert (found.macs, found.decision.scale) == (pytest.approx(share, rel=0.1), 0.5)
    secured = with_second_pass(model, found, dense, 5)
    output = model.trace(images, secured.decision)
    torch.testing.assert_close(output.logits, secured.output, atol=1e-4, rtol=0)
    assert output.unsure.sum() == 5
    assert secured.macs == pytest.approx(output.macs.double().mean().item() / model.dense_macs)
    with pytest.raises(InputError, match="cannot be met"):
        search(model, images, 0.9, trials=2)
    once = decision_at(model, images, gmacs=0.6 * model.dense_macs / 1e9)
    assert (once.scale, once.confidence, model.scale) == (1.0, 0.0, 0.5)
    assert model.trace(images, once).macs.double().mean() / model.dense_macs == pytest.approx(0.6, rel=0.05)


@pytest.mark.parametrize("value", [0, -0.1, 1.1, float("nan"), "half", None, True])
def test_what_is_no_scale(value):
    with pytest.raises(InputError, match="scale="):
        Decision(scale=value)


def test_one_patch_is_left_of_each_side():
    model = scaled((NAME, TINY))
    model.scale = 0.01
    assert model.trace(sharp_images(2)).kept.shape[-1] == 1


def test_clips_have_one_size():
    sizes = {"img_size": (6, 48, 32), "patch_size": (2, 8, 8)}
    clips = sharp_model(("videomae_base_patch16_224", {**TINY, **sizes, "depth": 3}))
    with pytest.raises(InputError, match=r"scale=0.5 .* takes clips"):
        clips.scale = 0.5


@pytest.mark.parametrize("name", [NAME, "vit_base_patch16_rope_mixed_224"])
@pytest.mark.parametrize("dropped", ["gone", "merged"])
def test_a_graph_of_one_pass_makes_the_image_smaller_itself(name, dropped):
    model, image = scaled((name, {**TINY, "depth": 3}), dropped=dropped), sharp_images(1)
    own = model.trace(image)
    logits, ids = Adaptive(model)(image)
    torch.testing.assert_close(logits, own.logits, atol=1e-4, rtol=0)
    assert ids.tolist() == own.kept[-1, 0].nonzero()[:, 0].tolist()
    counts = model.decision.but(thresholds=None, num_keep=(6, 4, 2))
    torch.testing.assert_close(FixedCount(model, (6, 4, 2))(image)[0], model(image, counts), atol=1e-4, rtol=0)
    with pytest.raises(InputError, match="3 numbers from 6 to 1"):
        FixedCount(model, (24, 4, 2))


def test_it_is_saved(tmp_path):
    model, images = scaled((NAME, TINY), confidence=0.25), sharp_images(4)
    model.save(tmp_path / "model.safetensors")
    loaded = iared2.load(tmp_path / "model.safetensors")
    assert loaded.decision == model.decision
    assert torch.equal(loaded(images), model(images))
    model.save_policy(tmp_path / "policy.safetensors")
    assert iared2.load(tmp_path / "policy.safetensors", model.backbone).scale == 0.5


def test_features_are_of_the_images_as_they_are():
    model, images = scaled((NAME, TINY), confidence=1.0), sharp_images(3)
    x = model.forward_features(images)
    assert x.shape == (3, 25, 48)
    once = model(images, model.decision.but(scale=1.0, confidence=0.0))
    torch.testing.assert_close(model.forward_head(x), once)


def test_without_its_classes_a_model_has_one_pass():
    for change in (
        lambda model: model.reset_classifier(0),
        lambda model: model.reset_classifier(5),
    ):
        model = scaled((NAME, TINY), confidence=0.5)
        change(model)
        assert (model.scale, model.confidence) == (1.0, 0.0)
    features = scaled((NAME, {**TINY, "num_classes": 0}))
    assert not features.trace(sharp_images(2), features.decision.but(confidence=0.9)).unsure.any()


def test_positions_have_a_gradient():
    model = scaled((NAME, TINY)).requires_grad_(True)
    model(sharp_images(2)).sum().backward()
    assert model.backbone.pos_embed.grad.abs().sum() > 0
    assert isinstance(model.backbone.pos_embed, torch.nn.Parameter)


def test_maps_of_any_pass():
    model, images = scaled((NAME, TINY)), sharp_images(2)
    for decision in (model.decision, model.decision.whole()):
        output = model.trace(images, decision)
        assert interpreter_map(model, output.scores, output.kept, (48, 32)).shape == (2, 48, 32)
    for run in (masked, padded):
        torch.testing.assert_close(run(model, images, keep_all), model(images, keep_all), atol=1e-4, rtol=0)
    with pytest.raises(InputError, match=r"a first pass of scale=0.5 takes .* set scale=1"):
        model.calibrate(images, gmacs=0.9 * model.dense_macs / 1e9)
