"""The pattern, and decisions that spread what they keep."""

from __future__ import annotations

import math
import time

import pytest
import torch
from oracle import masked_forward
from tiny import sharp_images, sharp_model

import iared2
from iared2.errors import InputError
from iared2.model import decide, file
from iared2.model.decide import Decision
from iared2.model.dither import pattern
from iared2.model.macs import interpreter_macs

GRIDS = [(1, 1), (1, 7), (5, 9), (14, 14), (16, 16), (2, 3, 4), (8, 14, 14)]
TINY = {"img_size": (48, 32), "patch_size": 8, "embed_dim": 48, "num_heads": 3, "num_classes": 7, "depth": 6}


def places(chosen, grid):
    return chosen.view(grid).nonzero()


def on(grid, **parts):
    return Decision(**parts).for_model(grid, 1)


@pytest.fixture
def model():
    return sharp_model(("deit_tiny_patch16_224", TINY))  # 6 × 4 patches


@pytest.mark.parametrize("grid", GRIDS, ids=str)
def test_the_values_fill_the_interval_evenly_and_neighbours_differ(grid):
    n, start = math.prod(grid), time.perf_counter()
    d = pattern(grid)
    assert time.perf_counter() - start < 5
    assert torch.equal(d.sort().values, (torch.arange(n, dtype=torch.float64) + 0.5) / n)
    for axis, size in enumerate(grid):
        if size > 3:
            assert d.view(grid).diff(dim=axis).abs().mean() > 0.4  # 1/3 in a random order


def test_the_pattern_stays_what_it_is():
    """It is not saved: with another one every saved model would decide otherwise."""
    ranks = (pattern((4, 4)) * 16 - 0.5).int().view(4, 4)
    assert ranks.tolist() == [[1, 8, 2, 10], [12, 4, 14, 6], [3, 11, 0, 9], [15, 7, 13, 5]]


