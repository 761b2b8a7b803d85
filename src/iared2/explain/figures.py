"""The tool's two pictures, composed pixel by pixel with Pillow so that no photo is resampled more than it must be."""

from __future__ import annotations

import math

import numpy as np
from PIL import Image, ImageDraw, ImageFont

from .heatmap import colors, overlay

PANEL_SIDES = 256, 640
"""Smallest and largest longer side of a panel of the hierarchy, in pixels."""
BLANK = 235
"""The grey of a dropped patch: not the white of the page or of a photo's background."""


def result_figure(photo: Image.Image, heatmap: np.ndarray, colormap: str = "jet") -> Image.Image:
    """`interpret-result.png`: the photo under its heat map, and a colour bar at its right.

    The upper left W × H pixels are the overlay, pixel for pixel; the canvas is higher only if the photo is lower than
    a legible bar.

    Args:
        photo: RGB, of width W and height H.
        heatmap: ``(H, W)`` in [0, 1].
        colormap: a name that matplotlib knows.
    """
    em = max(12, round(0.035 * min(photo.size)))  # the unit of everything that is drawn: the font's size
    font = ImageFont.load_default(em)
    high, low = "high", "low"
    height = max(photo.height, 5 * em)
    bar = Image.fromarray(colors(colormap)[::-1, None]).resize((em, height), Image.Resampling.BILINEAR)

    bar_left = photo.width + em
    text_left = bar_left + bar.width + em // 2
    canvas = Image.new("RGB", (text_left + math.ceil(font.getlength(high)) + em // 2, height), "white")
    canvas.paste(overlay(photo, heatmap, colormap))
    canvas.paste(bar, (bar_left, 0))
    draw = ImageDraw.Draw(canvas)
    draw.text((text_left, em // 4), high, "black", font, anchor="lt")
    draw.text((text_left, height - em // 4), low, "black", font, anchor="ls")
    return canvas


def hierarchy_figure(photo: Image.Image, kept: np.ndarray, grid_size: tuple[int, int]) -> Image.Image:
    """`hierarchy.png`: the photo, then one panel a group, its dropped patches blank and its keep ratio in the corner.

    Args:
        photo: RGB.
        kept: ``(D, N)`` bool, the patches that each group kept.
        grid_size: rows and columns of patches, N = rows × columns. The grid covers the whole photo.
    """
    panel = _fit(photo)
    panels = [panel, *(blank(panel, k.reshape(grid_size)) for k in kept)]
    em = max(16, round(0.075 * min(panel.size)))
    gap = em // 2
    cell = max(panel.width, 4 * em), max(panel.height, 2 * em)  # room for the ratio on the thinnest of photos
    canvas = Image.new("RGB", (len(panels) * (cell[0] + gap) - gap, cell[1]), "white")
    for i, picture in enumerate(panels):
        left = i * (cell[0] + gap)
        canvas.paste(picture, (left, 0))
        if i:
            _write_ratio(canvas, left, float(kept[i - 1].mean()), em)
    return canvas


def _fit(photo: Image.Image) -> Image.Image:
    """The photo within the bounds of a panel: smaller, or larger by a whole factor so that its pixels stay pixels."""
    smallest, largest = PANEL_SIDES
    panel = photo.copy()
    panel.thumbnail((largest, largest), Image.Resampling.LANCZOS)
    factor = math.ceil(smallest / max(panel.size))
    return panel.resize((panel.width * factor, panel.height * factor), Image.Resampling.NEAREST)


def blank(panel: Image.Image, kept: np.ndarray) -> Image.Image:
    """Blank where the patch that a pixel's centre lies in was dropped; ``kept`` is (rows, columns)."""
    rows, columns = kept.shape
    row = (2 * np.arange(panel.height) + 1) * rows // (2 * panel.height)
    column = (2 * np.arange(panel.width) + 1) * columns // (2 * panel.width)
    pixels = np.array(panel)
    pixels[~kept[row[:, None], column]] = BLANK
    return Image.fromarray(pixels)


def _write_ratio(canvas: Image.Image, left: int, ratio: float, em: int) -> None:
    """The ratio at the upper left of the panel that begins at ``left``: white in a dark box, legible on anything."""
    draw = ImageDraw.Draw(canvas)
    font = ImageFont.load_default(em)
    text, pad = f"{ratio:.2f}", em // 4
    box = draw.textbbox((left + 2 * pad, 2 * pad), text, font, anchor="lt")
    draw.rounded_rectangle((box[0] - pad, box[1] - pad, box[2] + pad, box[3] + pad), pad, fill=(32, 32, 32))
    draw.text((left + 2 * pad, 2 * pad), text, "white", font, anchor="lt")
