"""The heat map is the authors' computation, covers the whole photo, and says nothing where there is nothing to say."""

from __future__ import annotations

import matplotlib
import numpy as np
import pytest
import skimage.data
import torch
from PIL import Image
from tiny import TINY, sharp_images, sharp_model

import iared2
from iared2 import InputError
from iared2.explain.heatmap import clamp_below, colors, overlay, score_map, upsample

GRID = (2, 3)


def test_clamped_and_normalised() -> None:
    scores = torch.tensor([0.0, 0.3, 0.48, 0.50, 0.56, 0.52])  # the first is gone
    expected = torch.tensor([[0, 0, 0], [0.25, 1, 0.5]])
    torch.testing.assert_close(upsample(scores, GRID, GRID), expected)  # as many pixels as patches: nothing to resize


@pytest.mark.parametrize("value", [0.0, 0.3, 0.7, 1.0])
def test_a_constant_map_is_zeros(value: float) -> None:
    assert torch.equal(upsample(torch.full((6,), value), GRID, (20, 50)), torch.zeros(20, 50))


def test_everything_below_the_clamp_is_zeros() -> None:
    assert upsample(torch.linspace(0.1, 0.47, 6), GRID, (20, 50)).count_nonzero() == 0


def test_each_image_of_a_batch_by_itself() -> None:
    scores = torch.rand(4, 6, generator=torch.Generator().manual_seed(0)) * torch.tensor([[1.0], [0.8], [0.6], [0.1]])
    maps = upsample(scores, GRID, (30, 40))
    assert maps.shape == (4, 30, 40)
    for one, score in zip(maps, scores, strict=True):
        torch.testing.assert_close(one, upsample(score, GRID, (30, 40)))


@pytest.mark.parametrize("size", [(200, 300), (64, 640), (500, 30), (7, 5), (1, 1)])
def test_covers_the_whole_photo(size: tuple[int, int]) -> None:
    """Whatever the photo's shape, the last patch lights its lower right corner and no other."""
    scores = torch.tensor([0.5, 0.5, 0.5, 0.5, 0.5, 0.9])
    found = upsample(scores, GRID, size)
    assert found.shape == size
    assert 0 <= found.min() <= found.max() <= 1
    if size != (1, 1):
        assert found[-1, -1] == found.max() > 0.9
        assert found[0, 0] == found[0, -1] == found[-1, 0] == 0


def test_the_clamp_follows_low_thresholds_only() -> None:
    assert clamp_below(0.5) == pytest.approx(0.48)
    assert clamp_below(0.7) == 0.48
    assert clamp_below(0.2) == pytest.approx(0.18)
    scores = torch.tensor([0.1, 0.19, 0.3, 0.1, 0.1, 0.1])
    assert upsample(scores, GRID, GRID, clamp_below(0.2))[0, 2] == 1


def test_overlay_is_60_to_40() -> None:
    photo = Image.new("RGB", (2, 1), (200, 100, 0))
    found = np.asarray(overlay(photo, np.array([[0.0, 1.0]]), "viridis"))[0]
    for pixel, level in zip(found, (0.0, 1.0), strict=True):
        color = 255 * np.array(matplotlib.colormaps["viridis"](level)[:3])
        assert np.abs(pixel - (0.6 * np.array([200, 100, 0]) + 0.4 * color)).max() <= 1.5


def test_colors() -> None:
    assert np.abs(colors("gray").astype(int) - np.arange(256)[:, None]).max() <= 1
    with pytest.raises(InputError, match="unknown colour map 'rainbows'"):
        colors("rainbows")


def test_the_pattern_of_dropped_patches_is_not_in_the_map_of_a_model_that_spreads() -> None:
    """Half of the patches are dropped everywhere, in a checkerboard: only what scores higher is seen."""
    board = torch.arange(8)[:, None] + torch.arange(8) & 1
    flat, better = 0.3 * board, 0.3 * board
    better[:, 4:] *= 2
    (found,) = score_map(better.reshape(1, 64), (8, 8), (64, 64), [0.2], 1.0)
    assert found[:, :20].max() < 0.05
    assert found[:, 44:].min() > 0.95
    assert score_map(better[:1].reshape(1, 8), (1, 8), (8, 64), [0.2], 1.0).shape == (1, 8, 64)
    without = score_map(flat.reshape(1, 64), (8, 8), (64, 64), [0.2], 0.0)
    assert torch.equal(without, upsample(flat.reshape(1, 64), (8, 8), (64, 64), clamp_below(0.2)))
    assert without.max() > 0.9
    nothing_dropped = 0.1 + flat.reshape(1, 64)
    spread, plain = (score_map(nothing_dropped, (8, 8), (64, 64), [0.2], spread) for spread in (1.0, 0.0))
    assert torch.equal(spread, plain)


def test_every_map_of_a_model_that_spreads_is_the_predictors() -> None:
    model = sharp_model(("deit_tiny_patch16_224", {**TINY, "depth": 6}))
    model.spread = 1.0
    model.calibrate(sharp_images(), keep=(0.8, 0.5, 0.3))
    photo = Image.fromarray(skimage.data.coffee()).resize((32, 48))
    predictor = iared2.Predictor(model)
    for group in range(3):
        ours = iared2.heatmap(model, predictor.prepare(photo), group=group)[0].numpy()
        assert np.allclose(predictor(photo).heatmap(group), ours, atol=1e-5)
