"""Videos as files: their frames and times, and frames as Pillow images. Does not depend on models.

    open_video(path)              -> Video     the times of all frames; decodes one
    video.sample(frames, …)       -> indices   T frames by *time*, which handles variable frame rates
    video.frames(indices)         -> images    one at a time: upright, square pixels, 8-bit RGB

The package is PyAV, not torchcodec: the wheel of PyAV contains FFmpeg, and PyAV also writes videos. torchcodec needs
FFmpeg on the system and a build for the installed torch. Both decode with the same library.

A video is never in memory as a whole. Times come from the packets, which are not decoded. A frame is decoded from the
keyframe before it, or from the current position of the decoder if no keyframe lies in between. If packets have no times
(raw streams), one pass decodes and counts, and frames are read from the beginning.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from ..errors import InputError, missing
from .photo import TOO_LARGE, check_file, find_files, is_too_large, to_rgb

SUFFIXES = {
    *(".3gp", ".asf", ".avi", ".flv", ".m2ts", ".m4v", ".mkv", ".mov", ".mp4", ".mpeg"),
    *(".mpg", ".mts", ".ogv", ".qt", ".ts", ".vob", ".webm", ".wmv"),
}
"""Suffixes of files that count as videos before they are opened. GIFs are also read, but may be photos."""
INDEXED = "mov", "matroska", "avi"
"""Containers that store their length and the position of each keyframe. In others, FFmpeg estimates the length, and
after a seek also the times of the frames, so these are decoded from the beginning."""
MISSING = 0.5
"""Seconds (plus 2 %) by which a file may be shorter than its header says before it counts as truncated."""


def pyav() -> Any:
    """The module ``av``.

    Raises:
        InputError: it is not installed.
    """
    try:
        import av
    except ModuleNotFoundError:
        raise missing("a video", "av", "video") from None
    return av


def is_video(path: str | Path) -> bool:
    """Whether the name has the suffix of a video."""
    return Path(path).suffix.lower() in SUFFIXES


def find_videos(patterns: Sequence[str | Path], recursive: bool = False) -> list[Path]:
    """The videos that files, folders and globs stand for, see ``photo.find_files``."""
    return find_files(patterns, SUFFIXES, "video", recursive)


@dataclass(frozen=True, eq=False)
class Video:
    """A readable video file, from ``open_video``.

    Attributes:
        path: the file.
        times: ``(n,)`` float64, the time of each frame in seconds from the first one, increasing.
        duration: seconds until the last frame ends; above 0.
        width, height: as shown: upright and with square pixels.
        rotation: degrees counter-clockwise, a multiple of 90, of frames in the file; ``frames`` rotates them.
    """

    path: Path
    times: np.ndarray
    duration: float
    width: int
    height: int
    rotation: int
    _positions: np.ndarray
    """``(n,)`` int64, the frames' times in the units of the file; 0…n−1 if frames are counted."""
    _keys: np.ndarray
    """Indices of frames at which decoding can start; includes 0."""
    _by_count: bool

    def __len__(self) -> int:
        return len(self.times)

    def sample(
        self, frames: int, span: float | None = None, place: float = 0.5, offset: float | np.ndarray = 0.5
    ) -> np.ndarray:
        """The frames on the screen at T moments, one in each of T equal segments of a window.

        Args:
            frames: T.
            span: seconds of the window; None, or more than the duration: the whole video.
            place: of the window, from 0 (beginning) to 1 (end).
            offset: of the moment within its segment, in [0, 1); one number, or ``(T,)``.

        Returns:
            ``(T,)`` int64, not decreasing; a frame repeats where the video has too few.
        """
        span = min(span or self.duration, self.duration)
        moments = place * (self.duration - span) + (np.arange(frames) + offset) * (span / frames)
        return np.searchsorted(self.times, moments, side="right").clip(1) - 1

    def frames(self, indices: Iterable[int]) -> Iterator[Image.Image]:
        """The frames of these indices, which must not decrease; each is decoded on demand.

        Raises:
            InputError: the video is damaged at a requested frame.
        """
        indices, done = list(indices), 0
        for seek in (True, False):  # where the container finds no way to a keyframe, from the beginning
            try:
                for image in self._frames(indices[done:], seek):
                    yield image
                    done += 1
                return
            except _NotFound:
                continue
        number = indices[done]
        raise InputError(f"{self.path}: frame {number} cannot be decoded; the video is damaged, copy it again")

    def read(self, indices: np.ndarray) -> list[Image.Image]:
        """The frames of these indices, in any order; repeated indices share one image."""
        unique, inverse = np.unique(indices, return_inverse=True)
        images = list(self.frames(unique))
        return [images[i] for i in inverse]

    def _frames(self, indices: list[int], seek: bool) -> Iterator[Image.Image]:
        with _opened(self.path) as (container, stream):
            decoded = self._decoded(container, stream)
            now = ahead = None  # position and frame: the one on the screen, and the next one if it is decoded already
            for index in indices:
                want = self._positions[index]
                key = self._positions[self._keys[np.searchsorted(self._keys, index, side="right") - 1]]
                if seek and key > (now[0] if now else self._positions[0]):
                    _seek(container, stream, int(key))
                    decoded, now, ahead = self._decoded(container, stream), None, None
                while now is None or now[0] < want:
                    ahead = ahead or next(decoded, None)
                    if ahead is None:
                        raise _NotFound
                    if now is not None and ahead[0] > want:  # a packet without a frame: the one before stays
                        break
                    now, ahead = ahead, None
                if now[0] > want or now[1].is_corrupt:
                    raise _NotFound
                yield self._picture(now[1])

    def _decoded(self, container: Any, stream: Any) -> Iterator[tuple[int, Any]]:
        for number, frame in enumerate(container.decode(stream)):
            yield (number if self._by_count else frame.pts), frame

    def _picture(self, frame: Any) -> Image.Image:
        width, height = (self.width, self.height)[:: -1 if self.rotation % 180 else 1]
        has_alpha = any(part.is_alpha for part in frame.format.components)
        image = Image.fromarray(frame.reformat(width, height, "rgba" if has_alpha else "rgb24").to_ndarray())
        return to_rgb(image.transpose(_TURNS[self.rotation]) if self.rotation else image)


