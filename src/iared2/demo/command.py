"""``iared2 demo``: serve the page."""

from __future__ import annotations

import argparse
import os
import sys
from pathlib import Path

from ..errors import InputError
from ..predict.photo import Predictor
from ..pretrained.checkpoint import load


def add_arguments(command: argparse.ArgumentParser) -> None:
    """The arguments of ``iared2 demo``."""
    command.add_argument("-c", "--checkpoint", help="your own model (default: the model in the box)")
    command.add_argument("--host", default="127.0.0.1", help="0.0.0.0 allows other machines (default: %(default)s)")
    command.add_argument("--port", type=int, default=7860, help="(default: %(default)s)")
    command.add_argument("--root-path", help="path of the page behind a reverse proxy, e.g. /iared2")
    command.add_argument(
        "--max-file-size", type=int, default=20, metavar="MB", help="maximum size of an upload (default: %(default)s)"
    )
    command.add_argument("--device", default="cpu")


def run(arguments: argparse.Namespace) -> int:
    """Run ``iared2 demo`` until it is stopped."""
    try:
        from .page import build, serve
    except ModuleNotFoundError as error:
        raise InputError(f"the page needs the package {error.name}: pip install 'iared2[demo]'") from None
    checkpoint = arguments.checkpoint
    # visitors need not know where the server keeps its files
    predictor = Predictor(load(checkpoint), arguments.device, checkpoint and Path(checkpoint).name)
    predictor.model.pack_weights()
    options = {name: getattr(arguments, name) for name in ("host", "port", "root_path", "max_file_size")}
    try:
        serve(build(predictor), **options)
    except KeyboardInterrupt:  # all is cleaned up, but threads of the server may still be in torch: Python would abort
        print("stopped", file=sys.stderr, flush=True)
        os._exit(130)
    return 0
