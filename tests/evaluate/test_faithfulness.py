"""Insertion, deletion and blanking: against a plain loop, and on models whose answer rests on two known patches."""

from __future__ import annotations

from itertools import combinations

import numpy as np
import pytest
import scipy.ndimage
import torch
from planted import PLANTED as TRUE_PAIR
from planted import planted_images, planted_model
from sklearn.metrics import auc
from torch import Tensor

import iared2
from iared2.evaluate.explanations import faithfulness as faith
from iared2.explain.methods import heatmap

GRID, SIDE = (4, 4), 4
PLANTED = 5, 10


def planted(images: Tensor) -> Tensor:
    """Logits ``(B, 2)`` of a model that looks for brightness in patches 5 and 10 of a 4 × 4 grid, and in both."""
    patches = images.mean(1).unflatten(1, (4, SIDE)).unflatten(3, (4, SIDE)).mean((2, 4)).flatten(1)
    found = patches[:, PLANTED].clamp(0, 1).sum(1)
    return torch.stack([torch.zeros_like(found), 12 * (found - 1.5)], 1)


def photos(n: int = 3) -> Tensor:
    """Noise that is dark but for the two patches."""
    images = torch.randn(n, 3, *(g * SIDE for g in GRID), generator=torch.Generator().manual_seed(0)) / 8
    where = torch.zeros(16)
    where[list(PLANTED)] = 1
    return images + where.view(4, 4).repeat_interleave(SIDE, 0).repeat_interleave(SIDE, 1)


def map_of(patches: tuple[int, ...], n: int = 3) -> Tensor:
    chosen = torch.zeros(16)
    chosen[list(patches)] = 1
    return chosen.view(4, 4).repeat_interleave(SIDE, 0).repeat_interleave(SIDE, 1).expand(n, -1, -1)


def random_maps(n: int, seed: int) -> Tensor:
    return torch.rand(n, 16, 16, generator=torch.Generator().manual_seed(seed))


def test_the_planted_pair_is_found() -> None:
    """No other two patches have so low a deletion and so high an insertion, and random maps are far from it."""
    images, target = photos(), torch.ones(3, dtype=torch.int64)
    assert planted(images).argmax(1).tolist() == [1, 1, 1]

    def deletion(maps: Tensor) -> float:
        return faith.deletion(planted, images, maps, target).mean().item()

    def insertion(maps: Tensor) -> float:
        return faith.insertion(planted, images, maps, target, fill="zero").mean().item()

    pairs = list(combinations(range(16), 2))
    assert min(pairs, key=lambda pair: deletion(map_of(pair))) == PLANTED
    assert max(pairs, key=lambda pair: insertion(map_of(pair))) == PLANTED
    best = deletion(map_of(PLANTED)), insertion(map_of(PLANTED))
    chance = [(deletion(random_maps(3, seed)), insertion(random_maps(3, seed))) for seed in range(10)]
    assert best[0] < min(d for d, _ in chance) - 0.15
    assert best[1] > max(i for _, i in chance) + 0.2


def test_deletion_finds_the_patches_of_a_transformer() -> None:
    """Of the planted model: no other two patches have so low a deletion; our map comes near, a random one does not."""
    model = planted_model()
    images, labels = planted_images(120)
    images = images[labels == 1]
    target = torch.ones(len(images), dtype=torch.int64)

    def deletion(maps: Tensor) -> float:
        return faith.deletion(model.backbone, images, maps, target, steps=8).mean().item()

    pairs = list(combinations(range(16), 2))
    scores = {pair: deletion(map_of(pair, len(images))) for pair in pairs}
    best = min(pairs, key=scores.__getitem__)
    assert list(best) == TRUE_PAIR
    assert deletion(heatmap(model, images)) < scores[best] + 0.05
    assert deletion(heatmap(model, images, "random")) > scores[best] + 0.15


@pytest.mark.parametrize("way", ["insertion", "deletion"])
@pytest.mark.parametrize("steps", [1, 7, 16])
def test_the_curve_and_its_area_are_those_of_a_plain_loop(way: str, steps: int) -> None:
    images, maps, target = photos(), random_maps(3, 1), torch.tensor([0, 1, 1])
    curve = faith.curve(planted, images, maps, target, way, "mean", steps)
    areas = getattr(faith, way)(planted, images, maps, target, fill="mean", steps=steps)
    for image, map_, label, ours, area in zip(images, maps, target, curve, areas, strict=True):
        start, end = image.clone(), image.mean((1, 2))[:, None, None].expand_as(image).clone()
        if way == "insertion":
            start, end = end, start
        order = np.argsort(-map_.numpy().ravel())
        expected = []
        for step in range(steps + 1):
            now = start.clone().flatten(1)
            chosen = order[: round(256 * step / steps)]
            now[:, chosen] = end.flatten(1)[:, chosen]
            expected.append(planted(now.view(1, 3, 16, 16)).softmax(1)[0, label].item())
        assert ours.tolist() == pytest.approx(expected, abs=1e-6)
        assert area.item() == pytest.approx(auc(np.linspace(0, 1, steps + 1), expected), abs=1e-6)


def test_tied_pixels_favour_no_place() -> None:
    """A constant map deletes everywhere at once: not from a corner."""
    seen = []

    def model(images: Tensor) -> Tensor:
        seen.append(images[0, 0] != 0)
        return torch.zeros(len(images), 2)

    faith.curve(model, torch.ones(1, 3, 16, 16), torch.zeros(1, 16, 16), torch.tensor([0]), "deletion", "zero", 2)
    left = seen[1]
    assert left.sum() == 128
    for half in (left[:8], left[8:], left[:, :8], left[:, 8:]):
        assert 44 < half.sum() < 84
    again = [faith.deletion(planted, photos(), torch.zeros(3, 16, 16), torch.ones(3, dtype=torch.int64)) for _ in "ab"]
    assert torch.equal(*again)


