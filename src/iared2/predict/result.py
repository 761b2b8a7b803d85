"""What a model found in one photo or one clip, and the model that finds it: all that the two have in common.

Knows neither how a photo or a clip is read nor how its findings are drawn; `predictor` and `video.predictor` do.
"""

from __future__ import annotations

import io
import json
import math
import platform
from collections.abc import Sequence
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path
from typing import Any, ClassVar

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from ..atomic import whole
from ..data.batches import model_transform
from ..device import timed, usable_device
from ..errors import InputError
from ..model.decide import Decide
from ..model.reduced import Output, ReducedVisionTransformer

RESULT = "result.json"


@dataclass(frozen=True, eq=False, kw_only=True)
class Findings:
    """What the model saw. Groups are counted from 0 here, as in the arrays.

    Attributes:
        top5: the most probable classes and their probabilities, best first; fewer for a model of fewer classes.
        scores: ``(D, N)`` float32 in (0, 1), 0 where the patch was already gone.
        kept: ``(D, N)`` bool, the patches on which each group's blocks ran.
        grid_size: rows and columns of patches, N = rows × columns, before them T' in a clip; the grid covers it all.
        thresholds: one for each group; of a model that keeps counts, the lowest score that stayed, 0 where all did.
        macs, dense_macs: multiply-adds of this one, and of any with every patch kept and no interpreter.
        milliseconds: of the forward pass alone, after a warm-up; neither reading nor resizing.
        model: what made it, for `result.json`: architecture, input size, checkpoint.
        file: where it came from, if it came from a file.
    """

    PICTURES: ClassVar[tuple[str, ...]]
    """The files that ``save`` writes, but for `result.json`."""

    top5: list[tuple[str, float]]
    scores: np.ndarray
    kept: np.ndarray
    grid_size: tuple[int, ...]
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

    def shown_group(self, group: int | None) -> int:
        """The group whose scores make the heat map: the second one (1) as in the authors' tool if None.

        The first group is blind, the class token has seen no patch yet; a model of one group has no other.

        Raises:
            InputError: there is no such group.
        """
        if group is None:
            group = min(1, len(self.scores) - 1)
        if not 0 <= group < len(self.scores):
            raise InputError(f"there is no group {group}; the model has groups 0 to {len(self.scores) - 1}")
        return group

    def to_dict(self) -> dict[str, Any]:
        """Everything but the pictures, ready for JSON. Patches are listed row by row, of a clip moment by moment."""
        return {
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

    def pictures(self, group: int | None, colormap: str) -> list[bytes]:
        """The contents of the files ``PICTURES``."""
        raise NotImplementedError

    def save(self, folder: str | Path, group: int | None = None, colormap: str = "jet") -> None:
        """Write the files ``PICTURES`` and `result.json`, and touch nothing else in the folder.

        Each file appears whole or not at all, `result.json` last. Raises `InputError` if the folder cannot be written.
        """
        pictures = self.pictures(group, colormap)
        text = json.dumps(self.to_dict()) + "\n"
        with whole(Path(folder, RESULT), parents=True) as result:
            for name, picture in zip(self.PICTURES, pictures, strict=True):
                result.with_name(name).write_bytes(picture)
            result.write_text(text, encoding="utf-8")


class Finder:
    """A model that looks at one photo or clip at a time.

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
        channels, *size = cfg["input_size"]
        if channels != 3:
            raise InputError(f"the model takes images of {channels} channels, and photos and videos have 3")
        self.device = usable_device(device)
        self.model = model.eval().to(self.device)
        self._about = {
            "architecture": cfg.get("architecture") or type(model.backbone).__name__,
            "input_size": size,
            "checkpoint": None if checkpoint is None else str(checkpoint),
        }
        self._transform = model_transform(cfg)
        self._warm = False

    def thresholds(self, threshold: float | Sequence[float] | None) -> list[float] | None:
        """One number for each of the D groups, of one number for all, or None, for what the model itself decides.

        Raises:
            InputError: not finite, or not as many as there are groups.
        """
        if threshold is None:
            return None
        groups = self.model.num_groups
        values = [threshold] if isinstance(threshold, (int, float)) else list(threshold)
        if len(values) not in (1, groups) or not all(map(math.isfinite, values)):
            raise InputError(f"threshold {threshold}: give one finite number, or {groups}, one for each group")
        return values * (groups // len(values))

    def find(self, inputs: Tensor, thresholds: list[float] | None) -> dict[str, Any]:
        """The fields of ``Findings``, but for `file`, from what ``on_device`` and `thresholds` made."""
        output, seconds = self._trace(inputs, self.model.policy(thresholds))
        return {
            "top5": self._top5(output.logits[0]),
            "scores": output.scores[:, 0].cpu().numpy(),
            "kept": output.kept[:, 0].cpu().numpy(),
            "grid_size": self.model.grid_size,
            "thresholds": tuple(thresholds or self._met(output)),
            "macs": int(output.macs[0]),
            "dense_macs": self.model.dense_macs,
            "milliseconds": 1000 * seconds,
            "model": self._about,
        }

    def on_device(self, one: Tensor) -> Tensor:
        """One photo or clip as a batch of it, on the model's device and in its precision."""
        return one[None].to(next(self.model.parameters()))

    def _met(self, output: Output) -> list[float]:
        """The model's own thresholds, or, if it keeps counts, the lowest score that stayed."""
        if self.model.num_keep is None:
            return self.model.thresholds
        scores, kept = output.scores[:, 0], output.kept[:, 0]
        return [float(s[k].min()) if k.any() and not k.all() else 0.0 for s, k in zip(scores, kept, strict=True)]

    @torch.inference_mode()
    def _trace(self, inputs: Tensor, decide: Decide) -> tuple[Output, float]:
        """One forward pass and its seconds."""
        if not self._warm:
            self.model.trace(inputs, decide)  # the first pass also pays for allocations and the choice of kernels
            self._warm = True
        return timed(self.device, self.model.trace, inputs, decide)

    def _top5(self, logits: Tensor) -> list[tuple[str, float]]:
        if not self.model.num_classes:  # the output is features, not logits
            return []
        probabilities, classes = logits.float().softmax(0).topk(min(5, len(logits)))
        return [(self._class_name(c), p) for c, p in zip(classes.tolist(), probabilities.tolist(), strict=True)]

    def _class_name(self, index: int) -> str:
        return self.model.class_names[index] if self.model.class_names else str(index)


def png(picture: Image.Image) -> bytes:
    """The picture as a PNG file."""
    file = io.BytesIO()
    picture.save(file, "PNG")
    return file.getvalue()
