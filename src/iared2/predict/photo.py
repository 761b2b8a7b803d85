"""The facade: a photo -> arrays and pictures. The command line and all other front ends are thin clients of it."""

from __future__ import annotations

import base64
from collections.abc import Sequence
from dataclasses import dataclass
from html import escape
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image
from timm.data import ImageNetInfo, infer_imagenet_subset

from ..data.clips import is_video
from ..data.photo import read_photo, to_rgb, upright
from ..errors import InputError, printable
from ..explain import figures
from ..explain.heatmap import default_group, overlay
from .result import BasePredictor, Result, png


@dataclass(frozen=True, eq=False, kw_only=True)
class Interpretation(Result):
    """The result for one photo; see ``Result`` for the other attributes.

    Attributes:
        photo: upright, 8-bit RGB, in its original size W × H.
    """

    PICTURES = "interpret-result.png", "hierarchy.png"

    photo: Image.Image

    def heatmap(self, group: int | None = None) -> np.ndarray:
        """``(H, W)`` float32 in [0, 1]: the scores of a group, see ``Result.map``."""
        return self.map(group, self.photo)

    def overlay(self, group: int | None = None, colormap: str = "jet") -> Image.Image:
        """The photo blended with the heat map, W × H."""
        return overlay(self.photo, self.heatmap(group), colormap)

    def figure(self, group: int | None = None, colormap: str = "jet") -> Image.Image:
        """The overlay with a colour bar, and what it shows below; a small photo is enlarged."""
        photo = figures.enlarged(self.photo)
        number = default_group(len(self.scores)) if group is None else group
        what = f"colour: the scores by which group {number + 1} of {len(self.scores)} keeps patches"
        return figures.result_figure(photo, self.map(group, photo), colormap, [*self._words()[-1:], what])

    def hierarchy(self) -> Image.Image:
        """The photo, then the patches kept by each group, with their share, the class, and a legend."""
        return figures.hierarchy_figure(self.photo, self.kept, self.grid, self._words())

    def _words(self) -> list[str]:
        """The class and the cost: with all patches, if known, and with those that were kept."""
        found = []
        for what, best, macs in (
            ("with every patch", self.dense_top5, self.dense_macs),
            ("with the kept patches", self.top5, self.macs),
        ):
            for name, p in (best or ())[:1]:
                share = macs / self.dense_macs
                found.append(f"{what}: {printable(name):.60} {100 * p:.0f} %, {100 * share:.0f} % of the MACs")
        return found

    def pictures(self, group: int | None, colormap: str) -> list[bytes]:
        """`interpret-result.png`, the figure, and `hierarchy.png`."""
        return [png(self.figure(group, colormap)), png(self.hierarchy())]

    def _repr_html_(self) -> str:
        """The display in a notebook: overlay, hierarchy, the best classes and the cost. Self-contained and small."""
        classes = "".join(f"<tr><td>{escape(name)}</td><td>{100 * p:.1f} %</td></tr>" for name, p in self.top5)
        kept = " → ".join(f"{ratio:.2f}" for ratio in (1, *self.keep_ratio))
        return (
            f"<figure>{_inline(self.figure(), 480, 'heat map')}<br>{_inline(self.hierarchy(), 960, 'hierarchy')}"
            f"<figcaption>{escape(Path(self.file).name) if self.file else 'photo'}: patches {kept} of"
            f" {self.kept.shape[1]}, MACs {100 * self.macs / self.dense_macs:.0f} % of dense,"
            f" {self.milliseconds:.1f} ms</figcaption><table>{classes}</table></figure>"
        )

    def to_dict(self) -> dict[str, Any]:
        """Everything except the pictures, as JSON types. Patches are listed row by row."""
        photo = {"file": self.file, "width": self.photo.width, "height": self.photo.height}
        return {"photo": photo, **super().to_dict()}


class Predictor(BasePredictor):
    """Interprets photos, one at a time."""

    TAKES = "photos"

    def __call__(
        self, photo: str | Path | Image.Image | np.ndarray, threshold: float | Sequence[float] | None = None
    ) -> Interpretation:
        """Interpret one photo.

        Args:
            photo: a file, a Pillow image of any mode, or ``(H, W, 3)`` uint8 RGB. Any size; it is resized to the
                model's input as a whole, never cropped.
            threshold: for this call only, one number or one per group; the model's own if None. The model is not
                changed, so calls from several threads are independent.

        Raises:
            InputError: the file is not a readable photo, the array has another shape or type, or the thresholds are
                not finite or not one per group.
        """
        image = _as_image(photo)
        fields = self.predict(self.prepare(image), self.thresholds(threshold))
        return Interpretation(photo=image, file=str(photo) if isinstance(photo, (str, Path)) else None, **fields)

    def prepare(self, photo: Image.Image) -> torch.Tensor:
        """An RGB photo as the model's input ``(1, 3, height, width)``: resized whole, normalised, on the device."""
        return self.on_device(self._transform(photo))

    def _class_name(self, index: int) -> str:
        subset = None if self.model.class_names else infer_imagenet_subset(self.model)  # by their number: 1k, 12k, …
        return ImageNetInfo(subset).index_to_description(index) if subset else super()._class_name(index)


def _inline(picture: Image.Image, width: int, name: str) -> str:
    """The picture embedded in HTML, at most ``width`` pixels wide."""
    picture.thumbnail((width, 2 * width), Image.Resampling.LANCZOS)
    return f'<img alt="{name}" src="data:image/png;base64,{base64.b64encode(png(picture)).decode()}">'


def _as_image(photo: str | Path | Image.Image | np.ndarray) -> Image.Image:
    if isinstance(photo, (str, Path)):
        if is_video(photo):
            raise InputError(f"{photo}: a video, and this model takes photos; give a video model with -c")
        return read_photo(photo)
    if isinstance(photo, Image.Image) and all(photo.size):
        return to_rgb(upright(photo))
    if isinstance(photo, np.ndarray) and photo.dtype == np.uint8 and photo.shape[2:] == (3,) and photo.size:
        return Image.fromarray(photo)
    what = f"{photo.shape} {photo.dtype}" if isinstance(photo, np.ndarray) else f"{photo!r:.80}"
    raise InputError(f"a photo is a path, a PIL image with pixels or an (H, W, 3) uint8 RGB array, not {what}")
