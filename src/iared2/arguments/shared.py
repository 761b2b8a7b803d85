"""The arguments of every command, in one place, so that the same thing has the same name, form and default everywhere.

Imports no torch: `iared2 COMMAND --help` answers at once. The conventions, which tests/test_cli.py checks:

- The model is ``-c``/``--checkpoint``, by default the one in the box.
- A list is given with spaces, ``--keep 0.6 0.4 0.2``; commas are read as well.
- Results are a table on stdout. ``--json FILE`` writes them to a file as well; ``--json`` alone prints JSON to stdout,
  and the table to stderr.
- ``--device`` is cuda if there is one, else cpu; of the page always cpu, which all of its engines need.
- The help states every default.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Callable, Sequence
from typing import Any

CHECKPOINT = "file of model.save(), folder of a run, or user/model of the Hugging Face Hub"
CUDA = "cuda if there is one, else cpu"


class List(argparse.Action):
    """Values with spaces or commas between them, as a list of ``kind``."""

    def __init__(self, option_strings: Any, dest: str, kind: Callable[[str], Any] = float, **kwargs: Any) -> None:
        super().__init__(option_strings, dest, nargs="+", **kwargs)
        self.kind = kind

    def __call__(self, parser: Any, namespace: Any, values: Any, option_string: str | None = None) -> None:
        words = [word for value in values for word in value.replace(",", " ").split()]
        try:
            found = [self.kind(word) for word in words]
        except ValueError:
            found = []
        if not found:
            what = "whole numbers" if self.kind is int else "numbers"
            raise argparse.ArgumentError(self, f"{' '.join(values)!r}: give {what}, and words before the option")
        setattr(namespace, self.dest, found)


class OldName(argparse.Action):
    """An option that has another name now, ``dest``: it still works, and says so."""

    def __call__(self, parser: Any, namespace: Any, values: Any, option_string: str | None = None) -> None:
        note(f"{option_string} is now --{self.dest.replace('_', '-')}")
        setattr(namespace, self.dest, values)


def note(text: str) -> None:
    """A line on stderr."""
    print(f"note: {text}", file=sys.stderr)


def old_form(command: str, arguments: argparse.Namespace, rest: Sequence[str]) -> bool:
    """Read ``evaluate CHECKPOINT DATA``, the form without ``-c``; ``rest`` is DATA. False if it is something else."""
    name = {"evaluate": "data", "explain-bench": "data", "export": "output"}.get(command, "")
    if not name or len(rest) != 1 or rest[0].startswith("-") or arguments.checkpoint is not None:
        return False
    arguments.checkpoint = getattr(arguments, name)
    setattr(arguments, name, rest[0])
    note(f"iared2 {command} CHECKPOINT {name.upper()} is now iared2 {command} -c CHECKPOINT {name.upper()}")
    return True


def checkpoint(command: argparse.ArgumentParser, text: str = f"{CHECKPOINT} (default: the model in the box)") -> None:
    """Add ``-c``."""
    command.add_argument("-c", "--checkpoint", help=text)


def device(command: argparse.ArgumentParser, default: str | None = None) -> None:
    """Add ``--device``; None: cuda if there is one (`device.usable_device`)."""
    command.add_argument("--device", default=default, help=f"cpu, cuda, cuda:1, … (default: {default or CUDA})")


def engine(command: argparse.ArgumentParser, help: str) -> None:
    """Add ``--engine``."""
    engines = ["torch", "openvino", "onnxruntime"]
    command.add_argument("--engine", choices=engines, default="torch", help=f"{help} (default: %(default)s)")


def threshold(command: argparse.ArgumentParser) -> None:
    """Add ``-t``."""
    text = "keep patches that score above T: one number, or one per group (default: the model's own)"
    command.add_argument("-t", "--threshold", action=List, metavar="T", help=text)


def spread(command: argparse.ArgumentParser) -> None:
    """Add ``--spread``."""
    text = "spread the kept patches: 0 as published, 1 as if sampled (default: the model's own)"
    command.add_argument("--spread", type=float, metavar="S", help=text)


def passes(command: argparse.ArgumentParser) -> None:
    """Add ``--confidence`` and ``--scale``."""
    text = "a second pass with every patch if the two best classes are closer than C, from 0 (never) to 1 (always)"
    command.add_argument("--confidence", type=float, metavar="C", help=f"{text} (default: the model's own)")
    text = "the first pass has this part of the rows and columns of patches, above 0 and up to 1"
    command.add_argument("--scale", type=float, metavar="S", help=f"{text} (default: the model's own)")


def image_size(command: argparse.ArgumentParser) -> None:
    """Add ``--image-size``."""
    text = "resize photos to this side, or height and width, in pixels (default: the model's own)"
    command.add_argument("--image-size", action=List, kind=int, metavar="PIXELS", help=text)


def json(command: argparse.ArgumentParser) -> None:
    """Add ``--json``."""
    text = "write the results to FILE as JSON; without FILE, to stdout, and all else to stderr (default: no JSON)"
    command.add_argument("--json", nargs="?", const="-", metavar="FILE", help=text)


def colormap(command: argparse.ArgumentParser) -> None:
    """Add ``--colormap``."""
    command.add_argument("--colormap", default="jet", help="a colormap of matplotlib (default: %(default)s)")


def batches(command: argparse.ArgumentParser, workers: bool = True) -> None:
    """Add ``--batch-size`` and, with ``workers``, ``--workers``."""
    command.add_argument("--batch-size", type=int, default=64, metavar="B", help="per forward pass (default: 64)")
    if workers:
        command.add_argument("--workers", type=int, default=2, metavar="N", help="reading processes (default: 2)")
