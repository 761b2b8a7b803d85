from __future__ import annotations

import copy
import itertools
from dataclasses import replace

import pytest
import torch
from planted import PLANTED, learn, planted_images, untrained_model

import iared2
from iared2 import InputError, keyed
from iared2.model.decide import keep_all, sample
from iared2.model.dither import pattern
from iared2.train import policy_gradient
from iared2.train.curriculum import stages_of
from iared2.train.finetune import FinetuneStage
from iared2.train.policy_gradient import PolicyConfig, PolicyGradientStage, budget_shift, policy_gradient_loss
from iared2.train.recipe import read_recipe
from iared2.train.reward import RewardConfig, overlap, reward

N = 8
LABEL = 1


@pytest.fixture(scope="module")
def enumerated():
    """A float64 model on an image of 8 patches, and the reward of each of the 256 decisions at group 1."""
    torch.manual_seed(3)
    model = (
        iared2.from_timm(
            "deit_tiny_patch16_224", img_size=(8, 16), patch_size=4, embed_dim=32, depth=3, num_heads=2, num_classes=3
        )
        .double()
        .eval()
    )
    for p in model.backbone.parameters():
        p.data *= 4  # so that the prediction depends on what is kept
    image = torch.randn(1, 3, 8, 16, dtype=torch.float64)
    every_u = torch.tensor(list(itertools.product([False, True], repeat=N)))  # (256, 8)
    with torch.no_grad():
        packed, _, _ = model.reduce(model.run_blocks(model.embed(image).select(every_u), 0), range(1, 3), keep_all)
        correct = model.head(packed).argmax(1) == LABEL
    assert 20 < correct.sum() < 236, "both outcomes must occur"
    return model, image, every_u, reward(every_u.sum(1), N, correct, RewardConfig(tau=0.7))


def log_prob(scores, u):
    return torch.where(u, scores, 1 - scores).log().sum(-1)


def exact_gradient(scores, every_u, rewards):
    scores = scores.detach().requires_grad_()
    (log_prob(scores, every_u).exp() * rewards).sum().backward()
    return scores.grad


def greedy_reward(scores, every_u, rewards):
    return rewards[(every_u == (scores > 0.5)).all(1)].item()


def test_estimate_summed_over_every_decision_is_the_exact_gradient(enumerated):
    model, image, every_u, rewards = enumerated
    scores = model.score(model.embed(image), 0)
    parameters = list(model.interpreters[0].parameters())
    pi = log_prob(scores, every_u).exp()
    exact = torch.autograd.grad((pi * rewards).sum(), parameters, retain_graph=True)
    advantage = rewards - greedy_reward(scores, every_u, rewards)
    # policy_gradient_loss averages over images: weight each of the 256 by 256·π(u)
    weighted = 256 * pi.detach() * advantage
    loss = policy_gradient_loss(scores.expand(256, N), every_u, torch.ones_like(every_u), weighted)
    estimate = torch.autograd.grad(-loss, parameters)
    assert max(g.abs().max() for g in exact) > 1e-4
    for g, e in zip(exact, estimate, strict=True):
        torch.testing.assert_close(e, g, rtol=0, atol=1e-10)


def test_sampled_estimate_is_within_4_standard_errors(enumerated):
    model, image, every_u, rewards = enumerated
    scores = model.score(model.embed(image), 0).detach()
    samples = 20_000
    keys = keyed.sample_keys(0, 0, torch.arange(samples))
    many = scores.expand(samples, N).clone().requires_grad_()
    alive = torch.ones(samples, N, dtype=torch.bool)
    u = sample(many.detach(), alive, keys, 0)
    index = (u.long() * 2 ** torch.arange(N - 1, -1, -1)).sum(1)  # the order of itertools.product
    advantage = rewards[index] - greedy_reward(scores, every_u, rewards)
    policy_gradient_loss(many, u, alive, advantage).backward()
    each = -many.grad * samples  # (samples, N)
    error = (each.mean(0) - exact_gradient(scores, every_u, rewards)[0]).abs()
    standard_error = each.std(0) / samples**0.5
    assert (error <= 4 * standard_error).all(), error / standard_error
    assert (standard_error > 0).all()


