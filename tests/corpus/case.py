"""Where an input is made, and the command that reads it."""

from __future__ import annotations

import os
import random
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from .bases import Bases

PHOTO_FILES = ("interpret-result.png", "hierarchy.png", "result.json")
VIDEO_FILES = ("frames.png", "heatmap.png", "frames.gif", "frames.mp4", "result.json")


@dataclass(frozen=True)
class Case:
    """What to run, and what it promises to write if it succeeds.

    Attributes:
        root: the only folder that may be written to; the input is in ``root/in``, results go to ``root/out``.
        argv: for ``iared2.cli.main``; or else
        python: source code that uses the public names.
        promised: files in ``root/out``.
        seconds: of computing that it may take.
    """

    root: Path
    argv: tuple[str, ...] = ()
    python: str = ""
    promised: tuple[str, ...] = ()
    seconds: int = 8

    @property
    def marker(self) -> Path:
        """What hostile code makes if it is run."""
        return self.root / "outside" / "code-was-run"

    @property
    def canary(self) -> Path:
        """What must not be read, whatever file names it."""
        return self.root / "outside" / "canary.pth"


class Place:
    """A folder for one input: ``in`` for its files, ``out`` for results, ``outside`` for what must not be touched."""

    def __init__(self, root: Path, key: str, bases: Bases) -> None:
        self.root, self.bases, self.rng = root, bases, random.Random(key)
        self.inside, self.out, self.outside = root / "in", root / "out", root / "outside"
        self.inside.mkdir(parents=True)
        self.outside.mkdir()
        self.canary = Case(root).canary
        self.canary.write_bytes(b"nothing that a file names may be opened")
        os.utime(self.canary, (0, 0))  # most file systems note at once that a file so old is read

    def file(self, name: str, content: bytes | str) -> Path:
        """Write a file of the input."""
        path = self.inside / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(content.encode(errors="surrogateescape") if isinstance(content, str) else content)
        return path

    def interpret(self, path: Path | str, checkpoint: Path | str | None = None, video: bool = False) -> Case:
        """``iared2 interpret`` of one photo or video."""
        model = checkpoint or (self.bases.video_model if video else self.bases.model)
        argv = ("interpret", "-p", str(path), "-o", str(self.out), "-c", str(model), "--device", "cpu")
        return Case(self.root, argv, promised=VIDEO_FILES if video else PHOTO_FILES)

    def evaluate(self, data: Path | str, *options: str, video: bool = False) -> Case:
        """``iared2 evaluate`` of the tiny model on a data set."""
        self.out.mkdir(exist_ok=True)
        model = self.bases.video_model if video else self.bases.model
        rest = ("--workers", "0", "--batch-size", "4", "--json", str(self.out / "figures.json"), *options)
        return Case(self.root, ("evaluate", "-c", str(model), str(data), *rest), promised=("figures.json",))

    def train(self, recipe: Path | str, *options: str, data: Path | str | None = None) -> Case:
        """``iared2 train``, which the worker ends after the first step."""
        argv = ("train", str(recipe), "-o", str(self.out), "--data", str(data or self.bases.data), *options)
        return Case(self.root, argv)

    def python(self, source: str) -> Case:
        """Code that uses ``iared2``, ``Image``, ``np`` and ``torch``."""
        return Case(self.root, python=source)


Make = Callable[[Place], Case]


def fifo(place: Place, name: str) -> Path:
    """A named pipe that nobody writes to: whoever opens it waits for ever."""
    path = place.inside / name
    os.mkfifo(path)
    return path
