"""``iared2 accelerate``: a model and a folder of photos -> a faster model in a file."""

from __future__ import annotations

import argparse
import sys
from contextlib import redirect_stdout

from rich.markup import escape

from ..device import usable_device
from ..errors import printable
from ..predict.output import check_file, check_not_read, console, write_json
from .accelerate import accelerate


def run(arguments: argparse.Namespace) -> int:
    """Run ``iared2 accelerate``."""
    check_file("-o", arguments.output)
    check_file("--json", arguments.json)
    outputs = [path for path in (arguments.output, arguments.json) if path and path != "-"]
    check_not_read(outputs, [*arguments.photos, arguments.model])
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
