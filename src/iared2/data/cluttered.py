"""A synthetic set with known informative patches: labelled photos among pieces of other photos, with positions.

    open_cluttered(config, split, canvas) -> ClutteredImages
    .train_batches(augment, …), .eval_batches(mean, std, …) -> Batch, with its boxes
    patch_truth(boxes, canvas, grid) -> share of each patch that the photo covers

A canvas is a stack of layers, lowest first: cells that fill it all, loose pieces that overlap, and three or four whole
squares that do not. One of the whole squares, any of them, is the labelled photo. All layers show a picture in the same
way: side, crop, mirror image and colours have the same distribution, and each pixel is sampled once, from a source of
the same size. So the photo differs from the other whole squares only in content, not in position, size or sharpness.

Computed on the fly on the photos' device. Draws are a pure function of the keys (keyed.py). Does not depend on models.
Shape letters of this file: B canvases, L layers, V pixels along a canvas's side, S pixels along a source's side.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Literal, NamedTuple

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from .. import keyed
from ..errors import InputError
from .batches import Batch
from .device_dataset import (
    COLOUR_DRAWS,
    CROP_DRAWS,
    ERASE_DRAWS,
    EVAL_SEED,
    BatchAugment,
    MadeOfPhotos,
    ResidentImages,
    grey,
    normalise,
    recolour,
)
from .images import DataConfig, open_samples

SITE = 4 << 20  # sites of keyed draws, apart from those of device_dataset.py
SITE_SIDES, SITE_WHOLE, SITE_LOOSE, SITE_CELLS, SITE_SOURCES, SITE_AUGMENT, SITE_ERASE = range(SITE, SITE + 7)
WHOLE, LOOSE = 4, 6  # layers of each kind
CHUNK = 32  # canvases that are made at once, for the sake of memory
MAX_FILLING = 4000


class _Layers(NamedTuple):
    """The layers of a batch of canvases; x and y in pixels."""

    low: Tensor
    """``(B, L, 2)`` upper left corner of the visible part."""
    high: Tensor
    """``(B, L, 2)`` its lower right corner."""
    origin: Tensor
    """``(B, L, 2)`` upper left corner of the whole picture, from which the piece is cut."""
    side: Tensor
    """``(B, L, 1)`` side of the whole picture."""
    photo: Tensor
    """``(B,)`` int64, the layer of the labelled photo."""


@dataclass(frozen=True, eq=False)
class ClutteredImages(MadeOfPhotos):
    """Labelled photos at random places of canvases that are filled with pieces of other photos.

    Attributes:
        photos: the labelled photos, ``(n, 3, S, S)``.
        filling: ``(m, 3, S, S)`` uint8 on the same device, from which pieces are cut; sorted by label.
        filling_labels: ``(m,)`` int64, their labels, −1 for a class outside the label set. No piece on a canvas has the
            label of its photo.
        canvas: side of a canvas in pixels.
        min_side, max_side: smallest and largest side of a photo on it.

    Raises:
        InputError: four of the photos do not fit on a canvas, the filling has another size than the photos, or no
            filling is left for a photo.
    """

    photos: ResidentImages
    filling: Tensor
    filling_labels: Tensor
    canvas: int = 128
    min_side: int = 40
    max_side: int = 64

    def __post_init__(self) -> None:
        if not 8 <= self.min_side <= self.max_side <= self.canvas // 2:
            raise InputError(
                f"cluttered: sides {self.min_side}…{self.max_side} on a canvas of {self.canvas}; set"
                " 8 ≤ min_side ≤ max_side ≤ canvas / 2"
            )
        size = tuple(self.photos.images.shape[1:])
        if tuple(self.filling.shape[1:]) != size or size[1] != size[2]:
            raise InputError(
                f"cluttered: photos {size}, filling {tuple(self.filling.shape[1:])}; make both of one size, and square"
            )
        kinds = self.filling_labels.unique()
        if len(kinds) == 0 or (len(kinds) == 1 and (self.photos.labels == kinds).any()):
            raise InputError(
                "cluttered: all filling is of the labelled photo's own class; give photos of other classes"
            )
        order = self.filling_labels.argsort(stable=True)  # so that each class is one range, which a draw can leave out
        object.__setattr__(self, "filling", self.filling[order])
        object.__setattr__(self, "filling_labels", self.filling_labels[order])

    def canvases(self, rows: Tensor, keys: Tensor) -> tuple[Tensor, Tensor]:
        """Canvases with whole photos in their own colours.

        Args:
            rows: ``(B,)`` int64, places in ``photos``.
            keys: ``(B,)`` int64, which determine all draws.

        Returns:
            ``(B, 3, V, V)`` uint8, and ``(B, 4)`` float32 x0, y0, x1, y1 in pixels, the positions of the photos.
        """
        pixels, boxes = self._render(rows, keys, None)
        return (pixels * 255).round().to(torch.uint8), boxes

    def train_batch(self, places: Tensor, keys: Tensor, augment: BatchAugment) -> Batch:
        """Crop, mirror image and colours change each picture, including the photo, before it is cut and pasted. A box
        is erased from the canvas.
        """
        pixels, boxes = self._render(places, keys, augment)
        images = normalise(pixels, augment.mean, augment.std)
        images = augment.erase(images, keyed.uniform(keys, SITE_ERASE, ERASE_DRAWS))
        return Batch(images, self.photos.labels[places], self.rows[places], [], boxes)

    def eval_batch(self, places: Tensor, mean: Sequence[float], std: Sequence[float]) -> Batch:
        """``(B, 3, V, V)`` canvases, always the same for a photo."""
        pixels, boxes = self.canvases(places, self.eval_keys(places))
        return Batch(
            normalise(pixels.float() / 255, mean, std), self.photos.labels[places], self.rows[places], [], boxes
        )

    def _render(self, rows: Tensor, keys: Tensor, augment: BatchAugment | None) -> tuple[Tensor, Tensor]:
        """Pixels ``(B, 3, V, V)`` in [0, 1], and boxes ``(B, 4)``."""
        chunks = zip(rows.split(CHUNK), keys.split(CHUNK), strict=True)
        pixels, boxes = zip(*(self._render_chunk(*chunk, augment) for chunk in chunks), strict=True)
        return torch.cat(pixels), torch.cat(boxes)

    def _render_chunk(self, rows: Tensor, keys: Tensor, augment: BatchAugment | None) -> tuple[Tensor, Tensor]:
        layers = self._layers(keys)
        batch, number = layers.low.shape[:2]
        size = self.filling.shape[-1]
        each = torch.arange(batch, device=keys.device)

        sources = self.filling[self._draw_filling(self.photos.labels[rows], keys, number)]  # (B, L, 3, S, S)
        sources[each, layers.photo] = self.photos.images[rows]
        atlas = sources.transpose(1, 2).contiguous().float().div_(255)  # (B, 3, L, S, S), to be one tall picture

        at = torch.arange(self.canvas, device=keys.device) + 0.5
        inside = (at >= layers.low[..., None]) & (at < layers.high[..., None])  # (B, L, 2, V)
        top = torch.zeros(batch, self.canvas, self.canvas, dtype=torch.uint8, device=keys.device)
        for layer in range(1, number):
            top.masked_fill_(inside[:, layer, 0, None, :] & inside[:, layer, 1, :, None], layer)
        index = top.long()  # (B, V, V): which layer each pixel shows

        look = 2 * (at - layers.origin[..., None]) / layers.side[..., None] - 1  # (B, L, 2, V): −1 to 1 in a picture
        if augment:
            draws = keyed.uniform(keys, SITE_AUGMENT, number * (CROP_DRAWS + COLOUR_DRAWS)).view(batch, number, -1)
            zoom, shift = augment.crop(draws[..., :CROP_DRAWS])
            look = zoom[..., None] * look + shift[..., None]
        # no further than the centres of a source's outermost pixels, lest its neighbour in the atlas shines in
        x, y = look.clamp(1 / size - 1, 1 - 1 / size).unbind(2)
        y = (y + 1 + 2 * torch.arange(number, device=keys.device)[:, None]) / number - 1
        grid = torch.stack([x.gather(1, index), y.gather(1, index.transpose(1, 2)).transpose(1, 2)], 3)
        pixels = F.grid_sample(atlas.flatten(2, 3), grid, "bilinear", "border", align_corners=False)

        if augment:
            means = grey(atlas.flatten(3).mean(3)[..., None])  # (B, 1, L, 1), of whole pictures
            changes = torch.cat([augment.colour_factors(draws[..., CROP_DRAWS:]).transpose(1, 2), means[..., 0]], 1)
            changes = changes.gather(2, index.flatten(1)[:, None].expand(-1, COLOUR_DRAWS + 1, -1))
            factors, mean = changes.unflatten(2, pixels.shape[2:]).split([COLOUR_DRAWS, 1], 1)
            pixels = recolour(pixels, factors, mean)
        return pixels, torch.cat([layers.low, layers.high], 2)[each, layers.photo]

    def _draw_filling(self, labels: Tensor, keys: Tensor, number: int) -> Tensor:
        """``number`` places in ``filling`` per canvas, uniform over labels other than the photo's: ``(B, L)``."""
        first = torch.searchsorted(self.filling_labels, labels)[:, None]
        own = torch.searchsorted(self.filling_labels, labels, right=True)[:, None] - first
        place = (keyed.uniform(keys, SITE_SOURCES, number) * (len(self.filling) - own)).long()
        return place + torch.where(place >= first, own, 0)

    def _layers(self, keys: Tensor) -> _Layers:
        """The sides of all pictures have the same distribution; the kinds of layers differ in the part they show."""
        rows = math.ceil(self.canvas / (0.8 * self.min_side))
        number = rows * rows + LOOSE + WHOLE
        side = _between(keyed.uniform(keys, SITE_SIDES, number), self.min_side, self.max_side)[..., None]
        parts = side.split([rows * rows, LOOSE, WHOLE], 1)
        whole_low, whole_high, chosen = self._whole(parts[2], keys)
        pieces = [self._cells(parts[0], rows, keys), self._loose(parts[1], keys), (whole_low, whole_high, whole_low)]
        low, high, origin = (torch.cat(part, 1) for part in zip(*pieces, strict=True))
        return _Layers(low, high, origin, side, number - WHOLE + chosen)

    def _whole(self, side: Tensor, keys: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Three or four squares side by side, anywhere within their share of the canvas, and the index of the photo."""
        draws = keyed.uniform(keys, SITE_WHOLE, 8 + 2 * WHOLE)
        column, left, right, three, chosen, transpose = draws[:, :6].unbind(1)
        a, b, c, d = side[..., 0].unbind(1)  # upper left, lower left, upper right, lower right
        column = _between(column, a.maximum(b), self.canvas - c.maximum(d))
        left, right = _between(left, a, self.canvas - b), _between(right, c, self.canvas - d)
        three = three < 0.5  # then d is gone, and c may be anywhere on its side
        zero, end = torch.zeros_like(column), torch.full_like(column, self.canvas)
        right = torch.where(three, end, right)
        low_x, low_y = torch.stack([zero, zero, column, column], 1), torch.stack([zero, left, zero, right], 1)
        high_x, high_y = torch.stack([column, column, end, end], 1), torch.stack([left, end, right, end], 1)
        low, high = torch.stack([low_x, low_y], 2), torch.stack([high_x, high_y], 2)  # (B, WHOLE, 2), of the shares
        low = _between(draws[:, 8:].view_as(low), low, high - side)
        # any of the four corners may be the one that is left out, and either direction the one of the columns
        low = torch.where(draws[:, None, 6:8] < 0.5, low, self.canvas - low - side)
        low = torch.where(transpose[:, None, None] < 0.5, low, low.flip(2))
        shown = side.clone()
        shown[:, -1] *= ~three[:, None]
        return low, low + shown, (chosen * (WHOLE - three.long())).long()

    def _loose(self, side: Tensor, keys: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Pieces anywhere, with at least a quarter of their area within the canvas; half of them are squares."""
        draws = keyed.uniform(keys, SITE_LOOSE, LOOSE * 7).view(-1, LOOSE, 7)
        size = _between(draws[..., :2], (side / 2).ceil(), side)
        size = torch.where(draws[..., 6:] < 0.5, size, side)
        low = _between(draws[..., 2:4], -(size / 2).floor(), self.canvas - (size / 2).ceil())
        return low, low + size, low - _between(draws[..., 4:6], 0, side - size)

    def _cells(self, side: Tensor, rows: int, keys: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """``rows`` rows of as many cells, which fill the canvas; no cell is larger than the smallest picture."""
        draws = keyed.uniform(keys, SITE_CELLS, rows + rows * rows * 3)
        pitch = self.canvas / rows
        jitter = max(0.0, (self.min_side - 1 - pitch) / 2)

        def cuts(draws: Tensor) -> tuple[Tensor, Tensor]:
            place = (torch.arange(rows, device=keys.device) * pitch + jitter * (2 * draws - 1)).floor()
            place[..., 0] = 0
            return place, torch.cat([place[..., 1:], torch.full_like(place[..., :1], self.canvas)], -1)

        grid = (len(keys), rows, rows)
        shape = [part[:, :, None].expand(grid) for part in cuts(draws[:, :rows])]
        columns = cuts(draws[:, rows : rows + rows * rows].view(grid))
        low, high = (torch.stack([x, y], 3).flatten(1, 2) for x, y in zip(columns, shape, strict=True))
        inner = draws[:, rows + rows * rows :].view_as(low)
        return low, high, low - _between(inner, 0, side - (high - low))


def patch_truth(boxes: Tensor, canvas: tuple[int, int], grid: tuple[int, int]) -> Tensor:
    """How much of each patch a box covers.

    Args:
        boxes: ``(B, 4)`` x0, y0, x1, y1 in pixels.
        canvas: height and width in pixels.
        grid: rows and columns of patches.

    Returns:
        ``(B, N)`` float32 in [0, 1], patches row by row.
    """

    def covered(low: Tensor, high: Tensor, size: int, number: int) -> Tensor:
        edges = torch.arange(number + 1, device=boxes.device) * (size / number)
        overlap = high[:, None].minimum(edges[1:]) - low[:, None].maximum(edges[:-1])
        return overlap.clamp(min=0) * (number / size)  # (B, number)

    x0, y0, x1, y1 = boxes.unbind(1)
    down, across = covered(y0, y1, canvas[0], grid[0]), covered(x0, x1, canvas[1], grid[1])
    return (down[:, :, None] * across[:, None]).flatten(1)


def open_cluttered(
    config: DataConfig,
    split: Literal["train", "holdout", "eval"],
    canvas: int,
    photo_size: int = 64,
    device: torch.device | str = "cpu",
    max_filling: int = MAX_FILLING,
) -> ClutteredImages:
    """Decode one part of a data set, with the filling of the canvases from the same part.

    Args:
        config: the data set; its ``classes`` are the label set. The filling consists of all other classes or, if there
            are none, of the labelled photos themselves.
        split: as for `images.open_samples`.
        canvas: side of a canvas in pixels; photos get 5/16 to 1/2 of it.
        photo_size: side to which all photos are resized first.
        device: where to keep them.
        max_filling: number of photos to cut from, a fixed random choice.

    Raises:
        InputError: as `images.open_samples`, none of the photos can be read, or they are all of one class.
    """
    labelled = open_samples(config, split)
    everything = open_samples(replace(config, classes=()), split)
    own = np.unique(everything.labels[np.isin(everything.rows, labelled.rows)])  # not by name: names can be ambiguous
    outside = np.flatnonzero(~np.isin(everything.labels, own))
    photos = ResidentImages.read(labelled, (photo_size, photo_size), device, config.workers)
    if len(outside):
        outside = outside[keyed.permutation(EVAL_SEED, 0, len(outside))[:max_filling].numpy()]
        others = replace(everything, rows=everything.rows[outside], labels=np.full(len(outside), -1))
        read = ResidentImages.read(others, (photo_size, photo_size), device, config.workers)
        filling, labels = read.images, read.labels
    else:
        chosen = keyed.permutation(EVAL_SEED, 0, len(photos))[:max_filling].to(device)
        filling, labels = photos.images[chosen], photos.labels[chosen]
    return ClutteredImages(photos, filling, labels, canvas, min_side=canvas * 5 // 16, max_side=canvas // 2)


def _between(draws: Tensor, low: Tensor | float, high: Tensor | float) -> Tensor:
    """Integers from ``low`` to ``high``, both included."""
    return low + (draws * (high - low + 1)).floor()