def test_fills() -> None:
    images = photos()
    assert not faith.fills(images, "zero").any()
    mean = faith.fills(images, "mean")
    assert torch.allclose(mean[:, :, 3, 5], images.mean((2, 3)))
    for shape in ((16, 16), (12, 40), (5, 3)):  # the last: smaller than the blur reaches
        images = torch.randn(2, 3, *shape, generator=torch.Generator().manual_seed(0))
        blurred = faith.fills(images, "blur")
        assert blurred.shape == images.shape
        assert blurred.std() < images.std() * 0.7
    images = torch.randn(1, 1, 40, 50, generator=torch.Generator().manual_seed(0))
    expected = scipy.ndimage.gaussian_filter(images[0, 0].double().numpy(), 5, mode="mirror", radius=15)
    assert np.allclose(faith.fills(images, "blur")[0, 0], expected, atol=1e-5)


def test_blanked_are_the_patches_that_are_not_kept() -> None:
    images = photos(2) + 5
    kept = torch.rand(2, 16, generator=torch.Generator().manual_seed(0)) < 0.5
    patches = faith.blanked(images, kept, GRID, "zero").unflatten(2, (4, SIDE)).unflatten(4, (4, SIDE))
    shown = (patches != 0).all(5).all(3).all(1).flatten(1)
    blank = (patches == 0).all(5).all(3).all(1).flatten(1)
    assert torch.equal(shown, kept)
    assert torch.equal(blank, ~kept)
    where = kept.view(2, 1, 4, 4).repeat_interleave(SIDE, 2).repeat_interleave(SIDE, 3)
    assert torch.equal(
        faith.blanked(images, kept, GRID, "blur"), torch.where(where, images, faith.fills(images, "blur"))
    )


def test_best_patches_are_the_brightest() -> None:
    maps = random_maps(4, 0)
    count = torch.tensor([0, 1, 7, 16])
    kept = faith.best_patches(maps, count, GRID)
    assert torch.equal(kept.sum(1), count)
    for map_, k, chosen in zip(maps.numpy(), count.tolist(), kept.numpy(), strict=True):
        means = [map_[r : r + SIDE, c : c + SIDE].mean() for r in range(0, 16, SIDE) for c in range(0, 16, SIDE)]
        assert set(np.flatnonzero(chosen)) == set(np.argsort(means)[::-1][:k])
    tied = faith.best_patches(torch.zeros(1, 16, 16), torch.tensor([8]), GRID).view(4, 4)
    assert tied[:2].sum() not in (0, 8)
    assert torch.equal(faith.best_patches(torch.zeros(1, 16, 16), torch.tensor([8]), GRID).view(4, 4), tied)


def test_blanking_all_but_the_planted_patches_changes_nothing() -> None:
    images, n = photos(), 3
    before = planted(images).softmax(1)[:, 1]

    def kept(*patches: int) -> Tensor:
        return torch.zeros(n, 16, dtype=torch.bool).index_fill_(1, torch.tensor(patches), True)

    lost, agreement = faith.blanking(planted, images, kept(*PLANTED), GRID, fill="zero")
    assert torch.allclose(lost, torch.zeros(n), atol=1e-6)
    assert agreement.all()
    lost, agreement = faith.blanking(planted, images, kept(0, 1, 2, 3), GRID, fill="zero")
    assert torch.allclose(lost, before - torch.sigmoid(torch.tensor(-18.0)), atol=1e-6)
    assert not agreement.any()


def test_what_the_first_group_drops_is_never_looked_at() -> None:
    """By construction: with the decision held, the reduced answer is the same to the bit whatever stands there."""
    torch.manual_seed(0)
    model = iared2.from_timm(
        "deit_tiny_patch16_224", img_size=16, patch_size=4, embed_dim=32, depth=3, num_heads=2, num_classes=5
    ).eval()
    images = photos()
    with torch.no_grad():
        model.threshold = [model.trace(images).scores[0].median().item(), 0, 0]
        output = model.trace(images)
        assert 0 < output.kept[0].sum() < output.kept[0].numel()
        blank = faith.blanked(images, output.kept[0], model.grid_size)
        again = model.trace(blank, decide=lambda scores, alive, group: output.kept[group])
        assert torch.equal(again.logits, output.logits)
        other_blank = faith.blanked(images, ~output.kept[0], model.grid_size)
        changed = model.trace(other_blank, decide=lambda scores, alive, group: output.kept[group])
        assert not torch.equal(changed.logits, output.logits)


def test_against_quantus() -> None:
    """Deletion with black as Quantus' pixel flipping, where Quantus is there; its curve lacks the whole image."""
    quantus = pytest.importorskip("quantus", reason="pip install quantus, to compare with it as well")
    images, maps, target = photos(), random_maps(3, 2), torch.ones(3, dtype=torch.int64)

    class Planted(torch.nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            return planted(x.float())

    metric = quantus.PixelFlipping(
        features_in_step=16, perturb_baseline=0.0, abs=False, normalise=False, disable_warnings=True
    )
    theirs = metric(
        model=Planted().eval(),
        x_batch=images.numpy(),
        y_batch=target.numpy(),
        a_batch=maps[:, None].numpy(),
        softmax=True,
    )
    theirs = np.array(theirs)[:, 2::3]  # it counts the values of three channels: 16 pixels are three steps
    ours = faith.curve(planted, images, maps, target, "deletion", "zero", 16)[:, 1:]
    assert np.allclose(theirs, ours, rtol=0, atol=1e-6)
