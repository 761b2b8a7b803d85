from __future__ import annotations

from dataclasses import FrozenInstanceError

import numpy as np
import pytest
import torch

import iared2
from iared2 import keyed
from iared2.errors import InputError
from iared2.model.decide import Decision, at_random, by_share, keep_all, sample, top_k

SCORES = torch.tensor([[0.1, 0.5, 0.6, 0.9], [0.8, 0.0, 1.0, 0.4]])
ALIVE = torch.tensor([[True, True, True, False], [True, True, True, True]])


def test_threshold_is_strict_and_never_revives():
    keep = Decision(0.5)(SCORES, ALIVE, 0)
    assert keep.tolist() == [[False, False, True, False], [True, False, True, False]]


def test_threshold_0_keeps_all_and_1_none_whatever_the_sigmoid_rounds_to():
    for t in (0, -1.0):
        assert torch.equal(Decision(t)(SCORES, ALIVE, 0), ALIVE)
    for t in (1, 1.5):
        assert not Decision(t)(SCORES, ALIVE, 0).any()


def test_threshold_of_each_group():
    decide = Decision([0.0, 0.7])
    assert decide(SCORES, ALIVE, 0).sum() == 7
    assert decide(SCORES, ALIVE, 1).sum() == 2


@pytest.mark.parametrize(
    "number", [0.3, np.float32(0.3), torch.tensor(0.3), (0.3,) * 3, np.full(3, 0.3), torch.full((3,), 0.3)]
)
def test_thresholds_are_whatever_holds_numbers(number):
    """``np.float32`` and tensors crashed."""
    model = tiny_model()
    model.threshold = number
    assert model.thresholds == pytest.approx((0.3,) * 3)
    assert model.threshold == pytest.approx(0.3)


@pytest.mark.parametrize("number", [4, (4, 4, 4), np.full(3, 4), torch.full((3,), 4)])
def test_counts_are_whatever_holds_counts(number):
    model = tiny_model()
    model.num_keep = number
    assert model.decision == Decision(num_keep=(4, 4, 4))
    assert model.trace(torch.randn(2, 3, 32, 32)).kept.sum(-1).unique().tolist() == [4]


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("num_keep", []),
        ("num_keep", (3, 2, 1, 1)),
        ("num_keep", (3, 2)),
        ("num_keep", (3, -1, 1)),
        ("num_keep", (3, 2.5, 1)),
        ("num_keep", "abc"),
        ("num_keep", True),
        ("max_tokens", -1),
        ("max_tokens", 2.5),
        ("max_tokens", True),
        ("spread", -0.1),
        ("spread", float("inf")),
        ("spread", 10**400),
        ("threshold", 10**400),
        ("spread", True),
        ("spread", "1"),
        ("spread", None),
        ("threshold", float("nan")),
        ("threshold", (0.5, 0.5)),
        ("threshold", []),
        ("threshold", "half"),
        ("threshold", None),
        ("dropped", "nonsense"),
        ("decision", 0.4),
        ("decision", None),
    ],
)
def test_senseless_settings_are_refused_when_they_are_set(name, value):
    """Some passed without a word, some crashed in the forward pass."""
    model = tiny_model()
    with pytest.raises(InputError, match=name):
        setattr(model, name, value)
    assert model.decision == Decision((0.5, 0.5, 0.5)), "the model is as it was"
    assert model.dropped == "gone"


@pytest.mark.parametrize(
    "decision",
    [Decision(0.4), Decision((0.1, 0.2, 0.3), max_tokens=5, spread=0.5), Decision(num_keep=3), Decision(0.4, spread=1)],
)
def test_a_decision_is_one_value(decision, tmp_path):
    """Setting a part to what it is changed the model; the order of assignment mattered."""
    model = iared2.from_timm("deit_tiny_patch16_224", img_size=32, embed_dim=48, num_heads=3, depth=3)
    model.decision = decision
    whole = model.decision
    for name in ("threshold", "num_keep", "max_tokens", "spread", "decision"):
        setattr(model, name, getattr(model, name))
        assert model.decision == whole
    model.save(tmp_path / "m.safetensors")
    assert iared2.load(tmp_path / "m.safetensors").decision == whole
    assert repr(whole) in repr(model)
    with pytest.raises(FrozenInstanceError):
        whole.max_tokens = 3


