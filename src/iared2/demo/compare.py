"""Photos with every patch kept and with some dropped, side by side, under any method of explanation.

What the page shows, without the page. It changes nothing that two callers share: thresholds travel with each call.
"""

from __future__ import annotations

import copy
import zipfile
from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import lru_cache
from pathlib import Path
from typing import Literal

import numpy as np
import torch
from PIL import Image
from torch.nn import functional as F

from ..atomic import to_json, whole
from ..data.photo import read_photo
from ..errors import InputError, printable
from ..explain import figures
from ..explain.heatmap import overlay
from ..explain.methods import heatmap
from ..model.calibrate import thresholds_for
from ..predict.output import folder_names
from ..predict.photo import Interpretation, Predictor

MAX_SIDE = 1024
"""Longer photos are made smaller when they are read: a camera's photo is then as quick to play with as a small one."""
PASSES = 3
"""Of each photo and threshold; the fastest counts, since a server does other things beside."""


@dataclass(frozen=True)
class Choice:
    """What a visitor chose.

    Attributes:
        method: one of `explain.methods.METHODS`.
        group: whose scores make the map of the method `interpreter`, from 0, or "all"; None: the second's.
        rule: what is dropped: by `threshold`, by a budget of MACs (`macs`) or of `patches`; `own`: by the
            model's own thresholds or counts.
        threshold: for every group, in [0, 1].
        budget: share of the dense MACs, or of the patches, in (0, 1]; the photos meet it together.
    """

    method: str = "interpreter"
    group: int | Literal["all"] | None = None
    rule: str = "own"
    threshold: float = 0.5
    budget: float = 0.5


@dataclass(frozen=True, eq=False)
class Comparison:
    """One photo with every patch kept, and with some dropped.

    Attributes:
        name: of the photo's file.
        before: every patch kept.
        after: under the thresholds that were asked for.
        heat: ``(H, W)`` float32 in [0, 1], by the method that was asked for, of the reduced model.
        method: its name.
    """

    name: str
    before: Interpretation
    after: Interpretation
    heat: np.ndarray
    method: str

    @property
    def saved(self) -> float:
        """Share of the dense MACs not spent; negative if the interpreters cost more than was saved."""
        return 1 - self.after.macs / self.after.dense_macs

    @property
    def nbytes(self) -> int:
        """Memory that it holds: Pillow has four bytes per pixel, the heat map four more."""
        return 4 * self.after.photo.width * self.after.photo.height + self.heat.nbytes

    def overlay(self) -> Image.Image:
        """The photo under its heat map, W × H."""
        return overlay(self.after.photo, self.heat)


def compare(
    predictor: Predictor, files: Sequence[str | Path], choice: Choice
) -> tuple[list[Comparison], list[InputError]]:
    """Compare some photos; those that cannot be read are left out, and why is returned beside the rest.

    Raises:
        InputError: the budget cannot be met, or the method cannot be had here.
    """
    photos: dict[Path, Image.Image] = {}
    complaints = []
    for file in map(Path, files):
        try:
            photos[file] = _read(file)
        except InputError as error:  # a visitor knows the photo's name, not where the server has put it
            complaints.append(InputError(str(error).replace(printable(str(file)), file.name)))
    if not photos:
        return [], complaints
    thresholds = _thresholds(predictor, list(photos.values()), choice)
    return [_compare(predictor, file.name, photo, thresholds, choice) for file, photo in photos.items()], complaints


def write_archive(comparisons: Sequence[Comparison], path: str | Path) -> None:
    """A ZIP file with a folder for each photo: `heatmap.png`, `hierarchy.png`, `result.json`."""
    folders = folder_names([Path(comparison.name) for comparison in comparisons])
    with whole(path) as place, zipfile.ZipFile(place, "w") as archive:
        for folder, comparison in zip(folders, comparisons, strict=True):
            after = comparison.after
            pictures = {"heatmap": figures.result_figure(after.photo, comparison.heat), "hierarchy": after.hierarchy()}
            for name, picture in pictures.items():
                with archive.open(f"{folder}/{name}.png", "w") as file:
                    picture.save(file, "PNG")
            result = {"method": comparison.method, "before": comparison.before.to_dict(), "after": after.to_dict()}
            archive.writestr(f"{folder}/result.json", to_json(result) + "\n")


@lru_cache(maxsize=32)
def _read(file: Path) -> Image.Image:
    """A slider asks for the same photos again and again. Uploads lie at paths that are made from their contents."""
    photo = read_photo(file)
    photo.thumbnail((MAX_SIDE, MAX_SIDE), Image.Resampling.LANCZOS)
    return photo


def _compare(
    predictor: Predictor, name: str, photo: Image.Image, thresholds: list[float] | None, choice: Choice
) -> Comparison:
    passes = [[predictor(photo, t) for _ in range(PASSES)] for t in (0.0, thresholds)]
    fastest = [min(results, key=lambda r: r.milliseconds) for results in passes]
    before, after = (replace(result, file=name, photo=photo) for result in fastest)  # not a copy each
    if choice.method == "interpreter" and choice.group != "all":
        heat = after.heatmap(choice.group)
    else:
        model = copy.copy(predictor.model)  # shares the weights, and has thresholds of its own
        if thresholds is not None:
            model.threshold = thresholds
        maps = heatmap(model, predictor.prepare(photo), choice.method, group=choice.group)
        size = photo.height, photo.width
        heat = F.interpolate(maps[None], size, mode="bicubic", antialias=True).clamp(0, 1)[0, 0].cpu().numpy()
    return Comparison(name, before, after, heat, choice.method)


def _thresholds(predictor: Predictor, photos: Sequence[Image.Image], choice: Choice) -> list[float] | None:
    """None: what the model itself decides."""
    model = predictor.model
    if choice.rule in ("own", "threshold"):
        return None if choice.rule == "own" else [choice.threshold] * model.num_groups
    images = torch.cat([predictor.prepare(photo) for photo in photos])
    if choice.rule == "macs":
        return thresholds_for(model, images, gmacs=choice.budget * model.dense_macs / 1e9)
    return thresholds_for(model, images, keep=choice.budget)
