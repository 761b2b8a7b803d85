"""Every method keeps the one contract, on every family, dense and reduced; and each says what it should."""

from __future__ import annotations

import itertools

import numpy as np
import pytest
import skimage.data
import torch
from PIL import Image
from planted import PLANTED, patch_means, planted_images, planted_model
from tiny import sharp_images, sharp_model
from torch.nn import functional as F

import iared2
from iared2 import InputError, Predictor, heatmap
from iared2.explain.figures import blank, title_height
from iared2.explain.forward import first_pass
from iared2.explain.gradients import KIN
from iared2.explain.heatmap import upsample
from iared2.explain.methods import interpreter_map
from iared2.explain.names import METHODS
from iared2.model import backbone as vit
from iared2.model.block import attentions

QUICK = [m for m in dict.fromkeys((*METHODS, *KIN)) if m != "memorability"]  # that one has a file of its own
SMALL = "deit_tiny_patch16_224", {"img_size": 32, "patch_size": 8, "depth": 4, "embed_dim": 48, "num_heads": 3}


def cases(model):
    """Every method, dense and reduced: ``(who, method)``."""
    for who, method in itertools.product((model, model.backbone), QUICK):
        if method != "interpreter" or who is model:
            yield who, method


@pytest.mark.parametrize(("size", "fused"), [((48, 32), True), ((32, 32), False)], ids=["48x32", "square, not fused"])
def test_shape_range_and_batch_equals_single(family, size, fused):
    model = sharp_model(family, img_size=size)
    for attn in (attn for block in model.backbone.blocks for attn in attentions(block)):
        attn.fused_attn = fused
    images = sharp_images(16, *size)
    target = torch.arange(16) % 7
    for who, method in cases(model):
        maps = heatmap(who, images, method, target)
        assert maps.shape == (16, *size), method
        assert maps.dtype == torch.float32, method
        assert not maps.requires_grad, method
        assert 0 <= maps.min() <= maps.max() <= 1, method  # false for NaN, too
        assert maps.amax() > 0.9, f"{method}: some map should say something"
        for i in (0, 15):
            single = heatmap(who, images[i : i + 1], method, target[i : i + 1])
            torch.testing.assert_close(single[0], maps[i], rtol=0, atol=1e-5, msg=lambda m, n=method: f"{n}: {m}")


def test_all_groups_and_every_one_keep_the_contract(family):
    model, images = sharp_model(family), sharp_images(16)
    for group in ("all", *range(model.num_groups)):
        maps = heatmap(model, images, group=group)
        assert maps.shape == (16, 48, 32)
        assert 0 <= maps.min() <= maps.max() <= 1
        torch.testing.assert_close(heatmap(model, images[3:4], group=group)[0], maps[3], rtol=0, atol=1e-5)


def test_of_a_smaller_first_pass_too_while_gradients_are_on(family):
    """The maps are those of the model that sees the smaller images, resized."""
    model, images = sharp_model(family), sharp_images(3)
    model.scale = 0.7
    seen, small = first_pass(model, images)
    assert seen is not model
    for method in (m for m in QUICK if m != "center"):
        maps = heatmap(model, images, method)
        assert maps.shape == (3, 48, 32), method
        assert not maps.requires_grad, method
        expected = F.interpolate(heatmap(seen, small, method)[:, None], (48, 32), mode="bicubic", antialias=True)
        torch.testing.assert_close(maps, expected[:, 0].clamp(0, 1), rtol=0, atol=0.05, msg=method)
    assert all(p.grad is None for p in model.parameters())


@pytest.mark.parametrize("threshold", [0.0, 1.0, [1.0, 0.5, 0.5]])
def test_nothing_dropped_or_everything(family, threshold):
    model, images = sharp_model(family), sharp_images(3)
    model.threshold = threshold
    for who, method in cases(model):
        maps = heatmap(who, images, method)
        assert maps.shape == (3, 48, 32), method
        assert 0 <= maps.min() <= maps.max() <= 1, method
    if threshold != 0 and model.backbone.global_pool == "token":  # every patch left before the first block
        for method in ("attention", "rollout", "gradcam", "integrated-gradients"):
            assert heatmap(model, images, method).count_nonzero() == 0, method


def test_a_model_that_tells_nothing_apart_gives_zeros():
    model = iared2.from_timm(SMALL[0], **SMALL[1]).eval()
    torch.nn.init.zeros_(model.backbone.pos_embed)
    flat = torch.zeros(2, 3, 32, 32)
    for who, method in cases(model):
        if method not in ("random", "center"):
            assert heatmap(who, flat, method).count_nonzero() == 0, method


def test_the_planted_patches_are_found_and_not_by_chance():
    model = planted_model()
    images, labels = planted_images(400, seed=10**6)
    with torch.no_grad():
        assert (model.backbone(images).argmax(1) == labels).all()
        assert (model(images).argmax(1) == labels).all()
    images = images[labels == 1]
    for who, method in cases(model):
        found = patch_means(heatmap(who, images, method)).topk(2, 1).indices.sort(1).values
        share = (found == torch.tensor(PLANTED)).all(1).float().mean()
        assert share < 0.1 if method in ("random", "center") else share > 0.95, (method, share)


