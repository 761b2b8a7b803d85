"""WebDataset shards, read at random access: the position of each image in tar files, and its class number.

A sample is the files of one tar that share their name up to its first dot: ``KEY.jpg`` with ``KEY.cls``, its class
number as text, or with ``KEY.json``. Training reads in its own order (keyed.py), so shards are not streamed. Headers
are read once and stored in the user's cache, since every start would otherwise read one for each file of ImageNet.
Does not depend on splits or the names of classes.
"""

from __future__ import annotations

import hashlib
import io
import json
import os
import tarfile
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from ..atomic import whole
from ..errors import InputError
from .photo import files_in, photo_suffixes, readable

VERSION = 2
"""Version of the cached index; other versions are rebuilt."""
MAX_TEXT = 1 << 20
"""Maximum bytes to read from the file of a label."""


@dataclass(frozen=True, eq=False)
class ShardReader:
    """``reader[i]`` is image i as an open file.

    A shard is opened for each image. This takes microseconds, and forked processes do not share a file position with
    their parent.
    """

    files: tuple[Path, ...]
    """The shards."""
    members: np.ndarray
    """``(n,)`` records of the number of the shard, offset and size in bytes, label and name in the shard."""

    def __len__(self) -> int:
        return len(self.members)

    def __getitem__(self, index: int) -> io.BytesIO:
        member = self.members[index]
        with open(self.files[member["shard"]], "rb") as file:
            file.seek(member["offset"])
            return io.BytesIO(file.read(member["size"]))

    def filename(self, index: int, absolute: bool = False) -> str:
        """``SHARD/NAME``, where NAME is that of the file in the shard; ``absolute``: with the shard's folder."""
        member = self.members[index]
        shard = self.files[member["shard"]]
        return f"{shard if absolute else shard.name}/{member['name'].decode(errors='replace')}"


def shards_in(root: Path, suffix: str) -> list[Path]:
    """The shards, or tables, at a path: itself, or those in the folder or in its ``data/``; none for class folders.

    Raises:
        InputError: the folder cannot be read.
    """
    if not root.is_dir():
        return [root] if root.suffix == suffix else []
    with readable():
        folders = {entry.name for entry in root.iterdir() if entry.is_dir() and not entry.name.startswith(".")}
    if suffix == ".tar" and not folders <= {"data"}:
        return []  # the archive of the photos may lie beside their folders
    return files_in(root, [suffix]) or files_in(root / "data", [suffix])


def read_shards(files: Sequence[Path], label_field: str | None) -> ShardReader:
    """Find the images of shards.

    Args:
        files: the shards.
        label_field: the label's field in ``KEY.json``, if there is no ``KEY.cls``. None: no labels.

    Raises:
        InputError: a file is not a tar file, is damaged, has no images, or has one without a class number.
    """
    members, cache = None, None
    try:
        stats = [(str(file.resolve()), file.stat().st_size, file.stat().st_mtime_ns) for file in files]
        key = hashlib.sha256(json.dumps([VERSION, label_field, stats]).encode()).hexdigest()[:24]
        caches = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache")
        cache = caches / "iared2" / f"shards-{key}.npy"
        members = np.load(cache)
    except (OSError, ValueError, EOFError, RuntimeError):  # not there, damaged, or nobody's home
        pass
    if members is None:
        members = np.concatenate([_index(i, _read_headers(file, label_field)) for i, file in enumerate(files)])
        if cache:
            _store(cache, members)
    return ShardReader(tuple(files), members)


def _index(shard: int, rows: list[tuple[int, int, int, bytes]]) -> np.ndarray:
    longest = max(len(name) for *_, name in rows)
    record = [("shard", "i4"), ("offset", "i8"), ("size", "i8"), ("label", "i8"), ("name", f"S{longest}")]
    return np.array([(shard, *row) for row in rows], record)


def _read_headers(file: Path, label_field: str | None) -> list[tuple[int, int, int, bytes]]:
    """Offset, size, label and name of each image."""
    samples: dict[str, dict[str, tarfile.TarInfo]] = {}
    rows, suffixes = [], photo_suffixes()
    try:
        with open(file, "rb") as content, tarfile.open(fileobj=content, mode="r:") as tar:
            for member in tar:
                folder, _, base = member.name.rpartition("/")
                key, _, kind = base.partition(".")
                if member.isfile() and key:  # no key: a hidden file
                    samples.setdefault(f"{folder}/{key}".lstrip("/"), {})[kind.lower()] = member
            content.seek(tar.offset)
            if content.read(tarfile.BLOCKSIZE).strip(b"\0"):  # tarfile takes a damaged header for the end
                raise tarfile.ReadError(f"damaged at byte {tar.offset}")
            for key, parts in samples.items():
                if image := next((parts[kind] for kind in sorted(parts) if f".{kind}" in suffixes), None):
                    text = {}
                    for kind in ("cls", "json"):
                        if kind in parts:
                            content.seek(parts[kind].offset_data)
                            text[kind] = content.read(min(parts[kind].size, MAX_TEXT))
                    label = 0 if label_field is None else _label(text, label_field, f"{file}: {key}")
                    rows.append((image.offset_data, image.size, label, image.name.encode(errors="surrogateescape")))
    except (tarfile.TarError, OSError, ValueError) as error:  # ValueError: a size beyond all bounds
        raise InputError(f"{file}: not a tar file, or a damaged one ({error}); fetch it again") from None
    if not rows:
        raise InputError(f"{file}: no images in this shard; it should have KEY.jpg and KEY.cls for each")
    return rows


def _label(text: dict[str, bytes], field: str, where: str) -> int:
    try:
        label = int(text["cls"]) if "cls" in text else json.loads(text["json"])[field]
        if type(label) is int and abs(label) < 1 << 31:
            return label
    except (KeyError, TypeError, ValueError, RecursionError):
        pass
    kind = "cls" if "cls" in text else "json"
    found = f"{kind} is {text[kind][:40]!r}" if text else "there is neither"
    raise InputError(f"{where} has no class number ({found}); give a KEY.cls, or a KEY.json with {field!r}")


def _store(cache: Path, members: np.ndarray) -> None:
    """Cache the index; whole or not at all, since other processes may do the same at the same time."""
    with suppress(InputError), whole(cache, parents=True) as file:  # no home: the next start reads the headers again
        np.save(file, members)
