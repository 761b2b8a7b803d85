"""The benchmark's additional baseline: token merging."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode, flop_registry

import iared2
from iared2.errors import InputError
from iared2.model import onednn

sys.path.insert(0, str(Path(__file__).resolve().parents[2] / "benchmarks"))
from merging import merge, merging, merging_gmacs, r_for

pytestmark = pytest.mark.skipif(not onednn.AVAILABLE, reason="token merging is timed with oneDNN's layers")


@pytest.fixture(scope="module")
def model():
    torch.manual_seed(0)
    return iared2.from_timm(
        "deit_tiny_patch16_224", img_size=64, patch_size=8, embed_dim=48, num_heads=3, depth=6, num_classes=5
    ).eval()


def test_merging_nothing_is_the_dense_model(model):
    x = torch.randn(3, 3, 64, 64)
    with torch.no_grad():
        torch.testing.assert_close(merging(model, x, 0), model.backbone(x), atol=1e-5, rtol=1e-4)
    other = iared2.from_timm(
        "vit_medium_patch16_gap_256", img_size=64, patch_size=8, embed_dim=48, num_heads=3, depth=3
    )
    with pytest.raises(InputError, match="class token"):
        merging(other, x, 0)


def test_the_two_most_similar_tokens_become_their_weighted_mean():
    x = torch.tensor([[[9.0, 9.0], [1.0, 0.0], [0.0, 2.0], [0.0, 4.0], [3.0, -5.0]]])
    size = torch.tensor([[[1.0], [1.0], [1.0], [3.0], [1.0]]])
    merged, sizes = merge(x, size, x, 1)  # 2 and 3 point the same way, and lie in different sets
    assert merged[0, 0].tolist() == [9, 9]
    assert sizes[0, :, 0].tolist() == [1, 1, 1, 4]
    assert merged[0, -1].tolist() == [0, (2 + 3 * 4) / 4]


def test_multiply_adds(model):
    x = torch.randn(2, 3, 64, 64)
    if torch.ops.aten._scaled_dot_product_flash_attention_for_cpu not in flop_registry:
        pytest.skip("this torch does not count attention on a CPU")
    with FlopCounterMode(display=False) as counter, torch.inference_mode():
        merging(model, x, 5)
    counted = counter.get_total_flops() / 2 / 2 / 1e9
    assert merging_gmacs(model, 5) == pytest.approx(counted, rel=0.01)
    r = r_for(model, 0.6 * model.dense_macs / 1e9)
    assert merging_gmacs(model, r) == pytest.approx(0.6 * model.dense_macs / 1e9, rel=0.05)
