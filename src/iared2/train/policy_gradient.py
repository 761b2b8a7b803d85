"""The policy stage of a group: REINFORCE (Algorithm 1, lines 2–6; method.md section 2).

One step, for group i:

1. everything before the group runs once, without a graph;
2. the interpreter scores the patches alive; this is the only graph;
3. the sampled decisions on the same image, and the greedy one if it is the baseline, run as *one* packed batch;
   later groups drop nothing more;
4. advantage = reward(sampled) − baseline weights the log-probability of each sampled decision in the loss.

The network is in evaluation mode and every other parameter is frozen.

Deviations from the paper, all of them settings that are off by default:

1. ``keep``: decisions are drawn at a budget. One shift of all logits, computed for each batch, sets the mean share that
   is drawn. The deployed threshold is calibrated to the same share. So the policy learns which patches to keep, not how
   many, and samples at the budget at which it is deployed. With ``equal_counts``, each image has its own shift, and the
   counts themselves are deployed.
2. ``temperature``: the logits are divided by a number that falls during the stage, so that the samples become as sharp
   as the threshold.
3. ``samples`` and ``rloo``: several decisions per image; the baseline of each is the mean reward of the others (Kool et
   al., 2019). The greedy decision is then not run.
4. ``spread``: `Decision.spread` shifts the logits of draws and of the deployed decision by the same pattern.
5. ``reward.label``, ``reward.soft_reward`` and ``reward.divergence``: which prediction is correct, how correct, and how
   far from the dense model's (reward.py).
6. ``joint``: one stage for all interpreters in place of one per group. Every step divides the batch over the groups.
   On each part, one group draws, and the groups before and after it decide as they are deployed, at their budget. So
   the credit of a draw is the change of the final prediction, whatever later groups do with what it left.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from ..errors import InputError
from ..model.decide import Decide, keep_all, sample, top_k
from ..model.reduced import ReducedVisionTransformer
from ..model.schedule import divergence
from .reward import TEMPERATURE, RewardConfig, alike, correctness, overlap, reward

ANCHOR = 0.02  # found by trial: docs/LOG.md


@dataclass(frozen=True)
class PolicyConfig:
    """How patches are chosen, and how the policy is trained. The defaults are the paper's."""

    decisions: str = "learned"
    """"learned" by REINFORCE; "gumbel": by straight-through Gumbel-softmax; or a baseline without a policy, which
    is fine-tuned with its own decisions: "random", "attention" (of the class token), "centre", "spread" (evenly),
    "shift" (how far the following MLP moves a patch), "similarity" (the most similar go first)."""
    keep: tuple[float, ...] = ()
    """Shares of the patches alive after each group, D numbers that do not rise: the budget of the draws and of the
    threshold, or of a baseline. A group that drops nothing has no stages. Empty: the threshold is 0.5."""
    equal_counts: bool = False
    """Every image keeps the same number of patches, its best-scored ones (``num_keep`` of the model), and the draws
    meet the budget per image; false: one threshold for all images. Needs keep."""
    spread: float = 0.0
    """Spreads kept patches over the image: draws and thresholds depend on the position of a patch (`Decision.spread`).
    0: as published; 1: as if patches were drawn with their scores as probabilities."""
    joint: bool = False
    """One policy stage, and one fine-tuning stage, for all groups together; false: one of each per group, as published.
    Needs keep."""
    samples: int = 1
    """Sampled decisions per image and step."""
    rloo: bool = False
    """The baseline of a sample is the mean reward of the other samples of its image; false: the greedy decision's."""
    temperature: float = 1.0
    """Divisor of the logits of the scores at the end of the stage; 1 at its beginning, geometric in between."""
    gumbel_weight: float = 2.0
    """λ, the weight of (mean keep ratio − target)² in the loss of "gumbel"; the target is keep."""


