"""Output folders: their names, whether they are writable, and protection of the input files; results as JSON."""

from __future__ import annotations

import os
import sys
import tempfile
from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from contextlib import suppress
from itertools import chain
from pathlib import Path
from typing import Any

from rich.console import Console

from ..atomic import to_json, write
from ..errors import InputError

STDOUT = "-"
"""What the option ``--json`` is without a file."""
PLOTS = ".png", ".pdf", ".svg"
"""Kinds of pictures of the option ``--plot``."""


def folder_names(files: Sequence[Path]) -> list[str]:
    """A folder name per file: its stem; if two files share it, the file name; then numbered."""
    stems = Counter(file.stem.casefold() for file in files)  # some file systems do not distinguish A and a
    names: list[str] = []
    taken: set[str] = set()
    for file in files:
        unique = stems[file.stem.casefold()] == 1 and file.stem.strip(".")  # a file `...png` has the stem `..`
        name = base = file.stem if unique else file.name
        number = 1
        while name.casefold() in taken:
            number += 1
            name = f"{base}-{number}"
        taken.add(name.casefold())
        names.append(name)
    return names


def check_writable(output: Path) -> None:
    """Check by writing, since permissions are not sufficient; `output` itself is created only for the first result.

    Raises:
        InputError: the folder cannot be written, or a file has its name.
    """
    try:
        ancestor = next(folder for folder in (output, *output.absolute().parents) if folder.exists())
        if not ancestor.is_dir():
            raise InputError(f"{output}: {ancestor} is a file, not a folder; choose another output")
        tempfile.TemporaryFile(dir=ancestor).close()
    except OSError as error:
        raise InputError(f"{output}: cannot be written ({error.strerror}); choose another output") from None


def check_not_read(outputs: Iterable[str | Path], inputs: Iterable[str | Path | None]) -> None:
    """Refuse to overwrite an input file, also under another name: through a link, or in another case.

    Raises:
        InputError: an output is one of the inputs.
    """
    there = {_identity(path): path for path in outputs if Path(path).exists()}
    for path in inputs if there else ():
        if path and (output := there.get(_identity(path))):
            raise InputError(f"{output}: is read, and a result would replace it; choose another output")


def check_file(option: str, file: str | None) -> None:
    """Check before the work that an option names a file, in a folder that exists; None and ``STDOUT`` pass.

    Raises:
        InputError: it does not.
    """
    if file and file != STDOUT and (Path(file).is_dir() or not Path(file).absolute().parent.is_dir()):
        raise InputError(f"{option} {file}: give the name of a file, in a folder that is there")


def check_outputs(json: str | None, plot: str | None, checkpoint: str | None, data: str | None) -> None:
    """Check before the work the files of the options ``--json`` and ``--plot``.

    Args:
        json, plot: the values of the options.
        checkpoint: a file or a folder with a model, which is read.
        data: a file, or a folder of which every file is read.

    Raises:
        InputError: a file cannot be written, both are the same or one is read; or no picture has such a suffix.
    """
    check_file("--json", json)
    check_file("--plot", plot)
    if plot and Path(plot).suffix.lower() not in PLOTS:
        raise InputError(f"--plot {plot}: unknown kind of picture; end the name in {', '.join(PLOTS)}")
    if json and plot and os.path.realpath(json) == os.path.realpath(plot):
        raise InputError(f"--json and --plot are both {json}; give two names")
    model = [Path(checkpoint, name) for name in ("", "model.safetensors", "config.json")] if checkpoint else []
    check_not_read([file for file in (json, plot) if file and file != STDOUT], chain(model, _files(data or "")))


def console(json: str | None) -> Console:
    """Where a command prints for people: stdout, or stderr if the option ``--json`` needs stdout for itself."""
    stream = sys.stderr if json == STDOUT else sys.stdout
    return Console(file=stream, width=None if stream.isatty() else 140)


def write_json(file: str | None, results: Any) -> None:
    """Do what the option ``--json`` says: write the results in one line to a file or to stdout, or nothing.

    Raises:
        InputError: the file cannot be written.
    """
    if file == STDOUT:
        print(to_json(results))
    elif file is not None:
        write(file, to_json(results) + "\n")


def _files(path: str) -> Iterator[str]:
    """A path, and every file below it; found one by one, since a data set may have millions."""
    yield path
    for folder, _, names in os.walk(path):
        yield from (os.path.join(folder, name) for name in names)


def _identity(path: str | Path) -> tuple[int, int] | None:
    with suppress(OSError, ValueError):  # it does not exist, or cannot exist
        status = os.stat(path)
        return status.st_dev, status.st_ino
    return None
