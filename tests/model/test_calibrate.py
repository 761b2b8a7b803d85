from __future__ import annotations

import pytest
import torch

import iared2
from iared2.errors import InputError
from iared2.model.calibrate import thresholds_for
from iared2.model.decide import Decision


@pytest.fixture(scope="module")
def model():
    torch.manual_seed(0)
    model = iared2.from_timm(
        "deit_tiny_patch16_224", img_size=64, patch_size=8, embed_dim=48, num_heads=3, depth=6, num_classes=5
    ).eval()
    with torch.no_grad():
        for interpreter in model.interpreters:  # at birth the scores of an image hardly differ
            interpreter.query.weight.mul_(30)
    return model


@pytest.fixture(scope="module")
def images():
    torch.manual_seed(1)
    return torch.randn(80, 3, 64, 64)  # more than one batch


def kept(model, images, thresholds):
    with torch.inference_mode():
        return model.trace(images, Decision(thresholds))


def test_shares_of_each_group_are_met_exactly(model, images):
    shares = (0.8, 0.5, 0.25)
    output = kept(model, images, thresholds_for(model, images, keep=shares))
    for share, ratio in zip(shares, output.keep_ratio.mean(1).tolist(), strict=True):
        assert ratio == pytest.approx(share, abs=2 / images.shape[0] / 64)
    assert output.keep_ratio[0].std() > 0.01  # each image keeps what it needs


@pytest.mark.parametrize("keep", [0.0, 0.3, 0.6, 1.0])
def test_a_mean_share_is_met(model, images, keep):
    output = kept(model, images, thresholds_for(model, images, keep=keep))
    assert output.keep_ratio.mean() == pytest.approx(keep, abs=0.005)


@pytest.mark.parametrize("share", [0.4, 0.6, 0.9])
def test_multiply_adds_are_met(model, images, share):
    gmacs = share * model.dense_macs / 1e9
    output = kept(model, images, thresholds_for(model, images, gmacs=gmacs))
    assert output.macs.double().mean().item() / 1e9 == pytest.approx(gmacs, rel=0.01)


def test_a_budget_holds_on_other_images_too(model, images):
    torch.manual_seed(2)
    output = kept(model, torch.randn(80, 3, 64, 64), thresholds_for(model, images, keep=0.5))
    assert output.keep_ratio.mean() == pytest.approx(0.5, abs=0.05)


def test_latency_lies_between_the_extremes(model, images, monkeypatch):
    """A clock that counts MACs: the search is tested, not this machine."""
    from iared2.model import calibrate as budget

    def clock(device, run, image, decide):
        seen = []
        original = model.head
        monkeypatch.setattr(model, "head", lambda packed: seen.append(packed.lengths[0]) or original(packed))
        result = run(image, decide)
        monkeypatch.setattr(model, "head", original)
        return result, seen[0] / 1000  # a millisecond for each token of the last group

    monkeypatch.setattr(budget, "timed", clock)
    output = kept(model, images[:16], thresholds_for(model, images, latency_ms=30))
    assert 24 <= output.kept[-1].sum(-1).median() + 1 <= 30
    assert thresholds_for(model, images, latency_ms=1000) == [0, 0, 0]
    with pytest.raises(InputError, match=r"latency_ms=0.5 cannot be met: here the model takes 1"):
        thresholds_for(model, images, latency_ms=0.5)


def test_calibrate_sets_the_threshold(model, images):
    before = model.threshold
    try:
        thresholds = model.calibrate(images, keep=0.5)
        assert model.threshold == thresholds
        with torch.inference_mode():
            assert model.trace(images).keep_ratio.mean() == pytest.approx(0.5, abs=0.005)
    finally:
        model.threshold = before


def test_a_group_that_drops_nothing_goes_on_so(model, images):
    model.threshold = [0, 0.5, 0.5]
    try:
        thresholds = thresholds_for(model, images, gmacs=0.7 * model.dense_macs / 1e9)
    finally:
        model.threshold = 0.5
    assert thresholds[0] == 0
    assert kept(model, images, thresholds).keep_ratio[2].mean() < 0.9


def test_a_policy_that_drops_nothing_can_be_given_a_budget(model, images):
    model.threshold = 0.0
    try:
        thresholds = thresholds_for(model, images, keep=0.5)
    finally:
        model.threshold = 0.5
    ratio = kept(model, images, thresholds).keep_ratio.mean(1)
    assert ratio.mean() == pytest.approx(0.5, abs=0.005)
    assert ratio[0] > ratio[1] > ratio[2]


