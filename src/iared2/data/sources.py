"""Where labelled images lie: folders of classes, parquet files, WebDataset shards, Hugging Face data sets.

timm's readers find and read the files, with Hugging Face `datasets` for tables. What is ours: the search for splits,
shards at random access (shards.py), the names of the classes, and errors that say what is wrong before training begins.
Decodes no image.
"""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from timm.data.readers import create_reader

from ..errors import InputError
from .shards import read_shards

ALL = "all"
"""The split of a folder or file that has no splits."""
TRAIN_NAMES = ("train", "training", ALL)
EVAL_NAMES = ("validation", "val", "valid", "test")
MAX_IN_MEMORY = 1 << 30
"""Parquet files of up to so many bytes are held in memory; larger ones are mapped from `datasets`' cache on disk."""


class Source(NamedTuple):
    """One split as it lies there."""

    reader: Any
    """timm's reader, or one like it: ``reader[i]`` is an open file and a label."""
    labels: np.ndarray
    """``(n,)`` int64."""
    names: tuple[str, ...]
    """The classes' names."""
    aliases: tuple[set[str], ...] = ()
    """Other names of each class."""
    complete: bool = False
    """The names were declared for all splits; else they are only those that occur in this one."""


Splits = dict[str, Callable[[], Source]]


def find_splits(
    path: str, image_column: str, label_column: str, names: Sequence[str] = (), more: Sequence[str] = ()
) -> Splits:
    """The splits at ``path`` (see ``DataConfig``), each ready to be opened.

    ``names`` are more names of split folders, ``more`` are columns that a table's reader keeps in its ``dataset``.

    Raises:
        InputError: there is no data set, or (when one is opened) it is empty or wrongly labelled.
    """
    if not path:
        raise InputError("no data set; give --data PATH or --data hf:NAME")
    columns = [image_column, label_column, *more]
    if path.startswith("hf:"):
        return _hub_splits(path, columns)
    root = Path(path)
    with readable():
        if not root.is_dir():
            if not root.exists():
                raise InputError(f"{root}: no such file or folder; give the path of a data set")
            if root.suffix not in (".parquet", ".tar"):
                raise InputError(f"{root}: not a data set; give a folder of images per class, parquet files or shards")
            return {ALL: partial(_open_shards if root.suffix == ".tar" else _open_parquet, [root], columns)}
        if files := sorted(root.glob("*.parquet")) or sorted(root.glob("data/*.parquet")):
            shards: dict[str, list[Path]] = {}
            for file in files:  # Hugging Face's layout: train-00000-of-00005.parquet
                shards.setdefault(re.sub(r"-\d+-of-\d+.*", "", file.stem), []).append(file)
            return {split: partial(_open_parquet, files, columns) for split, files in shards.items()}
        folders = _folders(root)
        # beside folders of classes lies the archive that they came from, at times
        inside = not folders or [folder.name for folder in folders] == ["data"]
        if inside and (files := sorted(root.glob("*.tar")) or sorted(root.glob("data/*.tar"))):
            shards = {}
            for file in files:  # train-000000.tar, imagenet1k-train-0000.tar, or a mere number
                stem = re.sub(r"[-_.]?\d+(-of-\d+)?$", "", file.stem)
                word = re.split("[-_.]", stem)[-1]
                split = word if stem not in names and word in (*TRAIN_NAMES, *EVAL_NAMES, *names) else stem
                shards.setdefault(split or ALL, []).append(file)
            return {split: partial(_open_shards, files, columns) for split, files in shards.items()}
        return folder_splits(root, open_folder, names)


def folder_splits(root: Path, opener: Callable[[Path], Source], names: Sequence[str] = ()) -> Splits:
    """The splits of a folder: itself, with a folder a class, or its folders train, val …, each with a folder a class.

    ``opener`` opens a folder of class folders; ``names`` are more names of splits. Raises OSError.
    """
    # timm's own search falls back from a missing val/ to the whole folder, and would evaluate on training images
    folders = _folders(root)
    named = [folder for folder in folders if folder.name in (*TRAIN_NAMES, *EVAL_NAMES, *names)]
    # "train" can be the name of a class: then there is no folder in it, and it has neighbours of other names
    if named and (len(named) == len(folders) or any(_folders(folder) for folder in named)):
        return {folder.name: partial(opener, folder) for folder in named}
    return {ALL: partial(opener, root)}


@contextmanager
def readable() -> Iterator[None]:
    """What the system says when a file or folder is closed to us, as an ``InputError``."""
    try:
        yield
    except OSError as error:
        raise InputError(f"{error.filename}: {error.strerror}; make it readable for you") from None


def _folders(root: Path) -> list[Path]:
    return sorted(f for f in root.iterdir() if f.is_dir() and not f.name.startswith("."))


def open_folder(root: Path, suffixes: Iterable[str] = (), what: str = "image") -> Source:
    """The files of these suffixes (none: images) in a folder of class folders; ``what`` they are.

    Raises:
        InputError: there are none, or some outside of the class folders, or an empty class folder.
    """
    try:
        reader = create_reader("", root=str(root), input_key=";".join(suffixes))
    except RuntimeError:  # timm's word for "none"
        raise InputError(f"{root}: no {what}s there; give a folder with one folder of {what}s per class") from None
    # timm makes a class "" of stray images, passes over folders that are empty or closed to us, and numbers the rest
    parts = [Path(reader.filename(i)).parts for i in range(len(reader))]
    if stray := next((p for p in parts if len(p) == 1), None):
        raise InputError(f"{root}: {stray[0]} lies outside the class folders; put every {what} into {root}/CLASS_NAME/")
    if empty := sorted({f.name for f in _folders(root)} - {p[0] for p in parts}):
        raise InputError(f"{root / empty[0]}: a class folder without {what}s that you may read; add some or remove it")
    return Source(reader, np.array([label for _, label in reader.samples]), tuple(reader.class_to_idx))


