"""Labelled images: open a data set of any kind, and read it in batches that depend on nothing but their keys.

Files are found and read by timm's readers and Hugging Face `datasets`, transforms are timm's. What is ours: errors before
training begins, class names that mean the same in every split, and the order and the augmentation of the samples as
pure functions of seed, epoch and sample (keyed.py). Knows nothing of models.
"""

from __future__ import annotations

import difflib
import json
import random
import re
import warnings
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, Literal, NamedTuple

import numpy as np
import torch
from PIL import Image, ImageOps
from timm.data import create_transform
from timm.data.readers import create_reader
from torch import Tensor
from torch.utils.data import DataLoader, Dataset

from . import keyed
from .errors import InputError
from .photo import MAX_PIXELS, to_rgb

Transform = Callable[[Image.Image], Tensor]

ALL = "all"
"""The split of a folder or file that has no splits."""
TRAIN_NAMES = ("train", "training", ALL)
EVAL_NAMES = ("validation", "val", "valid", "test")
MAX_UNREADABLE = 100
"""So many unreadable images in a row end a run: it is the data set that is broken, not an image."""
MAX_IN_MEMORY = 1 << 30
"""Parquet files of up to so many bytes are held in memory; larger ones are mapped from `datasets`' cache on disk."""
HOLDOUT_SEED = 0
"""Not the run's seed: runs that differ in their seed are compared on the same holdout."""


@dataclass(frozen=True)
class DataConfig:
    """A labelled image data set and the part of it to use."""

    path: str = ""
    """A folder of images per class (directly, or in train/ and val/), a folder of parquet files, one parquet file, or
    hf:NAME or hf:OWNER/NAME/CONFIG for a Hugging Face data set. --data sets it."""
    train_split: str = "train"
    """Split to train on."""
    eval_split: str = "validation"
    """Split to evaluate on. "validation" also stands for val, valid and test, whichever is there first."""
    image_column: str = "image"
    """Column of the images, in parquet files and Hugging Face data sets."""
    label_column: str = "label"
    """Column of the integer labels, in parquet files and Hugging Face data sets."""
    classes: tuple[str, ...] = ()
    """Use only these classes, numbered in this order, given by name, WordNet id or synonym; empty: all."""
    holdout: float = 0.0
    """Share of every class of the training split that is put aside to choose settings on, in [0, 1)."""
    workers: int = 2
    """Processes that read images; 0: the main process does."""


@dataclass(frozen=True, eq=False)
class Samples(Dataset[tuple[Image.Image, int]]):
    """An open data set. ``samples[i]`` is the i-th image, upright 8-bit RGB, and its label; raises if it cannot be read."""

    reader: Any
    """timm's reader."""
    rows: np.ndarray
    """``(n,)`` int64, the samples' positions in the reader."""
    labels: np.ndarray
    """``(n,)`` int64 in 0…K−1; looking at them decodes no image."""
    class_names: tuple[str, ...]
    """K names."""

    def __len__(self) -> int:
        return len(self.rows)

    def __getitem__(self, index: int) -> tuple[Image.Image, int]:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # remarks on odd metadata; the size, also a mere warning, is checked below
            file = self.reader[int(self.rows[index])][0]
            with file, Image.open(file) as image:
                if image.width * image.height > MAX_PIXELS:
                    raise Image.DecompressionBombError(f"more than {MAX_PIXELS:,} pixels")
                return to_rgb(ImageOps.exif_transpose(image)), int(self.labels[index])

    def name(self, index: int) -> str:
        """The image's file name, or its row in the table if it has none."""
        row = int(self.rows[index])
        try:
            name = self.reader.filename(row, absolute=True)
        except TypeError:  # a table's empty cell
            name = None
        return name or f"row {row}"


