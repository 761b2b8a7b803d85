"""Hostile and malformed inputs, each a function of its kind and seed, and what the tool must do with any of them.

    inputs()                 -> list[Input]    all of them; none is made yet
    Input.make(root, bases)  -> Case           writes the files of one and says which command reads them
    Worker.run(case)         -> Report         runs it in a process of its own, and watches
    complaints(case, report) -> list[str]      what is against the contract; empty if all is well

Nothing is stored: valid files are made once (bases.py), and mutations of them are composed (images.py and the others).
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cache
from pathlib import Path

from . import checkpoints, data_sets, images, recipes, videos
from .bases import Bases
from .case import Case, Make, Place

KINDS = {
    "image": images.inputs,
    "checkpoint": checkpoints.inputs,
    "recipe": recipes.inputs,
    "data": data_sets.inputs,
    "video": videos.inputs,
}


@dataclass(frozen=True)
class Input:
    """One input, not made yet."""

    kind: str
    name: str
    seed: int
    maker: Make

    @property
    def id(self) -> str:
        """Readable, and the same in every run."""
        return f"{self.kind}/{self.name}-{self.seed}"

    def make(self, root: Path, bases: Bases) -> Case:
        """Write its files into ``root/in``."""
        place = Place(root, f"{self.kind}/{self.seed}", bases)
        return self.maker(place)


@cache
def inputs() -> list[Input]:
    """All inputs, kind by kind."""
    return [
        Input(kind, name, seed, maker) for kind, listed in KINDS.items() for seed, (name, maker) in enumerate(listed())
    ]