@pytest.mark.parametrize("grid", [(14, 14), (16, 16), (8, 14, 14)], ids=str)
def test_the_first_are_well_spread_however_many(grid):
    n, d = math.prod(grid), pattern(grid)
    for k, apart in ((n // 8, 1.6), (n // 4, 1.4)):
        chosen = places(d < k / n, grid).double()
        assert len(chosen) == k
        distance = torch.cdist(chosen, chosen).fill_diagonal_(torch.inf).amin(1)
        assert distance.mean() > apart
        assert distance.min() >= 1.4, "no two are neighbours"
        half = (2 * chosen >= torch.tensor(grid)).long() @ 2 ** torch.arange(len(grid))
        assert half.bincount(minlength=2 ** len(grid)).double().mul(2 ** len(grid) / k).sub(1).abs().max() < 0.07


@pytest.mark.parametrize("grid", GRIDS, ids=str)
@pytest.mark.parametrize("score", [0.03, 0.3, 0.5, 0.77, 0.99])
def test_the_share_kept_is_the_score(grid, score):
    """At spread 1 and the threshold 0.5, of constant scores: a threshold alone keeps all or none of them."""
    n = math.prod(grid)
    scores, alive = torch.full((2, n), score), torch.ones(2, n, dtype=torch.bool)
    keep = on(grid, spread=1)(scores, alive, 0)
    assert abs(keep[0].sum() - score * n) <= 1
    assert torch.equal(keep[0], keep[1])


def test_what_is_kept_where_scores_differ_is_what_they_say_there():
    left = (torch.arange(16) < 8).expand(16, 16).flatten()
    scores = torch.where(left, 0.75, 0.25)[None]
    keep = on((16, 16), spread=1)(scores, torch.ones(1, 256, dtype=torch.bool), 0)[0]
    assert keep[left].float().mean() == pytest.approx(0.75, abs=1 / 128)
    assert keep[~left].float().mean() == pytest.approx(0.25, abs=1 / 128)
    at = {t: on((16, 16), thresholds=t, spread=1)(scores, scores > 0, 0)[0] for t in (0.3, 0.5, 0.8)}
    assert not (at[0.8] & ~at[0.5]).any(), "what a higher threshold keeps, a lower one keeps as well"
    assert not (at[0.5] & ~at[0.3]).any()


def test_the_rule_to_the_letter():
    generator = torch.Generator().manual_seed(0)
    scores, alive = torch.rand(4, 45, generator=generator), torch.rand(4, 45, generator=generator) < 0.8
    standing = scores.double().logit() - 0.7 * pattern((5, 9)).logit()
    for t in (0.2, 0.5, 0.9):
        keep = on((5, 9), thresholds=t, spread=0.7)(scores, alive, 0)
        assert torch.equal(keep, alive & (standing > math.log(t / (1 - t))))
    best = decide.top_k(standing, alive, 7)
    assert torch.equal(on((5, 9), num_keep=7, spread=0.7)(scores, alive, 0), best)
    assert torch.equal(on((5, 9), thresholds=0.1, max_tokens=7, spread=0.7)(scores, alive, 0), best)
    for t in (0, -1.0):
        assert torch.equal(on((5, 9), thresholds=t, spread=0.7)(scores, alive, 0), alive)
    for t in (1, 1.5):
        assert not on((5, 9), thresholds=t, spread=0.7)(scores, alive, 0).any()
    ends = torch.tensor([0.0, 1.0]).repeat(23)[:45].expand(1, -1)  # sigmoids that have rounded
    assert torch.equal(on((5, 9), spread=1)(ends, ends >= 0, 0), ends == 1)


def test_without_spread_nothing_is_computed(model, monkeypatch):
    monkeypatch.setattr(decide, "pattern", None)
    scores = torch.rand(3, 24)
    assert model.decision.standing(scores) is scores
    with torch.no_grad():
        out = model.trace(sharp_images())
    alive = torch.cat([torch.ones_like(out.kept[:1]), out.kept[:-1]])
    assert torch.equal(out.kept, alive & (out.scores > 0.5))


@pytest.mark.parametrize("name", ["deit_tiny_patch16_224", "timesformer_joint_small_patch16_224"])
def test_the_packed_loop_is_the_masked_oracle_and_scores_do_not_show_the_pattern(name):
    clips = "timesformer" in name
    size = {"img_size": (4, 32, 32), "patch_size": (1, 8, 8)} if clips else {}
    model = sharp_model((name, {**TINY, **size}))
    x = torch.randn(3, 3, 4, 32, 32, generator=torch.Generator().manual_seed(1)) if clips else sharp_images()
    with torch.no_grad():
        plain = model.trace(x)
        model.spread = 1.0
        out = model.trace(x)
        logits, scores, kept = masked_forward(model, x, model.decision)
    assert torch.equal(out.scores[0], plain.scores[0])
    assert not torch.equal(out.kept, plain.kept)
    assert torch.equal(out.kept, kept)
    assert not (out.kept[1:] & ~out.kept[:-1]).any()
    torch.testing.assert_close(out.logits, logits, atol=1e-5, rtol=0)
    torch.testing.assert_close(out.scores[out.scores > 0], scores[out.scores > 0], atol=1e-6, rtol=0)
    assert torch.equal(out.macs, model.count_macs(kept.sum(-1)))


@pytest.mark.parametrize("spread", [0.3, 1.0, 3.0])
@pytest.mark.parametrize("budget", [{"keep": (0.8, 0.5, 0.2)}, {"keep": 0.4}, {"gmacs": 0.6}])
def test_a_budget_is_met(model, budget, spread):
    images = sharp_images(100)
    model.spread = spread
    if "gmacs" in budget:
        budget = {"gmacs": 0.6 * model.dense_macs / 1e9}
    thresholds = model.calibrate(images, **budget)
    assert all(0 <= t <= 1 for t in thresholds)
    with torch.no_grad():
        out = model.trace(images)
    if "gmacs" in budget:
        assert out.macs.double().mean().item() / 1e9 == pytest.approx(budget["gmacs"], rel=0.01)
    else:
        want = torch.tensor(budget["keep"])
        ratio = out.keep_ratio.mean(1) if want.ndim else out.keep_ratio.mean()
        torch.testing.assert_close(ratio, want, atol=0.005, rtol=0)
    assert model.spread == spread


def test_a_decision_needs_the_places_of_the_patches(model):
    decision = Decision(0.5, spread=1)
    scores = torch.rand(5, 24)
    with pytest.raises(InputError, match="spread=1 is laid over a grid of None, not over 24 patches"):
        decision(scores, scores > 0, 0)
    assert model.trace(sharp_images(), decision).kept.any(), "a model knows the places"
    assert decision == decision.for_model((6, 4), 1), "the grid is no part of the value"
    assert hash(decision) == hash(decision.for_model((6, 4), 1))
    assert repr(decision).startswith("Decision(thresholds=(0.5,), num_keep=None, max_tokens=None, spread=1.0, ")
    model.trace(sharp_images(), decision.for_model(model.grid_size, 3))


def test_images_of_another_size_and_padded_ones():
    model = sharp_model(("deit_tiny_patch16_224", {**TINY, "dynamic_img_size": True, "dynamic_img_pad": True}))
    assert model.grid_size == (6, 4)
    model.spread = 1.0
    images = sharp_images(4, 64, 80)
    model.calibrate(images, keep=(0.75, 0.5, 0.25))
    with torch.no_grad():
        found = model.trace(images)
        model.set_input_size((64, 80))
        expected = model.trace(images)  # on the model's own grid
    assert found.kept.float().mean((1, 2)).tolist() == pytest.approx([0.75, 0.5, 0.25], abs=0.03)
    assert torch.equal(found.kept, expected.kept)
    torch.testing.assert_close(found.logits, expected.logits, rtol=0, atol=1e-5)
    model = sharp_model(("deit_tiny_patch16_224", {**TINY, "img_size": (44, 30), "dynamic_img_size": True,
                                                   "dynamic_img_pad": True}))  # fmt: skip
    assert model.grid_size == (6, 4), "rows and columns that are there were not counted"
    model.spread = 1.0
    model.threshold = 0.0
    output = model.trace(torch.zeros(1, 3, 44, 30))
    assert output.kept.shape == (3, 1, 24)
    assert model.num_patches == 24
    interpreters = sum(int(interpreter_macs(each, torch.tensor(24))) for each in model.interpreters)
    assert output.macs.tolist() == [model.dense_macs + interpreters], "dense_macs counts them, too"


def test_it_is_saved_and_a_file_without_it_has_none(tmp_path, model):
    model.spread = 0.75
    model.save(tmp_path / "m.safetensors")
    loaded = iared2.load(tmp_path / "m.safetensors")
    assert loaded.decision == model.decision
    with torch.no_grad():
        assert torch.equal(loaded.trace(sharp_images()).kept, model.trace(sharp_images()).kept)
    assert not any("spread" in name or "pattern" in name for name in loaded.state_dict())
    tensors, config = file.read(tmp_path / "m.safetensors")
    del config["spread"]
    file.write(tmp_path / "old.safetensors", tensors, config)
    assert iared2.load(tmp_path / "old.safetensors").spread == 0
    for bad in (-0.5, "1", None, True):
        file.write(tmp_path / "bad.safetensors", tensors, {**config, "spread": bad})
        with pytest.raises(InputError, match="spread"):
            iared2.load(tmp_path / "bad.safetensors")
