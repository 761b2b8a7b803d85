"""One result on every device: a packed ragged batch = each image alone = the masked oracle on a CPU in float32."""

from __future__ import annotations

import copy

import pytest
import torch
from oracle import masked_forward
from tiny import sharp_model

import iared2
from iared2.export.static import FixedCount
from iared2.model.attention import attend, attention_weights
from iared2.model.tokens import PackedTokens

FAMILIES = {
    "class token": ("deit_tiny_patch16_224", {"depth": 6}),
    "layer scale, registers": ("vit_small_patch14_reg4_dinov2", {"depth": 6}),
    "average pooling": ("vit_medium_patch16_gap_256", {"depth": 6}),
    "rotary": ("eva02_tiny_patch14_224", {"depth": 6}),
}
TINY = {"img_size": (128, 96), "patch_size": 8, "embed_dim": 48, "num_heads": 3, "num_classes": 7}
# 192 patches: torch has other kernels for more than 128 tokens
TOLERANCE = {torch.float32: 1e-4, torch.bfloat16: 0.05}
DTYPES = pytest.mark.parametrize("dtype", TOLERANCE, ids=["fp32", "bf16"])


@pytest.fixture(autouse=True)
def float32_is_float32():
    """By default, cuDNN computes the patch embedding with 10 bits of mantissa."""
    conv = torch.backends.cudnn.conv
    before, conv.fp32_precision = conv.fp32_precision, "ieee"
    yield
    conv.fp32_precision = before


def error(got, want):
    """Relative, in the 2-norm."""
    got, want = (torch.cat([t.detach().double().cpu().flatten() for t in ts]) for ts in (got, want))
    return float((got - want).norm() / want.norm())


def make(family="class token", dtype=torch.float32, **kwargs):
    name, more = FAMILIES[family]
    model = sharp_model((name, {**TINY, **more}), **kwargs)
    with torch.no_grad():  # less sharp: a softmax that is nearly a maximum amplifies the rounding of bfloat16
        for parameter in model.parameters():
            parameter.copy_(parameter.to(dtype))
        for block in model.backbone.blocks:
            (getattr(block.attn, "qkv", None) or block.attn.q_proj).weight.div_(4)
    return model


def images(batch=6):
    return torch.randn(batch, 3, 128, 96, generator=torch.Generator().manual_seed(1)).bfloat16().float()


def ragged(scores, alive, group):
    """Every image keeps another number of patches, the first one nearly all, the last one few."""
    draws = torch.rand(192, generator=torch.Generator().manual_seed(group)).to(scores.device)
    share = torch.linspace(0.97, 0.1, len(scores), device=scores.device) if len(scores) > 1 else draws.new_ones(1)
    return alive & (draws < share[:, None])


def of(kept, image=None):
    """The recorded decision: scores may differ in the last digits."""
    return lambda scores, alive, group: kept[group].to(alive.device)[slice(image, None if image is None else image + 1)]


@DTYPES
@pytest.mark.parametrize("family", FAMILIES)
def test_ragged_batch_is_each_image_alone_is_the_masked_oracle(family, dtype, device, record_property):
    model, x = make(family, dtype), images()
    with torch.no_grad():
        want, _, kept = masked_forward(model, x, ragged)
        assert len(set(kept[-1].sum(1).tolist())) == len(x)
        there, pixels = copy.deepcopy(model).to(device, dtype), x.to(device, dtype)
        batch = there.trace(pixels, of(kept))
        alone = torch.cat([there(pixels[i : i + 1], of(kept[:, i : i + 1])) for i in range(len(x))])
    assert torch.equal(batch.kept.cpu(), kept)
    errors = {"batch": error([batch.logits], [want]), "alone": error([alone], [want])}
    for name, value in errors.items():
        record_property(f"error of the {name}", f"{value:.1e}")
    assert max(errors.values()) < TOLERANCE[dtype], errors


@DTYPES
def test_merged(dtype, device, record_property):
    """Sizes enter attention. The reference is our code on a CPU in float64, which other tests compare with loops."""
    model, x = make(dtype=dtype, dropped="merged"), images()
    with torch.no_grad():
        want = copy.deepcopy(model).double().trace(x.double(), ragged)
        got = copy.deepcopy(model).to(device, dtype)(x.to(device, dtype), of(want.kept))
    value = error([got], [want.logits])
    record_property("error", f"{value:.1e}")
    assert value < 2 * TOLERANCE[dtype]  # near ties of the cosines merge otherwise


