"""A data set that is decoded once, stays on the device, and is augmented there in whole batches.

For many small images, where decoding and augmenting them one by one would take longer than the training step. Draws are
a pure function of (seed, epoch, sample), as everywhere (keyed.py). Does not depend on models.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from PIL import Image
from torch import Tensor
from torchvision.transforms.functional import pil_to_tensor

from .. import keyed
from .batches import Batch, eval_batches, steps_per_epoch
from .images import Samples

SITE_AUGMENT = 3 << 20  # a site of keyed draws, apart from those of model/decide.py
CROP_DRAWS, COLOUR_DRAWS, ERASE_DRAWS = 5, 3, 5
EVAL_SEED = -1
"""Not the seed of any run."""


@dataclass(frozen=True)
class BatchAugment:
    """Random augmentation of a batch on its device. The fields are those of `train.augment.AugmentConfig`."""

    min_scale: float
    hflip: float
    color_jitter: float
    random_erasing: float
    mean: Sequence[float]
    std: Sequence[float]

    def __call__(self, images: Tensor, keys: Tensor) -> Tensor:
        """``(B, 3, H, W)`` uint8 and ``(B,)`` int64 keys -> ``(B, 3, H, W)`` float32, normalised."""
        draws = keyed.uniform(keys, SITE_AUGMENT, CROP_DRAWS + COLOUR_DRAWS + ERASE_DRAWS)
        crop, colour, erase = draws.split([CROP_DRAWS, COLOUR_DRAWS, ERASE_DRAWS], 1)
        zoom, shift = self.crop(crop)
        theta = torch.cat([torch.diag_embed(zoom), shift[..., None]], 2)
        grid = F.affine_grid(theta, list(images.shape), align_corners=False)
        pixels = F.grid_sample(images.float() / 255, grid, "bilinear", "reflection", align_corners=False)
        pixels = recolour(pixels, self.colour_factors(colour)[..., None, None])
        return self.erase(normalise(pixels, self.mean, self.std), erase)

    def crop(self, draws: Tensor) -> tuple[Tensor, Tensor]:
        """A crop of a random share of the area and aspect 3:4 to 4:3, half of them mirrored.

        ``(…, CROP_DRAWS)`` draws -> zoom and shift, ``(…, 2)`` each, x and y: the pixel at ``at``, from −1 to 1 across
        the picture, is sampled at ``zoom * at + shift``.
        """
        area, aspect, flip, x, y = draws.unbind(-1)
        area = self.min_scale + (1 - self.min_scale) * area
        stretch = (4 / 3) ** ((2 * aspect - 1) / 2 * (self.min_scale < 1))  # the whole area has but one aspect
        width, height = (area.sqrt() * stretch).clamp(max=1), (area.sqrt() / stretch).clamp(max=1)
        mirror = torch.where(flip < self.hflip, -1.0, 1.0)
        shift = [(2 * x - 1) * (1 - width), (2 * y - 1) * (1 - height)]
        return torch.stack([width * mirror, height], -1), torch.stack(shift, -1)

    def colour_factors(self, draws: Tensor) -> Tensor:
        """``(…, COLOUR_DRAWS)`` draws -> as many factors for ``recolour``."""
        return 1 + self.color_jitter * (2 * draws - 1)

    def erase(self, pixels: Tensor, draws: Tensor) -> Tensor:
        """Set a box of 2 to 33 % of the area to the mean colour: ``(B, 3, H, W)``, ``(B, ERASE_DRAWS)`` draws."""
        if not self.random_erasing:
            return pixels
        happens, area, aspect, x, y = draws.unbind(1)
        side = (0.02 + 0.31 * area).sqrt()
        stretch = (1 / 0.3) ** ((2 * aspect - 1) / 2)
        gone = torch.ones_like(pixels[:, :1], dtype=torch.bool)
        for dim, part, place in ((2, side * stretch, y), (3, side / stretch, x)):
            size = pixels.shape[dim]
            part = part.clamp(max=1)
            at = (torch.arange(size, device=pixels.device) + 0.5) / size
            start = (place * (1 - part))[:, None]
            inside = (at >= start) & (at < start + part[:, None])  # (B, size)
            gone = gone & (inside[:, None, :, None] if dim == 2 else inside[:, None, None, :])
        return pixels.masked_fill(gone & (happens < self.random_erasing)[:, None, None, None], 0)


class DeviceDataset(ABC):
    """Images or clips in memory, in whole batches. Subclasses create the batches; this class has the passes."""

    rows: Tensor
    """``(n,)`` int64, positions in the data set; the batches are on the same device."""

    skipped: list[tuple[str, str]]
    """File name and reason of each image that could not be read."""

    def __len__(self) -> int:
        return len(self.rows)

    @abstractmethod
    def train_batch(self, places: Tensor, keys: Tensor, augment: BatchAugment) -> Batch:
        """A batch to train on, of ``places (B,)`` in ``rows``; all draws are functions of ``keys (B,)``."""

    @abstractmethod
    def eval_batch(self, places: Tensor, mean: Sequence[float], std: Sequence[float]) -> Batch:
        """A batch to evaluate on, of ``places (B,)`` in ``rows``, the same at every call."""

    def train_batches(
        self,
        augment: BatchAugment,
        *,
        seed: int,
        epoch: int,
        batch_size: int,
        start_step: int = 0,
        rank: int = 0,
        world_size: int = 1,
    ) -> Iterator[Batch]:
        """One shuffled pass without the incomplete batch at its end; arguments as in `batches.train_batches`."""
        steps = steps_per_epoch(self, batch_size, world_size)
        order = keyed.permutation(seed, epoch, len(self))[: steps * world_size * batch_size].to(self.rows.device)
        for places in order.view(steps, world_size, batch_size)[start_step:, rank]:
            yield self.train_batch(places, keyed.sample_keys(seed, epoch, self.rows[places]), augment)

    def eval_batches(
        self, mean: Sequence[float], std: Sequence[float], *, batch_size: int, rank: int = 0, world_size: int = 1
    ) -> Iterator[Batch]:
        """One pass in order; process ``rank`` takes every ``world_size``-th batch."""
        for places in torch.arange(len(self), device=self.rows.device).split(batch_size)[rank::world_size]:
            yield self.eval_batch(places, mean, std)


@dataclass(frozen=True, eq=False)
class ResidentImages(DeviceDataset):
    """All images of a data set at one size, on one device.

    Attributes:
        images: ``(n, 3, H, W)`` uint8.
        labels: ``(n,)`` int64.
        rows: ``(n,)`` int64, positions in the data set, without images that could not be read.
        skipped: file name and reason of each image that could not be read.
    """

    images: Tensor
    labels: Tensor
    rows: Tensor
    skipped: list[tuple[str, str]]

    @classmethod
    def read(
        cls, samples: Samples, size: tuple[int, int], device: torch.device | str = "cpu", workers: int = 0
    ) -> ResidentImages:
        """Decode a data set; ``size`` is (H, W), to which each whole image is resized.

        Raises:
            InputError: none of the images can be read.
        """

        def resized(image: Image.Image) -> Tensor:
            height, width = size
            same = image.size == (width, height)
            return pil_to_tensor(image if same else image.resize((width, height), Image.Resampling.BICUBIC))

        batches = list(eval_batches(samples, resized, batch_size=256, workers=workers))
        good = [(batch.images, batch.labels, batch.samples) for batch in batches if len(batch.labels)]
        images, labels, rows = (torch.cat(parts).to(device) for parts in zip(*good, strict=True))
        return cls(images, labels, rows, [file for batch in batches for file in batch.skipped])

    def train_batch(self, places: Tensor, keys: Tensor, augment: BatchAugment) -> Batch:
        """``(B, 3, H, W)`` images, augmented by ``augment``."""
        return Batch(augment(self.images[places], keys), self.labels[places], self.rows[places], [])

    def eval_batch(self, places: Tensor, mean: Sequence[float], std: Sequence[float]) -> Batch:
        """``(B, 3, H, W)`` images, only normalised."""
        images = normalise(self.images[places].float() / 255, mean, std)
        return Batch(images, self.labels[places], self.rows[places], [])


class MadeOfPhotos(DeviceDataset):
    """Computed on the fly from photos in memory, one sample per photo."""

    photos: ResidentImages

    @property
    def rows(self) -> Tensor:  # type: ignore[override]
        """Of the photos."""
        return self.photos.rows

    @property
    def skipped(self) -> list[tuple[str, str]]:  # type: ignore[override]
        """Of the photos."""
        return self.photos.skipped

    def eval_keys(self, places: Tensor) -> Tensor:
        """``(B,)`` keys for evaluation, independent of the run's seed, so all runs are evaluated on the same images."""
        return keyed.sample_keys(EVAL_SEED, 0, self.rows[places])


