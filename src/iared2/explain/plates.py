"""Pictures in rows and columns for print, with matplotlib: PNG for slides, PDF for papers. Does not depend on models.

Photos are embedded at print resolution and not resampled again; text in a PDF is text.
"""

from __future__ import annotations

import io
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

from matplotlib.backends.backend_pdf import PdfPages
from matplotlib.figure import Figure
from PIL import Image

WIDTH, HEIGHT = 7.0, 9.5  # inches, of a page's text
GAP, TITLE = 0.05, 0.22  # inches, between pictures and above them
TALLEST = 2  # times as high as wide is a panel at most; a thinner photo leaves room at its sides
DPI = 300
FONT_SIZE = 8


@dataclass(frozen=True)
class Panel:
    """A picture, and the text in its upper left corner."""

    picture: Image.Image
    note: str = ""


def fit(photo: Image.Image, columns: int) -> Image.Image:
    """The photo in the pixels that a panel has in print, on a plate of 2 columns or more."""
    width = DPI * (WIDTH - GAP * (columns - 1)) / columns
    scale = min(width / photo.width, TALLEST * width / photo.height)
    return photo.resize((max(1, round(scale * photo.width)), max(1, round(scale * photo.height))))


def plate(rows: Sequence[Sequence[Panel]], titles: Sequence[str], kind: str) -> bytes:
    """The file of a plate: one row per photo, one column per title.

    Args:
        rows: panels as wide as ``fit`` makes them, as many in a row as there are titles; of one size within a row.
        titles: above the first row of a page.
        kind: "pdf", of as many pages as the rows need; or "png", one picture as high as the rows are.
    """
    file = io.BytesIO()
    if kind == "pdf":
        with PdfPages(file, metadata={"CreationDate": None}) as pages:  # the same photos, the same file
            for page in _pages(rows):
                _draw(page, titles).savefig(pages, format="pdf", dpi=DPI)
    else:
        _draw(rows, titles).savefig(file, format=kind, dpi=DPI)
    return file.getvalue()


def _height(row: Sequence[Panel]) -> float:
    return max(panel.picture.height for panel in row) / DPI


def _pages(rows: Sequence[Sequence[Panel]]) -> Iterator[list[Sequence[Panel]]]:
    """The rows of each page, as many as fit."""
    page: list[Sequence[Panel]] = []
    room = HEIGHT - TITLE
    for row in rows:
        if page and _height(row) > room:
            yield page
            page, room = [], HEIGHT - TITLE
        page.append(row)
        room -= _height(row) + GAP
    yield page


def _draw(rows: Sequence[Sequence[Panel]], titles: Sequence[str]) -> Figure:
    height = TITLE + sum(map(_height, rows)) + GAP * (len(rows) - 1)
    figure = Figure((WIDTH, height), dpi=DPI)
    cell = (WIDTH - GAP * (len(titles) - 1)) / len(titles)
    for column, title in enumerate(titles):
        x = (column * (cell + GAP) + cell / 2) / WIDTH
        figure.text(x, 1 - TITLE / 2 / height, title, ha="center", va="center", size=FONT_SIZE)
    top = height - TITLE
    for row in rows:
        for column, panel in enumerate(row):
            width, tall = (side / DPI for side in panel.picture.size)
            left = column * (cell + GAP) + (cell - width) / 2
            axes = figure.add_axes((left / WIDTH, (top - tall) / height, width / WIDTH, tall / height))
            axes.imshow(panel.picture, interpolation="none", aspect="auto")
            axes.set_axis_off()
            if panel.note:
                box = {"boxstyle": "round,pad=0.25", "facecolor": "#202020", "linewidth": 0}
                corner = (0, 1), (4, -4)  # 4 points to the right of it and below
                axes.annotate(
                    panel.note, corner[0], corner[1], "axes fraction", "offset points",
                    color="white", size=FONT_SIZE, ha="left", va="top", bbox=box,
                )  # fmt: skip
        top -= _height(row) + GAP
    return figure
