"""The part of a labelled data set that a run uses, with the same class numbers in every split.

sources.py finds and opens the data, batches.py reads it. Does not depend on models.
"""

from __future__ import annotations

import difflib
import hashlib
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, replace
from typing import Any, Literal

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import Dataset

from .. import keyed
from ..errors import InputError, NoSplit
from .photo import load_image, to_rgb, upright
from .sources import ALL, EVAL_NAMES, TRAIN_NAMES, Source, Splits, find_splits

Transform = Callable[[Any], Tensor]
"""Transform of an image, or of the images of a clip."""

HOLDOUT_SEED = 0
"""Not the seed of the run: runs with different seeds share the holdout, and `evaluate` finds it again."""


@dataclass(frozen=True)
class DataConfig:
    """A labelled image data set and the part of it to use."""

    path: str = ""
    """A folder of images per class (directly, or in train/ and val/), a folder of parquet files or of WebDataset shards
    (tar files with KEY.jpg and KEY.cls), one such file, or hf:NAME or hf:OWNER/NAME/CONFIG for a Hugging Face data set.
    --data sets it."""
    train_split: str = "train"
    """Split to train on."""
    eval_split: str = "validation"
    """Split to evaluate on. "validation" also stands for val, valid and test, whichever exists first."""
    image_column: str = "image"
    """Column of the images, in parquet files and Hugging Face data sets."""
    label_column: str = "label"
    """Column of the integer labels, in parquet files and Hugging Face data sets; the field in KEY.json of shards."""
    classes: tuple[str, ...] = ()
    """Use only these classes, in this order, given by name, WordNet id or synonym; empty: all."""
    holdout: float = 0.0
    """Share of the training split that is held out to choose settings on, in [0, 1). Each image is drawn by its path in
    the data set, or its row in a table, so that `iared2 evaluate` finds the same images again."""
    workers: int = 2
    """Processes that read images; 0: the main process reads."""
    clutter: int = 0
    """Side of a canvas in pixels: every image is placed on one, small and whole, among pieces of other images, so it is
    known which patches are informative (cluttered.py). 0: off."""
    resident: bool = False
    """Decode every training image once, keep all on the device at the model's input size, and augment them there in
    whole batches. For data sets of small images: 100,000 images of 64×64 take 1.2 GB."""


@dataclass(frozen=True, eq=False)
class Samples(Dataset[tuple[Any, int]]):
    """An open data set. ``samples[i]`` is image i, upright 8-bit RGB, and its label; raises whatever decoders raise."""

    reader: Any
    """The rows of a ``Source``."""
    rows: np.ndarray
    """``(n,)`` int64, the samples' positions in the reader."""
    labels: np.ndarray
    """``(n,)`` int64 in 0…K−1; reading them decodes no image."""
    class_names: tuple[str, ...]
    """K names."""

    def __len__(self) -> int:
        return len(self.rows)

    def __getitem__(self, index: int) -> tuple[Any, int]:
        with self.reader[int(self.rows[index])] as file:
            return to_rgb(upright(load_image(file))), int(self.labels[index])

    def name(self, index: int) -> str:
        """The image's file name, or its row in the table if it has none."""
        return self.reader.filename(int(self.rows[index]), absolute=True)

    def draw(self, number: int) -> Samples:
        """At most so many at random, since folders lie class by class; in their order, since tables are read so."""
        drawn = np.sort(keyed.permutation(0, 0, len(self))[:number].numpy())
        return replace(self, rows=self.rows[drawn], labels=self.labels[drawn])


def open_samples(config: DataConfig, split: Literal["train", "holdout", "eval"], whole: bool = False) -> Samples:
    """Open one part of a data set. Reads names and labels, decodes no image.

    Args:
        config: the data set.
        split: "train" (without the holdout), "holdout" or "eval" (the holdout, if there is no split to evaluate on).
        whole: for "eval", use all of a folder or file without splits. Not for training, which has trained on it.

    Raises:
        InputError: the path does not exist, is no data set, or has no such split; fewer than two classes; labels that
            are missing, out of range or unknown in training; an unknown or ambiguous class; or no holdout.
    """
    wanted = config.train_split, config.eval_split
    return choose(config, find_splits(config.path, config.image_column, config.label_column, wanted), split, whole)