def normalise(pixels: Tensor, mean: Sequence[float], std: Sequence[float]) -> Tensor:
    """Normalise ``(B, 3, H, W)`` in [0, 1] by mean and standard deviation per channel; grey for a single channel."""
    pixels = grey(pixels) if len(mean) == 1 else pixels
    return (pixels - pixels.new_tensor(mean)[:, None, None]) / pixels.new_tensor(std)[:, None, None]


def recolour(pixels: Tensor, factors: Tensor, mean: Tensor | None = None) -> Tensor:
    """Change brightness, contrast and saturation, in this order.

    Args:
        pixels: ``(B, 3, H, W)`` in [0, 1].
        factors: ``(B, 3, H, W)``, or 1 for H and W; a factor of 1 keeps brightness, contrast or saturation.
        mean: ``(B, 1, H, W)`` grey level about which contrast changes, of ``pixels`` as given; None: each picture's.
    """
    brightness, contrast, saturation = factors.split(1, 1)
    pixels = (pixels * brightness).clamp(0, 1)
    mean = grey(pixels).mean((2, 3), keepdim=True) if mean is None else (mean * brightness).clamp(0, 1)
    pixels = (mean + contrast * (pixels - mean)).clamp(0, 1)
    level = grey(pixels)
    return (level + saturation * (pixels - level)).clamp(0, 1)


def grey(pixels: Tensor) -> Tensor:
    """ITU-R BT.601 luma: ``(B, 3, H, W)`` -> ``(B, 1, H, W)``."""
    return (pixels * pixels.new_tensor([0.299, 0.587, 0.114])[:, None, None]).sum(1, keepdim=True)
