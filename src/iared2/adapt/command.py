"""``iared2 accelerate``: a model and a folder of photos -> a faster model in a file."""

from __future__ import annotations

import argparse
import sys
from contextlib import redirect_stdout

from rich.markup import escape

from ..device import usable_device
from ..errors import printable
from ..predict.output import check_outputs, console, write_json
from .accelerate import accelerate


def run(arguments: argparse.Namespace) -> int:
    """Run ``iared2 accelerate``."""
    check_outputs({"-o": arguments.output, "--json": arguments.json}, arguments.model, *arguments.photos)
    names = "max_drop", "macs", "minutes", "embedding", "limit", "workers"
    settings = {name: getattr(arguments, name) for name in names}
    device = usable_device(arguments.device)
    with redirect_stdout(sys.stderr if arguments.json == "-" else sys.stdout):
        model = accelerate(arguments.model, arguments.photos, device=device, **settings)
    model.save(arguments.output)
    write_json(arguments.json, model.report.to_dict())
    said = escape(printable(f"the model is in {arguments.output}: iared2.load({arguments.output!r})"))
    console(arguments.json).print(said)
    return 0