@DTYPES
@pytest.mark.parametrize("sized", [False, True], ids=["plain", "sizes"])
def test_attention_and_its_gradient(sized, dtype, device, record_property):
    keep = ragged(torch.empty(6, 192), torch.ones(6, 192, dtype=torch.bool), 0)
    packed = PackedTokens.from_dense(torch.randn(6, 193, 8), 1).select(keep)
    rows, generator = len(packed.x), torch.Generator().manual_seed(0)
    if sized:
        packed = packed.with_x(packed.x, torch.randint(1, 9, (rows,), generator=generator).float())
    q, k, v, weights = (torch.randn(rows, 3, 16, generator=generator).to(dtype) for _ in range(4))

    there = PackedTokens.from_dense(torch.randn(6, 193, 8).to(device, dtype), 1).select(keep.to(device))
    there = there.with_x(there.x, None if packed.sizes is None else packed.sizes.to(device))
    leaves = [t.clone().to(device).requires_grad_() for t in (q, k, v)]
    got = attend(*leaves, there)
    (got * weights.to(device)).sum().backward()

    double = [t.double().requires_grad_() for t in (q, k, v)]
    maps = attention_weights(double[0], double[1], packed)
    buckets = zip(maps, packed.buckets(double[2]), strict=True)
    want = torch.cat([(a @ b.transpose(1, 2)).transpose(1, 2).flatten(0, 1) for a, b in buckets])
    (want * weights.double()).sum().backward()
    errors = {"output": error([got], [want])}
    errors |= {f"gradient of {n}": error([a.grad], [b.grad]) for n, a, b in zip("qkv", leaves, double, strict=True)}
    for name, value in errors.items():
        record_property(f"error of the {name}", f"{value:.1e}")
    assert max(errors.values()) < {torch.float32: 1e-5, torch.bfloat16: 0.02}[dtype], errors


@DTYPES
def test_gradients_of_a_ragged_batch_are_those_of_the_masked_oracle(dtype, device, record_property):
    model, x = make(dtype=dtype), images()
    logits, _, kept = masked_forward(model, x, ragged)
    logits.square().sum().backward()
    want = {name: p.grad for name, p in model.backbone.named_parameters()}
    there = copy.deepcopy(model).to(device, dtype)
    there.zero_grad()
    there(x.to(device, dtype), of(kept)).square().sum().backward()
    got = {name: p.grad for name, p in there.backbone.named_parameters()}
    assert got.keys() == want.keys()
    value = error(got.values(), want.values())
    record_property("error", f"{value:.1e}")
    assert value < 2 * TOLERANCE[dtype]


@DTYPES
def test_fixed_counts_are_the_static_form(dtype, device, record_property):
    model = make(dtype=dtype)
    model.num_keep = (150, 100, 50)
    there, x = copy.deepcopy(model).to(device, dtype), images().to(device, dtype)
    with torch.no_grad():
        static, ids = FixedCount(there, there.num_keep).to(device, dtype)(x)
        kept = there.trace(x).kept[-1]
        got = there(x)
    same = torch.zeros_like(kept).scatter_(1, ids, True).eq(kept).all(1)  # the others: scores that nearly tie
    value = error([got[same]], [static[same]])
    record_property("error", f"{value:.1e}")
    assert same.sum() >= len(x) - 1
    assert value < TOLERANCE[dtype]


def test_the_decision_is_the_same_on_every_device(device):
    model, x = make(), images()
    there = copy.deepcopy(model).to(device)
    with torch.no_grad():
        model.calibrate(x, keep=(0.8, 0.6, 0.4))
        there.decision = model.decision
        assert isinstance(there, iared2.ReducedVisionTransformer)
        want, got = model.trace(x), there.trace(x.to(device))
    torch.testing.assert_close(got.scores.cpu(), want.scores, rtol=0, atol=1e-4)
    assert (got.kept.cpu() == want.kept).float().mean() > 0.999
