"""Synthetic clips with known informative patches: a small object over a still photo, with its position per frame.

    MovingClips(photos, …)    -> .train_batches(augment, …), .eval_batches(mean, std, …) -> Batch, with its boxes
    .truth(boxes, grid)       -> share of each patch that the object covers

The T frames have P = T + 1 places, the cells of a square (8 frames, 3 × 3 cells), numbered row by row, 0…P−1. In the
second half of the frames, the square with its numbers is rotated by 90 degrees. The object is at one place per frame,
and takes T of the P numbers, each once, in random order. **The class is the number that is left out.**

So every frame of every clip is needed, and so is its time. A few fixed orders would not be enough: two or three frames
would distinguish them. Here, a model that has seen the object in m frames knows m numbers that are not the class, and
nothing else: the P − m others are equally likely. With all frames but one, two are left. The same places in another
order may be another class. Other numberings do not work: if numbers advance by one in every frame, training makes no
progress for long, since a place says nothing without its time; reversed numbers reveal half of the answer; and in both
cases, or if the numbers advance once, some sum of the places gives the class without any order.

Computed on the fly on the photos' device. Draws are a pure function of the keys (keyed.py). Does not depend on models.
Shape letters of this file: B clips, T frames, P places, V pixels along a frame's side, S along a photo's.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from iared2 import InputError, keyed
from iared2.data.batches import Batch
from iared2.data.device_dataset import COLOUR_DRAWS, BatchAugment, MadeOfPhotos, ResidentImages, normalise, recolour

SITE = 5 << 20  # sites of keyed draws, apart from those of cluttered.py
SITE_ORDER, SITE_SIDE, SITE_PLACE, SITE_PICTURES, SITE_COLOUR = range(SITE, SITE + 5)
RIM = 1.5
"""Pixels of the object's outline."""
COLOUR = 1.0, 0.1, 0.9
"""Colour of the outline: rare in photos, so that the object differs from the background."""


