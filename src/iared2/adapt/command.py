"""``iared2 accelerate``: a model and a folder of photos -> a faster model in a file."""

from __future__ import annotations

import argparse
from pathlib import Path

import torch

from ..atomic import to_json, write
from ..predict.output import check_not_read, check_writable
from .accelerate import MAX_DROP, MAX_PHOTOS, accelerate


def add_arguments(command: argparse.ArgumentParser) -> None:
    """The arguments of ``iared2 accelerate``."""
    command.add_argument(
        "photos", nargs="+", help="photos like those that the model will see: folders, tar, parquet files, hf:NAME"
    )
    command.add_argument("-m", "--model", required=True, help="timm's name of a model, or a file for iared2.load")
    command.add_argument("-o", "--output", required=True, help="file for the faster model")
    command.add_argument(
        "--max-drop",
        type=float,
        metavar="SHARE",
        help=f"share of the photos whose answer, or nearest neighbour, may change (default: {MAX_DROP})",
    )
    command.add_argument("--macs", type=float, metavar="SHARE", help="in place of it: share of the dense MACs")
    command.add_argument("--minutes", type=float, default=0, help="also train the policy so long (default: 0)")
    command.add_argument("--embedding", action="store_true", help="leave the classifier out: return embeddings")
    command.add_argument(
        "--limit", type=int, default=MAX_PHOTOS, help=f"maximum number of photos (default: {MAX_PHOTOS})"
    )
    command.add_argument("--workers", type=int, default=2, help="processes that read photos (default: 2)")
    command.add_argument("--device", help="cpu, cuda, cuda:1, … (default: cuda if there is one)")
    command.add_argument("--json", help="also write the report to this file")


def run(arguments: argparse.Namespace) -> int:
    """Run ``iared2 accelerate``."""
    outputs = [path for path in (arguments.output, arguments.json) if path]
    for path in outputs:
        check_writable(Path(path).parent)
    check_not_read(outputs, [*arguments.photos, arguments.model])
    names = "max_drop", "macs", "minutes", "embedding", "limit", "workers"
    settings = {name: getattr(arguments, name) for name in names}
    device = arguments.device or ("cuda" if torch.cuda.is_available() else "cpu")
    model = accelerate(arguments.model, arguments.photos, device=device, **settings)
    model.save(arguments.output)
    if arguments.json:
        write(arguments.json, to_json(model.report.to_dict()) + "\n")
    print(f"the model is in {arguments.output}: iared2.load({arguments.output!r})")
    return 0