def test_stage_computes_the_same_estimate_in_one_packed_batch(enumerated):
    model, image, every_u, rewards = enumerated
    batch = 32
    keys = keyed.sample_keys(1, 0, torch.arange(batch))
    stage = PolicyGradientStage(model, [0], RewardConfig(tau=0.7)).train()
    model.zero_grad(set_to_none=True)
    loss, metrics = stage(image.expand(batch, -1, -1, -1), torch.full((batch,), LABEL), keys)
    loss.backward()
    got = [p.grad for p in model.interpreters[0].parameters()]
    learning = {name for name, p in model.named_parameters() if p.grad is not None}
    assert learning == {f"interpreters.0.{part}" for part in ("query.weight", "query.bias", "key.weight", "key.bias")}
    model.requires_grad_(True)

    scores = model.score(model.embed(image), 0)
    alive = torch.ones(batch, N, dtype=torch.bool)
    u = sample(scores.expand(batch, N), alive, keys, 0)
    index = (u.long() * 2 ** torch.arange(N - 1, -1, -1)).sum(1)
    advantage = rewards[index] - greedy_reward(scores, every_u, rewards)
    want_loss = policy_gradient_loss(scores.expand(batch, N), u, alive, advantage)
    want = torch.autograd.grad(want_loss, list(model.interpreters[0].parameters()))
    for g, w in zip(got, want, strict=True):
        torch.testing.assert_close(g, w, rtol=1e-9, atol=1e-12)
    assert metrics["reward"] == pytest.approx(rewards[index].mean().item())
    assert metrics["keep_ratio_sampled"] == pytest.approx(u.double().mean().item())


def test_second_group_decides_on_what_the_first_left(enumerated):
    """Group 1 has dropped patches by its threshold: they get no gradient, and still count in |u|₀/N as dropped."""
    model, image, _, _ = enumerated
    batch = 16
    first = model.score(model.embed(image), 0)[0].detach()
    threshold = model.threshold
    model.threshold = [float(first.median()), 0.5, 0.5]
    stage = PolicyGradientStage(model, [1], RewardConfig(tau=0.7)).train()
    seen = {}
    loss_of = policy_gradient.policy_gradient_loss

    def spy(scores, u, alive, advantage):
        seen.update(u=u, alive=alive, advantage=advantage)
        return loss_of(scores, u, alive, advantage)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(policy_gradient, "policy_gradient_loss", spy)
        keys = keyed.sample_keys(1, 0, torch.arange(batch))
        _, metrics = stage(image.expand(batch, -1, -1, -1), torch.full((batch,), LABEL), keys)
    alive = (first > first.median()).expand(batch, N)
    assert torch.equal(seen["alive"], alive)
    assert 0 < alive[0].sum() < N
    assert not (seen["u"] & ~alive).any()
    assert metrics["keep_ratio_sampled"] == pytest.approx(seen["u"].double().mean().item())

    # the same rewards, the long way round
    with torch.no_grad():
        packed, _, _ = model.reduce(model.embed(image.expand(batch, -1, -1, -1)), range(1))
        greedy = alive & (model.score(packed, 1) > 0.5)
        rewards = []
        for keep in (seen["u"], greedy):
            after, _, _ = model.reduce(model.run_blocks(packed.select(keep), 1), range(2, 3), keep_all)
            rewards.append(reward(keep.sum(1), N, model.head(after).argmax(1) == LABEL, RewardConfig(tau=0.7)))
    torch.testing.assert_close(seen["advantage"], rewards[0] - rewards[1])
    model.threshold = threshold
    model.requires_grad_(True)


def test_dead_patches_are_not_decided_on():
    scores = torch.rand(2, 4, requires_grad=True)
    alive = torch.tensor([[True, False, True, True]] * 2)
    policy_gradient_loss(scores, torch.zeros(2, 4, dtype=torch.bool), alive, torch.ones(2)).backward()
    assert (scores.grad[:, 1] == 0).all()
    assert (scores.grad[:, 0] != 0).all()


def xor_images(n, seed):
    """(n, 3, 16, 16) of 16 patches; the class is the exclusive-or of the signs of patches 5 and 10."""
    generator = torch.Generator().manual_seed(seed)
    patches = 0.5 * torch.randn(n, 16, 3, 4, 4, generator=generator)
    bits = torch.randint(0, 2, (n, 2), generator=generator)
    patches[:, [5, 10]] += (2 * bits - 1)[:, :, None, None, None].float()
    images = patches.unflatten(1, (4, 4)).permute(0, 3, 1, 4, 2, 5).reshape(n, 3, 16, 16)
    return images, bits.sum(1) % 2


