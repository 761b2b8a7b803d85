"""The photos that a model is adapted to: a tensor in memory, drawn from anything that holds photos."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from PIL import Image
from rich.console import Console
from rich.progress import track
from torch import Tensor

from ..data.batches import model_transform
from ..data.photo_batches import photo_batches, read_images
from ..data.unlabelled import Photos, open_photos
from ..errors import InputError
from ..keyed import permutation
from ..model.reduced import ReducedVisionTransformer

BATCH = 32
MAX_BYTES = 1 << 31
"""Of the photos in memory."""


def read(images: Any, model: ReducedVisionTransformer, limit: int, workers: int = 0) -> tuple[Tensor, int]:
    """The photos in random order, the same at every call, and how many could not be read.

    Args:
        images: ``(n, in_chans, height, width)`` normalised; or photos: a path or several (`open_photos`), `Photos`, or
            Pillow images, arrays and bytes (`read_images`).
        model: its input size, which bounds the number of photos by memory, and its normalisation.
        limit: at most so many photos.
        workers: reading processes, for paths.

    Returns:
        ``(n, in_chans, height, width)`` on the CPU.

    Raises:
        InputError: the photos cannot be opened, none can be read, the tensor has another shape, or the model does not
            take RGB.
    """
    size = tuple(model.pretrained_cfg["input_size"])
    limit = min(limit, MAX_BYTES // (4 * torch.Size(size).numel()))
    if isinstance(images, Tensor):
        if images.ndim != 4 or tuple(images.shape[1:]) != size or not len(images):
            raise InputError(f"images of shape {tuple(images.shape)}: the model takes (n, {', '.join(map(str, size))})")
        return images[permutation(0, 0, len(images))[:limit].to(images.device)].cpu(), 0
    if size[0] != 3:
        raise InputError(f"photos have 3 channels, and the model takes {size[0]}: give a tensor (n, {size[0]}, H, W)")
    images = [images] if isinstance(images, (str, Path, bytes, Image.Image)) else images
    if isinstance(images, Sequence) and images and all(isinstance(path, (str, Path)) for path in images):
        images = open_photos([str(path) for path in images])
    images = images if isinstance(images, (Photos, Sequence)) else list(images)
    chosen = permutation(0, 0, len(images))[:limit]
    rows, transform = chosen.sort().values.tolist(), model_transform(model.pretrained_cfg)  # tables are streams
    batches = [rows[start : start + BATCH] for start in range(0, len(rows), BATCH)]
    if isinstance(images, Photos):
        found = ((batch.images, batch.errors) for batch in photo_batches(images, transform, batches, workers))
    else:
        found = (read_images([images[row] for row in batch], transform) for batch in batches)
    tensors: list[Tensor] = []
    errors: list[str | None] = []
    for read_ones, failed in track(found, "reading photos", len(batches), console=Console(stderr=True), transient=True):
        tensors += read_ones
        errors += failed
    if not tensors:
        reasons = [error for error in errors if error]
        raise InputError("none of the photos can be read" + (f": {reasons[0]}" if reasons else "; give some"))
    readable = torch.tensor([error is None for error in errors])
    place = torch.where(readable, readable.cumsum(0) - 1, -1)[chosen.argsort().argsort()]
    return torch.stack(tensors)[place[place >= 0]], int((~readable).sum())
