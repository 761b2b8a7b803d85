from __future__ import annotations

import pytest
import torch
from oracle import masked_forward, plain_scores
from tiny import TINY

import iared2
from iared2.errors import InputError
from iared2.export.static import FixedCount
from iared2.model.decide import by_share
from iared2.model.interpreter import MultiHeadInterpreter
from iared2.model.tokens import PackedTokens


@pytest.mark.parametrize("padded", [False, True], ids=["by length", "padded"])
@pytest.mark.parametrize("relative", [False, True])
@pytest.mark.parametrize("has_class_token", [True, False])
@pytest.mark.parametrize(("width", "heads"), [(384, 6), (48, 3), (32, 1)])
def test_cheap_form_equals_plain_form(width, heads, has_class_token, relative, padded, monkeypatch):
    monkeypatch.setattr("iared2.model.interpreter._is_padded", lambda packed: padded)  # on a GPU it is
    torch.manual_seed(0)
    interpreter = MultiHeadInterpreter(width, heads, relative)
    for p in interpreter.parameters():
        p.data = torch.randn_like(p) / width**0.5
    x = torch.randn(5, 1 + 12, width) * 3 + 1
    alive = torch.rand(5, 12) < torch.linspace(0.3, 1, 5)[:, None]
    alive[:, 0] = True
    with torch.no_grad():
        cheap = interpreter(PackedTokens.from_dense(x, 1, alive), has_class_token)
        plain = plain_scores(interpreter, x, alive, 1, has_class_token)
    torch.testing.assert_close(cheap, plain, rtol=0, atol=1e-5)
    assert plain[alive].std() > 0.05, "scores that do not vary would hide a difference"
    assert (cheap[~alive] == 0).all()


@pytest.mark.parametrize("relative", [False, True])
def test_padding_changes_no_gradient_even_where_no_patch_is_alive(relative, monkeypatch):
    torch.manual_seed(0)
    interpreter, x, found = MultiHeadInterpreter(16, 2, relative), torch.randn(3, 1 + 6, 16), []
    alive = torch.tensor([[1, 1, 0, 1, 0, 0], [0] * 6, [1] * 6], dtype=torch.bool)
    for padded in (False, True):
        monkeypatch.setattr("iared2.model.interpreter._is_padded", lambda packed, padded=padded: padded)
        interpreter.zero_grad()
        scores = interpreter(PackedTokens.from_dense(x, 1, alive))
        (scores * torch.arange(18).view(3, 6)).sum().backward()
        found.append([scores, *(p.grad for p in interpreter.parameters())])
    for a, b in zip(*found, strict=True):
        torch.testing.assert_close(a, b)


def test_scores_are_float32_in_half_precision_and_float64_in_double():
    x = torch.randn(2, 5, 16)
    assert MultiHeadInterpreter(16, 2).bfloat16()(PackedTokens.from_dense(x.bfloat16(), 1)).dtype == torch.float32
    assert MultiHeadInterpreter(16, 2).double()(PackedTokens.from_dense(x.double(), 1)).dtype == torch.float64


def test_score_ignores_other_patches():
    """With a class token, a patch's score depends on itself and the class token alone."""
    torch.manual_seed(0)
    interpreter, x = MultiHeadInterpreter(16, 2), torch.randn(1, 5, 16)
    other = x.clone()
    other[:, 2:] = torch.randn(1, 3, 16)
    with torch.no_grad():
        a, b = (interpreter(PackedTokens.from_dense(t, 1)) for t in (x, other))
    assert a[0, 0] == pytest.approx(b[0, 0].item())
    assert a[0, 1] != pytest.approx(b[0, 1].item(), abs=1e-6)


def attention_model(**kwargs):
    """With norms and biases that are not 1 and 0, as at birth: else one that was left out would not be missed."""
    torch.manual_seed(0)
    model = iared2.from_timm("deit_tiny_patch16_224", interpreter="attention", **{**TINY, "depth": 6, **kwargs}).eval()
    with torch.no_grad():
        for p in model.backbone.parameters():
            p.add_(torch.randn_like(p), alpha=0.2)
    model.start_interpreters()
    return model


@pytest.mark.parametrize("qkv_bias", [True, False])
def test_attention_interpreter_starts_as_what_the_class_token_attends_to(qkv_bias):
    model = attention_model(qkv_bias=qkv_bias)
    block, packed = model.backbone.blocks[2], model.embed(torch.randn(2, 3, 48, 32))
    with torch.no_grad():
        packed = model.run_blocks(packed, 0)
        x = block.norm1(packed.x.view(2, 1 + 24, 48))
        q, k, _ = block.attn.qkv(x).view(2, 25, 3, 3, 16).unbind(2)
        attention = (torch.einsum("bhd,bnhd->bnh", q[:, 0], k[:, 1:]) / 4).softmax(1).mean(2)
        scores = model.score(packed, 1)
    odds = scores / (1 - scores)
    torch.testing.assert_close(odds, 24 * attention, rtol=1e-3, atol=1e-4)
    assert odds.std() > 0.1, "scores that do not vary would hide a difference"


def test_attention_interpreter_reduces_saves_and_exports_like_the_other(tmp_path):
    model, images = attention_model(), torch.randn(3, 3, 48, 32)
    model.threshold = [0.3, 0.3, 0.35]
    with torch.no_grad():
        out = model.trace(images)
        logits, scores, kept = masked_forward(model, images, model.decision)
    assert 0.1 < out.keep_ratio[2].mean() < out.keep_ratio[0].mean() < 0.9
    assert torch.equal(out.kept, kept)
    torch.testing.assert_close(out.logits, logits, rtol=0, atol=1e-4)
    torch.testing.assert_close(out.scores, scores, rtol=0, atol=1e-5)
    model.save(tmp_path / "model.safetensors")
    loaded = iared2.load(tmp_path / "model.safetensors")
    with torch.no_grad():
        assert torch.equal(loaded(images), model(images))
        fixed, ids = FixedCount(model, [20, 12, 6])(images)
        best = model.trace(images, by_share([20 / 24, 12 / 24, 6 / 24]))
    torch.testing.assert_close(fixed, best.logits, rtol=0, atol=1e-4)
    assert torch.equal(ids.sort(1).values, best.kept[2].nonzero()[:, 1].view(3, 6))


def test_attention_interpreter_refuses_what_it_cannot_copy():
    with pytest.raises(InputError, match="normalises queries"):
        iared2.from_timm("vit_small_patch16_224", interpreter="attention", **{**TINY, "depth": 3, "qk_norm": True})
    with pytest.raises(InputError, match="one of sigmoid, attention"):
        iared2.from_timm("deit_tiny_patch16_224", interpreter="none", **TINY)
