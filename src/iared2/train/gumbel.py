"""Policy stage of a baseline: straight-through Gumbel-softmax (supplementary material, section 4; method.md section 5).

For each patch, keep or drop is drawn. The forward pass uses the hard draw, and the gradient goes through the soft draw
(Jang et al. 2017). Loss = cross entropy + λ (mean keep ratio − target)². A removed patch would have no gradient, so no
row is removed here: the attention of later groups gives a dropped patch the weight 0, which has the same effect. The
temperature is 1.
"""

from __future__ import annotations

from functools import partial

import torch
import torch.nn.functional as F
from torch import Tensor

from .. import keyed
from ..device import widest_float
from ..model import backbone as vit
from ..model.decide import SITE_SAMPLE
from ..model.tokens import PackedTokens
from .policy_gradient import PolicyGradientStage


class GumbelStage(PolicyGradientStage):
    """Computes the loss and the metrics of one step on a batch. Arguments as for `PolicyGradientStage`."""

    def forward(self, images: Tensor, labels: Tensor, keys: Tensor) -> tuple[Tensor, dict[str, Tensor]]:
        """One step on a batch; arguments and result as for `PolicyGradientStage`, without rewards."""
        model, (group,) = self.model, self.groups
        with torch.no_grad():
            packed, _, _ = model.reduce(model.embed(images, keys), range(group))
            alive = packed.alive
        scores = model.score(packed, group)
        # the difference of two Gumbel draws is logistic: one draw decides between keep and drop
        draws = keyed.uniform(keys, SITE_SAMPLE + group, scores.shape[1]).clamp(1e-6, 1 - 1e-6)
        soft = (model.decision.logits(scores) + draws.logit()).sigmoid()
        hard = (soft > 0.5).to(soft.dtype)
        mask = (hard - soft.detach() + soft) * alive  # straight through

        x = packed.x
        attend = partial(attend_masked, mask=mask)
        for index in range(model.groups[group].start, len(model.backbone.blocks)):
            x = vit.run_block(model.backbone.blocks[index], x, packed, index, attend=attend)
        logits = model.head(packed.with_x(x)).float()
        ratio = mask.sum(1) / mask.shape[1]
        target = self.policy.keep[group]
        loss = F.cross_entropy(logits, labels) + self.policy.gumbel_weight * (ratio.mean() - target) ** 2
        wide = widest_float(logits.device)
        metrics = {
            "loss": loss.detach(),
            "keep_ratio_sampled": ratio.detach().to(wide).mean(),
            "keep_ratio_greedy": self.greedy(scores.detach(), alive, group).to(wide).mean(),
            "top1_sampled": 100 * (logits.argmax(1) == labels).to(wide).mean(),
        }
        return loss, metrics


def attend_masked(
    q: Tensor, k: Tensor, v: Tensor, packed: PackedTokens, dropout: float = 0.0, *, mask: Tensor
) -> Tensor:
    """`attend`, where patches of ``mask (B, N)`` 0 get no attention; differentiable in the mask.

    Needs a class token: without one, an image whose patches are all masked would have no weights.
    """
    keep = F.pad(mask, (packed.num_prefix_tokens, 0), value=1.0).flatten()[packed.token_ids]
    out = []
    for q_run, k_run, v_run, keep_run in zip(*map(packed.buckets, (q, k, v, keep)), strict=True):
        heads = [rows.transpose(1, 2).float() for rows in (q_run, k_run, v_run)]
        logits = heads[0] @ heads[1].mT * q.shape[-1] ** -0.5  # (images, H, length, length)
        weights = (logits - logits.amax(-1, keepdim=True).detach()).exp() * keep_run[:, None, None, :]
        y = (weights / weights.sum(-1, keepdim=True)) @ heads[2]
        out.append(y.transpose(1, 2).flatten(0, 1).to(v.dtype))
    return torch.cat(out)
