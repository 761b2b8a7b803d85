"""Photos with every patch kept and with some dropped, side by side, under any method of explanation.

The content of the page, without the page. It changes no shared state: thresholds are arguments of each call.
"""

from __future__ import annotations

import zipfile
from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import lru_cache
from pathlib import Path
from typing import Literal

import numpy as np
import torch
from PIL import Image

from ..atomic import to_json, whole
from ..data.photo import read_photo
from ..errors import InputError, printable
from ..explain import figures
from ..explain.heatmap import overlay
from ..model.calibrate import decision_at
from ..model.decide import Decision
from ..predict.output import folder_names
from ..predict.photo import Interpretation, Predictor

MAX_SIDE = 1024
"""Larger photos are reduced when they are read, so that a camera's photo is as fast as a small one."""
PASSES = 3
"""Forward passes per photo and threshold; the fastest counts, since a server runs other work."""


@dataclass(frozen=True)
class Choice:
    """The settings of a visitor.

    Attributes:
        method: one of `explain.names.METHODS`.
        group: the group whose scores make the map of the method `interpreter`, from 0, or "all"; None: see
            `explain.heatmap.default_group`.
        rule: how patches are dropped: by `threshold`, by a budget of MACs (`macs`) or of `patches`; `own`: by the
            model's own thresholds or counts.
        threshold: for every group, in [0, 1].
        budget: share of the dense MACs, or of the patches, in (0, 1]; met on average over the photos.
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
        after: with the requested thresholds.
        heat: ``(H, W)`` float32 in [0, 1], by the requested method, for the reduced model.
        method: the name of the method.
    """

    name: str
    before: Interpretation
    after: Interpretation
    heat: np.ndarray
    method: str

    @property
    def saved(self) -> float:
        """Share of the dense MACs that is saved; negative if interpreters and a second pass cost more than that."""
        return 1 - self.after.macs / self.after.dense_macs

    @property
    def nbytes(self) -> int:
        """Memory in bytes: four per pixel for Pillow, four more for the heat map."""
        return 4 * self.after.photo.width * self.after.photo.height + self.heat.nbytes

    def overlay(self) -> Image.Image:
        """The photo under its heat map, W × H."""
        return overlay(self.after.photo, self.heat)


def compare(
    predictor: Predictor, files: Sequence[str | Path], choice: Choice
) -> tuple[list[Comparison], list[InputError]]:
    """Compare photos; those that cannot be read are left out, and the reasons are returned as well.

    Raises:
        InputError: the budget cannot be met, or the method is not available.
    """
    photos: dict[Path, Image.Image] = {}
    complaints = []
    for file in map(Path, files):
        try:
            photos[file] = _read(file)
        except InputError as error:  # a visitor knows the name of the photo, not its path on the server
            complaints.append(InputError(str(error).replace(printable(str(file)), file.name)))
    if not photos:
        return [], complaints
    decision = _decision(predictor, list(photos.values()), choice)
    return [_compare(predictor, file.name, photo, decision, choice) for file, photo in photos.items()], complaints


def write_archive(comparisons: Sequence[Comparison], path: str | Path) -> None:
    """A ZIP file with one folder per photo: `heatmap.png`, `hierarchy.png`, `result.json`."""
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
    """Cached, since a slider requests the same photos repeatedly. Paths of uploads are hashes of their contents."""
    photo = read_photo(file)
    photo.thumbnail((MAX_SIDE, MAX_SIDE), Image.Resampling.LANCZOS)
    return photo


def _compare(predictor: Predictor, name: str, photo: Image.Image, decision: Decision, choice: Choice) -> Comparison:
    passes = [[predictor(photo, each) for _ in range(PASSES)] for each in (decision.whole(), decision)]
    fastest = [min(results, key=lambda r: r.milliseconds) for results in passes]
    before, after = (replace(result, file=name, photo=photo) for result in fastest)  # not a copy each
    if choice.method == "interpreter" and choice.group != "all":
        heat = after.heatmap(choice.group)
    else:
        heat = predictor.heatmap(photo, choice.method, decision, choice.group)
    return Comparison(name, before, after, heat, choice.method)


def _decision(predictor: Predictor, photos: Sequence[Image.Image], choice: Choice) -> Decision:
    model, own = predictor.model, predictor.model.decision
    if choice.rule in ("own", "threshold"):
        return own if choice.rule == "own" else own.at(choice.threshold)
    images = torch.cat([predictor.prepare(photo) for photo in photos])
    if choice.rule == "macs":
        return decision_at(model, images, gmacs=choice.budget * model.dense_macs / 1e9)
    return decision_at(model, images, keep=choice.budget)
