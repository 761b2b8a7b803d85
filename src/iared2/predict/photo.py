"""The facade: a photo -> arrays and pictures. The command line and all other front ends are thin clients of it."""

from __future__ import annotations

import base64
import copy
import http.client
import os
import urllib.request
import warnings
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import cache
from html import escape
from pathlib import Path
from typing import Any, BinaryIO, Literal, overload

import numpy as np
import torch
from PIL import Image
from timm.data import ImageNetInfo, infer_imagenet_subset
from torch.nn import functional as F

from ..data.clips import is_video
from ..data.photo import as_rgb, fault, find_photos, read_photo, reason
from ..errors import InputError, printable
from ..explain import figures, methods
from ..explain.heatmap import default_group, overlay
from ..model.decide import Decision
from ..model.reduced import ReducedVisionTransformer
from .result import BasePredictor, Result, Threshold, decision_for, png

Photo = str | Path | bytes | BinaryIO | Image.Image | np.ndarray
MAX_BYTES, TIMEOUT = 1 << 28, 30
"""Of a photo from a file object or an address: its size, and the seconds without an answer."""


@dataclass(frozen=True, eq=False, kw_only=True, repr=False)
class Interpretation(Result):
    """The result for one photo; see ``Result`` for the other attributes.

    Attributes:
        photo: upright, 8-bit RGB, in its original size W × H.
        method: of the heat map, see `explain.methods.heatmap`.
        heat: ``(H, W)`` float32 in [0, 1], of a method other than "interpreter"; None for our own.
    """

    PICTURES = "interpret-result.png", "hierarchy.png"

    photo: Image.Image
    method: str = "interpreter"
    heat: np.ndarray | None = None

    def heatmap(self, group: int | None = None) -> np.ndarray:
        """``(H, W)`` float32 in [0, 1]: the scores of a group, see ``Result.map``; or ``heat`` if it is set."""
        return self.map(group, self.photo) if self.heat is None else self.heat

    def overlay(self, group: int | None = None, colormap: str = "jet") -> Image.Image:
        """The photo blended with the heat map, W × H."""
        return overlay(self.photo, self.heatmap(group), colormap)

    def figure(self, group: int | None = None, colormap: str = "jet") -> Image.Image:
        """The overlay with a colour bar, and what it shows below; a small photo is enlarged."""
        photo = figures.enlarged(self.photo)
        number = default_group(len(self.scores)) if group is None else group
        what = f"colour: the scores by which group {number + 1} of {len(self.scores)} keeps patches"
        if self.heat is None:
            heat = self.map(group, photo)
        else:
            what = f"colour: {self.method}"
            heat = np.asarray(Image.fromarray(self.heat).resize(photo.size, Image.Resampling.BICUBIC)).clip(0, 1)
        return figures.result_figure(photo, heat, colormap, [*self._words()[-1:], what])

    def hierarchy(self) -> Image.Image:
        """The photo, then the patches kept by each group, with their share, the class, and a legend."""
        return figures.hierarchy_figure(self.photo, self.kept, self.grid, self._words())

    def _words(self) -> list[str]:
        """The class and the cost: with all patches, if known, and of this result."""
        found, own = [], "with the kept patches"
        if self.second_pass:
            own = "with the kept patches, not sure, then with every patch"
        for what, best, macs in (
            ("with every patch", self.dense_top5, self.dense_macs),
            (own, self.top5, self.macs),
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
        method = {} if self.heat is None else {"method": self.method}
        return {"photo": photo, **method, **super().to_dict()}


class Predictor(BasePredictor):
    """Interprets photos: ``Predictor()("photo.jpg")`` by the model in the box.

    Attributes:
        allow_urls: download photos whose name is an address (``https://…``). Without it, nothing uses the network.
    """

    TAKES = "photos"

    def __init__(
        self,
        model: ReducedVisionTransformer | str | Path | None = None,
        device: str | torch.device = "cpu",
        checkpoint: str | Path | None = None,
        engine: str = "torch",
        *,
        allow_urls: bool = False,
    ) -> None:
        """Prepare the model for calls: see `BasePredictor` and the class."""
        super().__init__(model, device, checkpoint, engine)
        self.allow_urls = allow_urls

    @overload
    def __call__(self, photo: Photo, threshold: Threshold | None = None) -> Interpretation: ...

    @overload
    def __call__(
        self, photo: list[Photo] | tuple[Photo, ...], threshold: Threshold | None = None
    ) -> list[Interpretation]: ...

    def __call__(
        self, photo: Photo | list[Photo] | tuple[Photo, ...], threshold: Threshold | None = None
    ) -> Interpretation | list[Interpretation]:
        """Interpret one photo, or a list of photos in one batch.

        Args:
            photo: a file, its contents as bytes, a binary file object, a Pillow image of any mode, or a uint8 array:
                ``(H, W)`` grey, ``(H, W, 3)`` RGB or ``(H, W, 4)`` RGBA; an address with ``allow_urls``. Any size; it
                is resized to the model's input as a whole, never cropped. Or a list of these.
            threshold: for this call only, one number or one per group, or a `Decision`; the model's own if None. The
                model is not changed, so calls from several threads are independent.

        Returns:
            The result, or a list of them.

        Raises:
            InputError: the file is not a readable photo, the array has another shape or type, or the thresholds are
                not finite or not one per group. Nothing of a list is interpreted then.
        """
        decision = decision_for(self.model, threshold)
        if not isinstance(photo, (list, tuple)):
            return self._batch([photo], decision)[0]
        return self._batch(photo, decision) if photo else []

    def folder(
        self, folder: str | Path, threshold: Threshold | None = None, *, recursive: bool = False
    ) -> Iterator[Interpretation]:
        """Interpret the photos of a folder, one at a time, in the order of their names. For many: ``iared2 predict``.

        Args:
            folder: the folder. Hidden files are left out; a photo that cannot be read gives a warning.
            threshold: as for a call.
            recursive: also the photos in subfolders.

        Raises:
            InputError: the folder cannot be read, or has no photo.
        """
        for file in find_photos([folder], recursive):
            try:
                result = self(file, threshold)
            except InputError as error:
                warnings.warn(f"left out: {error}", stacklevel=2)
            else:
                yield result

    def _batch(self, photos: Sequence[Photo], decision: Decision) -> list[Interpretation]:
        images = [_as_image(photo, self.allow_urls) for photo in photos]
        fields = self.predict(torch.cat([self.prepare(image) for image in images]), decision)
        names = [str(photo) if isinstance(photo, (str, Path)) else getattr(photo, "name", None) for photo in photos]
        files = [name if isinstance(name, str) else None for name in names]
        return [Interpretation(photo=i, file=f, **own) for i, f, own in zip(images, files, fields, strict=True)]

    def prepare(self, photo: Image.Image) -> torch.Tensor:
        """An RGB photo as the model's input ``(1, 3, height, width)``: resized whole, normalised, on the device."""
        return self.on_device(self._transform(photo))

    def heatmap(
        self,
        photo: Image.Image,
        method: str,
        threshold: Threshold | None = None,
        group: int | Literal["all"] | None = None,
    ) -> np.ndarray:
        """What another method of explanation shows of a photo, for the reduced model: `explain.methods.heatmap`.

        Args:
            photo: RGB, W × H.
            method: one of `explain.names.EVERY`.
            threshold: as for a call.
            group: of the method "interpreter", from 0, or "all".

        Returns:
            ``(H, W)`` float32 in [0, 1].

        Raises:
            InputError: an unknown method, or one whose package is missing; or the thresholds are wrong.
        """
        model = copy.copy(self.model)  # shares the weights, but has its own decision
        model.decision = decision_for(model, threshold)
        maps = methods.heatmap(model, self.prepare(photo), method, group=group)
        size = photo.height, photo.width
        return F.interpolate(maps[None], size, mode="bicubic", antialias=True).clamp(0, 1)[0, 0].cpu().numpy()

    def class_name(self, index: int) -> str:
        """See `class_name`."""
        return class_name(self.model, index)


def class_name(model: ReducedVisionTransformer, index: int) -> str:
    """The model's own name, that of ImageNet for a model with as many classes, or else the number."""
    if model.class_names:
        return model.class_names[index]
    subset = infer_imagenet_subset(model)  # by their number: 1k, 12k, …
    return _imagenet(subset).index_to_description(index) if subset else str(index)


_imagenet = cache(ImageNetInfo)  # reads files


def _inline(picture: Image.Image, width: int, name: str) -> str:
    """The picture embedded in HTML, at most ``width`` pixels wide."""
    picture.thumbnail((width, 2 * width), Image.Resampling.LANCZOS)
    return f'<img alt="{name}" src="data:image/png;base64,{base64.b64encode(png(picture)).decode()}">'


def _as_image(photo: Any, allow_urls: bool = False) -> Image.Image:
    if isinstance(photo, str) and photo.lower().startswith(("http://", "https://")):
        if not allow_urls:
            raise InputError(f"{photo}: an address; Predictor(…, allow_urls=True) downloads it, or give a file")
        return _decode(_download(photo), photo)
    if isinstance(photo, (str, Path)):
        if os.path.isdir(photo):
            raise InputError(f"{photo}: a folder; Predictor.folder() takes it, or give the path of an image")
        if is_video(photo):
            raise InputError(f"{photo}: a video, and this model takes photos; give a video model with -c")
        return read_photo(photo)
    if hasattr(photo, "read"):
        return _decode(_contents(photo), str(getattr(photo, "name", "the file object")))
    return _decode(photo, "the photo")


def _decode(photo: Any, name: str) -> Image.Image:
    try:
        return as_rgb(photo)
    except Exception as error:  # decoders raise anything
        raise InputError(f"{name}: {fault(error)}") from None


def _contents(file: Any) -> bytes:
    """All bytes of a binary file object, from where it stands."""
    try:
        data = file.read(MAX_BYTES + 1)
    except (OSError, ValueError) as error:  # ValueError: it is closed
        raise InputError(f"the file object cannot be read: {error}; open it anew, in binary mode") from None
    if not isinstance(data, bytes):
        raise InputError("the file object gives text, not bytes: open it in binary mode, 'rb'")
    if len(data) > MAX_BYTES:
        raise InputError(f"the photo has more than {MAX_BYTES:,} bytes; make it smaller first")
    return data


def _download(address: str) -> bytes:
    try:
        with urllib.request.urlopen(address, timeout=TIMEOUT) as response:
            return _contents(response)
    except (OSError, ValueError, http.client.HTTPException) as error:
        raise InputError(f"{address}: cannot be downloaded ({reason(error)}); download it, and give the file") from None
