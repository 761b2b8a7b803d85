"""The facade for videos: a file -> arrays and pictures, like `iared2.predict.photo` for photos."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from ..data.clips import Video, open_video
from ..explain.figures import PANEL_SIDES
from . import video_figures as figures
from .result import BasePredictor, Result, Threshold, decision_for, png


@dataclass(frozen=True, eq=False, kw_only=True, repr=False)
class ClipInterpretation(Result):
    """The result for one clip; see ``Result`` for the other attributes.

    Attributes:
        video: the whole file, with size and duration.
        indices: ``(T,)`` int64, the frames of the video that form the clip.
        frames: these frames, upright RGB, of ``PANEL_SIDES`` pixels at most.
    """

    PICTURES = "frames.png", "heatmap.png", "frames.gif", "frames.mp4"

    video: Video
    indices: np.ndarray
    frames: list[Image.Image]

    @property
    def times(self) -> np.ndarray:
        """``(T,)`` seconds from the start of the video."""
        return self.video.times[self.indices]

    @property
    def kept_in_frames(self) -> np.ndarray:
        """``(D, T, rows, columns)`` bool. The frames of one tubelet share their patches."""
        by_time = self.kept.reshape(len(self.kept), *self.grid_size)
        return np.repeat(by_time, len(self.frames) // self.grid_size[0], 1)

    def heatmap(self, group: int | None = None) -> np.ndarray:
        """``(T, H, W)`` float32 in [0, 1], of the size of ``frames``: the scores of a group, see ``Result.map``.

        The maps are normalised over the clip, so that frames can be compared.
        """
        maps = self.map(group, self.frames[0])
        return np.repeat(maps, len(self.frames) // len(maps), 0)

    def frames_figure(self) -> Image.Image:
        """The frames, then the patches kept by each group."""
        return figures.frames_figure(self.frames, self.times, self.kept_in_frames)

    def heatmap_figure(self, group: int | None = None, colormap: str = "jet") -> Image.Image:
        """The frames, then the same under their heat maps."""
        return figures.heatmap_figure(self.frames, self.times, self.heatmap(group), colormap)

    def pictures(self, group: int | None, colormap: str) -> list[bytes]:
        """`frames.png`, `heatmap.png`, and the animation as `frames.gif` and `frames.mp4`."""
        moving = figures.animation(self.frames, self.times, self.kept_in_frames[-1])
        seconds = figures.pace(self.times)
        still = self.frames_figure(), self.heatmap_figure(group, colormap)
        return [*map(png, still), figures.gif(moving, seconds), figures.mp4(moving, seconds)]

    def to_dict(self) -> dict[str, Any]:
        """Everything except the pictures, as JSON types. Patches are listed by time, then row by row."""
        video, result = self.video, super().to_dict()
        for group, kept in zip(result["groups"], self.kept_in_frames, strict=True):
            group["keep_ratio_of_frames"] = kept.mean((1, 2)).tolist()
        result["versions"]["av"] = version("av")
        return {
            "video": {
                "file": self.file,
                "width": video.width,
                "height": video.height,
                "rotation": video.rotation,
                "frames": len(video),
                "seconds": round(video.duration, 6),
            },
            "frames": [
                {"index": int(i), "seconds": round(float(t), 6)} for i, t in zip(self.indices, self.times, strict=True)
            ],
            "animation": {"codec": figures.mp4_codec(), "seconds_of_a_frame": figures.pace(self.times)},
            **result,
        }


class VideoPredictor(BasePredictor):
    """Interprets videos, one clip each: T frames, the centres of T equal parts of the whole video."""

    TAKES = "videos"

    @property
    def num_frames(self) -> int:
        """T."""
        return self.model.pretrained_cfg["input_size"][1]

    def __call__(
        self,
        path: str | Path,
        threshold: Threshold | None = None,
        advance: Callable[[int], object] = lambda frames: None,
    ) -> ClipInterpretation:
        """Interpret one video.

        Args:
            path: the file. Any size; each frame is resized to the model's input as a whole, never cropped.
            threshold: for this call only, one number or one per group, or a `Decision`; the model's own if None.
            advance: called with the number of frames after each frame.

        Raises:
            InputError: the file is not a readable video, or the thresholds are wrong.
        """
        decision = decision_for(self.model, threshold)
        video = open_video(path)
        indices = video.sample(self.num_frames)
        shown: list[Image.Image] = []

        def frames() -> Iterator[Image.Image]:  # one in memory at a time, small ones for the pictures
            for frame in video.frames(indices):
                yield frame
                frame.thumbnail((PANEL_SIDES[1], PANEL_SIDES[1]), Image.Resampling.LANCZOS)
                shown.append(frame)
                advance(1)

        [fields] = self.predict(self.on_device(self._transform(frames())), decision)
        return ClipInterpretation(video=video, indices=indices, frames=shown, file=str(path), **fields)
