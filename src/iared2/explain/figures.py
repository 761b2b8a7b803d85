"""The tool's pictures, composed pixel by pixel with Pillow to avoid resampling photos."""

from __future__ import annotations

import math
from collections.abc import Sequence

import numpy as np
from PIL import Image, ImageDraw, ImageFont

from .heatmap import colors, overlay

PANEL_SIDES = 256, 640
"""Smallest and largest longer side of a panel of the hierarchy, in pixels."""
BLANK = 235
"""The grey of a dropped patch, which differs from the white of the page or of a photo's background."""


def result_figure(photo: Image.Image, heatmap: np.ndarray, colormap: str = "jet") -> Image.Image:
    """`interpret-result.png`: the photo under its heat map, with a colour bar on the right.

    The upper left W × H pixels are exactly the overlay; the canvas is higher only if the photo is lower than a legible
    bar.

    Args:
        photo: RGB, of width W and height H.
        heatmap: ``(H, W)`` in [0, 1].
        colormap: a colormap of matplotlib.
    """
    return with_color_bar(overlay(photo, heatmap, colormap), max(12, round(0.035 * min(photo.size))), colormap)


def with_color_bar(picture: Image.Image, em: int, colormap: str = "jet") -> Image.Image:
    """The picture in the upper left of a white canvas, with a colour bar on the right; text of ``em`` pixels."""
    font = ImageFont.load_default(em)
    high, low = "high", "low"
    height = max(picture.height, 5 * em)
    bar = Image.fromarray(colors(colormap)[::-1, None]).resize((em, height), Image.Resampling.BILINEAR)

    bar_left = picture.width + em
    text_left = bar_left + bar.width + em // 2
    canvas = Image.new("RGB", (text_left + math.ceil(font.getlength(high)) + em // 2, height), "white")
    canvas.paste(picture)
    canvas.paste(bar, (bar_left, 0))
    draw = ImageDraw.Draw(canvas)
    draw.text((text_left, em // 4), high, "black", font, anchor="lt")
    draw.text((text_left, height - em // 4), low, "black", font, anchor="ls")
    return canvas


def hierarchy_figure(photo: Image.Image, kept: np.ndarray, grid: Sequence[float]) -> Image.Image:
    """`hierarchy.png`: the photo, then one panel per group, dropped patches blank, keep ratio in the corner.

    Args:
        photo: RGB.
        kept: ``(D, N)`` bool, the patches that each group kept.
        grid: from ``heatmap.grid_of``; rounded up, rows × columns = N.
    """
    panel = fit(photo, *PANEL_SIDES)
    by_place = kept.reshape(len(kept), *map(math.ceil, grid))
    return table([[(panel, ""), *((blank(panel, k, grid), ratio(k)) for k in by_place)]])


def ratio(kept: np.ndarray) -> str:
    """The share of the patches that were kept, as the text of a corner."""
    return f"{kept.mean():.2f}"


def table(rows: Sequence[Sequence[tuple[Image.Image, str]]]) -> Image.Image:
    """Panels of one size in rows and columns, each with an optional text in its corner."""
    panel = rows[0][0][0]
    em = text_size(panel)
    gap = em // 2
    cell = max(panel.width, 4 * em), max(panel.height, 2 * em)  # room for a note on the thinnest of photos
    size = len(rows[0]) * (cell[0] + gap) - gap, len(rows) * (cell[1] + gap) - gap
    canvas = Image.new("RGB", size, "white")
    for i, row in enumerate(rows):
        for j, (picture, note) in enumerate(row):
            corner = j * (cell[0] + gap), i * (cell[1] + gap)
            canvas.paste(picture, corner)
            if note:
                _write(canvas, corner, note, em)
    return canvas


def text_size(panel: Image.Image) -> int:
    """Pixels of the text on panels of this size."""
    return max(16, round(0.075 * min(panel.size)))


def fit(photo: Image.Image, smallest: int, largest: int) -> Image.Image:
    """The photo with its longer side within bounds: reduced, or enlarged by an integer factor without interpolation."""
    panel = photo.copy()
    panel.thumbnail((largest, largest), Image.Resampling.LANCZOS)
    factor = math.ceil(smallest / max(panel.size))
    return panel.resize((panel.width * factor, panel.height * factor), Image.Resampling.NEAREST)


def blank(panel: Image.Image, kept: np.ndarray, grid: Sequence[float] | None = None) -> Image.Image:
    """Blank the pixels whose centre lies in a dropped patch.

    ``kept`` is (rows, columns); ``grid`` is the number of them that cover the panel, by default all.
    """
    row, column = (
        ((2 * np.arange(pixels) + 1) * count // (2 * pixels)).astype(int)
        for pixels, count in zip((panel.height, panel.width), grid or kept.shape, strict=True)
    )
    pixels = np.array(panel)
    pixels[~kept[row[:, None], column]] = BLANK
    return Image.fromarray(pixels)


def _write(canvas: Image.Image, corner: tuple[int, int], text: str, em: int) -> None:
    """The text in the upper left corner of a panel: white in a dark box, legible on any photo."""
    draw = ImageDraw.Draw(canvas)
    font = ImageFont.load_default(em)
    pad = em // 4
    place = corner[0] + 2 * pad, corner[1] + 2 * pad
    box = draw.textbbox(place, text, font, anchor="lt")
    draw.rounded_rectangle((box[0] - pad, box[1] - pad, box[2] + pad, box[3] + pad), pad, fill=(32, 32, 32))
    draw.text(place, text, "white", font, anchor="lt")
