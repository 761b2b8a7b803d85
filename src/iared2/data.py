"""Labelled images in batches that depend on nothing but their keys.

Opens the part of a data set that a run asks for (sources.py finds it), with class numbers that mean the same in every
split, and reads it so that the order and the augmentation of the samples are pure functions of seed, epoch and sample
(keyed.py), whatever the number of processes. Transforms are timm's. Knows nothing of models.
"""

from __future__ import annotations

import difflib
import random
import warnings
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np
import torch
from PIL import Image, ImageOps
from timm.data import create_transform
from torch import Tensor
from torch.utils.data import DataLoader, Dataset

from . import keyed
from .errors import InputError
from .photo import MAX_PIXELS, to_rgb
from .sources import ALL, EVAL_NAMES, TRAIN_NAMES, Source, Splits, find_splits

Transform = Callable[[Image.Image], Tensor]

MAX_UNREADABLE = 100
"""So many unreadable images in a row end a run: it is the data set that is broken, not an image."""
HOLDOUT_SEED = 0
"""Not the run's seed: runs of different seeds are compared on the same holdout."""


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
    """An open data set. ``samples[i]`` is image i, upright 8-bit RGB, and its label; raises whatever decoders raise."""

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
    """``(B,)`` int64, positions in the data set, which key the draws, even where another image had to step in."""
    skipped: list[tuple[str, str]]
    """File name and reason of each image that could not be read."""


def open_samples(config: DataConfig, split: Literal["train", "holdout", "eval"], whole: bool = False) -> Samples:
    """Open one part of a data set. Reads names and labels, decodes no image.

    Args:
        config: the data set.
        split: "train" (without the holdout), "holdout" or "eval" (the holdout, if there is no split to evaluate on).
        whole: for "eval", take a folder or file without splits as a whole. Training must not: it has trained on it.

    Raises:
        InputError: nothing there, not a data set, no such split, fewer than two classes, labels that are missing, out
            of range or unknown in training, an unknown or ambiguous class, or no holdout.
    """
    wanted = config.train_split, config.eval_split
    splits = find_splits(config.path, config.image_column, config.label_column, wanted)
    train = _pick(splits, TRAIN_NAMES if wanted[0] == "train" else wanted[:1])
    evaluation = _pick(splits, (EVAL_NAMES if wanted[1] == "validation" else wanted[1:]) + (ALL,) * whole)
    if split == "eval" and evaluation is None and config.holdout:
        split = "holdout"
    if (chosen := evaluation if split == "eval" else train) is None:
        setting, hint = ("eval_split", " or data.holdout") if split == "eval" else ("train_split", "")
        name = getattr(config, setting)
        raise InputError(f"{config.path}: no split {name!r}, there is {', '.join(splits)}; set data.{setting}{hint}")
    source = chosen()
    if split == "eval" and train is not None and train is not chosen and not source.complete:
        source = _renumbered(source, train().names, config.path)

    rows, labels, class_names = np.arange(len(source.labels)), source.labels, source.names
    if config.classes and config.classes != class_names:
        number = np.full(len(class_names), -1)
        for new, name in enumerate(config.classes):
            old = _find_class(name, source, config.path)
            if number[old] >= 0:
                raise InputError(f"data.classes: {name!r} is {config.classes[number[old]]!r}; name each class once")
            number[old] = new
        labels, class_names = number[labels], config.classes
    part = labels >= 0
    if split != "eval":
        part &= _held_out(labels, config.holdout) == (split == "holdout")
    rows, labels = rows[part], labels[part]
    if len(rows) == 0:
        raise InputError(f"{config.path}: no images in the {split} split; see data.classes and data.holdout")
    if split == "train" and labels.min() == labels.max():
        name = class_names[labels[0]]
        raise InputError(f"{config.path}: all training images are of one class, {name!r}; give two or more")
    return Samples(source.reader, rows, labels, class_names)


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
    samples: Samples,
    transform: Transform,
    *,
    seed: int,
    epoch: int,
    batch_size: int,
    start_step: int = 0,
    rank: int = 0,
    world_size: int = 1,
    workers: int = 0,
) -> Iterator[Batch]:
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
    return _load(_Reading(samples, transform, rows, seed, epoch, MAX_UNREADABLE), workers)


