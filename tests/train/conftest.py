"""What the tests of the policy stage share."""

from __future__ import annotations

import itertools

import pytest
import torch
from policy_steps import LABEL, N

import iared2
from iared2.model.decide import keep_all
from iared2.train.reward import RewardConfig, reward


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
