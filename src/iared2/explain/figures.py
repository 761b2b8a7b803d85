"""The tool's pictures, composed pixel by pixel with Pillow to avoid resampling photos."""

from __future__ import annotations

import math
from collections.abc import Sequence

import numpy as np
from PIL import Image, ImageDraw, ImageFont

from .heatmap import colors, overlay

PANEL_SIDES = 256, 640
"""Smallest and largest longer side of a panel of the hierarchy, in pixels."""
IN_A_ROW = 5
"""Panels of the hierarchy in one row at most; more take two."""
LEGEND = "dropped patches"
"""The line of text beside a patch of the grey of dropped ones."""
BLANK = 235
"""The grey of a dropped patch, which differs from the white of the page or of a photo's background."""


def result_figure(
    photo: Image.Image, heatmap: np.ndarray, colormap: str = "jet", lines: Sequence[str] = ()
) -> Image.Image:
    """`interpret-result.png`: the photo under its heat map, with a colour bar on the right and lines of text below.

    The upper left W × H pixels are exactly the overlay; the bar is higher only if the photo is lower than a legible
    one.

    Args:
        photo: RGB, of width W and height H.
        heatmap: ``(H, W)`` in [0, 1].
        colormap: a colormap of matplotlib.
        lines: of text.
    """
    em = max(12, round(0.035 * min(photo.size)))
    return _captioned(with_color_bar(overlay(photo, heatmap, colormap), em, colormap), lines, em)


def enlarged(photo: Image.Image) -> Image.Image:
    """The photo, a small one as large as a panel at least."""
    return fit(photo, PANEL_SIDES[0], max(photo.size))


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


def hierarchy_figure(
    photo: Image.Image, kept: np.ndarray, grid: Sequence[float], lines: Sequence[str] = ()
) -> Image.Image:
    """`hierarchy.png`: the photo, then one panel per group with dropped patches blank, and a legend below.

    Above each panel stands which group it is, and the share of the patches that it keeps. More than ``IN_A_ROW`` panels
    take two rows.

    Args:
        photo: RGB.
        kept: ``(D, N)`` bool, the patches that each group kept.
        grid: from ``heatmap.grid_of``; rounded up, rows × columns = N.
        lines: of text, above the legend.
    """
    panel = fit(photo, *PANEL_SIDES)
    em, by_place = text_size(panel), kept.reshape(len(kept), *map(math.ceil, grid))
    panels = [(panel, "photo")]
    panels += [(blank(panel, k, grid), f"group {g}: {100 * k.mean():.0f} % kept") for g, k in enumerate(by_place, 1)]
    font = ImageFont.load_default(em)
    width = math.ceil(max(panel.width, *(font.getlength(title) for _, title in panels)))
    columns = len(panels) if len(panels) <= IN_A_ROW else math.ceil(len(panels) / 2)
    pitch = width + em, title_height(panel) + panel.height + em // 2
    canvas = Image.new("RGB", (columns * pitch[0] - em, math.ceil(len(panels) / columns) * pitch[1]), "white")
    draw = ImageDraw.Draw(canvas)
    for place, (picture, title) in enumerate(panels):
        x, y = place % columns * pitch[0], place // columns * pitch[1]
        draw.text((x, y + em // 4), title, "black", font, anchor="lt")
        canvas.paste(picture, (x, y + title_height(panel)))
    return _captioned(canvas, [*lines, LEGEND], em)


def title_height(panel: Image.Image) -> int:
    """Pixels from the title of a panel to its picture."""
    return round(1.5 * text_size(panel))


def _captioned(picture: Image.Image, lines: Sequence[str], em: int) -> Image.Image:
    """The picture over lines of text; beside ``LEGEND``, a patch of the grey that it explains."""
    if not lines:
        return picture
    font, step, indent = ImageFont.load_default(em), round(1.6 * em), round(1.5 * em)
    width = max(picture.width, *(math.ceil(font.getlength(line)) + indent for line in lines))
    canvas = Image.new("RGB", (width, picture.height + len(lines) * step + em // 2), "white")
    canvas.paste(picture)
    draw = ImageDraw.Draw(canvas)
    for number, line in enumerate(lines):
        x, y = 0, picture.height + number * step + em // 2
        if line == LEGEND:
            draw.rectangle((0, y, em, y + em), (BLANK, BLANK, BLANK), "black")
            x = indent
        draw.text((x, y), line, "black", font, anchor="lt")
    return canvas


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
