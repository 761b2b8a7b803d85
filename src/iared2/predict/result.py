"""The result for one photo or clip, and the predictor that computes it: the common part of `photo` and `video`.

Does not read photos or clips, and does not draw results; `photo` and `video` do.
"""

from __future__ import annotations

import io
import math
import platform
from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial
from importlib.metadata import version
from pathlib import Path
from typing import Any, ClassVar

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from ..atomic import to_json, whole
from ..data.batches import model_transform
from ..device import timed, usable_device
from ..errors import InputError, printable
from ..explain.heatmap import default_group, grid_of, lowest_kept, score_map
from ..export import served
from ..model.decide import Decide, Decision
from ..model.reduced import Output, ReducedVisionTransformer
from ..pretrained.checkpoint import load
from .output import check_not_read

Threshold = float | Sequence[float] | Decision
"""What decides which patches stay: one number, one per group, or all of it."""

RESULT = "result.json"


@dataclass(frozen=True, eq=False, kw_only=True, repr=False)
class Result:
    """The result of a predictor. Groups are counted from 0 here, as in the arrays.

    Attributes:
        top5: the most probable classes and their probabilities, best first; fewer for a model with fewer classes.
        dense_top5: the same with every patch kept; None if nobody asked.
        scores: ``(D, N)`` float32 in (0, 1), 0 where the patch was already dropped.
        kept: ``(D, N)`` bool, the patches on which each group's blocks ran.
        grid: rows and columns of patches that cover the photo in the first pass, see ``explain.heatmap.grid_of``.
        thresholds: one per group; for a model with counts, the lowest score that was kept, 0 if all were.
        macs, dense_macs: MACs of this result, and of the dense model without interpreters.
        second_pass: the probabilities are from a second pass with every patch (`Decision.confidence`).
        milliseconds: time of the forward pass alone, after a warm-up, without reading and resizing; of a batch, its
            share.
        model: the model, for `result.json`: architecture, input size, checkpoint.
        file: the input file, if any.
    """

    PICTURES: ClassVar[tuple[str, ...]]
    """The files that ``save`` writes, except `result.json`."""

    top5: list[tuple[str, float]]
    scores: np.ndarray
    kept: np.ndarray
    grid: tuple[float, ...]
    thresholds: tuple[float, ...]
    macs: int
    dense_macs: int
    second_pass: bool
    milliseconds: float
    model: dict[str, Any]
    file: str | None = None
    dense_top5: list[tuple[str, float]] | None = None

    def __repr__(self) -> str:
        """In one line: the file, the best class, and what was kept at which cost."""
        best = ", ".join(f"{name} {100 * p:.1f} %" for name, p in self.top5[:1]) or "no classes"
        kept = " > ".join(f"{ratio:.2f}" for ratio in self.keep_ratio)
        what = f"{self.file or 'no file'}: {best}, patches {kept}, MACs {self.cost}"
        return f"<{type(self).__name__} {printable(what)}>"

    @property
    def grid_size(self) -> tuple[int, ...]:
        """Rows and columns of patches, preceded by T' for a clip; their product is N."""
        return tuple(map(math.ceil, self.grid))

    @property
    def keep_ratio(self) -> np.ndarray:
        """``(D,)`` share of the patches alive after each group, in [0, 1]."""
        return self.kept.mean(1)

    @property
    def cost(self) -> str:
        """MACs as text: `1.23 of 4.61 G`."""
        unit, letter = (1e9, "G") if self.dense_macs >= 1e9 else (1e6, "M")
        return f"{self.macs / unit:.2f} of {self.dense_macs / unit:.2f} {letter}"

    def map(self, group: int | None, shown: Image.Image) -> np.ndarray:
        """The scores of a group as a heat map of the size of ``shown``, ``(H, W)``, for clips ``(T', H, W)``.

        The default is the last group; of fewer than four groups, the second (`explain.heatmap.default_group`).

        Raises:
            InputError: there is no such group.
        """
        if group is None:
            group = default_group(len(self.scores))
        if not 0 <= group < len(self.scores):
            raise InputError(f"there is no group {group}; the model has groups 0 to {len(self.scores) - 1}")
        scores, spread = torch.from_numpy(self.scores[group])[None], self.model.get("spread", 0.0)
        size = shown.height, shown.width
        return score_map(scores, self.grid, size, self.thresholds[group : group + 1], spread)[0].numpy()

    def to_dict(self) -> dict[str, Any]:
        """Everything except the pictures, as JSON types: docs/interpret.md says what each is, and its unit.

        Patches are listed row by row, for a clip also by time.
        """
        classes = {"top5": self.top5} | ({"dense_top5": self.dense_top5} if self.dense_top5 is not None else {})
        return {
            **{key: [{"class": name, "probability": round(p, 6)} for name, p in best] for key, best in classes.items()},
            "grid_size": list(self.grid_size),
            "groups": [
                {"threshold": t, "keep_ratio": float(k.mean()), "scores": s.round(6).tolist(), "kept": k.tolist()}
                for t, s, k in zip(self.thresholds, self.scores.astype(float), self.kept, strict=True)
            ],
            "macs": self.macs,
            "dense_macs": self.dense_macs,
            "second_pass": self.second_pass,
            "milliseconds": round(self.milliseconds, 3),
            "model": self.model,
            "versions": {name: version(name) for name in ("iared2", "torch", "timm")}
            | {"python": platform.python_version()},
        }

    def pictures(self, group: int | None, colormap: str) -> list[bytes]:
        """The contents of the files ``PICTURES``."""
        raise NotImplementedError

    def save(self, folder: str | Path, group: int | None = None, colormap: str = "jet") -> None:
        """Write the files ``PICTURES`` and `result.json`; other files in the folder are not changed.

        Each file is written whole or not at all, `result.json` last. Raises `InputError` if the folder cannot be
        written, or if one of the files is the input itself.
        """
        check_not_read(self.files(folder), [self.file])
        pictures = self.pictures(group, colormap)
        with whole(Path(folder, RESULT), parents=True) as result:
            for name, picture in zip(self.PICTURES, pictures, strict=True):
                result.with_name(name).write_bytes(picture)
            result.write_text(to_json(self.to_dict(), indent=2) + "\n", encoding="utf-8")

    @classmethod
    def files(cls, folder: str | Path) -> list[Path]:
        """The files that ``save`` writes into a folder."""
        return [Path(folder, name) for name in (*cls.PICTURES, RESULT)]


