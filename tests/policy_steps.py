"""Steps of the policy stage on one image, and the exact gradient that they estimate."""

from __future__ import annotations

import pytest
import torch

from iared2 import keyed
from iared2.train import policy_gradient
from iared2.train.policy_gradient import PolicyGradientStage
from iared2.train.reward import RewardConfig

N = 8
LABEL = 1


def log_prob(scores, u):
    return torch.where(u, scores, 1 - scores).log().sum(-1)


def exact_gradient(scores, every_u, rewards):
    scores = scores.detach().requires_grad_()
    (log_prob(scores, every_u).exp() * rewards).sum().backward()
    return scores.grad


def greedy_reward(scores, every_u, rewards):
    return rewards[(every_u == (scores > 0.5)).all(1)].item()


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
