"""Batches of samples that depend on nothing but their keys.

The order and the augmentation of the samples are pure functions of seed, epoch and sample (keyed.py), whatever the
number of processes. Transforms are timm's. Knows nothing of models.
"""

from __future__ import annotations

import random
import warnings
from collections.abc import Iterable, Iterator, Sequence, Sized
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from typing import Any

import numpy as np
import torch
from PIL import Image
from timm.data import create_transform, resolve_data_config
from torch import Tensor
from torch.utils.data import DataLoader, Dataset
from torchvision.transforms import Compose, Grayscale

from .. import keyed
from ..errors import InputError
from .images import Samples, Transform
from .photo import reason

WHOLE = {"crop_pct": 1.0, "crop_mode": "squash"}
"""What timm calls it if an image is resized as a whole, without keeping its proportions."""
MAX_UNREADABLE = 100
"""Number of unreadable images in a row that stops a run, since the data set must be broken."""


@dataclass
class Batch:
    """Images that were read together."""

    images: Tensor
    """``(B, 3, H, W)`` float32, transformed; clips are ``(B, 3, T, H, W)``, V views of each ``(B, V, 3, T, H, W)``."""
    labels: Tensor
    """``(B,)`` int64."""
    samples: Tensor
    """``(B,)`` int64, positions in the data set, which key the draws, even if an unreadable image was replaced."""
    skipped: list[tuple[str, str]]
    """File name and reason of each image that could not be read."""
    boxes: Tensor | None = None
    """``(B, 4)`` float32 x0, y0, x1, y1 in pixels, the position of the labelled photo, if known; for clips
    ``(B, T, 4)``, the position of the object."""

    @property
    def views(self) -> int:
        """V, the number of views per video; 1 for images."""
        return self.images.shape[1] if self.images.ndim == 6 else 1

    @property
    def inputs(self) -> Tensor:
        """The input of the model: the images, or all views of all videos ``(B·V, 3, T, H, W)``."""
        return self.images.flatten(0, 1) if self.images.ndim == 6 else self.images


