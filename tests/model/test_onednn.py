"""The fast blocks of a CPU against the plain ones."""

from __future__ import annotations

import copy
from contextlib import contextmanager

import pytest
import torch
from torch import nn

import iared2
from iared2.errors import InputError
from iared2.model import onednn
from iared2.model.decide import Decision, keep_all

if not onednn.AVAILABLE:
    pytest.skip("this torch has no oneDNN linear layers: the plain blocks run", allow_module_level=True)


@contextmanager
def plain_blocks(model):
    model.engine = "plain"
    yield
    model.engine = "auto"


@pytest.fixture
def calls(monkeypatch):
    """How many blocks ran on the fast path."""
    seen, run_block = [], onednn.run_block
    monkeypatch.setattr(onednn, "run_block", lambda *args: seen.append(args[0]) or run_block(*args))
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
    with torch.inference_mode(), plain_blocks(model):
        median = float(model.trace(x).scores[0].quantile(0.5))
        plain = model.trace(x, Decision([median, 0, 0]))
    assert not calls
    if packed_weights:
        model.pack_weights()
    with torch.inference_mode():
        fast = model.trace(x, Decision([median, 0, 0]))
    assert len(calls) == len(model.backbone.blocks)
    assert torch.equal(fast.kept, plain.kept)
    assert fast.kept.float().mean() < 0.9
    torch.testing.assert_close(fast.logits, plain.logits, atol=1e-4, rtol=1e-4)


@pytest.mark.skipif(not onednn.BF16, reason="this CPU has no bfloat16 matrix products")
def test_bfloat16_is_as_close_to_float32_as_the_plain_block(family, calls):
    exact, x = make(family)
    half, x_half = make(family, torch.bfloat16)
    with torch.inference_mode():
        want = exact.trace(x, Decision(0)).logits
        with plain_blocks(half):
            plain = half.trace(x_half, Decision(0)).logits
        fast = half.trace(x_half, Decision(0)).logits
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


def tiny(num_classes=5, name="deit_tiny_patch16_224"):
    torch.manual_seed(0)
    return iared2.from_timm(
        name, img_size=32, patch_size=8, embed_dim=48, num_heads=3, depth=3, num_classes=num_classes
    ).eval()


@torch.no_grad()
def logits(model, x):
    return model.trace(x, Decision(0)).logits


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
        with plain_blocks(model):
            want = logits(model, x)
    assert (before - want).abs().max() > 1e-3
    torch.testing.assert_close(logits(model, x), want, atol=1e-4, rtol=1e-4)


PARTS = ["", "attn", "drop_path1", "mlp", "mlp.act", "mlp.drop1", "attn.proj_drop"]
WATCHED = [("deit_tiny_patch16_224", where) for where in [*PARTS, "ls1"]]
WATCHED += [("eva02_base_patch14_448", where) for where in [*PARTS, "attn.q_proj", "attn.norm", "mlp.fc1_g"]]
WATCHED += [("vit_base_patch16_18x2_224", where) for where in ["", "attns.0", "attns.1.attn", "ffns.1.mlp", "ffns.0"]]
WATCHED += [("vit_base_patch16_xp_224", where) for where in ["", "in_proj", "mlp_act", "mlp_drop", "ls", "drop_path"]]


@pytest.mark.parametrize("engine", ["auto", "plain"])
@pytest.mark.parametrize(("name", "where"), WATCHED)
def test_every_part_of_a_block_can_be_watched_and_changed(name, where, engine):
    """A hook on ``Block`` or ``Attention`` never fired, and its change of the output was lost."""
    model, x, seen = tiny(name=name), torch.randn(3, 3, 32, 32), []
    with torch.no_grad():
        model.backbone.head.weight.normal_()
        for parameter_name, parameter in model.named_parameters():
            if parameter_name.endswith("gamma"):  # layer scale, born so small that no block acts
                parameter.fill_(0.5)
    model.engine = engine
    decide = ragged(model, x)
    with torch.no_grad():
        before = model(x, decide)
        watched = model.backbone.blocks[0].get_submodule(where)
        watched.register_forward_hook(lambda _, args, out: seen.append(out) or out)
        torch.testing.assert_close(model(x, decide), before, atol=1e-5, rtol=1e-4)
        assert seen
        watched.register_forward_hook(lambda _, args, out: 2 * out)
        changed = model(x, decide)
        assert (changed - before).abs().max() > 1e-3
        model.backbone.blocks[0].get_submodule(where)._forward_hooks.clear()
        torch.testing.assert_close(model(x, decide), before, atol=1e-5, rtol=1e-4)


