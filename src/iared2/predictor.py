"""The facade: a photo in, arrays and pictures out. The command line and every other front end are its thin clients."""

from __future__ import annotations

import base64
import io
import json
import math
import os
import platform
import tempfile
from collections.abc import Sequence
from dataclasses import dataclass
from html import escape
from importlib.metadata import version
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image, ImageOps
from timm.data import ImageNetInfo, infer_imagenet_subset

from .batches import model_transform
from .device import timed, usable_device
from .errors import InputError
from .explain import figures
from .explain.heatmap import clamp_below, overlay, upsample
from .model.decide import Decide
from .model.reduced import Output, ReducedVisionTransformer
from .photo import read_photo, to_rgb

RESULT_FILES = "interpret-result.png", "hierarchy.png", "result.json"


@dataclass(frozen=True, eq=False)
class Interpretation:
    """What the model saw in one photo. Groups are counted from 0 here, as in the arrays.

    Attributes:
        photo: upright, 8-bit RGB, of the photo's own size W × H.
        top5: the most probable classes and their probabilities, best first; fewer for a model of fewer classes.
        scores: ``(D, N)`` float32 in (0, 1), 0 where the patch was already gone.
        kept: ``(D, N)`` bool, the patches on which each group's blocks ran.
        grid_size: rows and columns of patches, N = rows × columns; the grid covers the whole photo.
        thresholds: one for each group.
        macs, dense_macs: multiply-adds of this photo, and of any photo with every patch kept and no interpreter.
        milliseconds: of the forward pass alone, after a warm-up; neither reading nor resizing the photo.
        model: what made it, for `result.json`: architecture, input size, checkpoint.
        file: where the photo came from, if it came from a file.
    """

    photo: Image.Image
    top5: list[tuple[str, float]]
    scores: np.ndarray
    kept: np.ndarray
    grid_size: tuple[int, int]
    thresholds: tuple[float, ...]
    macs: int
    dense_macs: int
    milliseconds: float
    model: dict[str, Any]
    file: str | None = None

    @property
    def keep_ratio(self) -> np.ndarray:
        """``(D,)`` share of the patches alive after each group, in [0, 1]."""
        return self.kept.mean(1)

    def heatmap(self, group: int | None = None) -> np.ndarray:
        """``(H, W)`` float32 in [0, 1]: the scores of a group, the second one (1) as in the authors' tool if None.

        The first group is blind, the class token has seen no patch yet; a model of one group has no other.
        """
        if group is None:
            group = min(1, len(self.scores) - 1)
        if not 0 <= group < len(self.scores):
            raise InputError(f"there is no group {group}; the model has groups 0 to {len(self.scores) - 1}")
        size = self.photo.height, self.photo.width
        low = clamp_below(self.thresholds[group])
        return upsample(torch.from_numpy(self.scores[group]), self.grid_size, size, low).numpy()

    def overlay(self, group: int | None = None, colormap: str = "jet") -> Image.Image:
        """The photo blended with the heat map, W × H."""
        return overlay(self.photo, self.heatmap(group), colormap)

    def figure(self, group: int | None = None, colormap: str = "jet") -> Image.Image:
        """The overlay with a colour bar."""
        return figures.result_figure(self.photo, self.heatmap(group), colormap)

    def hierarchy(self) -> Image.Image:
        """The photo, then what each group kept of it."""
        return figures.hierarchy_figure(self.photo, self.kept, self.grid_size)

    def _repr_html_(self) -> str:
        """What a notebook shows: overlay, hierarchy, the best classes and the cost. Self-contained, and not large."""
        classes = "".join(f"<tr><td>{escape(name)}</td><td>{100 * p:.1f} %</td></tr>" for name, p in self.top5)
        kept = " → ".join(f"{ratio:.2f}" for ratio in (1, *self.keep_ratio))
        return (
            f"<figure>{_inline(self.figure(), 480, 'heat map')}<br>{_inline(self.hierarchy(), 960, 'hierarchy')}"
            f"<figcaption>{escape(Path(self.file).name) if self.file else 'photo'}: patches {kept} of"
            f" {self.kept.shape[1]}, multiply-adds {100 * self.macs / self.dense_macs:.0f} % of dense,"
            f" {self.milliseconds:.1f} ms</figcaption><table>{classes}</table></figure>"
        )

    def to_dict(self) -> dict[str, Any]:
        """Everything but the pictures, ready for JSON. Patches are listed row by row."""
        return {
            "photo": {"file": self.file, "width": self.photo.width, "height": self.photo.height},
            "top5": [{"class": name, "probability": round(p, 6)} for name, p in self.top5],
            "grid_size": list(self.grid_size),
            "groups": [
                {"threshold": t, "keep_ratio": float(k.mean()), "scores": s.round(6).tolist(), "kept": k.tolist()}
                for t, s, k in zip(self.thresholds, self.scores.astype(float), self.kept, strict=True)
            ],
            "macs": self.macs,
            "dense_macs": self.dense_macs,
            "milliseconds": round(self.milliseconds, 3),
            "model": self.model,
            "versions": {name: version(name) for name in ("iared2", "torch", "timm")}
            | {"python": platform.python_version()},
        }

    def save(self, folder: str | Path, group: int | None = None, colormap: str = "jet") -> None:
        """Write `interpret-result.png`, `hierarchy.png` and `result.json`, and touch nothing else in the folder.

        Each file appears whole or not at all, `result.json` last. Raises `InputError` if the folder cannot be written.
        """
        folder = Path(folder)
        figure, hierarchy = self.figure(group, colormap), self.hierarchy()
        text = json.dumps(self.to_dict()) + "\n"
        try:
            folder.mkdir(parents=True, exist_ok=True)
            with tempfile.TemporaryDirectory(prefix=".iared2-", dir=folder) as temporary:
                files = [Path(temporary, name) for name in RESULT_FILES]
                figure.save(files[0])
                hierarchy.save(files[1])
                files[2].write_text(text, encoding="utf-8")
                for file in files:
                    os.replace(file, folder / file.name)
        except OSError as error:
            reason = error.strerror or error
            raise InputError(f"{folder}: cannot be written ({reason}); choose another output") from None