class BasePredictor:
    """Runs a model on one photo or clip at a time."""

    TAKES: ClassVar[str]
    """"photos" or "videos"."""

    def __init__(
        self,
        model: ReducedVisionTransformer | str | Path | None = None,
        device: str | torch.device = "cpu",
        checkpoint: str | Path | None = None,
        engine: str = "torch",
    ) -> None:
        """Prepare the model for calls.

        Args:
            model: set to evaluation mode and moved to the device. Its decision may be changed between calls. Or what
                `iared2.load` takes: a file, a folder, ``user/model`` of the Hugging Face Hub; None: the model in the
                box.
            device: anything that `torch.device` takes.
            checkpoint: the source of the model, only for `result.json`.
            engine: what runs the forward passes: "torch", or "openvino" or "onnxruntime" in float32 on the CPU, with
                the threads of torch (`runtime.Engine`). The model is exported first, in about half a minute for a
                ViT-S; nothing of it but its decision may change then, and a predictor cannot be pickled or copied.

        Raises:
            InputError: the device is missing, the model cannot be loaded, or it does not take RGB photos
                (`VideoPredictor`: RGB clips). Or the engine is missing, or is not for this device or these layers.
        """
        if not isinstance(model, ReducedVisionTransformer):
            checkpoint = checkpoint or model
        model = opened(model)
        check_takes(model, self.TAKES)
        cfg = model.pretrained_cfg
        self._size = list(cfg["input_size"][1:])
        self.device = usable_device(device)
        served.check_engine(engine, self.device)
        self.model = model.eval().to(self.device)
        self._served = None
        if engine != "torch":
            self._served = served.exported(model, engine, torch.get_num_threads(), stem=0)  # any group may drop
        self._about = {
            "architecture": cfg.get("architecture") or type(model.backbone).__name__,
            "input_size": self._size,
            "checkpoint": None if checkpoint is None else str(checkpoint),
        }
        self._transform = model_transform(cfg)
        self._warm = False

    def predict(self, inputs: Tensor, decision: Decision) -> list[dict[str, Any]]:
        """The fields of ``Result`` except `file`, for each photo or clip of a batch of ``on_device``."""
        output, seconds = self._trace(inputs, decision)
        return [self._fields(output, i, decision, seconds / len(inputs)) for i in range(len(inputs))]

    def _fields(self, output: Output, i: int, decision: Decision, seconds: float) -> dict[str, Any]:
        scores, kept = output.scores[:, i], output.kept[:, i]
        return {
            "top5": self._top5(output.logits[i]),
            "scores": scores.cpu().numpy(),
            "kept": kept.cpu().numpy(),
            "grid": grid_of(self.model, self._size, decision),
            "thresholds": tuple(decision.thresholds or lowest_kept(scores, kept).tolist()),
            "macs": int(output.macs[i]),
            "dense_macs": self.model.dense_macs,
            "second_pass": bool(output.unsure[i]),
            "milliseconds": 1000 * seconds,
            "model": self._about
            | {name: x for name in ("spread", "confidence") if (x := getattr(decision, name))}
            | ({"scale": decision.scale} if decision.scale < 1 else {}),
        }

    def on_device(self, one: Tensor) -> Tensor:
        """One photo or clip as a batch of one, on the model's device and in its precision."""
        return one[None].to(next(self.model.parameters()))

    @torch.inference_mode()
    def _trace(self, inputs: Tensor, decide: Decide) -> tuple[Output, float]:
        """One forward pass and its seconds."""
        trace = partial(served.trace, self._served, self.model) if self._served else self.model.trace
        if not self._warm:
            trace(inputs, decide)  # the first pass includes allocations and the choice of kernels
            self._warm = True
        return timed(self.device, trace, inputs, decide)

    def _top5(self, logits: Tensor) -> list[tuple[str, float]]:
        if not self.model.num_classes:  # the output is features, not logits
            return []
        probabilities, classes = logits.float().softmax(0).topk(min(5, len(logits)))
        return [(self.class_name(c), p) for c, p in zip(classes.tolist(), probabilities.tolist(), strict=True)]

    def class_name(self, index: int) -> str:
        """The name of a class, or its number if it has none."""
        return self.model.class_names[index] if self.model.class_names else str(index)