@dataclass(frozen=True, eq=False)
class MovingClips(MadeOfPhotos):
    """One clip per photo and epoch: the photo is still, and a disc cut from another photo moves over it.

    Attributes:
        photos: ``(n, 3, S, S)``, two or more; their labels do not matter. A frame is a random crop, mirrored or not.
        frames: T, one less than a square number: 3, 8, 15.
        size: V ≤ S.
        sides: smallest and largest diameter of the object in pixels. It lies anywhere within its cell.

    Raises:
        InputError: frames, size and sides do not fit together, or the photos are too small or too few.
    """

    photos: ResidentImages
    frames: int = 8
    size: int = 32
    sides: tuple[int, int] = (8, 10)

    def __post_init__(self) -> None:
        if self.frames < 3 or math.isqrt(self.num_classes) ** 2 != self.num_classes:
            raise InputError(
                f"moving: {self.frames} frames have {self.num_classes} places, not a square; give 3, 8, 15"
            )
        if not 4 <= self.sides[0] <= self.sides[1] <= self.cell:
            raise InputError(f"moving: objects of {self.sides} pixels in cells of {self.cell:g}; give 4 ≤ sides ≤ cell")
        number, _, *photo = self.photos.images.shape
        if number < 2 or photo[0] != photo[1] or photo[0] < self.size:
            raise InputError(f"moving: {number} photos {photo}; give two or more squares of {self.size} pixels or more")

    @property
    def num_classes(self) -> int:
        """P, the number of places."""
        return self.frames + 1

    @property
    def cell(self) -> float:
        """Pixels along a cell's side."""
        return self.size / math.isqrt(self.num_classes)

    def train_batch(self, places: Tensor, keys: Tensor, augment: BatchAugment) -> Batch:
        """Uses only the colours of ``augment``, the same for all frames. ``Batch.boxes`` are ``(B, T, 4)``."""
        pixels, labels, boxes = self.clips(places, keys)
        factors = augment.colour_factors(keyed.uniform(keys, SITE_COLOUR, COLOUR_DRAWS))[..., None, None]
        pixels = recolour(pixels.flatten(2, 3), factors).view_as(pixels)  # frames as one tall picture
        return Batch(_normalise(pixels, augment.mean, augment.std), labels, self.rows[places], [], boxes)

    def eval_batch(self, places: Tensor, mean: Sequence[float], std: Sequence[float]) -> Batch:
        """``(B, 3, T, V, V)`` clips, always the same for a photo."""
        pixels, labels, boxes = self.clips(places, self.eval_keys(places))
        return Batch(_normalise(pixels, mean, std), labels, self.rows[places], [], boxes)

    def clips(self, rows: Tensor, keys: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Clips in their own colours.

        Args:
            rows: ``(B,)`` int64, places in ``photos``.
            keys: ``(B,)`` int64, which determine all draws.

        Returns:
            ``(B, 3, T, V, V)`` float32 in [0, 1]; the classes ``(B,)`` int64; and ``(B, T, 4)`` float32 x0, y0, x1, y1
            in pixels, whole numbers: the box around the disc.
        """
        labels, boxes = self._paths(keys)
        depth = self._depth(boxes)
        inside = depth >= 0
        across, down, flip, other, left, top = keyed.uniform(keys, SITE_PICTURES, 6).unbind(1)
        number, side = len(self), self.photos.images.shape[-1]
        at = torch.arange(self.size, device=keys.device)

        # each pixel is sampled once, from the photo behind or from the one that the object is cut from
        other = (rows + 1 + (other * (number - 1)).long()) % number
        photo = torch.where(inside, other[:, None, None, None], rows[:, None, None, None])
        column = torch.where(flip[:, None] < 0.5, at.flip(0), at) + _whole(across, side - self.size)
        row = at + _whole(down, side - self.size)
        room = side - (boxes[:, 0, 2] - boxes[:, 0, 0])
        low = boxes[..., :2].long()
        x = at - low[..., :1] + _whole(left, room)[..., None]  # (B, T, V)
        y = at - low[..., 1:] + _whole(top, room)[..., None]
        x = torch.where(inside, x[:, :, None], column[:, None, None])
        y = torch.where(inside, y[..., None], row[:, None, :, None])
        pixels = self.photos.images[photo, :, y, x].movedim(4, 1).float() / 255

        rim = (inside & (depth < RIM))[:, None]
        return torch.where(rim, pixels.new_tensor(COLOUR)[:, None, None, None], pixels), labels, boxes

    def truth(self, boxes: Tensor, grid: Sequence[int]) -> Tensor:
        """How much of each patch the object covers.

        Args:
            boxes: ``(B, T, 4)`` of a batch.
            grid: T', rows and columns of patches: ``model.grid_size``. A patch of several frames has their mean.

        Returns:
            ``(B, T'·rows·columns)`` float32 in [0, 1], patches by time, row and column.
        """
        times, rows, columns = grid
        inside = (self._depth(boxes) >= 0).float()
        return F.adaptive_avg_pool3d(inside, (times, rows, columns)).flatten(1)

    def _paths(self, keys: Tensor) -> tuple[Tensor, Tensor]:
        """Classes ``(B,)`` and boxes ``(B, T, 4)``."""
        frames, rows = self.frames, math.isqrt(self.num_classes)
        order = keyed.uniform(keys, SITE_ORDER, self.num_classes).argsort(dim=1, stable=True)
        numbers, labels = order[:, :-1], order[:, -1]
        is_first_half = 2 * torch.arange(frames, device=keys.device) < frames
        turned = torch.arange(self.num_classes, device=keys.device).view(rows, rows).rot90().flatten()
        place = torch.where(is_first_half, numbers, turned[numbers])  # (B, T)
        cell = torch.stack([place % rows, place // rows], 2)
        smallest, largest = self.sides
        side = smallest + _whole(keyed.uniform(keys, SITE_SIDE, 1)[:, 0], largest - smallest)[..., None]  # (B, 1, 1)
        draws = keyed.uniform(keys, SITE_PLACE, 2 * frames).view(-1, frames, 2)
        low = (cell * self.cell + draws * (self.cell - side)).floor()
        return labels, torch.cat([low, low + side], 2)

    def _depth(self, boxes: Tensor) -> Tensor:
        """``(B, T, V, V)`` pixels from each pixel's centre to the edge of the disc, negative outside it."""
        at = torch.arange(self.size, device=boxes.device) + 0.5
        low, high = boxes.split(2, 2)
        off = at - ((low + high) / 2)[..., None]  # (B, T, 2, V)
        distance = (off[:, :, 0, None].square() + off[:, :, 1, :, None].square()).sqrt()
        return ((high - low)[..., :1] / 2)[..., None] - distance


def _whole(draws: Tensor, largest: Tensor | int) -> Tensor:
    """``(B,)`` draws -> ``(B, 1)`` int64, uniform in 0…``largest``."""
    return (draws * (largest + 1)).long()[:, None]


def _normalise(clips: Tensor, mean: Sequence[float], std: Sequence[float]) -> Tensor:
    """``normalise`` of ``(B, 3, T, V, V)``: the frames as one tall picture."""
    return normalise(clips.flatten(2, 3), mean, std).view_as(clips)
