from __future__ import annotations

import pytest
import torch
from tiny import sharp_images, sharp_model

from iared2 import keyed
from iared2.explain.attention_maps import raw_attention
from iared2.model.baselines import KINDS, baseline_scores, centre_scores
from iared2.model.decide import by_share, keep_all

TINY = {"img_size": (48, 32), "patch_size": 8, "embed_dim": 48, "num_heads": 3, "num_classes": 7}  # 6 × 4 patches
KEYS = keyed.sample_keys(0, 0, torch.arange(5))


def baseline(kind, name="deit_tiny_patch16_224"):
    model = sharp_model((name, {**TINY, "depth": 6}))
    for group in range(model.num_groups):
        model.interpreters[group] = baseline_scores(kind, model, group)
    return model


@pytest.mark.parametrize("kind", KINDS)
def test_the_loop_keeps_exact_shares_by_them_and_none_of_their_weights(kind):
    model = baseline(kind)
    assert not any(name.startswith("interpreters") for name in model.state_dict())
    with torch.no_grad():
        out = model.trace(sharp_images(), by_share((0.75, 0.5, 0.3)))
    assert [kept.sum(1).unique().tolist() for kept in out.kept] == [[18], [12], [7]]
    alive = torch.cat([torch.ones_like(out.kept[:1]), out.kept[:-1]])
    assert (out.scores[~alive] == 0).all()
    assert out.scores.min() >= 0
    assert out.scores.max() <= 1
    assert (out.macs < model.dense_macs).all()


def test_random_scores_are_a_function_of_the_keys():
    model, images = baseline("random"), sharp_images()
    order = torch.tensor([3, 0, 4, 1, 2])
    first, second = (model.score(model.embed(images, KEYS), group) for group in range(2))
    assert torch.equal(model.score(model.embed(images[order] + 1, KEYS[order]), 0), first[order])
    for other in (second, model.score(model.embed(images, KEYS + 1), 0), model.score(model.embed(images), 0)):
        assert (other != first).float().mean() > 0.99
    many = model.interpreters[0](model.embed(torch.zeros(400, 3, 48, 32)))
    assert (many.mean(0) - 0.5).abs().max() < 5 * 0.29 / 20


@pytest.mark.parametrize("grid", [(6, 4), (5, 5), (1, 3)])
def test_centre_scores_are_symmetric_and_fall_outwards(grid):
    found = centre_scores(grid).view(grid)
    if grid == (6, 4):
        scores = baseline_scores("centre", baseline("centre"), 0)(baseline("centre").embed(sharp_images(2)))
        assert torch.equal(scores, found.flatten().expand(2, -1))
    for turned in (found.flip(0), found.flip(1)):
        torch.testing.assert_close(found, turned)
    assert found[0, 0] == 0
    middle = found[grid[0] // 2, grid[1] // 2]
    assert middle == found.max()
    assert middle == 1 or not all(size % 2 for size in grid)
    assert (found[: (grid[0] + 1) // 2].diff(dim=0) > 0).all()


# two prefix tokens; no class token
@pytest.mark.parametrize(
    "name", ["deit_tiny_patch16_224", "deit_tiny_distilled_patch16_224", "vit_base_patch16_siglip_224"]
)
def test_attention_scores_are_the_raw_attention_of_the_groups_first_block(name):
    model, images = baseline("attention", name), sharp_images()
    model.threshold = 0.0  # nothing is dropped
    with torch.no_grad():
        for group, blocks in enumerate(model.groups):
            packed, _, _ = model.reduce(model.embed(images), range(group), keep_all)
            scores = model.score(packed, group)
            want = raw_attention(model, images, blocks.start)
            if model.backbone.cls_token is None:
                torch.testing.assert_close(scores.sum(1), torch.ones(5))
            torch.testing.assert_close(scores, want, rtol=1e-5, atol=1e-7)
            assert scores.std(1).min() > 1e-4


def test_shift_scores_are_the_norms_of_the_mlps_branch():
    model, images = baseline("shift", "deit3_small_patch16_224"), sharp_images(2)
    packed, _, _ = model.reduce(model.embed(images), range(1), keep_all)
    block = model.backbone.blocks[model.groups[1].start]
    with torch.no_grad():
        moved = block.ls2(block.mlp(block.norm2(packed.x))).norm(dim=1).view(2, -1)[:, 1:]
        scores = model.score(packed, 1)
    torch.testing.assert_close(scores, moved / moved.amax(1, keepdim=True))


def test_similarity_scores_are_low_where_a_patch_has_a_double():
    model = baseline("similarity")
    packed = model.embed(sharp_images(2))
    x = torch.randn(2, 25, 48, generator=torch.Generator().manual_seed(0))
    x[0, 4] = 3 * x[0, 7]
    packed = packed.with_x(x.flatten(0, 1))
    scores = model.score(packed, 0)
    assert sorted(scores[0].argsort()[:2].tolist()) == [3, 6]
    torch.testing.assert_close(scores[0, 3], torch.tensor(0.0), atol=1e-6, rtol=0)
    alike = torch.cosine_similarity(x[1, 1:, None], x[1, None, 1:], dim=2).fill_diagonal_(-1)
    torch.testing.assert_close(scores[1], (1 - alike.amax(1)) / 2)
    lone = packed.select(torch.zeros(2, 24, dtype=torch.bool).index_fill_(1, torch.tensor([5]), True))
    assert model.score(lone, 0)[:, 5].tolist() == [1, 1]
