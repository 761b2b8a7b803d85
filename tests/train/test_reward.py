from __future__ import annotations

import pytest
import torch

from iared2.train.reward import RewardConfig, reward


@pytest.mark.parametrize(
    ("config", "expected"),
    [
        (RewardConfig(tau=1.5), [1.0, 0.75, 0.0, -1.5]),
        (RewardConfig(tau=0.5, squared=False), [1.0, 0.5, 0.0, -0.5]),
    ],
)
def test_equation_2(config, expected):
    correct = torch.tensor([True, True, True, False])
    assert reward(torch.tensor([0, 4, 8, 0]), 8, correct, config).tolist() == expected
