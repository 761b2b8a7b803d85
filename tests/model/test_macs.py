from __future__ import annotations

import pytest
import torch
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

import iared2


def count(run):
    # torch 2.10 does not count the fused attention of a CPU; the plain one is made of products that it counts
    with FlopCounterMode(display=False) as counter, sdpa_kernel(SDPBackend.MATH), torch.no_grad():
        run()
    return counter.get_total_flops() / 2


@pytest.mark.parametrize("dropped", ["gone", "merged"])
def test_equal_to_torchs_counter(family, dropped):
    torch.manual_seed(0)
    name, kwargs = family
    model, x = iared2.from_timm(name, dropped=dropped, **kwargs).eval().requires_grad_(False), torch.randn(4, 3, 48, 32)
    assert count(lambda: model.backbone(x)) == 4 * model.dense_macs
    model.threshold = float(model.trace(x).scores[0].median())
    out = model.trace(x)
    assert out.kept.float().mean() < 0.9
    if dropped == "merged":
        assert (out.kept[0].sum(1) < 24).all(), "an image that drops nothing here would not be counted"
    assert count(lambda: model(x)) == out.macs.sum()


@pytest.mark.parametrize(("name", "gmacs"), [("deit_small_patch16_224", 4.6), ("deit_base_patch16_224", 17.6)])
def test_published_figures(name, gmacs):
    with torch.device("meta"):
        model = iared2.from_timm(name)
    assert model.dense_macs / 1e9 == pytest.approx(gmacs, rel=0.01)
    everything = torch.full((3, 1), 196)
    interpreters = int(model.count_macs(everything)) - model.dense_macs
    assert 0 < interpreters <= 0.001 * model.dense_macs