def eval_batches(
    samples: Samples, transform: Transform, *, batch_size: int, rank: int = 0, world_size: int = 1, workers: int = 0
) -> Iterator[Batch]:
    """One pass in order; process ``rank`` reads every ``world_size``-th batch.

    Arguments as in ``train_batches``. An image that cannot be read is left out: a batch may be short, or empty.

    Raises:
        InputError: none of this process's images can be read.
    """
    rows = torch.arange(len(samples)).split(batch_size)[rank::world_size]
    return _load(_Reading(samples, transform, rows, seed=0, epoch=0, tries=1), workers)


def eval_transform(
    input_size: Sequence[int],
    mean: Sequence[float],
    std: Sequence[float],
    interpolation: str = "bicubic",
    crop_pct: float | None = None,
) -> Transform:
    """timm's transform for evaluation, of the *whole* image: a heat map must cover the photo.

    Args:
        input_size: ``(H, W)`` or ``(3, H, W)``.
        mean, std: of each channel, of values in [0, 1].
        interpolation: "bicubic", "bilinear" …
        crop_pct: None resizes the whole image to H × W; a number in (0, 1] crops the centre as timm does by default.
    """
    height, width = input_size[-2:]
    return create_transform(
        (height, width),
        interpolation=interpolation,
        mean=tuple(mean),
        std=tuple(std),
        crop_pct=crop_pct or 1.0,
        crop_mode="squash" if crop_pct is None else "center",
    )


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
        images, labels, slots = [], [], []
        skipped: list[tuple[str, str]] = []
        with _own_generators():
            for row, seed in zip(rows.tolist(), seeds, strict=True):
                if (found := self._read(row, skipped)) is not None:
                    _seed_generators(seed)
                    images.append(self.transform(found[0]))
                    labels.append(found[1])
                    slots.append(row)
        stacked = torch.stack(images) if images else torch.empty(0)
        return Batch(stacked, torch.tensor(labels, dtype=torch.int64), torch.tensor(slots, dtype=torch.int64), skipped)

    def _read(self, row: int, skipped: list[tuple[str, str]]) -> tuple[Image.Image, int] | None:
        for index in range(row, row + min(self.tries, len(self.samples))):
            index %= len(self.samples)
            try:
                return self.samples[index]
            except Exception as error:  # decoders raise anything: OSError, SyntaxError, struct.error, zlib.error, …
                reason = " ".join(str(error).split()) or type(error).__name__
                skipped.append((self.samples.name(index), reason))
        return None


def _load(reading: _Reading, workers: int) -> Iterator[Batch]:
    # a loader draws a seed for its workers: from a generator of its own, lest the run's would advance
    loader = DataLoader(reading, batch_size=None, num_workers=workers, generator=torch.Generator())
    read = 0
    for rows, batch in zip(reading.rows, loader, strict=True):
        read += len(batch.labels)
        if reading.tries > 1 and len(batch.labels) < len(rows):
            raise _unreadable(batch)
        yield batch
    if reading.rows and not read:
        raise _unreadable(batch)


def _unreadable(batch: Batch) -> InputError:
    name, reason = batch.skipped[-1]
    return InputError(f"image after image cannot be read, the last is {name} ({reason}); repair the data set")


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


def _pick(splits: Splits, names: Sequence[str]) -> Callable[[], Source] | None:
    return next((splits[name] for name in names if name in splits), None)


def _renumbered(source: Source, names: tuple[str, ...], where: str) -> Source:
    """With the class numbers of the training split."""
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


def _held_out(labels: np.ndarray, share: float) -> np.ndarray:
    """``(n,)`` bool: the same share of every class, rounded down. Labels below 0 count as a class, too."""
    if not 0 <= share < 1:
        raise InputError(f"data.holdout = {share} must be in [0, 1)")
    order = keyed.permutation(HOLDOUT_SEED, 0, len(labels)).numpy()
    held = np.zeros(len(labels), dtype=bool)
    by_class = order[labels[order].argsort(kind="stable")]
    for rows in np.split(by_class, np.flatnonzero(np.diff(labels[by_class])) + 1):
        held[rows[: int(share * len(rows))]] = True
    return held