@dataclass
class Batch:
    """Images that were read together."""

    images: Tensor
    """``(B, 3, H, W)`` float32, transformed."""
    labels: Tensor
    """``(B,)`` int64."""
    samples: Tensor
    """``(B,)`` int64, positions in the data set: what the draws are keyed by, even where another image had to step in."""
    skipped: list[tuple[str, str]]
    """File name and reason of each image that could not be read."""


def open_samples(config: DataConfig, split: Literal["train", "holdout", "eval"], whole: bool = False) -> Samples:
    """Open one part of a data set. Reads names and labels, decodes no image.

    Args:
        config: the data set.
        split: "train" (without the holdout), "holdout" or "eval".
        whole: for "eval", take a folder or file without splits as a whole. Training must not: it has trained on it.

    Raises:
        InputError: nothing there, not a data set, no such split, fewer than two classes, labels that are missing, out of
            range or unknown in training, an unknown or ambiguous class, or no holdout.
    """
    splits = _find_splits(config)
    train = _pick(splits, TRAIN_NAMES if config.train_split == "train" else (config.train_split,))
    if split == "eval":
        names = EVAL_NAMES if config.eval_split == "validation" else (config.eval_split,)
        chosen, setting = _pick(splits, (*names, ALL) if whole else names), "eval_split"
    else:
        chosen, setting = train, "train_split"
    if chosen is None:
        raise InputError(
            f"{config.path}: no split {getattr(config, setting)!r}, there is {', '.join(splits)}; set data.{setting}"
            + (", or data.holdout to put training images aside" if split == "eval" else "")
        )
    opened = chosen()
    if split == "eval" and not opened.complete and train not in (None, chosen):
        opened = _renumbered(opened, train().names, config.path)  # type: ignore[misc]

    rows, labels, class_names = np.arange(len(opened.labels)), opened.labels, opened.names
    if config.classes and config.classes != class_names:
        wanted = [_find_class(name, opened, config.path) for name in config.classes]
        if len(set(wanted)) < len(wanted):
            raise InputError(f"data.classes: a class is named twice in {', '.join(config.classes)}")
        number = np.full(len(class_names), -1)
        number[wanted] = np.arange(len(wanted))
        rows, labels, class_names = np.flatnonzero(number[labels] >= 0), number[labels], config.classes
        labels = labels[rows]
    if split != "eval":
        held = _held_out(labels, config.holdout)
        if split == "holdout" and not held.any():
            raise InputError(f"{config.path}: data.holdout = {config.holdout} puts no image aside; set it higher")
        part = held if split == "holdout" else ~held
        rows, labels = rows[part], labels[part]
    if len(rows) == 0:
        raise InputError(f"{config.path}: no image of the chosen classes in the {split} split")
    if split == "train" and labels.min() == labels.max():
        raise InputError(f"{config.path}: all images are of one class, {class_names[labels[0]]!r}; it takes at least two")
    return Samples(opened.reader, rows, labels, class_names)


def steps_per_epoch(samples: Samples, batch_size: int, world_size: int = 1) -> int:
    """Whole batches of ``batch_size`` images for each of ``world_size`` processes in one pass.

    Raises:
        InputError: not even one.
    """
    steps = len(samples) // (batch_size * world_size)
    if steps == 0:
        raise InputError(
            f"{len(samples)} training images do not fill one batch of {batch_size} × {world_size} processes;"
            " set a smaller batch_size"
        )
    return steps


