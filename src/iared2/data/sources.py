"""Sources of labelled images: folders of classes, parquet files, WebDataset shards, Hugging Face data sets.

Hugging Face `datasets` reads tables. This module finds splits, files at any depth in a class folder, shards at random
access (shards.py) and the names of the classes, and reports errors before training starts. No image is decoded here.
"""

from __future__ import annotations

import io
import json
import os
import re
import warnings
from collections import Counter
from collections.abc import Callable, Collection, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, BinaryIO, NamedTuple

import numpy as np

from ..errors import InputError, missing
from .photo import files_in, photo_suffixes, readable, walk
from .shards import read_shards, shards_in

ALL = "all"
"""The name of the split of a folder or file without splits."""
TRAIN_NAMES = ("train", "training", ALL)
EVAL_NAMES = ("validation", "val", "valid", "test")
MAX_IN_MEMORY = 1 << 30
"""Parquet files up to this size in bytes are held in memory; larger ones are mapped from the cache of `datasets`."""
MAX_CLASSES = 1 << 16
"""Without declared names, a larger label is an error, unless there are as many samples."""


@dataclass(frozen=True)
class Files:
    """Files in a folder."""

    root: Path
    names: Sequence[str]
    """Relative to ``root``."""

    def __len__(self) -> int:
        return len(self.names)

    def __getitem__(self, row: int) -> BinaryIO:
        return open(self.root / self.names[row], "rb")

    def filename(self, row: int, absolute: bool = False) -> str:
        """The name; ``absolute``: with ``root``."""
        return str(self.root / self.names[row]) if absolute else self.names[row]


class Table:
    """Encoded images in a column of a data set of `datasets`: bytes, and on the hub also paths from `datasets`.

    Raises any exception of pyarrow if the column has neither.
    """

    def __init__(self, dataset: Any, column: str, may_open: bool = False) -> None:
        self.dataset, self.column = dataset.cast_column(column, _datasets().Image(decode=False)), column
        self.may_open = may_open

    def __getitem__(self, row: int) -> BinaryIO:
        cell = self.dataset[row][self.column] or {}
        if cell.get("bytes") is None and self.may_open and os.path.isfile(cell.get("path") or ""):
            return open(cell["path"], "rb")
        return io.BytesIO(cell.get("bytes") or b"")

    def filename(self, row: int, absolute: bool = False) -> str:
        """The row; ``absolute``: the path in the cell, if there is one."""
        path = (self.dataset[row][self.column] or {}).get("path") if absolute else None
        return path or f"row {row}"


class Source(NamedTuple):
    """One split, unchanged."""

    reader: Any
    """``reader[row]`` is an open file. ``reader.filename(row)`` is its path relative to the data set;
    ``reader.filename(row, absolute=True)`` is the path for messages."""
    labels: np.ndarray
    """``(n,)`` int64."""
    names: tuple[str, ...]
    """The names of the classes."""
    aliases: tuple[set[str], ...] = ()
    """Other names of each class."""
    complete: bool = False
    """Whether the names are declared, with one order for all splits; else they are those that occur in this split."""


Splits = dict[str, Callable[[], Source]]


def find_splits(
    path: str, image_column: str, label_column: str, names: Sequence[str] = (), more: Sequence[str] = ()
) -> Splits:
    """The splits at ``path`` (see ``DataConfig``), each ready to be opened.

    ``names`` are more names of split folders, ``more`` are columns that a table's reader keeps in its ``dataset``.

    Raises:
        InputError: there is no data set, or (when one is opened) it is empty or has invalid labels.
    """
    if not path:
        raise InputError("no data set; give --data PATH or --data hf:NAME")
    columns = [image_column, label_column, *more]
    if path.startswith("hf:"):
        return _hub_splits(path, columns)
    root = Path(path)
    if root.is_file() and root.suffix in (".parquet", ".tar"):
        return {ALL: partial(_open_parquet if root.suffix == ".parquet" else _open_shards, [root], columns, root)}
    if not root.is_dir():
        if not root.exists():
            raise InputError(f"{root}: no such file or folder; give the path of a data set")
        raise InputError(f"{root}: not a data set; give a folder of images per class, parquet files or shards")
    with readable():
        for suffix, opener, number in (
            (".parquet", _open_parquet, r"-\d+-of-\d+.*"),  # Hugging Face's layout: train-00000-of-00005.parquet
            (".tar", _open_shards, r"[-_.]?\d+(-of-\d+)?$"),  # train-000000.tar, imagenet1k-train-0000.tar, 0000.tar
        ):
            splits: dict[str, list[Path]] = {}
            for file in shards_in(root, suffix):
                stem = re.sub(number, "", file.stem)
                word = re.split("[-_.]", stem)[-1]
                is_split = stem not in names and word in (*TRAIN_NAMES, *EVAL_NAMES, *names)
                splits.setdefault(word if is_split else stem or ALL, []).append(file)
            if splits:
                first = next((split for split in (*names, *TRAIN_NAMES) if split in splits), min(splits))
                return {split: partial(opener, files, columns, splits[first][0]) for split, files in splits.items()}
        return folder_splits(root, open_folder, names)


