"""Where patches are dropped: `model.schedule`."""

from __future__ import annotations

import math
from dataclasses import replace
from itertools import pairwise

import pytest
import torch
from tiny import sharp_model

from iared2.errors import InputError
from iared2.model.decide import keep_all
from iared2.model.schedule import divergence, search

SMALL = {"img_size": 32, "patch_size": 4, "embed_dim": 32, "depth": 6, "num_heads": 2, "num_classes": 7, "groups": 3}


@pytest.fixture(scope="module")
def model():
    return sharp_model(("deit_tiny_patch16_224", SMALL))


@pytest.fixture(scope="module")
def images():
    return torch.randn(70, 3, 32, 32, generator=torch.Generator().manual_seed(2))  # more than one batch


def test_the_divergence_is_the_divergence_of_kullback_and_leibler():
    dense, reduced = torch.tensor([[0.0, math.log(3)], [1.0, 1.0]]), torch.tensor([[0.0, 0.0], [1.0, 1.0]])
    expected = 0.25 * math.log(0.25 / 0.5) + 0.75 * math.log(0.75 / 0.5)
    assert divergence(dense, reduced).tolist() == pytest.approx([expected, 0], abs=1e-6)
    hot = 9 * divergence(dense / 3, reduced / 3)
    torch.testing.assert_close(divergence(dense, reduced, temperature=3), hot)
    features = divergence(torch.tensor([[3.0, 4.0]]), torch.tensor([[4.0, 3.0]]), classes=False)
    assert features.item() == pytest.approx(1 - 24 / 25)


@pytest.mark.parametrize("equal_counts", [True, False])
@pytest.mark.parametrize("spread", [0.0, 1.0])
def test_what_is_found_meets_the_budget_and_is_what_the_model_then_does(model, images, equal_counts, spread):
    model.spread = spread
    seen = []
    found = search(model, images, 0.6, trials=20, equal_counts=equal_counts, log=seen.append)
    assert found.macs == pytest.approx(0.6, abs=0.02)
    assert len(found.shares) == 3
    assert all(1 >= a >= b > 0 for a, b in pairwise((1, *found.shares)))
    with torch.inference_mode():
        dense = model(images, keep_all)
        output = model.trace(images, found.decision)
    assert output.macs.double().mean().item() / model.dense_macs == pytest.approx(found.macs, abs=1e-6)
    assert (output.logits.argmax(1) == dense.argmax(1)).double().mean().item() == pytest.approx(found.agreement)
    assert divergence(dense, output.logits).mean().item() == pytest.approx(found.divergence, rel=1e-4)
    assert (len(set(output.kept[-1].sum(1).tolist())) == 1) == equal_counts
    # each reported one is better than the last, and the plain ones were among them
    assert [s.divergence for s in seen] == sorted((s.divergence for s in seen), reverse=True)
    assert found == seen[-1]
    plain = [search(model, images, 0.6, trials=n, equal_counts=equal_counts) for n in (1, 5)]
    assert found.divergence <= plain[1].divergence <= plain[0].divergence
    assert found == search(model, images, 0.6, trials=20, equal_counts=equal_counts)


def test_it_finds_a_group_that_must_not_drop(images):
    """In the second half of this model, nothing depends on patches any more: all of the budget is saved there."""
    model = sharp_model(("deit_tiny_patch16_224", SMALL))
    with torch.no_grad():
        for block in model.backbone.blocks[2:]:
            block.attn.proj.weight.zero_()
            block.attn.proj.bias.zero_()
    found = search(model, images, 0.6, trials=30)
    assert found.shares[0] == pytest.approx(1)
    assert found.agreement == 1


def test_features_have_no_classes_to_agree_on(images):
    model = sharp_model(("deit_tiny_patch16_224", {**SMALL, "num_classes": 0}))
    found = search(model, images[:8], 0.6, trials=3)
    assert math.isnan(found.agreement)
    assert 0 < found.divergence < 1


def test_the_shape_of_a_schedule_serves_other_budgets(model, images):
    model.spread = 0.0
    shape = replace(search(model, images, 0.6, trials=4)).shares
    with torch.inference_mode():
        model.calibrate(images, gmacs=0.4 * model.dense_macs / 1e9, shape=shape)
        output = model.trace(images)
    assert output.macs.double().mean().item() / model.dense_macs == pytest.approx(0.4, rel=0.01)
    logs = torch.tensor(shape).log(), output.keep_ratio.mean(1).log()
    torch.testing.assert_close(logs[1] / logs[1][-1], logs[0] / logs[0][-1], atol=0.05, rtol=0)
    model.threshold = 0.5


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"macs": 1.5}, "cannot be met"),
        ({"macs": 1e-6}, "cannot be met"),
        ({"images": torch.zeros(0, 3, 32, 32)}, "at least one"),
    ],
)
def test_what_cannot_be_found(model, images, change, message):
    with pytest.raises(InputError, match=message):
        search(model, **{"images": images[:4], "macs": 0.5, "trials": 4, **change})
    with pytest.raises(InputError, match="eval"):
        search(sharp_model(("deit_tiny_patch16_224", SMALL)).train(), images[:4], 0.5)