class PolicyGradientStage(nn.Module):
    """Computes the loss and the metrics of one step on a batch.

    Args:
        model: its interpreters of ``groups`` become the only trainable part.
        groups: the groups that are trained, 0…D−1: one, or with ``policy.joint`` several.
        config: the reward.
        policy: how decisions are drawn and rewarded.
        teacher: the dense model, if ``config`` asks for its prediction. A model without classes needs it: a decision is
            as correct as its embedding is like the dense one (`reward.alike`).
        neighbours: k, of a model without classes: a decision is as correct as its embedding has the dense one's k
            nearest neighbours in the batch (`reward.overlap`) instead.

    Raises:
        InputError: the model has no classes, and there is no teacher; or classes, and a reward for neighbours.
    """

    progress = 0.0
    """Progress of the stage, 0…1; the trainer sets it before every step."""

    def __init__(
        self,
        model: ReducedVisionTransformer,
        groups: Sequence[int],
        config: RewardConfig,
        policy: PolicyConfig | None = None,
        teacher: nn.Module | None = None,
        neighbours: int = 0,
    ) -> None:
        super().__init__()
        if not model.num_classes and teacher is None:
            raise InputError('a model without classes learns from the dense one: set reward.label = "dense"')
        if model.num_classes and neighbours:
            raise InputError("neighbours is for models without classes, and this one has some: give 0")
        self.model, self.groups, self.config = model, tuple(groups), config
        self.policy, self.teacher, self.neighbours = policy or PolicyConfig(), teacher, neighbours
        model.requires_grad_(False)
        for group in self.groups:
            model.interpreters[group].requires_grad_(True)

    def train(self, mode: bool = True) -> PolicyGradientStage:
        """Evaluation mode for all modules: dropout and stochastic depth would add noise to the reward."""
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
        several = len(self.groups)
        if len(images) < several:
            raise InputError(f"{len(images)} images cannot be divided over {several} groups; set a larger batch_size")
        parts = [
            self.of_group(group, images[i::several], labels[i::several], keys[i::several])
            for i, group in enumerate(self.groups)
        ]
        weights = torch.tensor([len(images[i::several]) / len(images) for i in range(several)]).to(images.device)
        loss = (torch.stack([loss for loss, _ in parts]) * weights).sum()
        metrics = {}
        for name in parts[0][1]:
            values = torch.stack([found[name] for _, found in parts])
            metrics[name] = (values * weights).sum()
        return loss, metrics

    def of_group(self, group: int, images: Tensor, labels: Tensor, keys: Tensor) -> tuple[Tensor, dict[str, Tensor]]:
        """`forward` for the draws of one group."""
        model, samples = self.model, self.policy.samples
        before, after = (self.greedy, self.greedy) if self.policy.joint else (model.decision, keep_all)
        dense = None
        with torch.no_grad():
            if self.teacher is not None:
                dense = self.teacher(images)
                labels = dense.argmax(1) if self.config.label == "dense" and model.num_classes else labels
            packed, _, _ = model.reduce(model.embed(images, keys), range(group), before)
            alive = packed.alive
        scores = model.score(packed, group)  # (B, N)
        probability, anchor = self.probability(scores, alive, group)

        with torch.no_grad():
            u = sample(probability, alive, keys, group, samples)  # (k·B, N)
            drawn = u if self.policy.rloo else torch.cat([u, self.greedy(scores, alive, group)])
            several = len(drawn) // len(images)
            all_of_them, _, kept = model.reduce(packed, range(group, model.num_groups), _first(drawn, group, after))
            keep, logits = kept[0], model.head(all_of_them)
            labels, each = labels.repeat(several), None if dense is None else dense.repeat(several, 1)
            if model.num_classes:
                right, correct = logits.argmax(1) == labels, correctness(logits, labels, self.config)
            else:
                assert dense is not None
                assert each is not None
                k = self.neighbours
                right = correct = overlap(dense, logits, k) if k else alike(each, logits)
            rewards = reward(keep.sum(1), scores.shape[1], correct, self.config)
            if self.config.divergence and each is not None:
                far = divergence(each, logits, TEMPERATURE, model.num_classes > 0).to(rewards.dtype)
                rewards = rewards - self.config.divergence * far
            rewards = rewards.view(several, -1)  # (k, B), and a last row of the greedy decision
            if self.policy.rloo:
                advantage = (rewards - rewards.mean(0)) * samples / (samples - 1)
            else:
                advantage = rewards[:-1] - rewards[-1]

        loss = policy_gradient_loss(probability.repeat(samples, 1), u, alive.repeat(samples, 1), advantage.flatten())
        loss = loss + anchor
        ratios, rights = (x.to(rewards.dtype).view(several, len(images), -1).mean(2) for x in (keep, right))
        metrics = {
            "loss": loss.detach(),
            "reward": rewards[:samples].mean(),
            "keep_ratio_sampled": ratios[:samples].mean(),
            "top1_sampled": 100 * rights[:samples].mean(),
            "entropy": bernoulli_entropy(probability.detach(), alive),
        }
        if not self.policy.rloo:
            metrics["reward_greedy"] = rewards[-1].mean()
            metrics["keep_ratio_greedy"] = ratios[-1].mean()
            metrics["top1_greedy"] = 100 * rights[-1].mean()
        return loss, metrics

    def greedy(self, scores: Tensor, alive: Tensor, group: int) -> Tensor:
        """The decision of a group that is deployed, ``(B, N)`` bool: by its threshold, or the best of its budget.

        With ``equal_counts``, the share is per image; otherwise it is of the batch, as in calibration.
        """
        decision = self.model.decision
        if not self.policy.keep:
            return decision(scores, alive, group)
        scores = decision.standing(scores)
        rows = len(scores) if self.policy.equal_counts else 1
        ranked, living = scores.reshape(rows, -1), alive.reshape(rows, -1)
        num_keep = round(self.policy.keep[group] * ranked.shape[1])
        return top_k(ranked, living, num_keep).view_as(alive)

    def probability(self, scores: Tensor, alive: Tensor, group: int) -> tuple[Tensor, Tensor]:
        """Probability of drawing each patch ``(B, N)``: its score, or the score sharpened and shifted to the budget.

        Also returns a small loss that moves the logits by the shift. Without it, a common shift of all scores
        would not affect the draws, and would drift to where sigmoids are flat.
        """
        policy, decision, none = self.policy, self.model.decision, scores.new_zeros(())
        if policy.temperature == 1 and not policy.keep and not decision.spread:
            return scores, none
        logits = decision.logits(scores.masked_fill(~alive, 0.5)) / policy.temperature**self.progress
        if not policy.keep:
            return logits.sigmoid(), none
        shift = budget_shift(logits.detach(), alive, policy.keep[group], policy.equal_counts)
        if self.model.interpreters[group].relative:  # has no such freedom
            return (logits + shift).sigmoid(), none
        over = 1 if policy.equal_counts else (0, 1)
        mean = (logits * alive).sum(over, keepdim=True) / alive.sum(over, keepdim=True).clamp_min(1)
        # 20 where too few are alive
        return (logits + shift).sigmoid(), -ANCHOR * (shift.clamp(-5, 5) * mean).mean()


