"""``iared2 train``: run a recipe, or resume a run."""

from __future__ import annotations

import argparse
import json
from pathlib import Path

from ..errors import InputError


def add_arguments(command: argparse.ArgumentParser) -> None:
    """The arguments of ``iared2 train``."""
    command.add_argument("recipe", help="TOML file, see recipes/")
    command.add_argument("--data", help="folder of class folders, folder of parquet files, or hf:NAME")
    command.add_argument("-o", "--output", required=True, help="folder of the run: checkpoints, logs, result")
    command.add_argument(
        "--set", action="append", default=[], metavar="KEY=VALUE", help="change a setting, e.g. finetune.epochs=2"
    )


def run(arguments: argparse.Namespace) -> int:
    """Run ``iared2 train``."""
    try:
        from .curriculum import train
        from .recipe import read_recipe
    except ModuleNotFoundError as error:
        raise InputError(f"training needs the package {error.name}: pip install 'iared2[train]'") from None
    settings = list(arguments.set)
    if arguments.data:
        settings.append(f"data.path={json.dumps(arguments.data)}")
    train(read_recipe(arguments.recipe, settings), Path(arguments.output))
    return 0
