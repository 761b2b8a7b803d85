"""Patches that join others, against the same in plain loops over images and patches."""

from __future__ import annotations

import copy

import pytest
import torch
import torch.nn.functional as F
from oracle import dense_tokens, run_block
from tiny import sharp_images, sharp_model

import iared2
from iared2.errors import InputError
from iared2.model.attention import attend, attention_weights, with_bias_channel
from iared2.model.merge import merge
from iared2.model.tokens import PackedTokens

B, P, N, C = 4, 1, 6, 8
FIRST = torch.tensor([[1, 1, 1, 1, 0, 1], [1, 1, 0, 0, 1, 1], [1] * 6, [0, 1, 1, 0, 1, 1]], dtype=torch.bool)
THEN = torch.tensor([[1, 0, 0, 1, 0, 1], [0] * 6, [1, 1, 0, 1, 1, 1], [0, 1, 0, 0, 0, 0]], dtype=torch.bool)
LAST = torch.tensor([[1, 0, 0, 0, 0, 1], [0] * 6, [0, 1, 0, 1, 0, 1], [0, 1, 0, 0, 0, 0]], dtype=torch.bool)


@pytest.fixture
def dense():
    return torch.randn(B, P + N, C, generator=torch.Generator().manual_seed(0))


def plainly(x, sizes, alive, keep):
    """One image: ``x (N, C)``, ``sizes (N,)``, changed in place."""
    stays = [j for j in range(len(x)) if keep[j]]
    before, old = x.clone(), sizes.clone()
    parts = {j: [j] for j in stays}
    for i in range(len(x)):
        if alive[i] and not keep[i] and stays:
            parts[max(stays, key=lambda j: F.cosine_similarity(before[i], before[j], dim=0).item())].append(i)
    for j, members in parts.items():
        sizes[j] = old[members].sum()
        x[j] = (before[members] * old[members, None]).sum(0) / sizes[j]


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_equals_plain_loops(dense, dtype):
    packed = PackedTokens.from_dense(dense := dense.to(dtype), P)
    x, sizes, alive = dense.clone(), dense.new_ones(B, N), torch.ones(B, N, dtype=torch.bool)
    for keep in (FIRST, THEN, LAST):  # an image has lost everything before the last
        packed = merge(packed, keep)
        for b in range(B):
            plainly(x[b, P:], sizes[b], alive[b], keep[b])
        alive = keep
    assert torch.equal(packed.alive, LAST)
    here = F.pad(LAST, (P, 0), value=True)
    torch.testing.assert_close(packed.to_dense(packed.x)[here], x[here])
    torch.testing.assert_close(packed.to_dense(packed.sizes)[:, P:][LAST], sizes[LAST])
    of_image = packed.to_dense(packed.sizes)[:, P:].sum(1)
    assert of_image.tolist() == [6, 0, 6, 6], "no patch is lost but where none is kept"


def test_half_precision_of_training_merges_what_is_deployed(dense):
    packed = PackedTokens.from_dense(dense + 30, P)  # cosines of nearly 1
    expected = merge(packed, THEN).sizes
    with torch.autocast("cpu", torch.bfloat16):
        assert torch.equal(merge(packed, THEN).sizes, expected)
    assert len(set(expected.tolist())) > 2


def test_several_selections_are_one_batch(dense):
    packed = merge(PackedTokens.from_dense(dense, P), FIRST)
    both = merge(packed, torch.cat([THEN, FIRST & ~THEN]))
    for half, keep in enumerate((THEN, FIRST & ~THEN)):
        alone, images = merge(packed, keep), slice(half * B, (half + 1) * B)
        torch.testing.assert_close(both.to_dense(both.x)[images], alone.to_dense(alone.x))
        torch.testing.assert_close(both.to_dense(both.sizes)[images], alone.to_dense(alone.sizes))


def test_nothing_dropped_changes_nothing(dense):
    packed = PackedTokens.from_dense(dense, P)
    assert merge(packed, torch.ones(B, N, dtype=torch.bool)) is packed


def test_gradient_reaches_what_has_joined(dense):
    dense.requires_grad_()
    merge(PackedTokens.from_dense(dense, P), THEN).x.sum().backward()
    reached = dense.grad.abs().sum(2)[:, P:] > 0
    assert reached[[0, 2, 3]].all()
    assert not reached[1].any(), "nothing is kept there that could be joined"


