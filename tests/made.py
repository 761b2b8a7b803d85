"""Small videos, made on the fly; most of them carry the number of each frame in its pixels."""

from __future__ import annotations

import math
from collections.abc import Sequence
from fractions import Fraction
from pathlib import Path
from typing import Any

import av
import numpy as np

BITS = 10


def numbered(number: int, width: int, height: int) -> np.ndarray:
    """``(height, width, 3)`` uint8: the number as ``BITS`` black and white stripes, which survive any codec."""
    bits = np.array([number >> i & 1 for i in range(BITS)])
    stripes = np.repeat(bits[np.arange(width) * BITS // width][None] * 255, height, 0)
    return np.repeat(stripes[..., None], 3, 2).astype(np.uint8)


def number_of(image: Any) -> int:
    """The number in a frame of ``numbered``."""
    columns = np.asarray(image).astype(float).mean((0, 2))
    centres = ((2 * np.arange(BITS) + 1) * len(columns)) // (2 * BITS)
    return int(sum(1 << i for i, c in enumerate(centres) if columns[c] > 127))


def write_video(
    path: Path,
    frames: Sequence[np.ndarray] | int,
    *,
    times: Sequence[int] | None = None,
    size: tuple[int, int] = (80, 48),
    codec: str = "libx264",
    format: str | None = None,
    rate: int = 10,
    gop: int = 12,
    rotation: int = 0,
    pixel_aspect: int = 1,
    pix_fmt: str = "yuv420p",
    options: dict[str, str] | None = None,
) -> Path:
    """A video of these frames, or of so many numbered ones.

    Args:
        path: where.
        frames: ``(height, width, 3)`` uint8 each, or how many.
        times: of each frame in thousandths of a second; constant rate if None.
        size: width and height of numbered frames.
        codec, format, rate, gop, pix_fmt, options: for FFmpeg.
        rotation: degrees counter-clockwise, by which a player has to turn it; of an MP4.
        pixel_aspect: width of a pixel by its height.
    """
    if isinstance(frames, int):
        frames = [numbered(i, *size) for i in range(frames)]
    with av.open(str(path), "w", format=format) as out:
        stream = out.add_stream(codec, rate=rate, options=options or {})
        stream.height, stream.width = frames[0].shape[:2]
        stream.pix_fmt, stream.gop_size = pix_fmt, gop
        stream.codec_context.sample_aspect_ratio = Fraction(pixel_aspect)
        if times is not None:
            stream.codec_context.time_base = Fraction(1, 1000)
        for i, pixels in enumerate(frames):
            frame = av.VideoFrame.from_ndarray(pixels, format="rgb24")
            if times is not None:
                frame.pts, frame.time_base = times[i], Fraction(1, 1000)
            out.mux(stream.encode(frame))
        out.mux(stream.encode())
    if rotation:
        _turn(path, rotation)
    return path


def _turn(path: Path, degrees: int) -> None:
    """Write the matrix a, b, 0, c, d, 0, 0, 0, 1 of the MP4's track: x' = a x + c y, y' = b x + d y, y downwards."""
    cos, sin = round(math.cos(math.radians(degrees))), round(math.sin(math.radians(degrees)))
    values = [65536 * v for v in (cos, -sin, 0, sin, cos, 0, 0, 0)] + [1 << 30]
    content = path.read_bytes()
    start = content.index(b"tkhd") + 4 + 40
    matrix = b"".join(value.to_bytes(4, "big", signed=True) for value in values)
    path.write_bytes(content[:start] + matrix + content[start + len(matrix) :])


def trim(path: Path, begin: float, seconds: float) -> Path:
    """Rewrite the MP4's edit list, as a phone that trims a video does: its frames stay in the file."""
    content = bytearray(path.read_bytes())

    def number(box: bytes, offset: int) -> int:
        return int.from_bytes(content[content.index(box) + offset :][:4], "big")

    length = round(seconds * number(b"mvhd", 16))
    start = number(b"elst", 16) + round(begin * number(b"mdhd", 16))
    for box, offset, value in ((b"elst", 12, length), (b"elst", 16, start), (b"mvhd", 20, length)):
        place = content.index(box) + offset
        content[place : place + 4] = value.to_bytes(4, "big")
    path.write_bytes(content)
    return path