def choose(
    config: DataConfig, splits: Splits, split: Literal["train", "holdout", "eval"], whole: bool = False
) -> Samples:
    """The part of ``splits`` that ``open_samples`` opens; its arguments and errors."""
    wanted = config.train_split, config.eval_split
    train = _pick(splits, TRAIN_NAMES if wanted[0] == "train" else wanted[:1])
    evaluation = _pick(splits, (EVAL_NAMES if wanted[1] == "validation" else wanted[1:]) + (ALL,) * whole)
    if split == "eval" and evaluation is None and config.holdout:
        split = "holdout"
    if (chosen := evaluation if split == "eval" else train) is None:
        setting, hint = ("eval_split", " or a holdout") if split == "eval" else ("train_split", "")
        name = getattr(config, setting)
        raise NoSplit(f"{config.path}: no split {name!r}, there is {', '.join(splits)}; give another {setting}{hint}")
    source = chosen()
    if split == "eval" and train is not None and train is not chosen and not source.complete:
        source = _renumbered(source, train().names, config.path)

    rows, labels, class_names = np.arange(len(source.labels)), source.labels, source.names
    if config.classes and config.classes != class_names:
        number = np.full(len(class_names), -1)
        for new, name in enumerate(config.classes):
            old = _find_class(name, source, config.path)
            if number[old] >= 0:
                raise InputError(f"classes: {name!r} is {config.classes[number[old]]!r}; name each class once")
            number[old] = new
        labels, class_names = number[labels], config.classes
    part = labels >= 0
    if split != "eval":
        part &= _held_out(source, config.holdout) == (split == "holdout")
    rows, labels = rows[part], labels[part]
    if len(rows) == 0:
        raise InputError(f"{config.path}: no images in the {split} split; see classes and holdout")
    if split == "train" and labels.min() == labels.max():
        name = class_names[labels[0]]
        raise InputError(f"{config.path}: all training images are of one class, {name!r}; give two or more")
    return Samples(source.reader, rows, labels, class_names)


def _pick(splits: Splits, names: Sequence[str]) -> Callable[[], Source] | None:
    return next((splits[name] for name in names if name in splits), None)


def _renumbered(source: Source, names: tuple[str, ...], where: str) -> Source:
    """Use the class numbers of the training split."""
    number = {name: i for i, name in enumerate(names)}
    for name in (source.names[label] for label in np.unique(source.labels)):
        if name not in number:
            hint = _close(name, names) or "rename or remove it"
            raise InputError(f"{where}: {name!r}, a class to evaluate on, is not a class of the training split; {hint}")
    return source._replace(labels=np.array([number.get(name, -1) for name in source.names])[source.labels], names=names)


def _find_class(name: str, source: Source, where: str) -> int:
    found = [i for i, own in enumerate(source.names) if own == name]
    found = found or [i for i, others in enumerate(source.aliases) if name in others]
    if len(found) == 1:
        return found[0]
    if found:
        choices = ", ".join(sorted(set().union(*(a for i, a in enumerate(source.aliases) if i in found)) - {name}))
        raise InputError(f"{where}: {len(found)} classes are called {name!r}; name the one you mean by: {choices}")
    hint = _close(name, {*source.names}.union(*source.aliases)) or f"there is {', '.join(source.names[:5])} …"
    raise InputError(f"{where}: no class {name!r} among {len(source.names)}; {hint}")


def _close(name: str, names: Iterable[str]) -> str:
    close = difflib.get_close_matches(name, names, 3)
    return f"did you mean {' or '.join(map(repr, close))}?" if close else ""


def _held_out(source: Source, share: float) -> np.ndarray:
    """``(n,)`` bool: drawn per sample, so that other samples may be added or removed."""
    if not isinstance(share, (int, float)) or not 0 <= share < 1:
        raise InputError(f"holdout = {share} must be in [0, 1)")
    if not share:
        return np.zeros(len(source.labels), dtype=bool)
    names = (source.reader.filename(row).encode(errors="surrogateescape") for row in range(len(source.labels)))
    digests = b"".join(hashlib.blake2b(name, digest_size=8).digest() for name in names)
    keys = torch.from_numpy(np.frombuffer(digests, "<i8").astype(np.int64))
    return (keyed.uniform(keyed.sample_keys(HOLDOUT_SEED, 0, keys), 0, 1)[:, 0] < share).numpy()
