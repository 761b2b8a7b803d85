"""Photos without labels, by number: folders, tar shards, parquet files, Hugging Face data sets, or several of these.

Names are packed into one block of memory and tables are read as a stream, so memory does not grow with the photos
that were read. Does not depend on models; sources.py opens labelled data.
"""

from __future__ import annotations

import hashlib
import io
import os
import warnings
from array import array
from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from itertools import groupby
from pathlib import Path
from typing import Any, BinaryIO, overload

import numpy as np

from ..errors import InputError, missing
from .photo import photo_suffixes, readable, reason, walk
from .shards import read_shards, shards_in
from .sources import Files, Table, hub_datasets

ROWS_AT_ONCE = 64
"""Rows of a parquet file that are held in memory."""


class Names(Sequence[str]):
    """File names in one block of memory: a list of a million would be copied, page by page, into each reader."""

    def __init__(self, names: Iterable[str]) -> None:
        blob, self._ends = bytearray(), array("q", [0])
        for name in names:
            blob += os.fsencode(name)
            self._ends.append(len(blob))
        self._blob = bytes(blob)

    def __len__(self) -> int:
        return len(self._ends) - 1

    @overload
    def __getitem__(self, row: int) -> str: ...
    @overload
    def __getitem__(self, row: slice) -> Sequence[str]: ...
    def __getitem__(self, row: int | slice) -> str | Sequence[str]:
        if isinstance(row, slice):
            return [self[i] for i in range(*row.indices(len(self)))]
        return os.fsdecode(self._blob[self._ends[row] : self._ends[row + 1]])


class ParquetPhotos:
    """The encoded photos of one column of parquet files, read as a stream: rows in ascending order are fast.

    A row before the last one, or in another row group, starts again at the beginning of its row group.

    Raises:
        InputError: not a parquet file, or the column is missing or has no encoded images.
    """

    def __init__(self, files: Sequence[Path], column: str) -> None:
        self.files = files
        groups, self._leaves = [], []
        for number, file in enumerate(files):
            metadata, leaf = _check_parquet(file, column)
            self._leaves.append(leaf)
            groups += [(number, g, metadata.row_group(g).num_rows) for g in range(metadata.num_row_groups)]
        self._groups = np.array(groups, np.int64).reshape(-1, 3)
        self._starts = np.concatenate([[0], self._groups[:, 2].cumsum()])
        self._group, self._first, self._chunk, self._stream = -1, 0, np.empty(0, object), iter(())

    def __len__(self) -> int:
        return int(self._starts[-1])

    def __getitem__(self, row: int) -> BinaryIO:
        group = int(np.searchsorted(self._starts, row, "right")) - 1
        try:
            if group != self._group or row < self._first:
                self._group, self._first, self._chunk = group, int(self._starts[group]), np.empty(0, object)
                self._stream = self._read(group)
            while row >= self._first + len(self._chunk):
                self._first += len(self._chunk)
                self._chunk = next(self._stream)
        except BaseException:
            self._group = -1  # the next row starts anew
            raise
        return io.BytesIO(self._chunk[row - self._first] or b"")

    def _read(self, group: int) -> Iterator[Any]:
        import pyarrow.parquet as pq

        number, own, _ = self._groups[group].tolist()
        # without pre_buffer and with a small buffer: a row group may be larger than the memory
        options = {"pre_buffer": False, "buffer_size": 1 << 20, "page_checksum_verification": True}
        with pq.ParquetFile(self.files[number], **options) as table:
            for batch in table.iter_batches(ROWS_AT_ONCE, [own], [self._leaves[number]], use_threads=False):
                column = batch.column(0)
                yield (column.field("bytes") if hasattr(column, "field") else column).to_pylist()

    def filename(self, row: int, absolute: bool = False) -> str:
        """``FILE/ROW``, the row counted from 0 in its file; ``absolute``: with the file's folder."""
        group = int(np.searchsorted(self._starts, row, "right")) - 1
        number = int(self._groups[group, 0])
        first = int(self._starts[np.argmax(self._groups[:, 0] == number)])
        return f"{self.files[number] if absolute else self.files[number].name}/{row - first}"


class HubPhotos(Table):
    """A split of a Hugging Face data set, memory-mapped from the cache of `datasets`."""

    def __init__(self, dataset: Any, column: str, where: str) -> None:
        super().__init__(dataset, column, may_open=True)
        self.where = where

    def __len__(self) -> int:
        return len(self.dataset)

    def filename(self, row: int, absolute: bool = False) -> str:
        """``hf:NAME/SPLIT/ROW``."""
        return f"{self.where}/{row}"