def train_batches(
    samples: Samples, transform: Transform, *, seed: int, epoch: int, batch_size: int,
    start_step: int = 0, rank: int = 0, world_size: int = 1, workers: int = 0,
) -> Iterator[Batch]:  # fmt: skip
    """One shuffled pass, the incomplete batch at its end left out.

    Batch k of all processes together is the same ``batch_size * world_size`` images however many they are and however
    they are read. An image that cannot be read is replaced by the next one in the data set.

    Args:
        samples: the data set.
        transform: image -> ``(3, H, W)``; may draw from the global generators of Python, numpy and torch's CPU.
        seed, epoch: key of the order and, with the sample, of the transform's draws.
        batch_size: images of a batch in this process.
        start_step: begin with this batch, as if those before had been read.
        rank, world_size: which process this is, of how many.
        workers: reading processes; 0: this one reads.

    Raises:
        InputError: the data set is smaller than one batch, or has ``MAX_UNREADABLE`` unreadable images in a row.
    """
    steps = steps_per_epoch(samples, batch_size, world_size)
    order = keyed.permutation(seed, epoch, len(samples))[: steps * world_size * batch_size]
    rows = order.view(steps, world_size, batch_size)[start_step:, rank].unbind()
    return _whole(_Reading(samples, transform, rows, seed, epoch, MAX_UNREADABLE), workers, batch_size)


def eval_batches(
    samples: Samples, transform: Transform, *, batch_size: int, rank: int = 0, world_size: int = 1, workers: int = 0,
) -> Iterator[Batch]:  # fmt: skip
    """One pass in order; process ``rank`` reads every ``world_size``-th batch. No batch is empty, the last may be short.

    Arguments as in ``train_batches``. An image that cannot be read is left out.

    Raises:
        InputError: none of the images can be read.
    """
    rows = torch.arange(len(samples)).split(batch_size)[rank::world_size]
    return _nonempty(_Reading(samples, transform, rows, seed=0, epoch=0, tries=1), workers)


def eval_transform(
    input_size: Sequence[int], mean: Sequence[float], std: Sequence[float],
    interpolation: str = "bicubic", crop_pct: float | None = None,
) -> Transform:  # fmt: skip
    """timm's transform for evaluation, of the *whole* image: a heat map must cover the photo.

    Args:
        input_size: ``(H, W)`` or ``(3, H, W)``.
        mean, std: of each channel, of values in [0, 1].
        interpolation: "bicubic", "bilinear" …
        crop_pct: None resizes the whole image to H × W; a number in (0, 1] crops the centre as timm does by default.
    """
    mode = "squash" if crop_pct is None else "center"
    return create_transform(
        tuple(input_size)[-2:], interpolation=interpolation, mean=tuple(mean), std=tuple(std),
        crop_pct=crop_pct or 1.0, crop_mode=mode,
    )  # fmt: skip


@dataclass(frozen=True)
class _Reading(Dataset[Batch]):
    """Batches by number, for a DataLoader without batching of its own."""

    samples: Samples
    transform: Transform
    rows: Sequence[Tensor]
    seed: int
    epoch: int
    tries: int

    def __len__(self) -> int:
        return len(self.rows)

    def __getitem__(self, step: int) -> Batch:
        rows = self.rows[step]
        seeds = keyed.python_seeds(keyed.sample_keys(self.seed, self.epoch, rows))
        images, labels, slots, skipped = [], [], [], []
        with _own_generators():
            for row, seed in zip(rows.tolist(), seeds, strict=True):
                if (found := self._read(row, skipped)) is not None:
                    _seed_generators(seed)
                    images.append(self.transform(found[0]))
                    labels.append(found[1])
                    slots.append(row)
        stacked = torch.stack(images) if images else torch.empty(0)
        return Batch(stacked, torch.tensor(labels), torch.tensor(slots), skipped)

    def _read(self, row: int, skipped: list[tuple[str, str]]) -> tuple[Image.Image, int] | None:
        for index in range(row, row + min(self.tries, len(self.samples))):
            index %= len(self.samples)
            try:
                return self.samples[index]
            except Exception as error:  # decoders raise anything: OSError, SyntaxError, struct.error, zlib.error, …
                reason = " ".join(str(error).split()) or type(error).__name__
                skipped.append((self.samples.name(index), reason))
        return None


def _load(reading: _Reading, workers: int) -> DataLoader[Batch]:
    # a loader draws a seed for its workers; from a generator of its own, lest the run's would advance
    return DataLoader(reading, batch_size=None, num_workers=workers, generator=torch.Generator())


