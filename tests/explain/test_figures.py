"""The pictures, pixel by pixel: the overlay stays as it is, and exactly the dropped patches are blank."""

from __future__ import annotations

import math

import numpy as np
import pytest
import skimage.data
from PIL import Image

from iared2.explain.figures import BLANK, IN_A_ROW, enlarged, hierarchy_figure, result_figure, table, title_height
from iared2.explain.heatmap import colors, overlay

SIZES = [(600, 400), (64, 64), (1, 1), (900, 20), (20, 900), (1500, 1000)]


def photo_of(size: tuple[int, int]) -> Image.Image:
    return Image.fromarray(skimage.data.coffee()).resize(size)


def panels(figure: Image.Image, count: int, width: int, height: int) -> list[np.ndarray]:
    """Cut a hierarchy of one row into its panels: equally wide cells with equal gaps between, below their titles."""
    pitch = (figure.width - width) // (count - 1)
    top = title_height(Image.new("RGB", (width, height)))
    return [np.asarray(figure)[top : top + height, i * pitch : i * pitch + width] for i in range(count)]


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
    first, *groups = panels(hierarchy_figure(photo_of(size), KEPT, (2, 3)), 4, width, height)
    assert first.shape == (height, width, 3)
    if size == panel:
        assert np.array_equal(first, np.asarray(photo_of(size)))
    for group, kept in zip(groups, KEPT, strict=True):
        for n, keep in enumerate(kept):
            rows, columns = borders(height, 2, n // 3), borders(width, 3, n % 3)
            assert (group[rows, columns] == (first[rows, columns] if keep else BLANK)).all(), f"patch {n}"


@pytest.mark.parametrize("size", SIZES)
@pytest.mark.parametrize("color", ["white", "black", (32, 32, 32)])
def test_a_note_is_in_the_upper_left_corner(size: tuple[int, int], color: str | tuple[int, int, int]) -> None:
    """White letters on a dark box, whatever lies beneath."""
    figure = np.asarray(table([[(Image.new("RGB", size, color).resize((300, 200)), "0.50")]]))
    corner = figure[:24, 8:][:, :52]
    assert (corner == 255).all(-1).any()
    assert (corner == 32).all(-1).any()


def test_a_title_says_the_groups_share() -> None:
    """Two groups of equal shares differ in their number alone; a third of another share in the percentage, too."""
    photo = Image.new("RGB", (300, 300), (BLANK, BLANK, BLANK))  # blanked or not, only the titles can differ
    half, third = np.arange(6) < 3, np.arange(6) < 2
    figure = hierarchy_figure(photo, np.stack([half, half, third]), (2, 3))
    pitch = (figure.width - 300) // 3
    titles = [np.asarray(figure)[: title_height(photo), g * pitch : g * pitch + 300].astype(int) for g in (1, 2, 3)]
    same, other = (np.abs(titles[1] - titles[i]).max((0, 2)).nonzero()[0] for i in (0, 2))
    assert 0 < same.max() - same.min() < 30
    assert other.max() - other.min() > 30


def test_many_groups_take_two_rows() -> None:
    photo = photo_of((600, 400))
    kept = np.ones((IN_A_ROW + 1, 6), dtype=bool)
    figure = hierarchy_figure(photo, kept, (2, 3))
    pitch = title_height(photo) + 400 + (figure.width - 4 * 600) // 3 // 2
    for place in range(IN_A_ROW + 2):
        top, left = place // 4 * pitch + title_height(photo), place % 4 * (figure.width - 600) // 3
        assert np.array_equal(np.asarray(figure)[top : top + 400, left : left + 600], np.asarray(photo)), place


def test_lines_and_a_legend_are_below() -> None:
    photo = photo_of((600, 400))
    plain, more = (hierarchy_figure(photo, KEPT, (2, 3), lines) for lines in ((), ("a cat", "x" * 300)))
    assert more.height > plain.height
    assert more.width > 3000, "no line is cut"
    legend = np.asarray(plain)[title_height(photo) + 400 :]
    assert (legend == BLANK).all(-1).sum() > 300
    assert (legend == 0).all(-1).sum() > 100


def test_a_small_photo_is_enlarged() -> None:
    assert enlarged(photo_of((64, 48))).size == (256, 192)
    assert enlarged(photo_of((600, 20))).size == (600, 20)
