"""What is off by default: budgets, temperature, spread, several samples, other rewards."""

from __future__ import annotations

import copy
from dataclasses import replace

import pytest
import torch
from planted import PLANTED, learn, planted_images, untrained_model
from policy_steps import N, greedy_reward, log_prob, stage_of, step_with_spy

import iared2
from iared2 import keyed
from iared2.model.dither import pattern
from iared2.train.policy_gradient import PolicyConfig, PolicyGradientStage, budget_shift
from iared2.train.reward import RewardConfig


def test_by_default_the_probabilities_are_the_scores(enumerated):
    stage = stage_of(enumerated[0], PolicyConfig())
    scores, alive = torch.rand(2, N), torch.ones(2, N, dtype=torch.bool)
    stage.progress = 0.7
    probability, anchor = stage.probability(scores, alive, 0)
    assert probability is scores
    assert anchor == 0
    enumerated[0].requires_grad_(True)


@pytest.mark.parametrize("scale", [0.0, 1.0, 46.0])  # 46: scores of 0 and 1, sharpened
@pytest.mark.parametrize("offset", [-46.0, 0.0, 5.0])
@pytest.mark.parametrize("share", [0.05, 0.3, 0.6])
def test_the_budget_is_of_all_patches_and_drawn_from_the_living(scale, offset, share):
    generator = torch.Generator().manual_seed(0)
    logits = scale * torch.randn(16, 50, generator=generator).clamp(-1, 1) + offset
    alive = torch.rand(16, 50, generator=generator) < 0.8
    logits = logits.masked_fill(~alive, 1e4)  # whatever stands there
    drawn = (logits + budget_shift(logits.masked_fill(~alive, 0), alive, share)).sigmoid() * alive
    assert drawn.mean().item() == pytest.approx(share, abs=2e-3 if scale == 46 else 1e-4)
    drawn = (logits + budget_shift(logits.masked_fill(~alive, 0), alive, share, each=True)).sigmoid() * alive
    assert drawn.mean(1).tolist() == pytest.approx([share] * 16, abs=2e-2 if scale == 46 else 1e-4)


@pytest.mark.parametrize("offset", [-46.0, 0.0, 46.0])
def test_a_budget_of_more_than_there_is_keeps_what_there_is(offset):
    alive = torch.arange(20).expand(4, 20) < 6
    logits = torch.linspace(-10, 10, 20).expand(4, 20) + offset
    drawn = (logits + budget_shift(logits, alive, 0.5)).sigmoid()
    assert drawn[alive].min() > 0.99


def test_probabilities_are_sharpened_as_the_stage_goes_on(enumerated):
    scores, alive = torch.tensor([[0.2, 0.5, 0.9]]), torch.tensor([[True, True, False]])
    stage = stage_of(enumerated[0], PolicyConfig(temperature=0.25))
    for progress, temperature in ((0.0, 1.0), (0.5, 0.5), (1.0, 0.25)):
        stage.progress = progress
        probability, anchor = stage.probability(scores, alive, 0)
        torch.testing.assert_close(probability[alive], (scores[alive].logit() / temperature).sigmoid())
        assert anchor == 0
    enumerated[0].requires_grad_(True)