@pytest.mark.parametrize("dropped", ["gone", "merged"])
@pytest.mark.parametrize(
    "name",
    ["deit_tiny_patch16_224", "vit_small_patch16_dinov3", "vit_base_patch16_rope_mixed_224", "vit_base_patch16_xp_224"],
)
def test_a_hooked_block_computes_what_it_computed(name, dropped):
    """With ragged lengths, where attention counts merged patches, and where it rotates them."""
    model, x = tiny(name=name), torch.randn(3, 3, 32, 32)
    model.dropped = dropped
    decide = ragged(model, x)
    with torch.no_grad():
        before = model(x, decide)
        for block in model.backbone.blocks:
            block.register_forward_pre_hook(lambda *_: None)
        torch.testing.assert_close(model(x, decide), before, atol=1e-5, rtol=1e-4)


def ragged(model, x):
    with torch.no_grad():
        scores = model.trace(x, keep_all).scores
    decide = Decision(float(scores[0].quantile(0.5)))
    return lambda scores, alive, group: decide(scores, alive, 0) if group == 0 else alive


def test_stochastic_depth_that_is_left_on_alone_drops():
    """It did in the plain blocks only."""
    torch.manual_seed(0)
    size = {"img_size": 32, "patch_size": 8, "embed_dim": 48, "num_heads": 3, "depth": 3, "drop_path_rate": 0.5}
    model = iared2.from_timm("deit_tiny_patch16_224", **size).eval()
    model.backbone.blocks[2].drop_path1.train()
    x = torch.randn(8, 3, 32, 32)
    assert not torch.equal(logits(model, x), logits(model, x))


def test_the_engine_is_set_and_seen():
    model, x = tiny(), torch.randn(2, 3, 32, 32)
    assert "engine='auto'" in repr(model)
    model.engine = "onednn"
    logits(model, x)
    with pytest.raises(InputError, match="inference on a CPU"):
        model(x)  # with a graph
    with pytest.raises(InputError, match="engine='turbo' should be one of auto, plain, onednn, compiled"):
        model.engine = "turbo"
    assert model.engine == "onednn"


def test_a_copy_has_no_packed_weights_but_the_same_output():
    model, x = tiny(), torch.randn(2, 3, 32, 32)
    model.pack_weights()
    assert len(model.packed_weights) == 12
    twin = copy.deepcopy(model)
    assert len(twin.packed_weights) == 0
    torch.testing.assert_close(logits(twin, x), logits(model, x))


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
    with plain_blocks(model):
        want = logits(model, x)
    assert (before - want).abs().max() > 1e-4
    torch.testing.assert_close(logits(model, x), want, atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize("where", ["mlp.fc1", "mlp.fc2", "attn.qkv", "attn.proj"])
def test_an_adapter_around_any_linear_layer(where):
    """LoRA as peft wraps it, with neither ``weight`` nor ``out_features``: wrapped, the layer computes what it did."""

    class Adapter(nn.Module):
        def __init__(self, base_layer):
            super().__init__()
            self.base_layer = base_layer
            self.down, self.up = nn.Linear(48, 2, bias=False), nn.Linear(2, 1, bias=False)
            nn.init.zeros_(self.up.weight)

        def forward(self, x):
            return self.base_layer(x) + self.up(self.down(x[..., :48]))

    model, x = tiny(), torch.randn(2, 3, 32, 32)
    model.pack_weights()
    before = logits(model, x)
    for block in model.backbone.blocks:
        name, _, leaf = where.rpartition(".")
        parent = block.get_submodule(name)
        setattr(parent, leaf, Adapter(getattr(parent, leaf)))
    torch.testing.assert_close(logits(model, x), before, atol=1e-5, rtol=1e-4)
    again = iared2.from_timm(model.backbone).eval()
    torch.testing.assert_close(logits(again, x), before, atol=1e-5, rtol=1e-4)
    assert model.trace(x).macs.min() > 0