def test_our_map_is_the_scores_of_the_second_group():
    model, images = sharp_model(SMALL), sharp_images(5, 32)
    output = model.trace(images)
    maps = heatmap(model, images)
    torch.testing.assert_close(maps, upsample(output.scores[1], (4, 4), (32, 32)))
    torch.testing.assert_close(maps, interpreter_map(model, output.scores, output.kept, (32, 32)))
    torch.testing.assert_close(
        heatmap(model, images, group=2), interpreter_map(model, output.scores, output.kept, (32, 32), 2)
    )
    model.threshold = [0.5, 0.2, 0.5]  # a low threshold has a low clamp
    scores = model.trace(images).scores[1]
    torch.testing.assert_close(heatmap(model, images), upsample(scores, (4, 4), (32, 32), 0.18))

    one = sharp_model(SMALL, groups=1)
    torch.testing.assert_close(heatmap(one, images), heatmap(one, images, group=0))


def test_all_groups_rank_by_how_far_a_patch_came_and_then_by_its_score():
    model = sharp_model(SMALL)
    images = sharp_images(5, 32)
    output = model.trace(images)
    for b in range(5):
        rank = []
        for n in range(16):
            seen = [g for g in range(3) if g == 0 or output.kept[g - 1, b, n]]
            rank.append(len(seen) + float(output.scores[seen[-1], b, n]))
        rank = torch.tensor(rank)
        expected = upsample((rank - rank.min()) / (rank.max() - rank.min()), (4, 4), (32, 32), 0)
        torch.testing.assert_close(heatmap(model, images[b : b + 1], group="all")[0], expected, rtol=0, atol=1e-5)
    assert len({tuple(k) for k in output.kept.sum(2).T.tolist()}) > 1


@pytest.mark.parametrize(("group", "blocks"), [(0, 0), (None, 2), (2, 3), ("all", 3)])
def test_our_map_runs_no_block_that_it_does_not_need(monkeypatch, group, blocks):
    """No backward pass, no second forward: fewer blocks than one forward pass, which has 4."""
    model, images = sharp_model(SMALL), sharp_images(2, 32)
    ran = []
    run_blocks = vit.run_blocks
    monkeypatch.setattr(vit, "run_blocks", lambda *args: ran.extend(args[1]) or run_blocks(*args))
    heatmap(model, images, group=group)
    assert ran == list(range(blocks))
    ran.clear()
    heatmap(model, images, "attention", block=1)
    assert ran == [0]


def test_random_has_a_seed_and_follows_the_image():
    model, images = sharp_model(SMALL), sharp_images(4, 32)
    maps = heatmap(model, images, "random", seed=3)
    assert torch.equal(maps, heatmap(model.backbone, images, "random", seed=3))
    assert torch.equal(maps[[2, 0]], heatmap(model, images[[2, 0]], "random", seed=3))
    assert not torch.equal(maps, heatmap(model, images, "random", seed=4))
    many = patch_means(heatmap(planted_model(), planted_images(2000)[0], "random"))
    assert many.mean(0).sub(many.mean()).abs().max() < 0.03  # no patch is favoured


def test_center_is_symmetric_and_falls_off():
    model = sharp_model(("deit_tiny_patch16_224", {"img_size": (48, 32), "patch_size": 8, "depth": 2}), groups=2)
    center = heatmap(model, torch.zeros(1, 3, 48, 32), "center")[0]
    torch.testing.assert_close(center, center.flip(0))
    torch.testing.assert_close(center, center.flip(1))
    assert (center[:25].diff(dim=0)[:23] > 0).all()
    assert center[0, 0] == 0
    assert center[24, 16] == 1


def test_target_moves_gradients_and_nothing_else():
    model, images = sharp_model(SMALL), sharp_images(8, 32)
    first, second = torch.arange(8), torch.arange(8) + 8
    for who, method in cases(model):
        same = torch.equal(heatmap(who, images, method, first), heatmap(who, images, method, second))
        assert same == (method not in (*KIN, "integrated-gradients")), method


def test_a_model_in_training_explains_what_it_would_deploy():
    model, images = sharp_model(SMALL, drop_path_rate=0.5, proj_drop_rate=0.5), sharp_images(3, 32)
    expected = {method: heatmap(model, images, method) for method in QUICK}
    model.train()
    for method, maps in expected.items():
        torch.testing.assert_close(heatmap(model, images, method), maps, rtol=0, atol=1e-5)
    assert model.training


def test_half_precision():
    model = sharp_model(SMALL).bfloat16()
    for who, method in cases(model):
        maps = heatmap(who, sharp_images(8, 32).bfloat16(), method)
        assert maps.dtype == torch.float32, method
        assert 0 <= maps.min() <= maps.max() <= 1, method
        assert maps.max() > 0.9, method


