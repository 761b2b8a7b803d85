"""Images whose answer is not sure take a second pass with every patch: `Decision.confidence`."""

from __future__ import annotations

import pytest
import torch
from tiny import TINY, sharp_images, sharp_model
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

import iared2
from iared2 import InputError
from iared2.model.decide import Decision, at_random, confidence_for, keep_all
from iared2.model.schedule import tried, with_second_pass
from iared2.model.second_pass import same_passes

NAME = "deit_tiny_patch16_224"


def margins(logits):
    best = logits.softmax(1).topk(2).values
    return best[:, 0] - best[:, 1]


def between(margins, number):
    """A confidence below which so many images are."""
    ordered = margins.sort().values
    return ((ordered[number - 1] + ordered[number]) / 2).item()


@pytest.mark.parametrize("dropped", ["gone", "merged"])
def test_the_unsure_have_the_dense_answer_and_all_else_is_of_the_first_pass(family, dropped):
    model, images = sharp_model(family, dropped=dropped), sharp_images(6)
    model.num_keep = [24, *([9] * (model.num_groups - 1))]
    with torch.no_grad():
        once, dense = model.trace(images), model(images, keep_all)
        model.confidence = between(margins(once.logits), 2)
        twice = model.trace(images)
        assert torch.equal(model(images), twice.logits)
        torch.testing.assert_close(model.forward_head(model.forward_features(images)), twice.logits)
        alone = torch.cat([model(image[None]) for image in images])
    assert not once.unsure.any()
    assert torch.equal(twice.unsure, margins(once.logits) < model.confidence)
    assert twice.unsure.sum() == 2
    torch.testing.assert_close(twice.logits[twice.unsure], dense[twice.unsure], atol=1e-4, rtol=0)
    torch.testing.assert_close(twice.logits[~twice.unsure], once.logits[~twice.unsure], atol=1e-5, rtol=0)
    torch.testing.assert_close(alone, twice.logits, atol=1e-4, rtol=0)
    assert torch.equal(twice.kept, once.kept)
    assert torch.equal(twice.scores, once.scores)


def test_its_macs_are_those_of_torchs_counter():
    model, images = sharp_model((NAME, TINY)).requires_grad_(False), sharp_images(6)
    model.num_keep = (24, 12, 5)
    model.confidence = between(margins(model(images)), 3)
    output = model.trace(images)
    with FlopCounterMode(display=False) as counter, sdpa_kernel(SDPBackend.MATH), torch.no_grad():
        model(images)
    assert counter.get_total_flops() / 2 == output.macs.sum()
    assert (output.macs[output.unsure] > output.macs[~output.unsure].max()).all()


@pytest.mark.parametrize("threshold", [0.0, (0.0, 0.5, 0.5)])
def test_who_takes_it(threshold):
    model, images = sharp_model((NAME, TINY)), sharp_images(6)
    model.decision = Decision(threshold, confidence=1.0)
    with torch.no_grad():
        output = model.trace(images)
        assert not model.trace(images, keep_all).unsure.any(), "a function alone has no confidence"
        assert not model.trace(images, model.decision.but(confidence=0.0)).unsure.any()
    # a model that drops nothing has nothing to do again
    assert output.unsure.tolist() == [threshold != 0.0] * 6
    one = sharp_model((NAME, {**TINY, "num_classes": 1}))
    one.decision = Decision(0.5, confidence=0.9)
    with torch.no_grad():
        assert not one.trace(images).unsure.any(), "one class is always sure"
        model.backbone.head.weight *= 1000  # margins that round to 1
        assert model.trace(images).unsure.all() == (threshold != 0.0)
        model.backbone.reset_classifier(0)  # behind our back
        assert not model.trace(images).unsure.any()


def test_images_of_another_size_have_it_too():
    model = sharp_model((NAME, {**TINY, "dynamic_img_size": True}))
    model.decision = Decision(num_keep=(24, 24, 24), confidence=1.0)
    with torch.no_grad():
        assert not model.trace(sharp_images(2)).unsure.any(), "24 patches are all of them"
        larger = sharp_images(2, 64, 48)
        output = model.trace(larger)
        torch.testing.assert_close(output.logits, model(larger, keep_all), atol=1e-5, rtol=0)
    assert output.unsure.all()
    assert output.kept.sum(-1).eq(24).all()


