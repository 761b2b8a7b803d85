from __future__ import annotations

import pytest
import torch

from iared2.model import attention
from iared2.model.attention import attend
from iared2.model.tokens import PackedTokens

B, P, N, C = 4, 1, 6, 8


@pytest.fixture
def dense():
    return torch.randn(B, P + N, C, generator=torch.Generator().manual_seed(0))


KEEP = torch.tensor(
    [[1, 0, 1, 1, 0, 1], [0, 0, 0, 0, 0, 0], [1, 1, 1, 1, 1, 1], [0, 1, 1, 0, 1, 1]],
    dtype=torch.bool,
)


def test_select_keeps_rows_ids_and_order(dense):
    packed = PackedTokens.from_dense(dense, P).select(KEEP)
    assert packed.lengths == (1, 5, 5, 7)
    assert packed.cu_seqlens.tolist() == [0, 1, 6, 11, 18]
    assert packed.max_seqlen == 7
    assert packed.image_ids.tolist() == [1, 0, 3, 2]
    assert torch.equal(packed.alive, KEEP)
    back = packed.to_dense(packed.x)
    here = torch.cat([torch.ones(B, P, dtype=torch.bool), KEEP], 1)
    assert torch.equal(back[here], dense[here])
    assert (back[~here] == 0).all()
    assert torch.equal(packed.prefix(), dense[:, :P])
    assert [tuple(run.shape[:2]) for run in packed.buckets(packed.x)] == [(1, 1), (2, 5), (1, 7)]
    assert torch.equal(packed.unsort(packed.image_ids), torch.arange(B))


def test_select_twice_equals_select_once(dense):
    first = KEEP | (torch.arange(N) < 3)
    twice = PackedTokens.from_dense(dense, P).select(first).select(KEEP)
    once = PackedTokens.from_dense(dense, P).select(KEEP)
    assert torch.equal(twice.to_dense(twice.x), once.to_dense(once.x))
    assert twice.lengths == once.lengths


def test_several_selections_of_the_same_images_are_one_batch(dense):
    packed = PackedTokens.from_dense(dense, P, keys=torch.arange(B)).select(KEEP | (torch.arange(N) < 4))
    both = packed.select(torch.cat([KEEP, packed.alive]))
    assert both.num_images == 2 * B
    assert both.keys.tolist() == [0, 1, 2, 3, 0, 1, 2, 3]
    rows = both.to_dense(both.x)
    for half, keep in ((rows[:B], KEEP), (rows[B:], packed.alive)):
        alone = packed.select(keep)
        assert torch.equal(half, alone.to_dense(alone.x))


def test_nothing_dropped_copies_nothing(dense):
    packed = PackedTokens.from_dense(dense, P)
    assert packed.select(torch.ones(B, N, dtype=torch.bool)) is packed


@pytest.mark.parametrize("keep", [KEEP, torch.ones_like(KEEP)], ids=["ragged", "whole"])
def test_attend_is_attention_within_each_image(dense, keep):
    packed = PackedTokens.from_dense(dense, P).select(keep)
    q, k, v = (torch.randn(len(packed.x), 2, 4) for _ in range(3))
    out = attend(q, k, v, packed)
    for start, stop in zip(packed.starts[:-1], packed.starts[1:], strict=True):
        rows = slice(start, stop)
        weights = (torch.einsum("ihd,jhd->hij", q[rows], k[rows]) / 2).softmax(-1)
        torch.testing.assert_close(out[rows], torch.einsum("hij,jhd->ihd", weights, v[rows]))


@pytest.mark.parametrize("window", [True, False], ids=["as torch 2.14", "as torch 2.10"])
def test_ragged_batches_are_kept_from_cudnn(dense, window, monkeypatch):
    """On Hopper, torch 2.14 takes cuDNN unless there is a window; flash attention ignores one as wide as an image."""
    packed, asked = PackedTokens.from_dense(dense, P).select(KEEP), []

    def varlen_attn(q, k, v, cu_seq_q, cu_seq_k, max_q, max_k, *, window_size=(-1, -1)):
        asked.append((max_q, window_size))
        return attend(q, k, v, packed)

    def older(q, k, v, cu_seq_q, cu_seq_k, max_q, max_k):
        return varlen_attn(q, k, v, cu_seq_q, cu_seq_k, max_q, max_k)

    monkeypatch.setattr("torch.nn.attention.varlen.varlen_attn", varlen_attn if window else older)
    q, k, v = (torch.randn(len(packed.x), 2, 4) for _ in range(3))
    torch.testing.assert_close(attention._attend_varlen(q, k, v, packed), attend(q, k, v, packed))
    ((max_q, size),) = asked
    assert max_q == packed.max_seqlen
    assert min(size) >= max_q if window else size == (-1, -1)


@pytest.mark.skipif(not torch.cuda.is_available(), reason="the variable-length kernel needs CUDA")
def test_variable_length_kernel_equals_the_plain_path(dense):
    packed = PackedTokens.from_dense(dense, P).select(KEEP)
    q, k, v = (torch.randn(len(packed.x), 2, 64) for _ in range(3))
    plain = attend(q, k, v, packed)
    on_gpu = PackedTokens.from_dense(dense.cuda(), P).select(KEEP.cuda())
    fast = attend(*(t.cuda().bfloat16() for t in (q, k, v)), on_gpu)
    torch.testing.assert_close(fast.float().cpu(), plain, rtol=0.02, atol=0.02)