def test_policy_stage_finds_the_two_patches_that_matter():
    torch.manual_seed(0)
    model = iared2.from_timm(
        "deit_tiny_patch16_224", img_size=16, patch_size=4, embed_dim=32, depth=3, num_heads=2, num_classes=2
    )
    with torch.no_grad():  # a stronger signal from the start, so that exclusive-or is learned in seconds
        model.backbone.patch_embed.proj.weight *= 3
        model.backbone.cls_token.normal_(std=0.5)
        model.backbone.pos_embed.normal_(std=1.0)  # a score sees one patch: where it is must show in it

    def steps(stage, n, lr):
        optimizer = torch.optim.Adam([p for p in stage.parameters() if p.requires_grad], lr)
        stage.train()
        for step in range(n):
            images, labels = xor_images(128, seed=step + 1)
            loss, _ = stage(images, labels, keyed.sample_keys(0, step, torch.arange(128)))
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()

    def accuracy(decide=None):
        model.eval()
        with torch.no_grad():
            out = model.trace(test_images, decide)
        return (out.logits.argmax(1) == test_labels).float().mean().item(), out.kept[0].float().mean(0)

    test_images, test_labels = xor_images(512, seed=10**6)
    steps(FinetuneStage(model, None), 150, 3e-3)
    dense, _ = accuracy(keep_all)
    assert dense > 0.95
    steps(PolicyGradientStage(model, [0], RewardConfig(tau=1.0)), 300, 5e-3)
    only_first = lambda scores, alive, group: alive & (scores > 0.5) if group == 0 else alive  # noqa: E731
    reduced, kept = accuracy(only_first)
    assert kept[[5, 10]].min() > 0.95
    assert kept[[i for i in range(16) if i not in (5, 10)]].mean() <= 0.3
    assert reduced >= dense - 0.02


# ---- what is off by default --------------------------------------------------------------------------------------


def stage_of(model, policy, config=RewardConfig(tau=0.7), group=0, teacher=None):  # noqa: B008 (frozen)
    return PolicyGradientStage(model, [group], config, policy, teacher).train()


def step_with_spy(stage, image, batch, labels=None):
    """One step on a batch of one image; the loss, and what the loss was computed from."""
    seen = {}
    loss_of = policy_gradient.policy_gradient_loss

    def spy(probability, u, alive, advantage):
        seen.update(probability=probability, u=u, alive=alive, advantage=advantage)
        return loss_of(probability, u, alive, advantage)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(policy_gradient, "policy_gradient_loss", spy)
        labels = torch.full((batch,), LABEL) if labels is None else labels
        loss, _ = stage(image.expand(batch, -1, -1, -1), labels, keyed.sample_keys(1, 0, torch.arange(batch)))
    stage.model.requires_grad_(True)
    return loss, seen


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


@pytest.fixture
def three_groups():
    """A model of three groups, its dense teacher, four images and their keys."""
    torch.manual_seed(0)
    model = iared2.from_timm(
        "deit_tiny_patch16_224", img_size=16, patch_size=4, embed_dim=32, depth=3, num_heads=2, num_classes=3
    ).eval()
    with torch.no_grad():
        for name, p in model.named_parameters():
            if name.endswith(("query.weight", "key.weight", "pos_embed", "cls_token", "head.weight")):
                p.normal_(std=0.5)
    teacher = copy.deepcopy(model.backbone).eval()
    return model, teacher, torch.randn(4, 3, 16, 16), keyed.sample_keys(0, 0, torch.arange(4))


JOINT = PolicyConfig(keep=(0.75, 0.5, 0.25), joint=True, samples=2, rloo=True, equal_counts=True)


def test_a_joint_step_divides_the_batch_over_the_groups(three_groups):
    model, teacher, images, keys = three_groups
    labels = torch.zeros(4, dtype=torch.int64)
    config = RewardConfig(label="dense", divergence=1.0)
    stage = PolicyGradientStage(model, [0, 2], config, JOINT, teacher).train()
    loss, metrics = stage(images, labels, keys)
    loss.backward()
    parts = [stage.of_group(g, images[i::2], labels[i::2], keys[i::2]) for i, g in enumerate([0, 2])]
    assert loss.item() == pytest.approx(sum(part.item() for part, _ in parts) / 2, rel=1e-5)
    assert metrics["reward"].item() == pytest.approx(sum(found["reward"].item() for _, found in parts) / 2)
    moved = [any(p.grad is not None and p.grad.any() for p in own.parameters()) for own in model.interpreters]
    assert moved == [True, False, True]
    with pytest.raises(iared2.InputError, match="larger batch_size"):
        stage(images[:1], labels[:1], keys[:1])


def test_in_a_joint_step_the_other_groups_decide_as_they_are_deployed(three_groups):
    model, _, images, keys = three_groups
    stage = PolicyGradientStage(model, [0, 1, 2], RewardConfig(), JOINT).train()
    counts = {}
    decide = model.decide

    def spy(scores, alive, group, decision):
        keep = decide(scores, alive, group, decision)
        counts[group] = keep.sum(1).tolist()
        return keep

    model.decide = spy
    stage.of_group(1, images, torch.zeros(4, dtype=torch.int64), keys)
    assert counts[0] == [12] * 4
    assert len(counts[1]) == 8  # two draws of each image
    assert len(set(counts[1])) > 1
    assert counts[2] == [4] * 8