def test_other_choices_have_the_same_pass():
    model, images = sharp_model((NAME, TINY)), sharp_images(6)
    model.num_keep = (24, 12, 5)
    keys = torch.arange(6)
    random = at_random(torch.tensor([[24] * 6, [12] * 6, [5] * 6]), keys)
    with torch.no_grad():
        once = model.trace(images, random)
        decision = model.decision.but(confidence=between(margins(once.logits), 3))
        both = same_passes(model, decision, random)
        twice = model.trace(images, both)
    assert torch.equal(twice.unsure, margins(once.logits) < decision.confidence)
    assert torch.equal(twice.kept, once.kept)
    early = same_passes(model, model.decision.but(confidence=1.0), lambda scores, alive, group: alive & (scores > 0.5))
    with torch.no_grad(), pytest.raises(InputError, match="drops patches before"):
        model.trace(images, early)
    assert same_passes(model, model.decision, random) is random
    assert same_passes(model, Decision(0.0, confidence=0.5), random) is random, "it drops nothing"
    assert same_passes(model, both, keep_all).first == 1


@pytest.mark.parametrize("value", [-0.1, 1.1, float("nan"), "much", True])
def test_what_is_no_confidence(value):
    with pytest.raises(InputError, match=r"confidence=.* a number from 0 to 1"):
        Decision(confidence=value)


def test_where_it_cannot_be():
    with pytest.raises(InputError, match="max_tokens"):
        Decision(confidence=0.5, max_tokens=10)
    features = sharp_model((NAME, {**TINY, "num_classes": 0}))
    with pytest.raises(InputError, match=r"confidence=0.5 .* no classes"):
        features.confidence = 0.5


def test_other_classes_forget_it(tmp_path):
    model = sharp_model((NAME, TINY))
    model.confidence = 0.25
    model.save(tmp_path / "model.safetensors")
    assert iared2.load(tmp_path / "model.safetensors").confidence == 0.25
    model.save_policy(tmp_path / "policy.safetensors")
    assert iared2.load(tmp_path / "policy.safetensors", model.backbone).confidence == 0.25
    model.reset_classifier(3)
    assert model.confidence == 0


@pytest.mark.parametrize("equal_counts", [True, False])
@pytest.mark.parametrize("number", [0, 3, 8])
def test_a_schedule_knows_what_it_gives_without_running_it(equal_counts, number):
    model, images = sharp_model((NAME, TINY)), sharp_images(8)
    model.confidence = 0.9  # of its own, which a schedule replaces
    with torch.no_grad():
        dense = model(images, keep_all)
        first = tried(model, [model.embed(images)], dense, (1, 0.5, 0.25), equal_counts)
        found = with_second_pass(model, first, dense, number)
        output = model.trace(images, found.decision)
    assert first.decision.confidence == 0
    assert output.unsure.sum() == number
    assert found.macs == pytest.approx(output.macs.double().mean().item() / model.dense_macs)
    assert found.first_macs == first.macs
    torch.testing.assert_close(found.output, output.logits, atol=1e-4, rtol=0)
    assert found.agreement == (output.logits.argmax(1) == dense.argmax(1)).double().mean()


@pytest.mark.parametrize("number", range(5))
def test_the_confidence_for_a_number_of_images(number):
    logits = torch.tensor([[9.0, 0.0], [0.3, 0.0], [0.0, 2.0], [0.1, 0.0]])
    unsure = Decision(confidence=confidence_for(logits, number)).unsure(logits)
    assert unsure.tolist() == [number > place for place in (3, 1, 2, 0)]


def test_images_of_which_the_model_is_wholly_sure_are_never_unsure_by_number():
    """Their margin rounds to 1, and a confidence of 1 would be all images."""
    logits = torch.tensor([[0.1, 0.0], [99.0, 0.0], [99.0, 0.0], [99.0, 0.0]])
    assert Decision(confidence=confidence_for(logits, 2)).unsure(logits).tolist() == [True, False, False, False]
    assert Decision(confidence=confidence_for(logits, 4)).unsure(logits).all()