def test_attention_counts_a_mean_as_often_as_it_stands_for_a_patch(dense):
    torch.manual_seed(0)
    packed = merge(PackedTokens.from_dense(dense, P), THEN)
    times = packed.sizes.long()
    q, k, v = (torch.randn(len(packed.x), 2, 4) for _ in range(3))
    found, weights = attend(q, k, v, packed), list(attention_weights(q, k, packed))
    wide = [F.pad(t, (0, 4)) for t in (q, k)]
    biased = with_bias_channel(*wide, F.pad(v, (0, 4)), packed.log_sizes)
    for start, stop in zip(packed.starts[:-1], packed.starts[1:], strict=True):
        rows, repeated = slice(start, stop), torch.arange(start, stop).repeat_interleave(times[start:stop])
        logits = torch.einsum("ihd,jhd->hij", q[rows], k[repeated]) / 2
        expected = torch.einsum("hij,jhd->ihd", logits.softmax(-1), v[repeated])
        torch.testing.assert_close(found[rows], expected)
        # the kernel that takes no bias: heads of 8, as if they were 4 wide and half of them empty
        qb, kb, vb = (t[rows].transpose(0, 1) for t in biased)
        by_channel = F.scaled_dot_product_attention(qb, kb, vb)[..., :4].transpose(0, 1)
        logits = torch.einsum("ihd,jhd->hij", q[rows], k[repeated]) / 8**0.5
        torch.testing.assert_close(by_channel, torch.einsum("hij,jhd->ihd", logits.softmax(-1), v[repeated]))
    torch.testing.assert_close(weights[-1].sum(-1), torch.ones(weights[-1].shape[:-1]))


def plain_forward(model, image):
    """Logits of one image ``(1, 3, h, w)`` by timm's own blocks, with a mask of log sizes."""
    vit, prefix = model.backbone, model.backbone.num_prefix_tokens
    x, rope = dense_tokens(vit, image)
    positions = torch.arange(x.shape[1] - prefix)
    sizes = torch.ones(x.shape[1])
    for group, blocks in enumerate(model.groups):
        scores = model.score(PackedTokens.from_dense(x, prefix), group)[0]
        keep = scores > model.thresholds[group]
        if vit.global_pool != "token" and not keep.any():
            keep[scores.argmax()] = True
        patches = x[0, prefix:]
        plainly(patches, sizes[prefix:], torch.ones(len(patches)), keep)
        here = F.pad(keep, (prefix, 0), value=True)
        x, sizes, positions = x[:, here], sizes[here], positions[keep]
        for index in blocks:
            turns = None if rope is None else rope[..., positions, :]
            x = run_block(vit, index, x, turns, sizes.log().expand(1, 1, len(sizes), -1))
    return vit.forward_head(vit.norm(x))


def test_model_equals_timms_blocks_on_each_image(family):
    model, x = sharp_model(family, dropped="merged"), sharp_images()
    with torch.inference_mode():
        model.calibrate(x, keep=(0.8, 0.5, 0.3)[: model.num_groups])
        model.threshold = [t + 1e-5 for t in model.thresholds]  # not a score itself, lest rounding decides
        out = model.trace(x)
        assert len(set(out.kept[0].sum(1).tolist())) > 1, "the batch should be ragged"
        alone = torch.cat([plain_forward(model, x[b : b + 1]) for b in range(len(x))])
        single = torch.cat([model(x[b : b + 1]) for b in range(len(x))])
    atol = 1e-4 * max(1, alone.abs().max().item())
    torch.testing.assert_close(out.logits, alone, rtol=0, atol=atol)
    torch.testing.assert_close(out.logits, single, rtol=0, atol=atol)


def test_plain_blocks_and_onednn_agree(family):
    model, x = sharp_model(family, dropped="merged"), sharp_images()
    model.calibrate(x, keep=0.5)
    model.threshold = [t + 1e-5 for t in model.thresholds]
    with torch.no_grad():
        fast, plain = model(x), copy.deepcopy(model)
        plain.engine = "plain"
        torch.testing.assert_close(fast, plain(x), rtol=0, atol=1e-4 * max(1, fast.abs().max().item()))


def test_threshold_0_is_the_backbone_and_a_file_remembers(family, tmp_path):
    model, x = sharp_model(family, dropped="merged"), sharp_images()
    model.threshold = 0
    with torch.no_grad():
        torch.testing.assert_close(model(x), model.backbone(x), rtol=0, atol=1e-4)
    model.calibrate(x, keep=0.5)
    model.save(tmp_path / "m.safetensors")
    again = iared2.load(tmp_path / "m.safetensors")
    assert again.dropped == "merged"
    with torch.no_grad():
        assert torch.equal(again(x), model(x))


def test_unknown_fate_is_one_line():
    with pytest.raises(InputError, match=r"dropped='burnt' should be one of gone, merged"):
        iared2.from_timm("deit_tiny_patch16_224", dropped="burnt", depth=3)