def opened(model: ReducedVisionTransformer | str | Path | None) -> ReducedVisionTransformer:
    """The model itself, or what `iared2.load` finds under a name.

    Raises:
        InputError: as `iared2.load`; or it is another module.
    """
    if isinstance(model, torch.nn.Module) and not isinstance(model, ReducedVisionTransformer):
        raise InputError(f"a {type(model).__name__} drops no patches: give iared2.from_timm(model)")
    return model if isinstance(model, ReducedVisionTransformer) else load(model)


def check_takes(model: ReducedVisionTransformer, takes: str) -> None:
    """Refuse a model that does not take RGB ``"photos"``, or ``"videos"``.

    Raises:
        InputError: names what it takes.
    """
    if (found := "videos" if model.is_video else "photos") != takes:
        other = "VideoPredictor" if model.is_video else "Predictor"
        raise InputError(f"the model takes {found}, not {takes}; give it to {other}")
    if (channels := model.pretrained_cfg["input_size"][0]) != 3:
        raise InputError(f"the model takes images of {channels} channels, and photos and videos have 3")


def decision_for(model: ReducedVisionTransformer, threshold: Threshold | None) -> Decision:
    """The decision for one call: the model's own, with other thresholds, or another one.

    Raises:
        InputError: the numbers are not finite, or not one per group.
    """
    own = model.decision
    decision = own if threshold is None else threshold if isinstance(threshold, Decision) else own.at(threshold)
    return decision.for_model(model.grid_size, model.num_groups)


def png(picture: Image.Image) -> bytes:
    """The picture as a PNG file."""
    file = io.BytesIO()
    picture.save(file, "PNG")
    return file.getvalue()