def dropping(keep: Sequence[float]) -> list[int]:
    """The groups that drop patches, by the shares alive after each (`PolicyConfig.keep`)."""
    return [i for i, share in enumerate(keep) if share < (1.0, *keep)[i]]


def _first(drawn: Tensor, group: int, after: Decide) -> Decide:
    """What was drawn in one group, another decision in those after it."""
    return lambda scores, alive, i: drawn if i == group else after(scores, alive, i)


def budget_shift(logits: Tensor, alive: Tensor, share: float, each: bool = False) -> Tensor:
    """The b for which ``sigmoid(logits + b)`` of the patches alive sums to ``share`` of all patches ``(B, N)``.

    Found by bisection; if fewer patches are alive than that, a shift that keeps nearly all of them.

    Args:
        logits: ``(B, N)``.
        alive: ``(B, N)`` bool.
        share: 0…1.
        each: per image, not per batch.

    Returns:
        ``(1, 1)``, or ``(B, 1)``.
    """
    high = logits.abs().amax().expand(len(logits) if each else 1, 1) + 20
    low = -high
    for _ in range(40):
        middle = (low + high) / 2
        over = ((logits + middle).sigmoid() * alive).mean(1 if each else (0, 1), keepdim=True) > share
        low, high = torch.where(over, low, middle), torch.where(over, middle, high)
    return high


def policy_gradient_loss(probability: Tensor, u: Tensor, alive: Tensor, advantage: Tensor) -> Tensor:
    """``−mean_b A_b · log π(u_b)``; its gradient is minus the REINFORCE estimate of ``∇J``.

    Args:
        probability: ``(B, N)`` of keeping each patch: I, in the paper's form; carries the gradient.
        u: ``(B, N)`` bool, the sampled decision.
        alive: ``(B, N)`` bool: only patches alive at the entrance of the group were decided on.
        advantage: ``(B,)`` A, without gradient.
    """
    of_decision = torch.where(u, probability, 1 - probability)
    # the floor only guards log(0) where a sigmoid has saturated; such a draw has probability 0 otherwise
    log_prob = of_decision.clamp_min(1e-12).log().masked_fill(~alive, 0).sum(1)
    return -(advantage.detach().to(log_prob.dtype) * log_prob).mean()


def bernoulli_entropy(probability: Tensor, alive: Tensor) -> Tensor:
    """Mean entropy of the decisions on the patches alive, in nats: 0.69 undecided, 0 certain."""
    entropy = torch.special.entr(probability) + torch.special.entr(1 - probability)
    return entropy.masked_fill(~alive, 0).sum() / alive.sum().clamp_min(1)