class Predictor:
    """Interprets photos, one at a time.

    Args:
        model: is set to evaluation mode and moved to the device. Its `threshold` may be changed between calls.
        device: anything that `torch.device` takes.
        checkpoint: where the model came from, for `result.json` alone.

    Raises:
        InputError: the device is not there, or the model does not take RGB images.
    """

    def __init__(
        self, model: ReducedVisionTransformer, device: str | torch.device = "cpu", checkpoint: str | Path | None = None
    ) -> None:
        cfg = model.pretrained_cfg
        channels, height, width = cfg["input_size"]
        if channels != 3:
            raise InputError(f"the model takes images of {channels} channels, and photos have 3")
        self.device = usable_device(device)
        self.model = model.eval().to(self.device)
        self._about = {
            "architecture": cfg.get("architecture") or type(model.backbone).__name__,
            "input_size": [height, width],
            "checkpoint": None if checkpoint is None else str(checkpoint),
        }
        self._transform = model_transform(cfg)
        self._warm = False

    def __call__(
        self, photo: str | Path | Image.Image | np.ndarray, threshold: float | Sequence[float] | None = None
    ) -> Interpretation:
        """Interpret one photo.

        Args:
            photo: a file, a Pillow image of any mode, or ``(H, W, 3)`` uint8 RGB. Any size; it is resized to the
                model's input as a whole, never cropped.
            threshold: of this call alone, one number or one for each group; the model's own if None. The model is not
                changed, so calls from several threads do not see each other's.

        Raises:
            InputError: the file is not a photo that can be read, the array is not of that form, or the thresholds are
                not finite or not as many as there are groups.
        """
        image = _as_image(photo)
        thresholds = self.thresholds(threshold)
        output, seconds = self._trace(self.prepare(image), self.model.policy(thresholds))
        return Interpretation(
            photo=image,
            top5=self._top5(output.logits[0]),
            scores=output.scores[:, 0].cpu().numpy(),
            kept=output.kept[:, 0].cpu().numpy(),
            grid_size=self.model.grid_size,
            thresholds=tuple(thresholds),
            macs=int(output.macs[0]),
            dense_macs=self.model.dense_macs,
            milliseconds=1000 * seconds,
            model=self._about,
            file=str(photo) if isinstance(photo, (str, Path)) else None,
        )

    def prepare(self, photo: Image.Image) -> torch.Tensor:
        """An RGB photo as the model's input ``(1, 3, height, width)``: resized whole, normalised, on the device."""
        parameter = next(self.model.parameters())  # its device, and its precision
        return self._transform(photo)[None].to(parameter)

    def thresholds(self, threshold: float | Sequence[float] | None) -> list[float]:
        """One number for each of the D groups, of one number for all, or of None for the model's own.

        Raises:
            InputError: not finite, or not as many as there are groups.
        """
        if threshold is None:
            return self.model.thresholds
        groups = self.model.num_groups
        values = [threshold] if isinstance(threshold, (int, float)) else list(threshold)
        if len(values) not in (1, groups) or not all(map(math.isfinite, values)):
            raise InputError(f"threshold {threshold}: give one finite number, or {groups}, one for each group")
        return values * (groups // len(values))

    @torch.inference_mode()
    def _trace(self, images: torch.Tensor, decide: Decide) -> tuple[Output, float]:
        """One forward pass and its seconds."""
        if not self._warm:
            self.model.trace(images, decide)  # the first pass also pays for allocations and the choice of kernels
            self._warm = True
        return timed(self.device, self.model.trace, images, decide)

    def _top5(self, logits: torch.Tensor) -> list[tuple[str, float]]:
        if not self.model.num_classes:  # the output is features, not logits
            return []
        probabilities, classes = logits.float().softmax(0).topk(min(5, len(logits)))
        return [(self._class_name(c), p) for c, p in zip(classes.tolist(), probabilities.tolist(), strict=True)]

    def _class_name(self, index: int) -> str:
        if self.model.class_names:
            return self.model.class_names[index]
        subset = infer_imagenet_subset(self.model)  # by the number of classes: 1k, 12k, 21k, 22k
        return ImageNetInfo(subset).index_to_description(index) if subset else str(index)


def _inline(picture: Image.Image, width: int, name: str) -> str:
    """The picture in HTML itself, no wider than ``width`` pixels."""
    picture.thumbnail((width, 2 * width), Image.Resampling.LANCZOS)
    file = io.BytesIO()
    picture.save(file, "PNG")
    return f'<img alt="{name}" src="data:image/png;base64,{base64.b64encode(file.getvalue()).decode()}">'


def _as_image(photo: str | Path | Image.Image | np.ndarray) -> Image.Image:
    if isinstance(photo, (str, Path)):
        return read_photo(photo)
    if isinstance(photo, Image.Image):
        return to_rgb(ImageOps.exif_transpose(photo))
    if photo.dtype != np.uint8 or photo.ndim != 3 or photo.shape[2] != 3 or not photo.size:
        raise InputError(f"a photo as an array is (H, W, 3) uint8 RGB, not {photo.shape} {photo.dtype}")
    return Image.fromarray(photo)
