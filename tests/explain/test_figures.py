"""The pictures, pixel by pixel: the overlay stays as it is, and exactly the dropped patches are blank."""

from __future__ import annotations

import math

import numpy as np
import pytest
import skimage.data
from PIL import Image

from iared2.explain.figures import BLANK, hierarchy_figure, result_figure
from iared2.explain.heatmap import colors, overlay

SIZES = [(600, 400), (64, 64), (1, 1), (900, 20), (20, 900), (1500, 1000)]


def photo_of(size: tuple[int, int]) -> Image.Image:
    return Image.fromarray(skimage.data.coffee()).resize(size)


def panels(figure: Image.Image, count: int, width: int) -> list[np.ndarray]:
    """Cut a hierarchy into its panels: equally wide cells with equal gaps between."""
    pitch = (figure.width - width) // (count - 1)
    return [np.asarray(figure)[:, i * pitch : i * pitch + width] for i in range(count)]


@pytest.mark.parametrize("size", SIZES)
def test_result_keeps_the_photos_resolution(size: tuple[int, int]) -> None:
    photo = photo_of(size)
    heat = np.linspace(0, 1, size[0] * size[1], dtype=np.float32).reshape(size[::-1])
    figure = result_figure(photo, heat)
    assert figure.crop((0, 0, *size)) == overlay(photo, heat)


@pytest.mark.parametrize("size", SIZES)
def test_result_has_a_labelled_colour_bar(size: tuple[int, int]) -> None:
    photo = photo_of(size)
    strip = np.asarray(result_figure(photo, np.zeros(size[::-1], np.float32), "viridis"))[:, size[0] :].astype(int)
    bar = [x for x in range(strip.shape[1]) if np.abs(strip[0, x] - colors("viridis")[-1]).max() <= 12]
    assert len(bar) >= 12
    assert np.abs(strip[-1, bar] - colors("viridis")[0]).max() <= 12  # high above, low below
    labels = strip[:, bar[-1] + 1 :]
    middle = len(labels) // 2
    for half in (labels[:middle], labels[middle:]):
        assert half.min() < 100  # ink
        assert (half[:, [0, -1]] == 255).all()  # with a margin around
    assert strip.shape[0] >= 60


def borders(side: int, patches: int, index: int) -> slice:
    """The pixels whose centres lie in a patch."""
    return slice(*(math.ceil(side * i / patches - 0.5) for i in (index, index + 1)))


KEPT = np.array([[1, 1, 1, 1, 1, 0], [0, 1, 1, 0, 1, 0], [0, 0, 0, 0, 0, 0]], dtype=bool)


@pytest.mark.parametrize(
    ("size", "panel"), [((600, 400), (600, 400)), ((90, 60), (270, 180)), ((1500, 1000), (640, 427))]
)
def test_exactly_the_dropped_patches_are_blank(size: tuple[int, int], panel: tuple[int, int]) -> None:
    width, height = panel
    first, *groups = panels(hierarchy_figure(photo_of(size), KEPT, (2, 3)), 4, width)
    assert first.shape == (height, width, 3)
    if size == panel:
        assert np.array_equal(first, np.asarray(photo_of(size)))
    box = np.zeros((height, width), dtype=bool)
    box[: height // 6 + 20, : width // 5 + 20] = True  # the ratio is here, within the first patch
    for group, kept in zip(groups, KEPT, strict=True):
        for n, keep in enumerate(kept):
            rows, columns = borders(height, 2, n // 3), borders(width, 3, n % 3)
            shown = group[rows, columns][~box[rows, columns]]
            expected = first[rows, columns][~box[rows, columns]] if keep else BLANK
            assert (shown == expected).all(), f"patch {n}"


@pytest.mark.parametrize("size", SIZES)
@pytest.mark.parametrize("color", ["white", "black", (32, 32, 32)])
def test_the_ratio_is_in_the_upper_left_corner(size: tuple[int, int], color: str | tuple[int, int, int]) -> None:
    """White letters on a dark box, whatever lies beneath."""
    figure = np.asarray(hierarchy_figure(Image.new("RGB", size, color), np.ones((1, 6), dtype=bool), (2, 3)))
    corner = figure[:24, figure.shape[1] // 2 + 8 :][:, :52]  # of the right one of two panels, clear of the gap
    assert (corner == 255).all(-1).any()
    assert (corner == 32).all(-1).any()


def test_the_ratio_is_the_groups() -> None:
    """Two groups of equal patches show the same picture; of unequal ones, not even the same number."""
    photo = Image.new("RGB", (300, 300), (BLANK, BLANK, BLANK))  # blanked or not, only the number can differ
    half, third = np.arange(6) < 3, np.arange(6) < 2
    _, a, b, c = panels(hierarchy_figure(photo, np.stack([half, half, third]), (2, 3)), 4, 300)
    assert np.array_equal(a, b)
    changed = np.argwhere((b != c).any(-1))
    assert len(changed)
    assert changed.max(0).tolist() < [60, 100]
