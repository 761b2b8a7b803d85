"""Compiled blocks against plain ones: traced by dynamo, run eagerly."""

from __future__ import annotations

from functools import cache

import pytest
import torch
from torch._dynamo.testing import CompileCounterWithBackend

import iared2
from iared2.model import backbone as vit
from iared2.model.decide import Decision


@pytest.fixture
def graphs(monkeypatch):
    """A counter of the graphs that were compiled."""
    torch.compiler.reset()
    counter = CompileCounterWithBackend("aot_eager")
    monkeypatch.setattr(vit, "_compiled", cache(lambda half: torch.compile(half, dynamic=True, backend=counter)))
    yield counter
    torch.compiler.reset()


def make(name="deit_tiny_patch16_224", **kwargs):
    torch.manual_seed(0)
    tiny = {"img_size": 64, "patch_size": 8, "embed_dim": 48, "num_heads": 3, "depth": 6, "num_classes": 5}
    return iared2.from_timm(name, **tiny, **kwargs).eval()


def ragged(model, images):
    with torch.no_grad():
        return Decision(float(model.trace(images).scores[0].quantile(0.5)))


@pytest.mark.parametrize(
    "name",
    [
        "deit_tiny_patch16_224",
        "deit3_small_patch16_224",
        "vit_small_patch14_reg4_dinov2",
        "vit_small_patch16_dinov3",
        "vit_base_patch16_18x2_224",
    ],
)
def test_same_logits_and_no_recompilation_as_counts_change(name, graphs):
    model = make(name)
    batches = [torch.randn(n, 3, 64, 64) for n in (2, 5, 3, 4, 1, 7)]
    with torch.no_grad():
        want = [model.trace(x, ragged(model, x)) for x in batches]
        model.compile()
        got = []
        for x in batches:
            got.append(model.trace(x, ragged(model, x)))
            if len(got) == 2:
                after_two = graphs.frame_count
    for a, b in zip(want, got, strict=True):
        torch.testing.assert_close(a.logits, b.logits, atol=1e-5, rtol=1e-4)
    assert len({int(n) for o in got for n in o.kept.sum(-1).flatten()}) > 10
    assert 0 < graphs.frame_count == after_two <= 4, "the same graphs for all blocks and all counts"


@pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor that is not a leaf")  # dynamo looks at it
def test_gradients(graphs):
    model, x = make(drop_path_rate=0.3), torch.randn(4, 3, 64, 64)
    decide, gradients = ragged(model, x), []
    model.train()
    for compiled in (False, True):
        model.engine = "compiled" if compiled else "plain"
        model.zero_grad()
        packed = model.embed(x, keys=torch.arange(4) * 7919)
        model.head(model.reduce(packed, decide=decide)[0]).square().sum().backward()
        gradients.append([p.grad.clone() for p in model.backbone.parameters() if p.grad is not None])
    for a, b in zip(*gradients, strict=True):
        torch.testing.assert_close(a, b, atol=1e-5, rtol=1e-4)
    assert graphs.frame_count > 0


def test_torch_compile_of_the_whole_model_is_right_and_compiles_no_length():
    torch.compiler.reset()
    model = make()
    counter = CompileCounterWithBackend("aot_eager")
    compiled = torch.compile(model, backend=counter)
    with torch.no_grad():
        for n in (1, 2, 3, 4, 5):
            x = torch.randn(n, 3, 64, 64)
            torch.testing.assert_close(compiled(x), model(x))
    assert counter.frame_count <= 1
    torch.compiler.reset()


def test_compile_takes_no_arguments():
    with pytest.raises(TypeError, match="no arguments"):
        make().compile(mode="max-autotune")