def test_images_of_another_size_where_the_model_takes_them():
    model = sharp_model(SMALL, dynamic_img_size=True)
    for who, method in cases(model):
        assert heatmap(who, sharp_images(2, 48, 24), method).shape == (2, 48, 24), method


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"method": "saliency"}, "no method 'saliency': take one of interpreter, attention"),
        ({"group": 3}, "no group 3: give a number from 0 to 2"),
        ({"group": "every"}, "no group every"),
        ({"method": "attention", "block": 4}, "no block 4: give a number from 0 to 3"),
        ({"method": "gradcam", "block": -1}, "no block -1"),
        ({"images": torch.zeros(3, 32, 32)}, r"takes \(B, 3, 32, 32\) of floats, not \(3, 32, 32\)"),
        ({"images": torch.zeros(1, 3, 48, 32)}, r"takes \(B, 3, 32, 32\)"),
        ({"images": torch.zeros(0, 3, 32, 32)}, r"takes \(B, 3, 32, 32\)"),
        ({"images": torch.zeros(1, 3, 32, 32, dtype=torch.uint8)}, "not .* torch.uint8"),
        ({"method": "gradcam", "target": torch.tensor([0, 1])}, "one class for each of the 1 images, from 0 to 999"),
        ({"method": "integrated-gradients", "target": torch.tensor([1000])}, "from 0 to 999"),
        ({"model": torch.nn.Linear(2, 2)}, "Linear is not supported"),
    ],
)
def test_what_does_not_go_together_is_one_line(change, message):
    model = sharp_model(SMALL)
    with pytest.raises(InputError, match=message):
        heatmap(**{"model": model, "images": torch.zeros(1, 3, 32, 32), **change})


def test_what_a_model_cannot_be_asked():
    model, images = sharp_model(SMALL), sharp_images(1, 32)
    with pytest.raises(InputError, match="a dense backbone has no interpreter"):
        heatmap(model.backbone, images)
    model.reset_classifier(0)
    with pytest.raises(InputError, match="this model has no classes"):
        heatmap(model, images, "gradcam")
    assert heatmap(model, images).max() == 1


@pytest.mark.parametrize("num_keep", [[12, 8, 4], [16, 9, 9], [16, 16, 16]])
@pytest.mark.parametrize("group", [0, 1, 2])
def test_a_model_that_keeps_counts_shows_what_the_predictor_shows(num_keep, group):
    """The clamp lies below the lowest score that stayed, not below a threshold that is not used."""
    model = sharp_model(SMALL)
    with torch.no_grad():
        model.interpreters[group].key.weight *= 0.01  # scores of 0.49 to 0.51: clamped at 0.48, all would be low
    model.num_keep = num_keep
    predictor = Predictor(model)
    photo = Image.fromarray(skimage.data.coffee()).resize((32, 32))
    images = predictor.prepare(photo)
    output = model.trace(images)
    scores, kept = output.scores[group, 0], output.kept[group, 0]
    low = 0.0 if kept.all() else scores[kept].min().item()
    expected = upsample(scores, (4, 4), (32, 32), min(0.48, low - 0.02))
    assert expected.max() > 0.9
    torch.testing.assert_close(heatmap(model, images, group=group)[0], expected)
    torch.testing.assert_close(torch.from_numpy(predictor(photo).heatmap(group)), expected)


@pytest.mark.parametrize("method", [m for m in QUICK if m != "center"])
def test_the_map_of_a_padded_image_covers_the_padding_and_is_cropped(method):
    """30 × 44 pixels make 4 × 6 patches of 8: the map of 32 × 48 pixels is not squeezed into them."""
    model = sharp_model(SMALL, img_size=(32, 48), dynamic_img_size=True, dynamic_img_pad=True)
    images = sharp_images(3, 30, 44)
    padded = torch.nn.functional.pad(images, (0, 4, 0, 2))
    target = torch.arange(3)
    expected = heatmap(model, padded, method, target)[:, :30, :44]
    torch.testing.assert_close(heatmap(model, images, method, target), expected)


def test_a_photo_that_the_model_pads(monkeypatch):
    """6 of the patches in a row cover 48 of the model's 44 columns: the last one begins at 40 / 44 of the photo."""
    model = sharp_model(SMALL, img_size=(30, 44), dynamic_img_size=True, dynamic_img_pad=True)
    last = torch.where(torch.arange(24) % 6 == 5, 0.9, 0.2)
    monkeypatch.setattr(model, "score", lambda packed, group: last * packed.alive)
    result = Predictor(model)(np.zeros((300, 440, 3), np.uint8))
    assert result.grid_size == (4, 6)
    kept = np.asarray(blank(Image.new("RGB", (440, 300)), result.kept[0].reshape(4, 6), result.grid))[..., 0] == 0
    assert kept[:, 400:].all()
    assert not kept[:, :400].any()
    heat = result.heatmap()
    assert heat.shape == (300, 440)
    rising = np.argmax(heat[150] > 0.5)
    assert 385 < rising < 415
    top = title_height(result.photo)
    assert not np.asarray(result.hierarchy())[top : top + 300, :440].any(), "the photo, which is black"
