"""`iared2 figure maps` and `iared2 figure hierarchy`: the figures of the paper, for any photos, for print.

Owns the output of the command, and the path of the file.
"""

from __future__ import annotations

import argparse
import importlib.util
import sys
from collections.abc import Callable
from pathlib import Path

import torch
from PIL import Image
from rich.console import Console
from rich.progress import track
from torch.nn.functional import interpolate

from ..atomic import write
from ..data.photo import find_photos, read_photo
from ..device import usable_device
from ..errors import InputError, missing, printable
from ..explain.figures import blank, ratio
from ..explain.heatmap import colors, overlay
from ..explain.methods import heatmap
from ..explain.names import PAPER
from ..explain.plates import Panel, fit, plate
from ..pretrained.checkpoint import load
from .output import check_not_read, check_writable
from .photo import Predictor

KINDS = ".png", ".pdf"
TITLES = {"interpreter": "ours", "attention": "raw attention", "rollout": "attention rollout", "gradcam": "Grad-CAM"}
MAX_HEIGHT = 60_000  # pixels; matplotlib draws nothing higher than 2¹⁶
Row = Callable[[Image.Image], list[Panel]]


def run(args: argparse.Namespace) -> int:
    """Run the command. Returns 0, or 1 if some photos could not be read; the others are drawn.

    Raises:
        InputError: an argument is wrong (checked before any work); or no photo can be read.
    """
    output = Path(args.output)
    if output.suffix.lower() not in KINDS or output.is_dir():
        raise InputError(f"{output}: give the name of a file that ends in {' or '.join(KINDS)}")
    check_writable(output.parent)
    photos = find_photos(args.photo)
    check_not_read([output], [*photos, args.checkpoint])
    colors(args.colormap)
    predictor = Predictor(load(args.checkpoint), usable_device(args.device))
    if args.threshold is not None:
        predictor.model.threshold = args.threshold
    titles, row = (_maps if args.figure == "maps" else _hierarchy)(predictor, args)

    rows, height = [], 0
    console = Console(stderr=True)
    for file in track(photos, "photos", console=console, transient=True, disable=not console.is_terminal):
        try:
            photo = fit(read_photo(file), len(titles))
        except InputError as error:
            print(f"error: {error}", file=sys.stderr)
            continue
        rows.append(row(photo))
        height += photo.height
        if output.suffix.lower() == ".png" and height > MAX_HEIGHT:
            raise InputError(f"{len(photos)} photos are too many for one picture; write a .pdf, which has pages")
    if not rows:
        raise InputError("none of the photos can be read")
    write(output, plate(rows, titles, output.suffix[1:].lower()), parents=True)
    print(printable(f"{output}: {len(rows)} photos, {', '.join(titles)}"))
    return int(len(rows) < len(photos))


def _maps(predictor: Predictor, args: argparse.Namespace) -> tuple[list[str], Row]:
    """A row: the photo, and the photo under the heat map of each method."""
    methods = args.methods or [*PAPER]
    if not args.methods and not importlib.util.find_spec("resmem"):
        methods.remove("memorability")
        print(f"left out: {missing('memorability', 'resmem', 'memorability')} (489 MB)", file=sys.stderr)

    def row(photo: Image.Image) -> list[Panel]:
        images = predictor.prepare(photo)
        maps = torch.cat([heatmap(predictor.model, images, method) for method in methods])
        large = interpolate(maps[:, None], (photo.height, photo.width), mode="bicubic").clamp(0, 1)[:, 0].cpu()
        return [Panel(photo), *(Panel(overlay(photo, heat, args.colormap)) for heat in large.numpy())]

    return ["photo", *(TITLES.get(method, method) for method in methods)], row


def _hierarchy(predictor: Predictor, args: argparse.Namespace) -> tuple[list[str], Row]:
    """A row: the photo, then the patches kept by each group, with the ratio in the corner."""

    def row(photo: Image.Image) -> list[Panel]:
        result = predictor(photo)
        kept = (k.reshape(result.grid_size) for k in result.kept)
        return [Panel(photo), *(Panel(blank(photo, k, result.grid), ratio(k)) for k in kept)]

    return ["photo", *(f"group {group + 1}" for group in range(predictor.model.num_groups))], row