@pytest.mark.parametrize("keep", [(), (0.4, 0.4, 0.4)])
def test_what_is_drawn_is_spread_as_what_is_deployed(keep):
    """One distribution: p = sigmoid(logit I − s logit d + shift), whose sharpened form is the greedy decision."""
    model = untrained_model()
    model.spread = 0.8
    patches = model.num_patches
    scores = torch.rand(3, patches, generator=torch.Generator().manual_seed(0)).requires_grad_()
    alive = torch.rand(3, patches, generator=torch.Generator().manual_seed(1)) < 0.8
    want = scores.logit() - 0.8 * pattern(model.grid_size).logit().float()
    stage = stage_of(model, PolicyConfig(keep=keep, temperature=1e-3))
    probability, _ = stage.probability(scores, alive, 0)
    if not keep:
        torch.testing.assert_close(probability[alive], want.sigmoid()[alive])
        torch.testing.assert_close(
            *(torch.autograd.grad(p[alive].sum(), scores) for p in (probability, want.sigmoid()))
        )
    else:
        shift = (probability.logit() - want)[alive]
        torch.testing.assert_close(shift, shift[0].expand_as(shift), atol=1e-4, rtol=0)
        assert (probability * alive).mean().item() == pytest.approx(0.4, abs=1e-4)
    stage.progress = 1.0
    sharp, _ = stage.probability(scores, alive, 0)
    greedy = stage.greedy(scores.detach(), alive, 0)
    assert ((sharp > 0.5)[alive] != greedy[alive]).sum() <= 1
    assert torch.equal(greedy, model.decision(scores.detach(), alive, 0)) or keep


def test_what_all_scores_have_in_common_is_pulled_back_and_makes_no_difference(enumerated):
    stage = stage_of(enumerated[0], PolicyConfig(keep=(0.5, 0.5, 0.5)))
    alive = torch.ones(4, 10, dtype=torch.bool)
    alive[:, 7:] = False
    spread = torch.randn(4, 10, generator=torch.Generator().manual_seed(0))
    probabilities, pulls = [], []
    for common in (-3.0, 0.0, 3.0):
        logits = (spread + common).requires_grad_()
        probability, anchor = stage.probability(logits.sigmoid(), alive, 0)
        probabilities.append(probability[alive])
        (pull,) = torch.autograd.grad(anchor, logits)
        assert (pull[~alive] == 0).all()
        torch.testing.assert_close(pull[alive], pull[0, 0].expand(28), rtol=1e-3, atol=1e-6)
        pulls.append(pull[0, 0].item())
    for probability in probabilities:
        torch.testing.assert_close(probability, probabilities[1], rtol=0, atol=1e-4)
    assert pulls[0] < pulls[1] < pulls[2]
    assert pulls[0] < 0 < pulls[2], "a step against the gradient brings the scores back"
    enumerated[0].requires_grad_(True)


@pytest.mark.parametrize("rloo", [True, False])
def test_several_samples_are_judged_by_each_other_or_by_the_greedy_decision(enumerated, rloo):
    model, image, every_u, rewards = enumerated
    batch, samples = 16, 3
    policy = PolicyConfig(samples=samples, rloo=rloo)
    loss, seen = step_with_spy(stage_of(model, policy), image, batch)
    index = (seen["u"].long() * 2 ** torch.arange(N - 1, -1, -1)).sum(1)
    drawn, advantage = rewards[index].view(samples, batch), seen["advantage"].view(samples, batch)
    assert drawn.std(0).max() > 0.1
    if rloo:
        others = torch.stack([drawn[[j for j in range(samples) if j != i]].mean(0) for i in range(samples)])
        torch.testing.assert_close(advantage, drawn - others)
        torch.testing.assert_close(advantage.sum(0), torch.zeros(batch, dtype=torch.float64))
    else:
        scores = model.score(model.embed(image), 0)
        torch.testing.assert_close(advantage, drawn - greedy_reward(scores, every_u, rewards))
    of_each = log_prob(seen["probability"], seen["u"])
    torch.testing.assert_close(loss, -(advantage.flatten() * of_each).mean())


def test_a_budget_moves_what_is_drawn_to_it(enumerated):
    """At a later group too, where it is a share of all patches and not of those that are left."""
    model, image, _, _ = enumerated
    threshold = model.threshold
    model.threshold = [float(model.score(model.embed(image), 0).detach().kthvalue(2).values), 0.5, 0.5]
    for group, left in ((0, 8), (1, 6)):
        _, seen = step_with_spy(stage_of(model, PolicyConfig(keep=(0.6, 0.3, 0.3)), group=group), image, 64)
        share = (0.6, 0.3)[group]
        assert seen["alive"].sum(1).unique().tolist() == [left]
        assert (seen["probability"] * seen["alive"]).mean().item() == pytest.approx(share, abs=1e-4)
        assert seen["u"].double().mean().item() == pytest.approx(share, abs=0.08)
    model.threshold = threshold