def test_the_divergence_from_the_dense_model_is_subtracted_from_the_reward(three_groups):
    model, teacher, images, keys = three_groups
    labels = torch.zeros(4, dtype=torch.int64)
    rewards = []
    for weight in (0.0, 1.0, 3.0):
        config = RewardConfig(label="dense", divergence=weight)
        stage = PolicyGradientStage(model, [2], config, replace(JOINT, joint=False), teacher).train()
        rewards.append(stage(images, labels, keys)[1]["reward"].item())
    assert rewards[0] - rewards[1] > 1e-5
    assert rewards[0] - rewards[2] == pytest.approx(3 * (rewards[0] - rewards[1]), rel=1e-4)


def test_without_a_baseline_there_is_no_greedy_pass(enumerated):
    model, image, _, _ = enumerated
    seen = []
    head = model.head
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(model, "head", lambda packed: seen.append(packed.num_images) or head(packed))
        for rloo in (True, False):
            stage = stage_of(model, PolicyConfig(samples=3, rloo=rloo))
            keys = keyed.sample_keys(1, 0, torch.arange(4))
            _, metrics = stage(image.expand(4, -1, -1, -1), torch.full((4,), LABEL), keys)
            assert any(name.endswith("greedy") for name in metrics) is not rloo
    assert seen == [12, 16]
    model.requires_grad_(True)


@pytest.mark.parametrize(
    ("reward", "needed"), [("", False), ("label = 'dense'", True), ("divergence = 1.0", True), ("tau = 1.0", False)]
)
def test_the_dense_model_runs_only_for_rewards_that_need_it(three_groups, reward, needed, tmp_path):
    """Fine-tuning may need it all the same."""
    model, teacher, _, _ = three_groups
    (tmp_path / "recipe.toml").write_text(f"[reward]\n{reward}\n[finetune]\ndistill = 0.5\n")
    stages = stages_of(read_recipe(tmp_path / "recipe.toml"), model, teacher)
    steps = {stage.section: stage.step() for stage in stages}
    assert (steps["policy_gradient"].teacher is teacher) == needed
    assert steps["finetune"].teacher is teacher


def test_without_classes_the_reward_is_the_cosine_with_the_dense_embedding():
    torch.manual_seed(0)
    model = iared2.from_timm(
        "deit_tiny_patch16_224", img_size=16, patch_size=4, embed_dim=32, depth=3, num_heads=2, num_classes=0
    ).eval()
    images, keys = torch.randn(6, 3, 16, 16), keyed.sample_keys(0, 0, torch.arange(6))
    policy = PolicyConfig(keep=(0.5, 0.5, 0.25), joint=True, samples=2, rloo=True)
    config = RewardConfig(label="dense", divergence=0.5)
    with pytest.raises(InputError, match=r"reward\.label"):
        PolicyGradientStage(model, [0, 2], config, policy)
    stage = PolicyGradientStage(model, [0, 2], config, policy, model.backbone)
    labels = torch.zeros(6, dtype=torch.int64)
    loss, metrics = stage(images, labels, keys)
    loss.backward()
    assert any(parameter.grad.abs().sum() > 0 for parameter in model.interpreters[0].parameters())

    # the same by hand, for the draws of the last group alone
    _, last = stage.of_group(2, images, labels, keys)
    with torch.no_grad():
        packed, _, _ = model.reduce(model.embed(images), range(2), stage.greedy)
        scores = model.score(packed, 2)
        probability, _ = stage.probability(scores, packed.alive, 2)
        u = sample(probability, packed.alive, keys, 2, 2)
        ends, _, (keep,) = model.reduce(packed, range(2, 3), lambda scores, alive, group: u)
        cosine = torch.cosine_similarity(model.head(ends), model.backbone(images).repeat(2, 1)).double().clamp(0, 1)
    expected = reward(keep.sum(1), 16, cosine, config) - 0.5 * (1 - cosine)
    assert last["reward"].item() == pytest.approx(expected.mean().item(), abs=1e-5)
    assert last["top1_sampled"].item() == pytest.approx(100 * cosine.mean().item(), abs=1e-4)
    assert metrics["reward"].isfinite()

    # neighbours in place of the cosine
    with_neighbours = replace(config, neighbours=2)
    _, found = PolicyGradientStage(model, [2], with_neighbours, policy, model.backbone)(images, labels, keys)
    with torch.no_grad():
        shared = overlap(model.backbone(images), model.head(ends), 2)
    assert 0 < shared.mean() < 1
    assert found["top1_sampled"].item() == pytest.approx(100 * shared.mean().item(), abs=1e-4)
    expected = reward(keep.sum(1), 16, shared, config) - 0.5 * (1 - cosine)
    assert found["reward"].item() == pytest.approx(expected.mean().item(), abs=1e-5)
    model.reset_classifier(3)
    with pytest.raises(InputError, match=r"reward\.neighbours"):
        PolicyGradientStage(model, [2], with_neighbours, policy, model.backbone)
