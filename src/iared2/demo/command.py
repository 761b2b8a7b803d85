"""``iared2 demo``: serve the page."""

from __future__ import annotations

import argparse
import os
import sys
from pathlib import Path

from ..errors import missing
from ..predict.photo import Predictor
from ..pretrained.checkpoint import load


def run(arguments: argparse.Namespace) -> int:
    """Run ``iared2 demo`` until it is stopped."""
    try:
        from .page import build, serve
    except ModuleNotFoundError as error:
        raise missing("the page", error.name, "demo") from None
    checkpoint = arguments.checkpoint
    # visitors need not know where the server keeps its files
    predictor = Predictor(load(checkpoint), arguments.device, checkpoint and Path(checkpoint).name, arguments.engine)
    if arguments.engine == "torch":
        predictor.model.pack_weights()
    options = {name: getattr(arguments, name) for name in ("host", "port", "root_path", "max_file_size")}
    try:
        serve(build(predictor), **options)
    except KeyboardInterrupt:  # all is cleaned up, but threads of the server may still be in torch: Python would abort
        print("stopped", file=sys.stderr, flush=True)
        os._exit(130)
    return 0