def test_the_dense_models_prediction_needs_no_labels(enumerated):
    model, image, _, _ = enumerated
    teacher = copy.deepcopy(model.backbone).eval()
    with torch.no_grad():
        says = teacher(image).argmax(1)
    config = RewardConfig(tau=0.7, label="dense", soft_reward=True)
    losses = []
    for label in range(3):
        labels = torch.full((16,), label)
        losses.append(step_with_spy(stage_of(model, PolicyConfig(), config, teacher=teacher), image, 16, labels)[0])
    assert losses[0] == losses[1] == losses[2]
    given = stage_of(model, PolicyConfig(), replace(config, label="true"), teacher=teacher)
    assert losses[0] == step_with_spy(given, image, 16, says.expand(16))[0]
    assert losses[0] != step_with_spy(given, image, 16, (says + 1).expand(16) % 3)[0]


def test_with_a_budget_and_no_labels_it_finds_the_patches_that_matter():
    model = untrained_model(misled=True)
    policy = PolicyConfig(keep=(0.25,), samples=4, rloo=True, temperature=0.3)
    config = RewardConfig(tau=1.5, label="dense", soft_reward=True)
    images, _ = planted_images(256)
    others = [i for i in range(16) if i not in PLANTED]

    def kept():
        model.eval().calibrate(images, keep=policy.keep)
        with torch.no_grad():
            found = model.trace(images).kept[0].float()
        assert found.mean().item() == pytest.approx(0.25, abs=1e-3)
        return found.mean(0)

    assert kept()[PLANTED].max() == 0
    stage = PolicyGradientStage(model, [0], config, policy, copy.deepcopy(model.backbone).eval())
    metrics = learn(stage, 80, 64)
    assert torch.stack([m["keep_ratio_sampled"] for m in metrics]).mean().item() == pytest.approx(0.25, abs=0.02)
    after = kept()
    assert after[PLANTED].min() > 0.95
    assert after[others].mean() < 0.2


@pytest.mark.parametrize("spread", [0.0, 1.0])
@pytest.mark.parametrize("equal_counts", [True, False])
def test_the_greedy_decision_is_the_deployed_one(equal_counts, spread):
    """Logged, the baseline, and what the calibrated model keeps of the same images."""
    torch.manual_seed(0)
    model = iared2.from_timm(
        "deit_tiny_patch16_224", img_size=32, patch_size=4, embed_dim=32, depth=2, num_heads=2, num_classes=3, groups=1
    )
    with torch.no_grad():
        for name, p in model.named_parameters():
            if name.endswith(("query.weight", "key.weight", "pos_embed", "cls_token")):
                p.normal_(std=0.5)
    model.spread = spread
    images, share = torch.randn(6, 3, 32, 32), 0.92  # 59 of 64 patches
    policy = PolicyConfig(keep=(share,), equal_counts=equal_counts)
    stage = PolicyGradientStage(model, [0], RewardConfig(), policy).train()
    _, metrics = stage(images, torch.zeros(6, dtype=torch.int64), keyed.sample_keys(0, 0, torch.arange(6)))
    scores = model.score(model.embed(images), 0)
    greedy = stage.greedy(scores, torch.ones_like(scores, dtype=torch.bool), 0)
    if equal_counts:
        model.num_keep = [round(share * 64)]
    else:
        model.calibrate(images, keep=share)
    with torch.no_grad():
        deployed = model.trace(images).kept[0]
    assert (greedy != deployed).sum() <= (0 if equal_counts else 1), "a threshold lies between two scores"
    assert metrics["keep_ratio_greedy"] == pytest.approx(share, abs=0.01)
    assert set(greedy.sum(1).tolist()) == {59} or not equal_counts