def _datasets() -> Any:
    try:
        import datasets
    except ImportError:
        raise InputError("this data set needs the package datasets; pip install 'iared2[train]'") from None
    datasets.disable_progress_bars()
    return datasets


def _hub_splits(path: str, columns: list[str]) -> Splits:
    datasets, name, subset = _datasets(), path.removeprefix("hf:"), None
    if name.count("/") > 1 and not Path(name).is_dir():
        owner, name, subset = name.split("/", 2)
        name = f"{owner}/{name}"

    def open_split(split: str) -> Source:
        with _input_errors(path):
            return _open_table(datasets.load_dataset(name, subset, split=split), f"{path} ({split})", name, columns)

    with _input_errors(path):
        return {split: partial(open_split, split) for split in datasets.get_dataset_split_names(name, subset)}


def _open_parquet(files: list[Path], columns: list[str]) -> Source:
    datasets, where = _datasets(), str(files[0])
    import pyarrow.parquet as pq

    with _input_errors(where):
        _check_columns(pq.read_schema(files[0]).names, where, columns)
        if sum(file.stat().st_size for file in files) <= MAX_IN_MEMORY:
            # from_parquet would write a copy to the cache on disk, even if told to keep the data in memory
            dataset = datasets.Dataset(pq.read_table(files, columns=columns))
        else:
            dataset = datasets.Dataset.from_parquet([str(file) for file in files], columns=columns)
        return _open_table(dataset, where, files[0].parent, columns)


def _open_table(dataset: Any, where: str, folder: str | Path, columns: list[str]) -> Source:
    _check_columns(dataset.column_names, where, columns)
    image_column, label_column, *_ = columns
    dataset = dataset.select_columns(columns).cast_column(image_column, _datasets().Image(decode=False))
    values = dataset[label_column][:]
    if len(values) == 0:
        raise InputError(f"{where}: no rows; give a data set with images")
    if odd := next((repr(value) for value in values if type(value) is not int), None):
        raise InputError(f"{where}: the column {label_column!r} has {odd}; labels must be integers from 0")
    # timm's reader, given a data set that is open: by itself it opens neither a single file nor a configuration
    from timm.data.readers.reader_hfds import ReaderHfds

    reader: Any = ReaderHfds.__new__(ReaderHfds)
    reader.dataset, reader.image_key, reader.label_key = dataset, image_column, label_column
    reader.target_keys, reader.remap_class, reader.additional_features = None, False, None
    return _named(reader, np.array(values), dataset.features[label_column], Path(folder), lambda i: f"{where}: row {i}")


def _open_shards(files: list[Path], columns: list[str]) -> Source:
    reader = read_shards(files, columns[1])
    labels = np.ascontiguousarray(reader.members["label"])
    return _named(reader, labels, None, files[0].parent, lambda i: reader.filename(i, absolute=True))


def _named(reader: Any, labels: np.ndarray, feature: Any, folder: Path, where: Callable[[int], str]) -> Source:
    names, aliases = _class_names(feature, folder / "classes.json")
    complete = bool(names)
    names = names or tuple(map(str, range(labels.max() + 1)))
    if len(wrong := np.flatnonzero((labels < 0) | (labels >= len(names)))):
        row = wrong[0]
        raise InputError(f"{where(row)} has the label {labels[row]}; labels must be in 0…{len(names) - 1}")
    return Source(reader, labels, names, aliases, complete)


def _check_columns(found: Sequence[str], where: str, columns: list[str]) -> None:
    if missing := [column for column in columns if column not in found]:
        raise InputError(
            f"{where}: no column {missing[0]!r}, there is {', '.join(found)}; set data.image_column, data.label_column"
        )


def _class_names(feature: Any, file: Path) -> tuple[tuple[str, ...], tuple[set[str], ...]]:
    """Names and other names, from classes.json and the column's own list; empty if there is neither.

    The file wins: where there are both, it has the names for people, and the list has identifiers.
    """
    own = tuple(getattr(feature, "names", None) or ())
    if not file.is_file():
        return own, ()
    try:
        entries = json.loads(file.read_text(encoding="utf-8"))
        if not isinstance(entries, list) or not entries:
            raise ValueError("no list")
        entries = [{"index": i, "name": e} if isinstance(e, str) else e for i, e in enumerate(entries)]
        entries.sort(key=lambda entry: entry["index"])
        if [entry["index"] for entry in entries] != list(range(len(own or entries))):
            raise ValueError(f"the indices are not 0…{len(own or entries) - 1}")
        names = tuple(entry["name"] for entry in entries)
        own = own or ("",) * len(names)
        others = [{e.get("wnid", ""), *e.get("synonyms", "").split(", ")} for e in entries]
    except (OSError, ValueError, TypeError, KeyError, AttributeError) as error:
        raise InputError(f'{file}: not a list of names or of {{"index", "name"}} ({error!r}); repair it') from None
    return names, tuple((other | {label}) - {"", name} for other, label, name in zip(others, own, names, strict=True))


@contextmanager
def _input_errors(where: str) -> Iterator[None]:
    """pyarrow, datasets and the hub's client raise anything; the first line says it best."""
    try:
        yield
    except InputError:
        raise
    except Exception as error:
        reason = (str(error).splitlines() or [type(error).__name__])[0]
        raise InputError(f"{where}: cannot be opened ({reason})") from error
