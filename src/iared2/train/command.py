"""``iared2 train``: run a recipe, or resume a run."""

from __future__ import annotations

import argparse
import json
from pathlib import Path

from ..errors import missing


def run(arguments: argparse.Namespace) -> int:
    """Run ``iared2 train``."""
    try:
        from .curriculum import train
        from .recipe import read_recipe
    except ModuleNotFoundError as error:
        raise missing("training", error.name, "train") from None
    settings = list(arguments.set)
    if arguments.data:
        settings.append(f"data.path={json.dumps(arguments.data)}")
    train(read_recipe(arguments.recipe, settings), Path(arguments.output))
    return 0