def folder_splits(root: Path, opener: Callable[[Path], Source], names: Sequence[str] = ()) -> Splits:
    """The splits of a folder: itself, with one folder per class, or its folders train, val …, with class folders.

    ``opener`` opens a folder of class folders; ``names`` are more names of splits. Raises OSError.
    """
    # timm's own search falls back from a missing val/ to the whole folder, and would evaluate on training images
    folders = _folders(root)
    named = [folder for folder in folders if folder.name in (*TRAIN_NAMES, *EVAL_NAMES, *names)]
    # "train" can be the name of a class: then there is no folder in it, and it has neighbours of other names
    if named and (len(named) == len(folders) or any(_folders(folder) for folder in named)):
        return {folder.name: partial(opener, folder) for folder in named}
    return {ALL: partial(opener, root)}


def _folders(root: Path) -> list[Path]:
    return sorted((f for f in root.iterdir() if f.is_dir() and not f.name.startswith(".")), key=_natural)


def _natural(path: Path) -> list[str | int]:
    """Sort key: `10.jpg` comes after `9.jpg`."""
    return [int(part) if part.isdecimal() else part for part in re.split(r"(\d+)", str(path).lower())]


def open_folder(root: Path, suffixes: Collection[str] = (), what: str = "image") -> Source:
    """The files with these suffixes (none: images) in a folder of class folders, at any depth; ``what`` names them.

    Warns of other files. Raises InputError if there are none of these, some outside of the class folders, or an empty
    class folder.
    """
    suffixes = suffixes or photo_suffixes()
    if stray := files_in(root, suffixes):
        raise InputError(f"{stray[0]}: lies outside the class folders; put every {what} into {root}/CLASS_NAME/")
    names: list[str] = []
    labels: list[int] = []
    left_out: Counter[str] = Counter()
    with readable():
        folders = _folders(root)
        seen = {os.path.realpath(folder) for folder in folders}
        if len(seen) < len(folders):
            raise InputError(f"{root}: two class folders are links to the same folder; remove one")
        for label, folder in enumerate(folders):
            for file in sorted(walk(folder, seen), key=_natural):
                if file.suffix.lower() in suffixes:
                    names.append(file.relative_to(root).as_posix())
                    labels.append(label)
                else:
                    left_out[file.suffix.lower() or "without a suffix"] += 1
    if not names:
        raise InputError(f"{root}: no {what}s there; give a folder with one folder of {what}s per class")
    if empty := sorted(set(range(len(folders))).difference(labels)):
        raise InputError(f"{folders[empty[0]]}: a class folder without {what}s; add some or remove it")
    if left_out:
        kinds = ", ".join(f"{number} {suffix}" for suffix, number in left_out.most_common())
        warnings.warn(f"{root}: files that are no {what}s to be read here are left out: {kinds}", stacklevel=2)
    return Source(Files(root, names), np.array(labels), tuple(folder.name for folder in folders))


def _datasets() -> Any:
    try:
        import datasets
    except ImportError:
        raise missing("this data set", "datasets", "train") from None
    datasets.disable_progress_bars()
    return datasets


def hub_datasets(path: str) -> dict[str, Callable[[], Any]]:
    """The splits of ``hf:NAME``, each ready to be loaded, as data sets of `datasets`.

    Raises:
        InputError: there is no such data set, or (when one is loaded) it cannot be read.
    """
    datasets, name, subset = _datasets(), path.removeprefix("hf:"), None
    if name.count("/") > 1 and not Path(name).is_dir():
        owner, name, subset = name.split("/", 2)
        name = f"{owner}/{name}"

    def load(split: str) -> Any:
        with _input_errors(path):
            return datasets.load_dataset(name, subset, split=split)

    with _input_errors(path):
        return {split: partial(load, split) for split in datasets.get_dataset_split_names(name, subset)}


def _hub_splits(path: str, columns: list[str]) -> Splits:
    def open_split(split: str, load: Callable[[], Any]) -> Source:
        with _input_errors(path):
            where, folder = f"{path} ({split})", Path(path.removeprefix("hf:"))
            return _open_table(load(), where, folder, columns, may_open=True)

    return {split: partial(open_split, split, load) for split, load in hub_datasets(path).items()}


def _open_parquet(files: list[Path], columns: list[str], order: Path) -> Source:
    """``order`` is the file whose order of classes is used; other splits may declare another order."""
    datasets, where = _datasets(), str(files[0])
    import pyarrow.parquet as pq

    _check_columns(column_names(files[0]), where, columns)
    with _input_errors(where):
        of = {f: _declared(datasets.Features.from_arrow_schema(pq.read_schema(f)), columns) for f in {*files, order}}
        for file in files:
            if sorted(of[file]) != sorted(of[order]) or of[file] != of[files[0]]:
                other = order if of[file] == of[files[0]] else files[0]
                raise InputError(f"{file} declares other classes than {other}, or in another order; write them anew")
        if sum(file.stat().st_size for file in files) <= MAX_IN_MEMORY:
            # from_parquet would write a copy to the cache on disk, even if told to keep the data in memory
            dataset = datasets.Dataset(pq.read_table(files, columns=columns))
        else:
            dataset = datasets.Dataset.from_parquet([str(file) for file in files], columns=columns)
        return _open_table(dataset, where, files[0].parent, columns, of[order])


