"""The policy stage of a group: REINFORCE with a self-critical baseline (Algorithm 1, lines 2–6; method.md section 2).

One step, for group i:

1. what lies before the group runs once, without a graph;
2. the interpreter scores the living patches: the only graph there is;
3. two decisions on the same image, sampled and greedy, go on as *one* packed batch of 2B images; later groups drop
   nothing more;
4. advantage = reward(sampled) − reward(greedy), and the log-probability of the sampled decision carries it back.

The network is in evaluation mode and every other parameter is frozen.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

from ..model.decide import by_sampling, by_threshold, keep_all
from ..model.reduced import ReducedVisionTransformer
from .reward import RewardConfig, reward

GREEDY_THRESHOLD = 0.5


class PolicyGradientStage(nn.Module):
    """Calling it with a batch gives the loss and the metrics of one step.

    Args:
        model: its interpreter of ``group`` becomes the only trainable part.
        group: i, 0…D−1.
        config: the reward.
    """

    def __init__(self, model: ReducedVisionTransformer, group: int, config: RewardConfig) -> None:
        super().__init__()
        self.model, self.group, self.config = model, group, config
        model.requires_grad_(False)
        model.interpreters[group].requires_grad_(True)

    def train(self, mode: bool = True) -> PolicyGradientStage:
        """Evaluation mode throughout: dropout and stochastic depth would blur the reward."""
        self.model.eval()
        return self

    def forward(self, images: Tensor, labels: Tensor, keys: Tensor) -> tuple[Tensor, dict[str, Tensor]]:
        """One step on a batch.

        Args:
            images: ``(B, in_chans, height, width)``.
            labels: ``(B,)`` int64, hard.
            keys: ``(B,)`` int64, the images' keys: the Bernoulli draws are a function of them.

        Returns:
            The loss, and the step's metrics (docs/metrics.md) as detached scalars.
        """
        model, group = self.model, self.group
        with torch.no_grad():
            packed, _, _ = model.reduce(model.embed(images), range(group))
            alive = packed.alive
        scores = model.score(packed, group)  # (B, N)

        with torch.no_grad():
            u = by_sampling(keys)(scores, alive, group)
            greedy = by_threshold(GREEDY_THRESHOLD)(scores, alive, group)
            keep = model.keep_one(torch.cat([u, greedy]), scores.repeat(2, 1), alive.repeat(2, 1))  # (2B, N)
            both = model.run_blocks(packed.select(keep), group)
            both, _, _ = model.reduce(both, range(group + 1, model.num_groups), keep_all)
            correct = model.head(both).argmax(1) == labels.repeat(2)
            num_patches = scores.shape[1]
            rewards = reward(keep.sum(1), num_patches, correct, self.config)
            advantage = rewards[: len(u)] - rewards[len(u) :]

        loss = policy_gradient_loss(scores, u, alive, advantage)
        ratio, right = keep.double().mean(1).view(2, -1).mean(1), 100 * correct.double().view(2, -1).mean(1)
        mean_reward = rewards.view(2, -1).mean(1)
        metrics = {
            "loss": loss.detach(),
            "reward": mean_reward[0],
            "reward_greedy": mean_reward[1],
            "keep_ratio_sampled": ratio[0],
            "keep_ratio_greedy": ratio[1],
            "top1_sampled": right[0],
            "top1_greedy": right[1],
            "entropy": bernoulli_entropy(scores.detach(), alive),
        }
        return loss, metrics


def policy_gradient_loss(scores: Tensor, u: Tensor, alive: Tensor, advantage: Tensor) -> Tensor:
    """``−mean_b A_b · log π(u_b)``; its gradient is minus the REINFORCE estimate of ``∇J``.

    Args:
        scores: ``(B, N)`` I, the probability of keeping each patch; carries the gradient.
        u: ``(B, N)`` bool, the sampled decision.
        alive: ``(B, N)`` bool: only patches alive at the entrance of the group were decided on.
        advantage: ``(B,)`` A, carries none.
    """
    probability = torch.where(u, scores, 1 - scores)
    # the floor only guards log(0) where a sigmoid has saturated; such a draw has probability 0 otherwise
    log_prob = probability.clamp_min(1e-12).log().masked_fill(~alive, 0).sum(1)
    return -(advantage.detach().to(log_prob.dtype) * log_prob).mean()


def bernoulli_entropy(scores: Tensor, alive: Tensor) -> Tensor:
    """Mean entropy of the decisions on living patches, in nats: 0.69 undecided, 0 certain."""
    entropy = torch.special.entr(scores) + torch.special.entr(1 - scores)
    return entropy.masked_fill(~alive, 0).sum() / alive.sum().clamp_min(1)
