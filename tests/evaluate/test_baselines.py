"""The baselines compute what ours computes: otherwise their times would mean nothing."""

from __future__ import annotations

import pytest
import torch

import iared2
from iared2.errors import InputError
from iared2.evaluate.speed import baselines
from iared2.evaluate.speed.workload import by_the_policy, drawn
from iared2.model import onednn


def make(name="deit_tiny_patch16_224", **kwargs):
    torch.manual_seed(0)
    return iared2.from_timm(
        name, img_size=64, patch_size=8, embed_dim=48, num_heads=3, depth=3, num_classes=5, **kwargs
    ).eval()


@pytest.mark.parametrize("baseline", [baselines.masked, baselines.padded])
@pytest.mark.parametrize(
    "name",
    [
        "deit_tiny_patch16_224",
        "vit_small_patch14_reg4_dinov2",
        "vit_medium_patch16_gap_256",
        "vit_small_patch16_dinov3",
        "vit_base_patch16_rope_mixed_224",
    ],
)
@pytest.mark.parametrize("fast", [True, False])
def test_same_logits(baseline, name, fast, monkeypatch):
    if not fast:
        monkeypatch.setattr(onednn, "can_run", lambda *_: False)
    model, images = make(name), torch.randn(5, 3, 64, 64)
    workload = drawn(model, images, (0.8, 0.5, 0.3), 0.15)
    assert len(set(workload.num_keep[-1].tolist())) > 2
    with torch.inference_mode():
        want = model.trace(images, workload.decide).logits
        torch.testing.assert_close(baseline(model, images, workload.decide), want, atol=1e-5, rtol=1e-4)


def test_drawn_counts_follow_the_stated_distribution():
    model = make()
    workload = drawn(model, torch.randn(32, 3, 64, 64), (0.85, 0.6, 0.35), 0.12)
    shares = workload.num_keep / 64
    assert shares.mean(1).tolist() == pytest.approx([0.85, 0.6, 0.35], abs=0.01)
    assert shares[1].std().item() == pytest.approx(0.12, abs=0.02)
    one = drawn(model, torch.randn(1, 3, 64, 64), (0.85, 0.6, 0.35), 0.12)
    assert one.num_keep[:, 0].tolist() == [54, 38, 22]


def test_the_policys_own_counts():
    model, images = make(), torch.randn(4, 3, 64, 64)
    model.calibrate(images, keep=(0.7, 0.5, 0.2))
    workload = by_the_policy(model, images)
    with torch.inference_mode():
        output = model.trace(images)
    assert torch.equal(workload.num_keep, output.kept.sum(-1))
    assert workload.gmacs == pytest.approx(output.macs.double().mean().item() / 1e9)


@pytest.mark.parametrize("keep", [(0.5, 0.6, 0.4), (0.5, 0.4), (1.5, 1.0, 0.5)])
def test_senseless_shares_are_refused(keep):
    with pytest.raises(InputError, match="give 3 shares"):
        drawn(make(), torch.randn(2, 3, 64, 64), keep, 0.1)
