"""A plate shows every pixel of its panels where it should, and writes on them what it should."""

from __future__ import annotations

import io
import re

import numpy as np
import pytest
from PIL import Image

from iared2.explain.plates import DPI, GAP, HEIGHT, TITLE, WIDTH, Panel, fit, plate


def noise(width: int, height: int, seed: int = 0) -> Image.Image:
    pixels = np.random.default_rng(seed).integers(60, 200, (height, width, 3))
    return Image.fromarray(pixels.astype(np.uint8))


@pytest.mark.parametrize("size", [(30, 20), (4000, 3000), (300, 4000), (1, 900), (900, 1)])
def test_photos_fit_their_panels_in_shape(size):
    panel = fit(noise(*size), 4)
    width = (WIDTH - 3 * GAP) / 4 * DPI
    assert panel.width <= round(width)
    assert panel.height <= round(2 * width)
    assert panel.width == round(width) or panel.height == round(2 * width)
    assert abs(np.log(panel.width / panel.height) - np.log(size[0] / size[1])) < 0.3 or 1 in panel.size


def test_a_png_is_as_wide_as_a_page_and_holds_the_panels_pixel_for_pixel():
    photos = [fit(noise(300, 200, seed), 3) for seed in range(6)]
    rows = [[Panel(photo) for photo in photos[:3]], [Panel(photo) for photo in photos[3:]]]
    picture = Image.open(io.BytesIO(plate(rows, ["a", "b", "c"], "png")))
    assert picture.width == WIDTH * DPI
    assert abs(picture.height - (TITLE + GAP) * DPI - 2 * photos[0].height) <= 2
    assert round(picture.info["dpi"][0]) == DPI
    pixels = np.asarray(picture.convert("RGB")).astype(int)
    for i, photo in enumerate(photos):
        top = round(TITLE * DPI) + (i // 3) * (photo.height + round(GAP * DPI))
        left = (i % 3) * (WIDTH * DPI + GAP * DPI) / 3
        inner = np.asarray(photo).astype(int)[10:-10, 10:-10]
        shifts = [  # the place of a panel is a fraction of a pixel
            np.abs(pixels[y : y + inner.shape[0], x : x + inner.shape[1]] - inner).mean()
            for y in range(top + 8, top + 13)
            for x in range(round(left) + 8, round(left) + 13)
        ]
        assert min(shifts) < 5, f"panel {i}; another photo would differ by 46"


def test_the_note_stands_in_the_corner_and_nowhere_else():
    photo = fit(Image.new("RGB", (300, 200), (200, 120, 40)), 2)
    picture = Image.open(io.BytesIO(plate([[Panel(photo), Panel(photo, "0.55")]], ["photo", "group 1"], "png")))
    pixels = np.asarray(picture.convert("RGB")).astype(int)[round(TITLE * DPI) + 3 : -3]
    half = pixels.shape[1] // 2
    changed = np.abs(pixels - (200, 120, 40)).max(2) > 8
    assert not changed[:, 5 : half - 12].any()
    rows, columns = np.nonzero(changed[:, half + 12 : -5])
    assert rows.size > 1000
    assert rows.max() < 70
    assert columns.max() < 150


def test_a_pdf_has_the_pages_it_needs_and_is_the_same_every_time():
    photo = fit(Image.new("RGB", (30, 60), (200, 120, 40)), 2)
    one_page = int((HEIGHT - TITLE) * DPI // (photo.height + GAP * DPI))
    rows = [[Panel(photo), Panel(photo, "0.55")]] * (one_page + 1)
    file = plate(rows, ["photo", "group 1"], "pdf")
    assert file.startswith(b"%PDF")
    assert re.search(rb"/Count 2\b", file)
    assert plate(rows, ["photo", "group 1"], "pdf") == file
    boxes = [list(map(float, box.split())) for box in re.findall(rb"/MediaBox \[([^]]*)\]", file)]
    assert all(box[2] == WIDTH * 72 and box[3] <= HEIGHT * 72 for box in boxes)
    assert re.search(rb"/Count 1\b", plate(rows[:-1], ["photo", "group 1"], "pdf"))
    large = re.findall(rb"/Width (\d+)", file)
    assert max(map(int, large)) == photo.width  # embedded as it is