def column_names(file: Path) -> list[str]:
    """The columns of a parquet file. Raises InputError if it is not one, or the package `datasets` is missing."""
    _datasets()
    import pyarrow.parquet as pq

    with _input_errors(str(file)):
        return pq.read_schema(file).names


def _declared(features: Any, columns: list[str]) -> tuple[str, ...]:
    return tuple(map(str, getattr(features.get(columns[1]), "names", None) or ()))


def _open_table(
    dataset: Any, where: str, folder: Path, columns: list[str], order: tuple[str, ...] = (), may_open: bool = False
) -> Source:
    _check_columns(dataset.column_names, where, columns)
    reader = Table(dataset.select_columns(columns), columns[0], may_open)
    values = dataset[columns[1]][:]
    if len(values) == 0:
        raise InputError(f"{where}: no rows; give a data set with images")
    if odd := next((repr(value) for value in values if type(value) is not int), None):
        raise InputError(f"{where}: the column {columns[1]!r} has {odd}; labels must be integers from 0")
    labels, declared = np.array(values), _declared(dataset.features, columns)
    if order and order != declared:
        check_labels(labels, len(declared), lambda row: f"{where}: row {row}")
        labels, declared = np.array([order.index(name) for name in declared])[labels], order
    return _named(reader, labels, declared, folder, f"{where}: ")


def _open_shards(files: list[Path], columns: list[str], order: Path) -> Source:
    reader = read_shards(files, columns[1])
    return _named(reader, np.ascontiguousarray(reader.members["label"]), (), order.parent, f"{order.parent}{os.sep}")


def _named(reader: Any, labels: np.ndarray, declared: tuple[str, ...], folder: Path, where: str) -> Source:
    names, aliases = _class_names(declared, folder / "classes.json")
    check_labels(labels, len(names), lambda row: where + reader.filename(row))
    return Source(reader, labels, names or tuple(map(str, range(labels.max() + 1))), aliases, bool(names))


def check_labels(labels: np.ndarray, number: int, where: Callable[[int], str]) -> None:
    """Refuse invalid class numbers before anything of that size is allocated.

    ``number`` of classes is 0 if it is unknown; the message begins with ``where(row)``. Raises InputError.
    """
    number = number or max(len(labels), MAX_CLASSES)
    if len(wrong := np.flatnonzero((labels < 0) | (labels >= number))):
        row = int(wrong[0])
        raise InputError(f"{where(row)} has the label {labels[row]}; labels must be in 0…{number - 1}")


def _check_columns(found: Sequence[str], where: str, columns: list[str]) -> None:
    if missing := [column for column in columns if column not in found]:
        raise InputError(
            f"{where}: no column {missing[0]!r}, there is {', '.join(found)}; give image_column or label_column"
        )


def _class_names(declared: tuple[str, ...], file: Path) -> tuple[tuple[str, ...], tuple[set[str], ...]]:
    """Names and other names, from classes.json and the column's own list; empty if there is neither.

    The file has precedence: if both exist, it has readable names, and the list has identifiers. If the list contains
    names or WordNet ids of the file, entries are matched by these and not by position.
    """
    if not file.is_file():
        return declared, ()
    try:
        entries = json.loads(file.read_text(encoding="utf-8"))
        if not isinstance(entries, list) or not entries:
            raise ValueError("no list")
        entries = [{"index": i, "name": e} if isinstance(e, str) else e for i, e in enumerate(entries)]
        entries.sort(key=lambda entry: entry["index"])
        if [entry["index"] for entry in entries] != list(range(len(declared or entries))):
            raise ValueError(f"the indices are not 0…{len(declared or entries) - 1}")
        place = {own: i for i, own in enumerate(declared)}
        if 0 < sum(entry["name"] in place for entry in entries) < len(declared):
            raise ValueError("the data set itself declares other names")
        places = [place.get(e["name"], place.get(e.get("wnid"), e["index"])) for e in entries]
        entries = [entries[places.index(i)] for i in range(len(entries))]
        names = tuple(entry["name"] for entry in entries)
        others = [{e.get("wnid", ""), *e.get("synonyms", "").split(", ")} for e in entries]
    except (OSError, ValueError, TypeError, KeyError, AttributeError, RecursionError) as error:
        raise InputError(f'{file}: not a list of names or of {{"index", "name"}} ({error!r}); repair it') from None
    own = declared or ("",) * len(names)
    return names, tuple((other | {label}) - {"", name} for other, label, name in zip(others, own, names, strict=True))


@contextmanager
def _input_errors(where: str) -> Iterator[None]:
    """pyarrow, datasets and the client of the hub raise anything; the first line of the message is used."""
    try:
        yield
    except InputError:
        raise
    except Exception as error:
        reason = (str(error).splitlines() or [type(error).__name__])[0]
        raise InputError(f"{where}: cannot be opened ({reason})") from error