def test_a_threshold_ends_counts_and_leaves_the_limit():
    model = tiny_model()
    model.max_tokens, model.spread = 7, 0.5
    model.num_keep = (6, 5, 4)
    assert (model.threshold, model.max_tokens, model.spread) == (None, 7, 0.5)
    model.threshold = 0.3
    assert (model.threshold, model.num_keep, model.max_tokens, model.spread) == (0.3, None, 7, 0.5)
    with pytest.raises(InputError, match="not both"):
        Decision(0.5, num_keep=3)


def test_the_whole_of_a_decision_is_the_dense_model():
    images = torch.rand(2, 3, 32, 32)
    for decision in (Decision(0.5, max_tokens=3, spread=1.0), Decision(num_keep=2), Decision(1.0, confidence=1.0)):
        model = tiny_model().eval()
        model.decision = decision
        model.decision = model.decision.whole()
        out = model.trace(images)
        assert out.kept.all()
        assert not out.unsure.any()
        torch.testing.assert_close(out.logits, model.backbone(images))
        assert model.spread == decision.spread


def tiny_model():
    size = {"img_size": 32, "patch_size": 8, "embed_dim": 48, "num_heads": 3, "depth": 3, "num_classes": 5}
    return iared2.from_timm("deit_tiny_patch16_224", **size).eval()


def test_samples_have_the_scores_as_probabilities():
    n = 20_000
    scores, alive = SCORES[1].expand(n, 4), torch.ones(n, 4, dtype=torch.bool)
    rate = sample(scores, alive, keyed.sample_keys(0, 0, torch.arange(n)), 0).float().mean(0)
    assert rate[1] == 0
    assert rate[2] == 1
    assert (rate - SCORES[1]).abs().max() < 4 * 0.5 / n**0.5


def test_top_k_and_random_keep_exact_numbers_of_living_patches():
    assert top_k(SCORES, ALIVE, torch.tensor([2, 1])).tolist() == [
        [False, True, True, False],
        [False, False, True, False],
    ]
    num_keep = torch.tensor([[2, 3], [0, 1]])
    decide = at_random(num_keep, keyed.sample_keys(0, 0, torch.arange(2)))
    first = decide(SCORES, ALIVE, 0)
    assert first.sum(1).tolist() == [2, 3]
    assert not (first & ~ALIVE).any()
    second = decide(SCORES, first, 1)
    assert second.sum(1).tolist() == [0, 1]
    assert not (second & ~first).any()
    assert torch.equal(keep_all(SCORES, first, 1), first)


def test_random_dropping_is_uniform():
    n, keep = 5000, 2
    decide = at_random(torch.full((1, n), keep), keyed.sample_keys(0, 0, torch.arange(n)))
    rate = decide(torch.zeros(n, 8), torch.ones(n, 8, dtype=torch.bool), 0).float().mean(0)
    assert (rate - keep / 8).abs().max() < 4 * 0.44 / n**0.5


@pytest.mark.parametrize("share", [0.0, 0.3, 0.5, 1.0])
def test_a_share_is_of_all_patches_and_the_same_for_each_image(share):
    generator = torch.Generator().manual_seed(0)
    scores = torch.rand(6, 15, generator=generator)
    decide, alive = by_share((share, 0.4)), torch.ones(6, 15, dtype=torch.bool)
    keep = decide(scores, alive, 0)
    assert keep.sum(1).tolist() == [round(share * 15)] * 6
    assert torch.equal(keep, top_k(scores, alive, keep.sum(1)))
    again = decide(torch.rand(6, 15, generator=generator), keep, 1)
    assert not (again & ~keep).any()
    assert again.sum(1).tolist() == [min(6, round(share * 15))] * 6


def test_several_draws_of_an_image():
    """The first ones do not depend on how many there are; all differ, and each patch is drawn as often as it should."""
    images = 2000
    probability, alive = SCORES.repeat(images, 1), ALIVE.repeat(images, 1)
    keys = keyed.sample_keys(0, 0, torch.arange(2 * images))
    four = sample(probability, alive, keys, 1, samples=4)
    draws = four.unflatten(0, (4, 2 * images))
    assert torch.equal(draws[0], sample(probability, alive, keys, 1))
    assert torch.equal(draws[:3].flatten(0, 1), sample(probability, alive, keys, 1, samples=3))
    assert torch.equal(sample(probability[7:9], alive[7:9], keys[7:9], 1, samples=4), draws[:, 7:9].flatten(0, 1))
    rates = draws.unflatten(1, (images, 2)).float().mean(1)
    assert (rates - SCORES * ALIVE).abs().max() < 4 * 0.5 / images**0.5
    undecided = draws[:, ::2, 1].float()  # probability 0.5
    assert (torch.corrcoef(undecided) - torch.eye(4)).abs().max() < 4 / images**0.5
