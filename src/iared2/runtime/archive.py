"""The file of an exported model: a zip of ONNX graphs and a manifest, of which nothing is trusted.

Sizes and types of the manifest are checked, the archive is never unpacked to a disk, and no graph may name other
files.
"""

from __future__ import annotations

import json
import os
import zipfile
from pathlib import Path
from typing import Any

from ..errors import InputError

FORMAT = "iared2 adaptive batch 5"
MANIFEST = "manifest.json"
EXTERNAL = b"location"
"""A graph that names a file has this key: weights outside of it, which ONNX readers would look for on the disk."""
MAX_MANIFEST = 1 << 26


def is_exported(path: Path | str) -> bool:
    """Whether a file is one of ``iared2 export --adaptive-batch``, by its content."""
    try:
        with zipfile.ZipFile(path) as folder:
            return MANIFEST in folder.namelist()
    except (OSError, zipfile.BadZipFile, NotImplementedError, ValueError):
        return False


def read(path: Path) -> tuple[dict[str, Any], dict[str, bytes]]:
    """The manifest and the graphs by name. Entries are not compressed, so none is larger than the file."""
    try:
        with zipfile.ZipFile(path) as folder:
            entries = folder.infolist()
            if any(entry.compress_type != zipfile.ZIP_STORED for entry in entries):
                raise InputError(f"{path}: its entries are compressed; export the model again")
            if sum(entry.file_size for entry in entries) > os.path.getsize(path):
                raise InputError(f"{path}: its entries are larger than the file; export the model again")
            content = {entry.filename: folder.read(entry) for entry in entries}
    except (OSError, zipfile.BadZipFile, RuntimeError, NotImplementedError, EOFError, ValueError) as error:
        reason = getattr(error, "strerror", None) or str(error).split("\n")[0]
        raise InputError(f"cannot read {path}: {reason}; give a file of iared2 export --adaptive-batch") from None
    text = content.pop(MANIFEST, b"")
    try:
        manifest = json.loads(text[:MAX_MANIFEST])
    except (ValueError, RecursionError):
        manifest = None
    if not isinstance(manifest, dict) or manifest.get("format") != FORMAT:
        raise InputError(f"{path} is no file of iared2 export --adaptive-batch, or of another version")
    for name, graph in content.items():
        if EXTERNAL in graph:
            raise InputError(f"{path}: {name} names another file; export the model again")
    return manifest, content


class Manifest:
    """Checked entries of a manifest."""

    def __init__(self, entries: dict[str, Any], path: str) -> None:
        self.get, self.path = entries.get, path

    def _refuse(self, name: str) -> InputError:
        return InputError(
            f"{self.path}: {name}={self.get(name)!r:.80} in its manifest is not usable; export the model again"
        )

    def whole(self, name: str, low: int, high: int) -> int:
        """An integer in ``low…high``."""
        return int(self.numbers(name, int, 1, low, high)[0])

    def numbers(
        self, name: str, kind: type, count: int | None, low: float = -1e9, high: float = 1e9
    ) -> tuple[Any, ...]:
        """``count`` finite numbers, or 1 to 16 if None."""
        values = self.get(name)
        values = values if isinstance(values, list) else [values]
        kinds = (int,) if kind is int else (int, float)
        right = 1 <= len(values) <= 16 if count is None else len(values) == count
        if not right or not all(type(value) in kinds and low <= value <= high for value in values):
            raise self._refuse(name)
        return tuple(map(kind, values))

    def choice(self, name: str, *values: str) -> str:
        """One of the values; the first if there is none."""
        value = self.get(name, values[0])
        if value not in values:
            raise self._refuse(name)
        return str(value)

    def names(self, name: str) -> tuple[str, ...] | None:
        """A list of strings, or None."""
        values = self.get(name)
        if values is not None and not (isinstance(values, list) and all(isinstance(value, str) for value in values)):
            raise self._refuse(name)
        return None if values is None else tuple(values)
