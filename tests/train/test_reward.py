from __future__ import annotations

import re
from pathlib import Path

import pytest
import torch

import iared2
from iared2.errors import InputError
from iared2.train.reward import RewardConfig, alike, correctness, overlap, reward


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


def test_right_or_wrong_or_how_right():
    logits, labels = torch.tensor([[0.0, 2.0], [1.0, 0.0], [0.0, 0.0]]).log1p(), torch.tensor([1, 1, 0])
    found = correctness(logits, labels, RewardConfig())
    assert found.dtype == torch.float64
    assert found.tolist() == [1, 0, 1]
    soft = correctness(logits, labels, RewardConfig(soft_reward=True))
    torch.testing.assert_close(soft, torch.tensor([3 / 4, 1 / 3, 1 / 2], dtype=torch.float64), rtol=0, atol=1e-6)


def test_a_soft_reward_lies_between_right_and_wrong():
    config = RewardConfig(tau=1.5, soft_reward=True)
    found = reward(torch.full((3,), 4), 8, torch.tensor([0.0, 0.5, 1.0]), config)
    assert found.tolist() == [-1.5, (0.75 - 1.5) / 2, 0.75]
    several = reward(torch.full((2, 3), 4), 8, torch.tensor([0.0, 0.5, 1.0]).expand(2, 3), config)
    assert torch.equal(several, found.expand(2, 3))


def test_a_device_without_float64_gets_float32():
    """MPS; its stand-in here is the device without memory."""
    logits, labels = torch.zeros(4, 3, device="meta"), torch.zeros(4, dtype=torch.int64, device="meta")
    for config in (RewardConfig(), RewardConfig(soft_reward=True)):
        correct = correctness(logits, labels, config)
        assert correct.dtype == reward(labels, 8, correct, config).dtype == torch.float32


def test_no_training_code_asks_a_device_for_float64():
    source = Path(iared2.__file__).parent
    files = [*(source / "train").glob("*.py"), source / "measure.py"]
    # of numbers that were read back from the device, for the checkpoint
    assert [f.name for f in files if re.search(r"torch\.float64|\.double\(", f.read_text())] == ["optimizer.py"]


def test_an_embedding_is_as_correct_as_it_is_like_the_dense_one():
    dense = torch.tensor([[3.0, 4.0], [1.0, 0.0], [1.0, 0.0]])
    found = alike(dense, torch.tensor([[4.0, 3.0], [-1.0, 0.0], [5.0, 0.0]]))
    assert found.tolist() == pytest.approx([24 / 25, 0, 1])
    assert alike(dense.to("meta"), dense.to("meta")).dtype == torch.float32


def at(*degrees):
    angle = torch.tensor(degrees, dtype=torch.float64).deg2rad()
    return (torch.arange(len(degrees))[:, None] + 1) * torch.stack([angle.cos(), angle.sin()], 1).float()


def test_an_embedding_is_as_correct_as_its_neighbours():
    dense = at(0, 10, 25, 45, 90)  # the two nearest of each, by number: 1 2, 0 2, 1 3, 2 1, 3 2
    first = at(20, 18, 30, 49, 60)  # 2 1, 2 0, 3 1, 2 1, 3 2
    second = at(30, 10, 25, 45, -80)  # 2 3, 0 2, 1 3, 2 1, 0 1
    both = torch.cat([first, second])
    assert overlap(dense, both, 1).tolist() == [0, 0, 0, 1, 1, 0, 1, 1, 1, 0]
    assert overlap(dense, both, 2).tolist() == [1, 1, 1, 1, 1, 0.5, 1, 1, 1, 0]
    assert overlap(dense.to("meta"), both.to("meta"), 2).dtype == torch.float32
    for k in (0, 4, 5):
        with pytest.raises(InputError, match=rf"neighbours = {k} of 5 images"):
            overlap(dense, dense, k)
