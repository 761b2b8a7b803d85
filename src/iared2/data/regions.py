"""Photos with the region that an explanation should find: boxes or masks. Does not depend on models or heat maps.

    open_regions(path)          -> Regions       names and labels; no photo is decoded yet
    Regions[i]                  -> photo, mask   Pillow RGB, (height, width) bool in the photo's own frame
    region_batches(regions, …)  -> RegionBatch   images (B, 3, H, W), masks (B, H, W) in the model's frame

The model's transform resizes the whole photo, so its region goes through the same resize; a pixel of the small frame is
inside if the pixel of the photo under its centre is.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from ..errors import InputError, missing
from .images import Samples, Transform
from .photo import find_photos, load_image, read_photo, reason, to_rgb
from .shards import shards_in
from .sources import ALL, EVAL_NAMES, Table, column_names, find_splits

BOX, MASK = "bbox", "mask"
"""Columns of regions in a table; the second one is used if both exist."""
LABELS = "label", "class_id"
NO_REGION = "no region"
"""Reason to skip a photo: an empty mask, a degenerate box, or a region smaller than a pixel of the model."""


@dataclass(frozen=True, eq=False)
class Regions:
    """A data set of photos with one region each. ``regions[i]`` raises any exception of decoders, or InputError."""

    photo: Callable[[int], Image.Image]
    """Photo i, upright, 8-bit RGB."""
    mask: Callable[[int, tuple[int, int]], np.ndarray]
    """Its region, given the photo's height and width: ``(height, width)`` bool."""
    name: Callable[[int], str]
    """Its file name, or a similar name."""
    size: int
    is_box: bool
    """Whether the regions are boxes."""
    labels: np.ndarray | None = None
    """``(size,)`` int64, or None if the data has no labels."""
    class_names: tuple[str, ...] = ()
    """The names of the labels."""

    def __len__(self) -> int:
        return self.size

    def __getitem__(self, index: int) -> tuple[Image.Image, np.ndarray]:
        photo = self.photo(index)
        frame = photo.height, photo.width
        mask = self.mask(index, frame)
        if mask.shape != frame:
            raise InputError(
                f"{self.name(index)}: the mask has {mask.shape} pixels, the photo {frame}; make them equal"
            )
        return photo, mask


class RegionBatch(NamedTuple):
    """Photos that were read together."""

    images: Tensor
    """``(B, 3, H, W)`` float32, transformed."""
    masks: Tensor
    """``(B, H, W)`` bool, each with a pixel."""
    rows: Tensor
    """``(B,)`` int64, positions in the data set."""


def open_regions(
    path: str | Path, *, split: str = "validation", region: str | None = None, label: str | None = None, only: str = ""
) -> Regions:
    """Open a data set of photos with boxes or masks.

    Args:
        path: one of
            a parquet file, or a folder of them, with a column `image`; a column `mask` of encoded images or `bbox` of
            x0, y0, x1, y1, inclusive, in the photo's pixels; and a column of integer labels;
            a folder with the photos in `images/` and their masks, of the same stem, in `masks/`;
            `gtsegs_ijcv.mat`, the ImageNet-Segmentation of Guillaumin et al. (IJCV 2014), which needs h5py.
            Pixels of a mask that are not 0 are inside.
        split: of a folder of parquet files; "validation" also stands for val, valid and test.
        region: column of the regions; `mask` if there is one, else `bbox`.
        label: column of the labels; `label` if there is one, else `class_id`.
        only: a column of booleans; use only the rows where it is true.

    Raises:
        InputError: the path does not exist or has another form, no such split or column, or h5py is missing.
    """
    root = Path(path)
    if not root.exists():
        raise InputError(f"{root}: no such file or folder; give the path of a data set with boxes or masks")
    if root.suffix == ".mat":
        return _open_mat(root)
    if (root / "images").is_dir():
        return _open_folders(root)
    return _open_table(root, split, region, label, only)


def region_batches(
    regions: Regions,
    transform: Transform,
    *,
    batch_size: int,
    order: Tensor,
    limit: int | None = None,
    skipped: list[tuple[str, str]],
) -> Iterator[RegionBatch]:
    """Photos that can be read and have a region, in batches.

    Args:
        regions: the data set.
        transform: photo -> ``(3, H, W)``; must resize the whole photo, as ``batches.model_transform`` does.
        batch_size: images per batch; only the last may have fewer.
        order: ``(n,)`` int64, the photos to read.
        limit: maximum number of valid photos.
        skipped: receives the file name and the reason, such as ``NO_REGION``, of each photo that is left out.

    Raises:
        InputError: there is no valid photo.
    """
    good: list[tuple[Tensor, Tensor, int]] = []
    read = 0
    for row in order.tolist():
        if read == limit:
            break
        try:
            photo, mask = regions[row]
            image = transform(photo)
        except Exception as error:  # decoders raise anything: OSError, SyntaxError, struct.error, zlib.error, …
            skipped.append((regions.name(row), reason(error)))
            continue
        height, width = image.shape[1:]
        resized = Image.fromarray(mask.astype(np.uint8)).resize((width, height), Image.Resampling.NEAREST)
        if not (small := np.array(resized, dtype=bool)).any():
            skipped.append((regions.name(row), NO_REGION))
            continue
        good.append((image, torch.from_numpy(small), row))
        read += 1
        if len(good) == batch_size:
            yield _batch(good)
            good = []
    if good:
        yield _batch(good)
    if not read:
        hint = f"the last is {skipped[-1][0]} ({skipped[-1][1]})" if skipped else "the data set is empty"
        raise InputError(f"there is no photo with a region that can be read; {hint}")


