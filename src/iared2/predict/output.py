"""Output folders: their names, whether they are writable, and protection of the input files; results as JSON."""

from __future__ import annotations

import os
import sys
import tempfile
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping, Sequence
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


def check_outputs(outputs: Mapping[str, str | None], checkpoint: str | None, *data: str | None) -> None:
    """Check before the work the files that options name; None and ``STDOUT`` pass.

    Args:
        outputs: option -> its value.
        checkpoint: a file or a folder with a model, which is read; results may lie beside it.
        data: files, or folders of which every file is read.

    Raises:
        InputError: a file cannot be written, two are the same, or one is read; or no plot has such a suffix.
    """
    named = {option: file for option, file in outputs.items() if file and file != STDOUT}
    seen: dict[str, str] = {}
    for option, file in named.items():
        check_file(option, file)
        if option == "--plot" and Path(file).suffix.lower() not in PLOTS:
            raise InputError(f"--plot {file}: unknown kind of picture; end the name in {', '.join(PLOTS)}")
        if other := seen.get(place := os.path.realpath(file)):
            raise InputError(f"{other} and {option} are both {file}; give two names")
        seen[place] = option
    model = [Path(checkpoint, name) for name in ("", "model.safetensors", "config.json")] if checkpoint else []
    check_not_read(named.values(), chain(model, *map(_files, filter(None, data))))


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