def steps_per_epoch(samples: Sized, batch_size: int, world_size: int = 1) -> int:
    """Number of full batches of ``batch_size`` images for each of ``world_size`` processes in one pass.

    Raises:
        InputError: there is none.
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
    """One shuffled pass without the incomplete batch at its end.

    Batch k of all processes together consists of the same ``batch_size * world_size`` images for any number of
    processes and readers. An image that cannot be read is replaced by the next one in the data set.

    Args:
        samples: the data set.
        transform: image -> ``(3, H, W)``; may draw from the global generators of Python, numpy and torch's CPU.
        seed, epoch: key of the order and, with the sample, of the transform's draws.
        batch_size: images per batch in this process.
        start_step: start with this batch, as if the earlier ones had been read.
        rank, world_size: rank of this process, and number of processes.
        workers: reading processes; 0: this process reads.

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

    Arguments as in ``train_batches``. An image that cannot be read is left out, so a batch may be short or empty.

    Raises:
        InputError: none of this process's images can be read.
    """
    rows = torch.arange(len(samples)).split(batch_size)[rank::world_size]
    return _load(_Reading(samples, transform, rows, seed=0, epoch=0, tries=1), workers)


def eval_transform(
    input_size: Sequence[int], mean: Sequence[float], std: Sequence[float], interpolation: str = "bicubic"
) -> Transform:
    """timm's transform for evaluation, on the *whole* image, since a heat map must cover the photo.

    Args:
        input_size: ends with H, W.
        mean, std: per channel, for values in [0, 1]; one number gives grey images, ``(1, H, W)``.
        interpolation: "bicubic", "bilinear" …
    """
    size = tuple(input_size[-2:])
    of_pixels = {"mean": tuple(mean), "std": tuple(std), "interpolation": interpolation}
    transform = create_transform(size, **WHOLE, **of_pixels)
    return Compose([Grayscale(), transform]) if len(mean) == 1 else transform


def clip_length(pretrained_cfg: dict[str, Any]) -> int:
    """T for a model of clips, whose input size is ``(3, T, H, W)``; 0 for a model of images."""
    size = pretrained_cfg["input_size"]
    return size[1] if len(size) == 4 else 0


def per_batch(images: int, pretrained_cfg: dict[str, Any], clips: int = 1) -> int:
    """How many samples, 1 or more, have as many frames as so many images; ``clips`` is the number per video."""
    return max(1, images // ((clip_length(pretrained_cfg) * clips) or 1))


def model_transform(pretrained_cfg: dict[str, Any]) -> Transform:
    """The evaluation transform for a model: the whole image, in the size and normalisation of its ``pretrained_cfg``.

    For a model of clips, whose input size is ``(3, T, H, W)``, it takes the frames of one clip or of several in a row.
    Missing entries have timm's defaults. Training, evaluation and the tool all use this transform.
    """
    cfg = resolve_data_config(pretrained_cfg=pretrained_cfg)
    frame = eval_transform(cfg["input_size"], cfg["mean"], cfg["std"], cfg["interpolation"])
    return partial(_transform_clip, frame, length) if (length := clip_length(cfg)) else frame


def _transform_clip(frame: Transform, length: int, images: Iterable[Image.Image]) -> Tensor:
    return as_clips(torch.stack([frame(image) for image in images]), length)


def as_clips(frames: Tensor, length: int) -> Tensor:
    """Frames ``(V·T, 3, H, W)`` of V consecutive clips -> ``(V, 3, T, H, W)``; ``(3, T, H, W)`` for one clip."""
    clips = frames.unflatten(0, (-1, length)).transpose(1, 2)
    return clips[0] if len(clips) == 1 else clips


@dataclass(frozen=True)
class _Reading(Dataset[Batch]):
    """Batches by number, for a DataLoader without automatic batching."""

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
                _seed_generators(seed)  # reading draws as well, if clips are taken at random
                if (found := self._read(row, skipped)) is not None:
                    images.append(self.transform(found[0]))
                    labels.append(found[1])
                    slots.append(row)
        stacked = torch.stack(images) if images else torch.empty(0)
        return Batch(stacked, torch.tensor(labels, dtype=torch.int64), torch.tensor(slots, dtype=torch.int64), skipped)

    def _read(self, row: int, skipped: list[tuple[str, str]]) -> tuple[Any, int] | None:
        for index in range(row, row + min(self.tries, len(self.samples))):
            index %= len(self.samples)
            try:
                return self.samples[index]
            except Exception as error:  # decoders raise anything: OSError, SyntaxError, struct.error, zlib.error, …
                skipped.append((self.samples.name(index), reason(error)))
        return None


def _load(reading: _Reading, workers: int) -> Iterator[Batch]:
    # a loader draws a seed for its workers: from its own generator, so that the run's does not advance
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "This DataLoader will create")  # also read in parallel on a single core
        loader = iter(DataLoader(reading, batch_size=None, num_workers=workers, generator=torch.Generator()))
    read = 0
    for rows, batch in zip(reading.rows, loader, strict=True):
        read += len(batch.labels)
        if reading.tries > 1 and len(batch.labels) < len(rows):
            raise _unreadable(batch)
        yield batch
    if reading.rows and not read:
        raise _unreadable(batch)


def _unreadable(batch: Batch) -> InputError:
    name, fault = batch.skipped[-1]
    return InputError(f"image after image cannot be read, the last is {name} ({fault}); repair the data set")


def _seed_generators(seed: int) -> None:
    random.seed(seed)
    np.random.seed(seed)  # noqa: NPY002 (timm's augmentations draw from the global generator)
    torch.default_generator.manual_seed(seed)  # the CPU's; torch.manual_seed would seed every GPU, too


@contextmanager
def _own_generators() -> Iterator[None]:
    """Restore the generators of the main process after reading in it."""
    states = random.getstate(), np.random.get_state(), torch.get_rng_state()  # noqa: NPY002
    try:
        yield
    finally:
        random.setstate(states[0])
        np.random.set_state(states[1])  # noqa: NPY002
        torch.set_rng_state(states[2])
