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
    model.threshold = float(model.trace(x).scores[0].median()) + 1e-5  # not a score itself, lest rounding decides
    out = model.trace(x)
    assert out.kept.float().mean() < 0.9
    if dropped == "merged":
        assert (out.kept[0].sum(1) < 24).all(), "an image that drops nothing here would not be counted"
    assert count(lambda: model(x)) == out.macs.sum()


class Adapter(torch.nn.Module):
    """A layer with a low-rank branch beside it, as PEFT wraps it: neither a weight nor sizes of its own."""

    def __init__(self, base):
        super().__init__()
        self.base_layer = base
        if isinstance(base, torch.nn.Linear):
            self.lora = torch.nn.Sequential(
                torch.nn.Linear(base.in_features, 2, bias=False), torch.nn.Linear(2, base.out_features, bias=False)
            )

    def forward(self, x):
        return self.base_layer(x) + (self.lora(x) if hasattr(self, "lora") else 0)


@pytest.mark.parametrize("layer", ["blocks.1.mlp.fc2", "blocks.1.attn.proj", "attn_pool.kv", "attn_pool.q",
                                   "attn_pool.mlp.fc1", "head", "patch_embed.proj"])  # fmt: skip
def test_wrapped_layers_are_counted(layer):
    tiny = {"img_size": 16, "patch_size": 4, "embed_dim": 48, "depth": 3, "num_heads": 3, "num_classes": 5}
    model = iared2.from_timm("vit_base_patch16_siglip_224", **tiny).eval().requires_grad_(False)
    parent, _, name = layer.rpartition(".")
    parent = model.backbone.get_submodule(parent)
    setattr(parent, name, Adapter(getattr(parent, name)))
    assert count(lambda: model.backbone(torch.randn(4, 3, 16, 16))) == 4 * model.dense_macs


@pytest.mark.parametrize(("name", "gmacs"), [("deit_small_patch16_224", 4.6), ("deit_base_patch16_224", 17.6)])
def test_published_figures(name, gmacs):
    with torch.device("meta"):
        model = iared2.from_timm(name)
    assert model.dense_macs / 1e9 == pytest.approx(gmacs, rel=0.01)
    everything = torch.full((3, 1), 196)
    interpreters = int(model.count_macs(everything)) - model.dense_macs
    assert 0 < interpreters <= 0.001 * model.dense_macs
