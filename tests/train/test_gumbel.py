from __future__ import annotations

from functools import partial

import pytest
import torch
from planted import PLANTED, learn, planted_images, untrained_model
from tiny import sharp_images, sharp_model

from iared2 import keyed
from iared2.model import backbone as vit
from iared2.train.gumbel import GumbelStage, attend_masked
from iared2.train.policy_gradient import PolicyConfig
from iared2.train.reward import RewardConfig

TINY = {"img_size": (48, 32), "patch_size": 8, "embed_dim": 48, "num_heads": 3, "num_classes": 7, "depth": 6}
KEYS = keyed.sample_keys(0, 0, torch.arange(5))


@pytest.mark.parametrize("name", ["deit_tiny_patch16_224", "deit_tiny_distilled_patch16_224"])
def test_a_masked_patch_is_as_good_as_gone(name):
    """Also where some were gone before, so that the batch is ragged and its images are sorted by length."""
    model = sharp_model((name, TINY))
    images = sharp_images()
    first, second = (keyed.uniform(KEYS, site, 24) for site in range(2))
    alive = first < torch.tensor([1.0, 0.6, 0.8, 0.4, 0.8])[:, None]
    keep = alive & (second < 0.5)
    with torch.no_grad():
        packed = model.embed(images).select(alive)
        dropped = model.run_blocks(model.run_blocks(packed.select(keep), 1), 2)
        x = packed.x
        for index in range(2, 6):
            attend = partial(attend_masked, mask=keep.float())
            x = vit.run_block(model.backbone.blocks[index], x, packed, index, attend=attend)
        masked = packed.with_x(x)
    assert len(set(packed.lengths)) > 2
    torch.testing.assert_close(masked.prefix(), dropped.prefix(), rtol=0, atol=1e-5)
    torch.testing.assert_close(model.head(masked), model.head(dropped), rtol=0, atol=1e-5)
    patches = [p.to_dense(p.x)[:, p.num_prefix_tokens :][keep] for p in (masked, dropped)]
    torch.testing.assert_close(*patches, rtol=0, atol=1e-5)


def test_the_gradient_reaches_the_interpreter_and_nothing_else():
    model = sharp_model(("deit_tiny_patch16_224", TINY))
    model.threshold = 0.5
    policy = PolicyConfig(decisions="gumbel", keep=(0.7, 0.5, 0.3), gumbel_weight=0.0)  # of the cross entropy alone
    loss, metrics = GumbelStage(model, [1], RewardConfig(), policy).train()(sharp_images(), torch.arange(5), KEYS)
    loss.backward()
    grads = {name: p.grad for name, p in model.named_parameters() if p.grad is not None}
    assert grads.keys() == {f"interpreters.1.{n}" for n in ("query.weight", "query.bias", "key.weight", "key.bias")}
    assert all(grad.isfinite().all() for grad in grads.values())
    assert grads["interpreters.1.query.weight"].abs().max() > 0
    assert 0 < metrics["keep_ratio_sampled"] < 1


def test_it_learns_the_budget_and_what_matters():
    model = untrained_model(misled=True)
    policy = PolicyConfig(decisions="gumbel", keep=(0.25,), gumbel_weight=10.0)
    metrics = learn(GumbelStage(model, [0], RewardConfig(), policy), 80, 64)
    ratios = torch.stack([m["keep_ratio_sampled"] for m in metrics])
    assert ratios[0] > 0.45
    assert ratios[-5:].mean() == pytest.approx(0.25, abs=0.05)
    with torch.no_grad():
        mean = model.score(model.embed(planted_images(64)[0]), 0).mean(0)
    others = [i for i in range(16) if i not in PLANTED]
    assert mean[PLANTED].min() > 2 * mean[others].mean()
