"""Photos without labels -> batches for a model. A bad photo becomes an error, and the rest of its batch is read.

unlabelled.py opens the photos. Does not depend on models; batches.py reads labelled data, for training too.
"""

from __future__ import annotations

import warnings
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from PIL import Image
from torch import Tensor
from torch.utils.data import DataLoader, Dataset

from ..errors import InputError
from .images import Transform
from .photo import as_rgb, fault
from .unlabelled import Photos


@dataclass
class PhotoBatch:
    """Photos that were read together."""

    rows: Sequence[int]
    """Their numbers."""
    names: list[str]
    """``Photos.name`` of each."""
    images: Tensor
    """``(B, 3, H, W)`` float32, transformed, of those that could be read."""
    errors: list[str | None]
    """For each row, why it could not be read."""


def read_images(photos: Iterable[Any], transform: Transform) -> tuple[Tensor, list[str | None]]:
    """Decode and transform photos; a bad one is an entry in the list of errors.

    Args:
        photos: what `as_rgb` takes, ``{"bytes": …}`` as `datasets` has it, or functions that return one of these.
        transform: RGB image -> ``(3, H, W)``.

    Returns:
        ``(B, 3, H, W)`` of the G photos that could be read, in order, and for each photo None or the error.
    """
    images: list[Tensor] = []
    errors: list[str | None] = []
    for photo in photos:
        try:
            images.append(transform(_decoded(photo() if callable(photo) else photo)))
            errors.append(None)
        except Exception as error:  # decoders raise anything: OSError, SyntaxError, struct.error, zlib.error, …
            errors.append(fault(error))
    return torch.stack(images) if images else torch.empty(0), errors


def _decoded(photo: Any) -> Image.Image:
    photo = photo.get("bytes") if isinstance(photo, dict) else photo
    if photo is None:
        raise InputError("there is no photo")
    return as_rgb(photo)


@dataclass(frozen=True)
class _Reading(Dataset[PhotoBatch]):
    photos: Photos
    transform: Transform
    batches: Sequence[Sequence[int]]

    def __len__(self) -> int:
        return len(self.batches)

    def __getitem__(self, number: int) -> PhotoBatch:
        rows = self.batches[number]
        images, errors = read_images((lambda row=row: self.photos[row] for row in rows), self.transform)
        return PhotoBatch(rows, [self.photos.name(row) for row in rows], images, errors)


def photo_batches(
    photos: Photos, transform: Transform, batches: Sequence[Sequence[int]], workers: int = 0, pin_memory: bool = False
) -> Iterator[PhotoBatch]:
    """Read these batches, in order.

    Args:
        photos: of ``open_photos``.
        transform: RGB image -> ``(3, H, W)``.
        batches: the numbers of the photos of each batch.
        workers: reading processes; 0: this process reads.
        pin_memory: see `torch.utils.data.DataLoader`.
    """
    reading = _Reading(photos, transform, batches)
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "This DataLoader will create")  # also read in parallel on a single core
        warnings.filterwarnings("ignore", "This process .* is multi-threaded")  # readers do not use threads of Arrow
        loader = iter(DataLoader(reading, batch_size=None, num_workers=workers, pin_memory=pin_memory))
    yield from loader