def _batch(good: list[tuple[Tensor, Tensor, int]]) -> RegionBatch:
    images, masks, rows = zip(*good, strict=True)
    return RegionBatch(torch.stack(images), torch.stack(masks), torch.tensor(rows))


def _open_table(root: Path, split: str, region: str | None, label: str | None, only: str) -> Regions:
    if not (files := shards_in(root, ".parquet")):
        raise InputError(f"{root}: give a parquet file, a folder of them, a folder with images/ and masks/, or a .mat")
    columns = column_names(files[0])
    region = region or (MASK if MASK in columns else BOX)
    label = label or next((name for name in LABELS if name in columns), LABELS[0])
    for column in filter(None, ("image", region, label, only)):
        if column not in columns:
            raise InputError(f"{files[0]}: no column {column!r}, there is {', '.join(columns)}; name another")
    splits = find_splits(str(root), "image", label, more=[region, *filter(None, [only])])
    wanted = (*EVAL_NAMES, ALL) if split == "validation" else (split,)
    if (name := next((name for name in wanted if name in splits), None)) is None:
        raise InputError(f"{root}: no split {split!r}, there is {', '.join(splits)}; name one of them")
    source = splits[name]()
    dataset = source.reader.dataset
    rows = np.flatnonzero(dataset[only][:]) if only else np.arange(len(source.labels))
    samples = Samples(source.reader, rows, source.labels[rows], source.names)
    cells = dataset.select_columns([region])
    is_box = np.shape(cells[0][region]) == (4,)
    try:
        masks = None if is_box else Table(cells, region)
    except Exception:  # pyarrow raises anything
        kind = cells.features[region]
        raise InputError(f"{root}: the column {region!r} is neither boxes nor encoded masks, but {kind}") from None

    def mask(index: int, frame: tuple[int, int]) -> np.ndarray:
        row = int(rows[index])
        return _inside(load_image(masks[row])) if masks else _box(cells[row][region], frame)

    return Regions(lambda i: samples[i][0], mask, samples.name, len(rows), is_box, samples.labels, samples.class_names)


def _box(box: Sequence[float], frame: tuple[int, int]) -> np.ndarray:
    """Inclusive corners; not finite, or without width or height, the box is degenerate, and not a region."""
    mask = np.zeros(frame, dtype=bool)
    if not np.isfinite(box).all():
        return mask
    left, top, right, bottom = map(round, box)
    if right > left and bottom > top:
        mask[max(top, 0) : bottom + 1, max(left, 0) : right + 1] = True
    return mask


def _inside(image: Image.Image) -> np.ndarray:
    """``(height, width)`` bool, where an image is not 0: grey level, palette index or colour, ignoring opacity."""
    if image.mode not in ("1", "L", "P", "I", "I;16"):
        image = image.convert("RGB")
    pixels = np.asarray(image)
    return pixels != 0 if pixels.ndim == 2 else (pixels != 0).any(2)


def _open_folders(root: Path) -> Regions:
    photos = find_photos([root / "images"])
    if not (root / "masks").is_dir():
        raise InputError(f"{root}: there is images/, but no masks/; put the masks there, named as the photos")
    found = {file.stem: file for file in find_photos([root / "masks"])}
    if missing := [photo for photo in photos if photo.stem not in found]:
        raise InputError(f"{missing[0]}: there is no mask {root}/masks/{missing[0].stem}.png; add it")

    def mask(index: int, frame: tuple[int, int]) -> np.ndarray:
        with found[photos[index].stem].open("rb") as file:
            return _inside(load_image(file))

    return Regions(lambda i: read_photo(photos[i]), mask, lambda i: str(photos[i]), len(photos), False)


def _open_mat(file: Path) -> Regions:
    """MATLAB 7.3 files are HDF5: arrays have reversed axes, and cells are references."""
    try:
        import h5py
    except ImportError:
        raise missing(str(file), "h5py", "explain") from None
    try:
        mat = h5py.File(file, "r")
        photos, masks = mat["value/img"], mat["value/gt"]
    except (OSError, KeyError) as error:
        raise InputError(f"{file}: not the file of ImageNet-Segmentation ({error}); download it again") from None

    def photo(index: int) -> Image.Image:
        return to_rgb(Image.fromarray(mat[photos[index, 0]][()].T))

    def mask(index: int, frame: tuple[int, int]) -> np.ndarray:
        cell = mat[masks[index, 0]]  # of annotations; the first one is the table's
        return mat[cell[0, 0]][()].T != 0

    return Regions(photo, mask, lambda i: f"photo {i + 1}", len(photos), False)
