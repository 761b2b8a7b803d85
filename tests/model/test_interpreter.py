from __future__ import annotations

import pytest
import torch
from oracle import plain_scores

from iared2.model.interpreter import MultiHeadInterpreter
from iared2.model.tokens import PackedTokens


@pytest.mark.parametrize("has_class_token", [True, False])
@pytest.mark.parametrize(("width", "heads"), [(384, 6), (48, 3), (32, 1)])
def test_cheap_form_equals_plain_form(width, heads, has_class_token):
    torch.manual_seed(0)
    interpreter = MultiHeadInterpreter(width, heads)
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