def _whole(reading: _Reading, workers: int, batch_size: int) -> Iterator[Batch]:
    for batch in _load(reading, workers):
        if len(batch.labels) < batch_size:
            name, reason = batch.skipped[-1]
            raise InputError(f"too many images in a row cannot be read, the last is {name} ({reason}); repair the data set")
        yield batch


def _nonempty(reading: _Reading, workers: int) -> Iterator[Batch]:
    held = None  # one batch is held back, so that what an empty one skipped can be told with another
    for batch in _load(reading, workers):
        if held is None:
            held = batch
        elif len(batch.labels) == 0:
            held.skipped += batch.skipped
        else:
            if len(held.labels) == 0:
                batch.skipped = held.skipped + batch.skipped
            else:
                yield held
            held = batch
    if held is not None:
        if len(held.labels) == 0:
            name, reason = held.skipped[0]
            raise InputError(f"none of {len(held.skipped)} images can be read, the first is {name} ({reason})")
        yield held


def _seed_generators(seed: int) -> None:
    random.seed(seed)
    np.random.seed(seed)  # noqa: NPY002 (timm's augmentations draw from the global generator)
    torch.default_generator.manual_seed(seed)  # the CPU's; torch.manual_seed would seed every GPU, too


@contextmanager
def _own_generators() -> Iterator[None]:
    """Whoever reads in the main process gets its generators back as they were."""
    states = random.getstate(), np.random.get_state(), torch.get_rng_state()  # noqa: NPY002
    try:
        yield
    finally:
        random.setstate(states[0])
        np.random.set_state(states[1])  # noqa: NPY002
        torch.set_rng_state(states[2])


def _renumbered(opened: _Opened, names: tuple[str, ...], where: str) -> _Opened:
    """With the class numbers of the training split."""
    number = {name: i for i, name in enumerate(names)}
    for label in np.unique(opened.labels):
        if (name := opened.names[label]) not in number:
            close = difflib.get_close_matches(name, names, 3)
            hint = f"; is it {' or '.join(map(repr, close))}?" if close else "; rename or remove it"
            raise InputError(f"{where}: the class {name!r} of the evaluation split is not in the training split{hint}")
    labels = np.array([number.get(name, -1) for name in opened.names])[opened.labels]
    return opened._replace(labels=labels, names=names, aliases=tuple(set() for _ in names))


def _find_class(name: str, opened: _Opened, where: str) -> int:
    found = [i for i, own in enumerate(opened.names) if own == name]
    found = found or [i for i, others in enumerate(opened.aliases) if name in others]
    if len(found) == 1:
        return found[0]
    if found:
        choices = ", ".join(sorted(set().union(*(opened.aliases[i] for i in found)) - {name}))
        raise InputError(f"{where}: {len(found)} classes are called {name!r}; name the one you mean by: {choices}")
    close = difflib.get_close_matches(name, {*opened.names}.union(*opened.aliases), 3)
    hint = f"did you mean {' or '.join(map(repr, close))}?" if close else f"such as {', '.join(opened.names[:3])}"
    raise InputError(f"{where}: no class {name!r} among {len(opened.names)}; {hint}")


def _held_out(labels: np.ndarray, share: float) -> np.ndarray:
    """``(n,)`` bool, the same share of every class, rounded to whole images."""
    if not 0 <= share < 1:
        raise InputError(f"data.holdout = {share} must be in [0, 1)")
    order = keyed.permutation(HOLDOUT_SEED, 0, len(labels)).numpy()
    by_class = order[labels[order].argsort(kind="stable")]
    counts = np.bincount(labels)
    rank = np.arange(len(labels)) - (counts.cumsum() - counts).repeat(counts)  # within its class
    held = np.zeros(len(labels), dtype=bool)
    held[by_class] = rank < np.rint(share * counts).repeat(counts)
    return held