_TURNS = {90: Image.Transpose.ROTATE_90, 180: Image.Transpose.ROTATE_180, 270: Image.Transpose.ROTATE_270}


class _NotFound(Exception):
    """The requested frame is missing or damaged."""


def open_video(path: str | Path) -> Video:
    """Open a video: reads the whole file, decodes its first frame.

    Raises:
        InputError: no such file, empty, not a video, a photo, only sound, too large, truncated or damaged.
    """
    path = Path(path)
    with _opened(path) as (container, stream):
        first = None
        packets: list[tuple[Any, bool, bool, int]] = []  # time, is it shown, keyframe, duration
        end = 0.0  # seconds, of everything in the file
        for packet in container.demux():
            if packet.pts is not None:
                end = max(end, float((packet.pts + (packet.duration or 0)) * packet.time_base))
            if packet.stream.index == stream.index:
                if packet.size:  # the last one is empty and asks for what the decoder holds back
                    shown = not packet.is_discard  # an edit list cuts what others need to be decoded
                    packets.append((packet.pts, shown, packet.is_keyframe, packet.duration or 0))
                if first is None:
                    first = next(iter(packet.decode()), None)
        is_indexed = container.format.name.startswith(INDEXED)
        header = (container.duration or 0) / 1e6 if is_indexed else 0.0
        is_shown = any(shown for _, shown, *_ in packets)
        if first is None or not is_shown or end < 0.98 * header - MISSING:
            there = f"{end:.1f} of {header:.1f} seconds are there" if header and is_shown else "no frame is there"
            raise InputError(f"{path}: the video is cut short or damaged ({there}); copy or download it again")
        unit = float(stream.time_base)
        aspect = float(stream.sample_aspect_ratio or 1)
        rate = float(stream.average_rate or stream.guessed_rate or 25)
    rotation = round(first.rotation / 90) * 90 % 360
    width, height = (max(1, round(first.width * aspect)), first.height)[:: -1 if rotation % 180 else 1]
    if is_too_large(width, height):  # with square pixels
        raise InputError(f"{path}: {TOO_LARGE}")

    by_count = any(time is None for time, *_ in packets)
    if by_count:
        times = _decoded_times(path, unit, rate)
        positions, keys, last = np.arange(len(times)), np.zeros(1, dtype=int), 0.0
    else:
        positions = np.unique([time for time, shown, *_ in packets if shown])
        begins = np.array([time for time, _, is_key, _ in packets if is_key] or positions[:1])
        first_key = min(begins.min(), positions[-1])
        positions = positions[positions >= first_key]  # what is shown before it cannot be decoded
        later = np.searchsorted(positions, begins[begins > positions[0]]) if is_indexed else ()
        keys = np.unique([0, *later])
        times = (positions - positions[0]) * unit
        last = max(duration for time, _, _, duration in packets if time == positions[-1]) * unit
    if last <= 0:  # the file does not say for how long the last frame stays
        last = float(np.median(np.diff(times))) if len(times) > 1 else 1 / rate
    return Video(path, times, float(times[-1]) + last, width, height, rotation, positions, keys, by_count)


def _decoded_times(path: Path, unit: float, rate: float) -> np.ndarray:
    """The time of each frame in seconds, by decoding all of them, one at a time."""
    with _opened(path) as (container, stream):
        times = np.array([np.nan if frame.pts is None else frame.pts * unit for frame in container.decode(stream)])
    return times - times[0] if (np.diff(times) > 0).all() else np.arange(len(times)) / rate


def _seek(container: Any, stream: Any, position: int) -> None:
    try:
        container.seek(position, stream=stream)
    except pyav().FFmpegError:
        raise _NotFound from None


@contextmanager
def _opened(path: Path) -> Iterator[tuple[Any, Any]]:
    """The container and its first video stream; errors of FFmpeg become an ``InputError``."""
    av = pyav()
    check_file(path, "a video")
    is_open = False
    try:
        # a playlist must not fetch from the network; a title in an odd encoding is no reason to stop
        options = {"protocol_whitelist": "file"}
        with av.open(str(path), options=options, metadata_errors="replace") as container:
            is_open = True
            if container.format.name.endswith("_pipe") or container.format.name == "image2":
                raise InputError(f"{path}: a photo, and a video is needed; give a video, or a model for photos")
            cover = av.stream.Disposition.attached_pic
            streams = [s for s in container.streams.video if not s.disposition & cover and s.codec_context]
            if not streams:
                raise InputError(f"{path}: no video in this file; give one that has pictures")
            if is_too_large(streams[0].width, streams[0].height):
                raise InputError(f"{path}: {TOO_LARGE}")
            yield container, streams[0]
    except av.FFmpegError as error:
        if is_open:
            reason = error.strerror or type(error).__name__
            fault = f"the video is cut short or damaged ({reason}); copy or download it again"
        else:
            fault = "not a video that can be read here, or its end is missing; copy it again or convert it to MP4"
        raise InputError(f"{path}: {fault}") from None
