"""The fast blocks of a CPU against the plain ones."""

from __future__ import annotations

from unittest import mock

import pytest
import torch
from torch import nn

import iared2
from iared2.model import onednn
from iared2.model.decide import by_threshold

if not onednn.AVAILABLE:
    pytest.skip("this torch has no oneDNN linear layers: the plain blocks run", allow_module_level=True)


def plain_blocks():
    return mock.patch.object(onednn, "can_run", return_value=False)


@pytest.fixture
def calls(monkeypatch):
    """How many blocks ran on the fast path."""
    seen, run_block = [], onednn.run_block
    monkeypatch.setattr(onednn, "run_block", lambda block, x, packed: seen.append(block) or run_block(block, x, packed))
    return seen


def make(family, dtype=torch.float32):
    torch.manual_seed(0)
    name, kwargs = family
    model = iared2.from_timm(name, **kwargs).eval().to(dtype)
    with torch.no_grad():
        for parameter in model.parameters():  # biases and layer scales at birth are zero or tiny
            parameter.add_(0.05 * torch.randn_like(parameter))
    return model, torch.randn(4, 3, 48, 32).to(dtype)


@pytest.mark.parametrize("packed_weights", [False, True])
def test_equal_to_the_plain_block_for_every_family(family, packed_weights, calls):
    model, x = make(family)
    with torch.inference_mode(), plain_blocks():
        median = float(model.trace(x).scores[0].median())
        plain = model.trace(x, by_threshold([median, 0, 0]))
    assert not calls
    if packed_weights:
        model.pack_weights()
    with torch.inference_mode():
        fast = model.trace(x, by_threshold([median, 0, 0]))
    assert len(calls) == len(model.backbone.blocks)
    assert torch.equal(fast.kept, plain.kept)
    assert fast.kept.float().mean() < 0.9
    torch.testing.assert_close(fast.logits, plain.logits, atol=1e-4, rtol=1e-4)


@pytest.mark.skipif(not onednn.BF16, reason="this CPU has no bfloat16 matrix products")
def test_bfloat16_is_as_close_to_float32_as_the_plain_block(family, calls):
    exact, x = make(family)
    half, x_half = make(family, torch.bfloat16)
    with torch.inference_mode():
        want = exact.trace(x, by_threshold(0)).logits
        with plain_blocks():
            plain = half.trace(x_half, by_threshold(0)).logits
        fast = half.trace(x_half, by_threshold(0)).logits
    error, plain_error = (fast - want).norm() / want.norm(), (plain - want).norm() / want.norm()
    assert error < max(2 * plain_error, 0.02)
    assert len(calls) == 2 * len(half.backbone.blocks)  # the float32 model's and these


def test_training_and_autocast_take_the_plain_path(calls):
    model = iared2.from_timm("deit_tiny_patch16_224", img_size=32, patch_size=8, embed_dim=48, num_heads=3, depth=3)
    x = torch.randn(2, 3, 32, 32)
    model.eval()(x)  # with a graph
    with torch.no_grad(), torch.autocast("cpu", torch.bfloat16):
        model(x)
    with torch.no_grad():
        model.train()(x)
    assert not calls


def tiny(num_classes=5):
    torch.manual_seed(0)
    return iared2.from_timm(
        "deit_tiny_patch16_224", img_size=32, patch_size=8, embed_dim=48, num_heads=3, depth=3, num_classes=num_classes
    ).eval()


@torch.no_grad()
def logits(model, x):
    return model.trace(x, by_threshold(0)).logits


@pytest.mark.parametrize(
    "change", ["in place", "load_state_dict", "double and back", "new parameter", "transposed", "fused optimiser"]
)
def test_packed_weights_follow_a_change_of_the_weights(change):
    model, x = tiny(), torch.randn(2, 3, 32, 32)
    model.pack_weights()
    before = logits(model, x)
    layer = model.backbone.blocks[1].attn.proj
    if change == "fused optimiser":  # it leaves no trace on the weight
        optimizer = torch.optim.AdamW([layer.weight], lr=0.1, fused=True)
        model(x).sum().backward()
        optimizer.step()
    with torch.no_grad():
        if change == "in place":
            layer.weight.mul_(3)
        elif change == "load_state_dict":
            layer.load_state_dict({"weight": 3 * layer.weight, "bias": layer.bias})
        elif change == "double and back":
            model.double()
            layer.weight.mul_(3)
            model.float()
        elif change == "transposed":
            layer.weight = nn.Parameter(layer.weight.t())
        elif change == "new parameter":
            layer.weight = nn.Parameter(3 * layer.weight)
        with plain_blocks():
            want = logits(model, x)
    assert (before - want).abs().max() > 1e-3
    torch.testing.assert_close(logits(model, x), want, atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize("where", ["mlp", "mlp.act", "mlp.drop1", "attn.proj_drop", "ls1"])
def test_what_is_fused_away_can_still_be_watched(where, calls):
    model, x, seen = tiny(), torch.randn(2, 3, 32, 32), []
    model.backbone.blocks[0].get_submodule(where).register_forward_hook(lambda *_: seen.append(1))
    logits(model, x)
    assert seen
    assert len(calls) < 3


def test_dropout_that_is_left_on_alone_drops():
    """Monte Carlo dropout: the model in evaluation mode, its dropout not."""
    torch.manual_seed(0)
    model = iared2.from_timm(
        "deit_tiny_patch16_224", img_size=32, patch_size=8, embed_dim=48, num_heads=3, depth=3, proj_drop_rate=0.5
    ).eval()
    model.backbone.blocks[1].mlp.drop1.train()
    x = torch.randn(2, 3, 32, 32)
    assert not torch.equal(logits(model, x), logits(model, x))


def test_hooks_and_adapters_on_a_layer_are_honoured():
    """Someone watches a layer, or has put another in its place."""
    model, x, seen = tiny(), torch.randn(2, 3, 32, 32), []
    handle = model.backbone.blocks[0].attn.proj.register_forward_hook(lambda *_: seen.append(1))
    before = logits(model, x)
    assert seen
    handle.remove()

    class Doubled(nn.Linear):
        def forward(self, x):
            return 2 * super().forward(x)

    plain = model.backbone.blocks[0].attn.proj
    model.backbone.blocks[0].attn.proj = Doubled(48, 48)
    model.backbone.blocks[0].attn.proj.load_state_dict(plain.state_dict())
    with plain_blocks():
        want = logits(model, x)
    assert (before - want).abs().max() > 1e-4
    torch.testing.assert_close(logits(model, x), want, atol=1e-4, rtol=1e-4)
