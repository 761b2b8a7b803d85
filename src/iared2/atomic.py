"""Files that appear whole or not at all: a reader, or a crash, sees the old file or the new one, never half of one."""

from __future__ import annotations

import json
import os
import re
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

from .errors import InputError


@contextmanager
def whole(path: Path | str, parents: bool = False, errors: type[Exception] = OSError) -> Iterator[Path]:
    """A temporary path to write a file to; it becomes ``path`` when the block ends, or is removed if the block raises.

    Other files that the block writes beside it move to the folder of ``path`` first, ``path`` itself last.

    Args:
        path: the file. For a link, its target is replaced; a device, such as ``/dev/stdout``, is written to.
        parents: create missing folders.
        errors: what the writer raises besides ``OSError``.

    Raises:
        InputError: the file cannot be written. An existing file is unchanged.
    """
    target = Path(os.path.realpath(path))
    try:
        is_device = target.exists() and not target.is_file() and not target.is_dir()
        if parents:
            target.parent.mkdir(parents=True, exist_ok=True)
        with TemporaryDirectory(prefix=".iared2-", dir=None if is_device else target.parent) as folder:
            yield Path(folder, target.name)
            (probe := Path(folder, ".mode")).touch()  # as umask has it; safetensors' files nobody else could read
            mode = probe.stat().st_mode
            probe.unlink()
            files = sorted(Path(folder).iterdir(), key=lambda file: file.name == target.name)
            if is_device:
                target.write_bytes(files[-1].read_bytes())
                return
            for file in files:
                if (target.parent / file.name).is_dir():
                    raise IsADirectoryError(f"{target.parent / file.name} is a folder")
                file.chmod(mode)
                with file.open("rb") as content:
                    os.fsync(content.fileno())
            for file in files:
                os.replace(file, target.parent / file.name)
    except (OSError, errors) as error:
        reason = getattr(error, "strerror", None) or str(error).strip().split("\n")[0]
        raise InputError(
            f"cannot write {path}: {reason}; give a path in a folder that exists and can be written"
        ) from None


def write(path: Path | str, content: bytes | str, parents: bool = False) -> None:
    """Write a file, text as UTF-8, whole or not at all.

    Raises:
        InputError: see ``whole``.
    """
    with whole(path, parents) as file:
        file.write_bytes(content.encode() if isinstance(content, str) else content)


def to_json(value: Any, indent: int | None = None) -> str:
    """Standard JSON: a number that is not finite is null. In one line, or indented, with lists of numbers in one."""
    finite = json.loads(json.dumps(value), parse_constant=lambda name: None)
    text = json.dumps(finite, allow_nan=False, indent=indent)
    # a string has no line break in JSON, so this finds no list in one
    return re.sub(r"\[\n([^][{}\"]*)\n *\]", lambda match: f"[{' '.join(match[1].split())}]", text)