@pytest.mark.parametrize(
    ("budget", "message"),
    [
        ({}, "one budget"),
        ({"keep": 0.5, "gmacs": 1.0}, "one budget"),
        ({"keep": 1.5}, "from 0 to 1"),
        ({"keep": (0.5, 0.6, 0.4)}, "do not rise"),
        ({"keep": (0.5, 0.4)}, "or 3 that do not rise"),
        ({"gmacs": 1000.0}, r"gmacs=1000 cannot be met: this model takes 0\.\d+ to 0\.\d+ GMACs"),
    ],
)
def test_what_cannot_be_met_is_said(model, images, budget, message):
    with pytest.raises(InputError, match=message):
        thresholds_for(model, images[:4], **budget)
    with pytest.raises(InputError, match="at least one image"):
        thresholds_for(model, images[:0], keep=0.5)


def test_max_tokens_bounds_every_image_and_keeps_the_best(model, images):
    model.max_tokens = 20
    try:
        with torch.inference_mode():
            capped = model.trace(images)
            model.max_tokens = None
            free = model.trace(images)
    finally:
        model.max_tokens = None
    assert free.kept[0].sum(-1).max() > 20
    assert capped.kept.sum(-1).max() == 20
    few = free.kept[0].sum(-1) <= 20
    assert torch.equal(capped.kept[0, few], free.kept[0, few])
    best = free.scores[0].sort(descending=True).values[:, 19:20]
    assert torch.equal(capped.kept[0], free.kept[0] & (free.scores[0] >= best))


def test_a_budget_counts_max_tokens(model, images):
    model.max_tokens = 40
    try:
        model_keep = thresholds_for(model, images, keep=0.5)
        with torch.inference_mode():
            kept_now = model.trace(images, model.decision.at(model_keep)).keep_ratio.mean()
        with pytest.raises(InputError, match=r"max_tokens=40 allows no more than 0\.6"):
            thresholds_for(model, images, keep=(0.9, 0.9, 0.9))
    finally:
        model.max_tokens = None
    assert kept_now == pytest.approx(0.5, abs=0.02)


def test_equal_scores_do_not_all_go():
    from iared2.model.calibrate import _quantile

    scores = torch.tensor([0.5] * 8 + [0.2] * 2)
    assert (scores > _quantile(scores, 7)).sum() == 8
    assert (scores > _quantile(scores, 3)).sum() == 0
    assert (torch.ones(5) > _quantile(torch.ones(5), 4)).all()


def test_what_is_no_number_is_said(model, images):
    with pytest.raises(InputError, match="not numbers"):
        thresholds_for(model, torch.full_like(images[:2], torch.nan), keep=0.5)
    with pytest.raises(InputError, match=r"model.eval\(\)"):
        thresholds_for(model.train(), images[:2], keep=0.5)
    model.eval()


def test_max_tokens_is_saved(model, tmp_path):
    model.max_tokens = 7
    try:
        model.save(tmp_path / "m.safetensors")
    finally:
        model.max_tokens = None
    assert iared2.load(tmp_path / "m.safetensors").max_tokens == 7


def test_as_many_of_every_image_until_a_threshold_is_set(model, images, tmp_path):
    threshold, model.num_keep = model.threshold, (30, 20, 7)
    try:
        with torch.inference_mode():
            out, all_kept = model.trace(images), model.trace(images, model.decision.at([0.0] * 3)).kept
        model.save(tmp_path / "m.safetensors")
        model.calibrate(images, keep=0.5)
        assert model.num_keep is None
    finally:
        model.threshold = threshold
    assert (out.kept.sum(-1) == torch.tensor([[30], [20], [7]])).all()
    best = out.scores[0].sort(descending=True).values[:, 29:30]
    assert torch.equal(out.kept[0], out.scores[0] >= best)
    assert all_kept.all(), "thresholds that are asked for are not limited by counts"
    assert iared2.load(tmp_path / "m.safetensors").num_keep == (30, 20, 7)


def test_a_whole_group_is_given_up_before_the_last_ones_have_next_to_nothing(images):
    torch.manual_seed(0)
    size = {"img_size": 64, "patch_size": 8, "embed_dim": 48, "num_heads": 3, "depth": 8, "num_classes": 5}
    model = iared2.from_timm("deit_tiny_patch16_224", groups=4, interpreter="attention", **size).eval()
    model.calibrate(images, keep=(1.0, 0.5, 0.3, 0.18))
    shares = {}
    for budget in (0.5, 0.4, 0.3, 0.2):
        output = kept(model, images, thresholds_for(model, images, gmacs=budget * model.dense_macs / 1e9))
        assert output.macs.double().mean().item() == pytest.approx(budget * model.dense_macs, rel=0.01)
        shares[budget] = output.keep_ratio.mean(1).tolist()
    assert shares[0.5][0] == shares[0.4][0] == 1, "a group that drops nothing keeps dropping nothing"
    assert shares[0.3][0] < 0.8
    assert shares[0.3][3] > shares[0.4][3] / 2 > 0.01
