"""The tool's pictures of a clip: the paper's Figure 3, the same as an animation, and heat maps over time."""

from __future__ import annotations

import io
from collections.abc import Sequence
from fractions import Fraction

import numpy as np
from PIL import Image

from ..data.clips import pyav
from ..explain.figures import blank, fit, ratio, table, text_size, with_color_bar
from ..explain.heatmap import overlay

WIDTH = 2560
"""Width of a row of frames in pixels; many frames are small, but no smaller than ``SIDES``."""
SIDES = 128, 320
"""Smallest and largest longer side of a frame, in pixels."""
MOVING_SIDES = 320, 480
"""The same for the animation."""
PACE = 0.2, 0.5
"""Shortest and longest time of a frame of the animation, in seconds."""


def frames_figure(frames: Sequence[Image.Image], times: np.ndarray, kept: np.ndarray) -> Image.Image:
    """`frames.png`: a row of the frames with their times, then one row per group, dropped patches blank.

    Args:
        frames: T, RGB, of one size.
        times: ``(T,)`` seconds.
        kept: ``(D, T, rows, columns)`` bool, the patches that each group kept. The corner of a frame shows the share
            of patches left.
    """
    panels = _fit(frames)
    return table([_first_row(panels, times), *(_blanked(panels, group) for group in kept)])


def heatmap_figure(
    frames: Sequence[Image.Image], times: np.ndarray, heatmaps: np.ndarray, colormap: str = "jet"
) -> Image.Image:
    """`heatmap.png`: a row of the frames with their times, a row of the same under their heat maps, and a colour bar.

    Args:
        frames: T, RGB, of one size.
        times: ``(T,)`` seconds.
        heatmaps: ``(T, H, W)`` in [0, 1], of the frames' size.
        colormap: a name that matplotlib knows.
    """
    maps = _fit([overlay(frame, heatmap, colormap) for frame, heatmap in zip(frames, heatmaps, strict=True)])
    panels = _fit(frames)
    return with_color_bar(table([_first_row(panels, times), [(m, "") for m in maps]]), text_size(panels[0]), colormap)


def animation(frames: Sequence[Image.Image], times: np.ndarray, kept: np.ndarray) -> list[Image.Image]:
    """Each frame next to the patches kept by the last group; ``kept (T, rows, columns)`` bool."""
    panels = [fit(frame, *MOVING_SIDES) for frame in frames]
    return [table([sides]) for sides in zip(_first_row(panels, times), _blanked(panels, kept), strict=True)]


def pace(times: np.ndarray) -> float:
    """Seconds per frame of the animation: the time between the frames of the video, within ``PACE``."""
    return float(np.clip(np.diff(times).mean() if len(times) > 1 else PACE[1], *PACE))


def gif(pictures: Sequence[Image.Image], seconds: float) -> bytes:
    """`frames.gif`, which loops forever."""
    file = io.BytesIO()
    indexed = [picture.quantize(255, dither=Image.Dither.NONE) for picture in pictures]
    indexed[0].save(file, "GIF", save_all=True, append_images=indexed[1:], duration=round(1000 * seconds), loop=0)
    return file.getvalue()


def mp4_codec() -> str:
    """The encoder of `frames.mp4`: H.264 if FFmpeg was built with it."""
    return "libx264" if "libx264" in pyav().codecs_available else "mpeg4"


def mp4(pictures: Sequence[Image.Image], seconds: float) -> bytes:
    """`frames.mp4`, 4:2:0, which every player supports. It needs even sides, so a white line may be added."""
    width, height = (side + side % 2 for side in pictures[0].size)
    file, codec = io.BytesIO(), mp4_codec()
    av = pyav()
    options = {"crf": "18"} if codec == "libx264" else {"q": "2"}
    with av.open(file, "w", format="mp4") as out:
        stream = out.add_stream(codec, rate=Fraction(round(1000 / seconds), 1000), options=options)
        stream.width, stream.height, stream.pix_fmt = width, height, "yuv420p"
        for picture in pictures:
            canvas = Image.new("RGB", (width, height), "white")
            canvas.paste(picture)
            out.mux(stream.encode(av.VideoFrame.from_image(canvas)))
        out.mux(stream.encode())
    return file.getvalue()


def _fit(frames: Sequence[Image.Image]) -> list[Image.Image]:
    smallest, largest = SIDES
    side = max(smallest, min(largest, WIDTH // len(frames) - 8))
    return [fit(frame, smallest, side) for frame in frames]


def _first_row(panels: Sequence[Image.Image], times: np.ndarray) -> list[tuple[Image.Image, str]]:
    return [(panel, f"{time:.2f} s") for panel, time in zip(panels, times, strict=True)]


def _blanked(panels: Sequence[Image.Image], kept: np.ndarray) -> list[tuple[Image.Image, str]]:
    return [(blank(panel, k), ratio(k)) for panel, k in zip(panels, kept, strict=True)]
