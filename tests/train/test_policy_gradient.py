"""The estimate of REINFORCE is the gradient of the expected reward, and the stage finds the patches that matter."""

from __future__ import annotations

import pytest
import torch
from policy_steps import LABEL, N, exact_gradient, greedy_reward, log_prob

import iared2
from iared2 import keyed
from iared2.model.decide import keep_all, sample
from iared2.train import policy_gradient
from iared2.train.finetune import FinetuneStage
from iared2.train.policy_gradient import PolicyGradientStage, policy_gradient_loss
from iared2.train.reward import RewardConfig, reward


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