class Photos:
    """Photos of one or several sources, numbered in one sequence. ``photos[i]`` is an open file.

    Args:
        parts: readers of folders, tar shards or tables.
        stamps: for each, what else tells it from another with the same names: the sizes of shards.
    """

    def __init__(self, parts: Sequence[Any], stamps: Sequence[str]) -> None:
        self.parts, self.stamps = parts, stamps
        self._starts = np.cumsum([0, *map(len, parts)])

    def __len__(self) -> int:
        return int(self._starts[-1])

    def _find(self, row: int) -> tuple[Any, int]:
        part = int(np.searchsorted(self._starts, row, "right")) - 1
        return self.parts[part], int(row - self._starts[part])

    def __getitem__(self, row: int) -> BinaryIO:
        part, own = self._find(row)
        return part[own]

    def name(self, row: int) -> str:
        """The path of a photo, as given; ``SHARD/NAME`` in a tar file, ``FILE/ROW`` in a parquet file. Valid UTF-8."""
        part, own = self._find(row)
        name = part.filename(own, absolute=True)
        return name.encode(errors="surrogateescape").decode(errors="backslashreplace")

    def filename(self, row: int, absolute: bool = False) -> str:
        """`name`, as other readers call it."""
        return self.name(row)

    def digest(self) -> str:
        """Changes with the names, the order and the number of the photos, and with the size of a shard."""
        total = hashlib.blake2b(digest_size=16)
        for part, stamp in zip(self.parts, self.stamps, strict=True):
            total.update(f"{len(part)} {stamp}\n".encode(errors="surrogateescape"))
            if isinstance(part, Files):  # shards are pinned by their sizes
                for row in range(len(part)):
                    total.update(part.filename(row).encode(errors="surrogateescape") + b"\n")
        return total.hexdigest()


def open_photos(paths: Sequence[str], image_column: str = "image", split: str | None = None) -> Photos:
    """Open photos without labels; decodes none.

    Args:
        paths: photos; tar shards; parquet files; folders of shards or of parquet files, there or in ``data/``, or else
            of photos at any depth; ``hf:NAME``. A path that is given twice is used once.
        image_column: of parquet files and Hugging Face data sets: encoded images, as bytes or as ``{bytes, path}``.
        split: of Hugging Face data sets; None: all, one after the other.

    Raises:
        InputError: a path does not exist, cannot be read, has no photos, or is damaged.
    """
    parts: list[tuple[Any, str]] = []
    for kind, group in groupby(dict.fromkeys(map(str, paths)), _kind):
        if kind == "photo":
            parts.append((Files(Path(), Names(group)), ""))
        elif kind == "hub":
            parts += [part for path in group for part in _open_hub(path, image_column, split)]
        else:
            parts += [_open(Path(path), image_column) for path in group]
    photos = Photos(*zip(*parts, strict=True)) if parts else None
    if not photos:
        raise InputError(f"{', '.join(map(str, paths))}: no photos there; give photos, .tar, .parquet or hf:NAME")
    return photos


def _kind(path: str) -> str:
    if path.startswith("hf:"):
        return "hub"
    if not os.path.exists(path):
        raise InputError(f"{path}: no such file or folder; give photos, a folder, .tar, .parquet or hf:NAME")
    return "set" if os.path.isdir(path) or path.endswith((".tar", ".parquet")) else "photo"


def _open_hub(path: str, column: str, split: str | None) -> Iterator[tuple[Any, str]]:
    found = hub_datasets(path)
    if split and split not in found:
        raise InputError(f"{path}: no split {split!r}, there is {', '.join(found)}; give --split")
    for name in [split] if split else found:
        dataset = found[name]()
        if column not in dataset.column_names:
            there = ", ".join(dataset.column_names)
            raise InputError(f"{path}: no column {column!r}, there is {there}; give --image-column")
        yield HubPhotos(dataset, column, f"{path}/{name}"), f"{path}/{name} {dataset._fingerprint}"


def _open(root: Path, column: str) -> tuple[Any, str]:
    """A reader of a folder or shard, and its stamp."""
    for suffix in (".parquet", ".tar"):
        if files := shards_in(root, suffix):
            reader = ParquetPhotos(files, column) if suffix == ".parquet" else read_shards(files, None)
            return reader, "\n".join(f"{file.name} {file.stat().st_size}" for file in files)
    suffixes, left_out = photo_suffixes(), Counter[str]()

    def names() -> Iterator[str]:
        for file in walk(root, set()):
            if file.suffix.lower() in suffixes:
                yield file.relative_to(root).as_posix()
            else:
                left_out[file.suffix.lower() or "without a suffix"] += 1

    with readable():
        found = Names(names())
    if left_out:
        kinds = ", ".join(f"{number} {suffix}" for suffix, number in left_out.most_common(5))
        warnings.warn(f"{root}: files that are no photos are left out: {kinds}", stacklevel=2)
    return Files(root, found), ""


def _check_parquet(file: Path, column: str) -> tuple[Any, str]:
    """The metadata, and the name of the column of bytes."""
    try:
        import pyarrow as pa
        import pyarrow.parquet as pq
    except ImportError:
        raise missing("a parquet file", "pyarrow", "predict") from None
    try:
        with pq.ParquetFile(file) as table:
            metadata, schema = table.metadata, table.schema_arrow
    except (OSError, pa.ArrowException) as error:
        raise InputError(f"{file}: cannot be opened ({reason(error)}); fetch it again") from None
    if column not in schema.names:
        raise InputError(f"{file}: no column {column!r}, there is {', '.join(schema.names)}; give --image-column")
    kind, leaf = schema.field(column).type, column
    if pa.types.is_struct(kind) and kind.get_field_index("bytes") >= 0:
        kind, leaf = kind.field("bytes").type, f"{column}.bytes"
    if not (pa.types.is_binary(kind) or pa.types.is_large_binary(kind)):
        raise InputError(f"{file}: the column {column!r} has {kind}, not encoded images; give --image-column")
    return metadata, leaf
