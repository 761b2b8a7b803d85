"""`iared2 explain-bench`: methods of explanation × measures on photos with boxes or masks, as a table and a plot.

A thin client of benchmark.py: owns the options of the command, its output, and the paths of the files.
"""

from __future__ import annotations

import argparse
import io
import os
from itertools import chain
from pathlib import Path
from typing import get_args

from matplotlib.figure import Figure
from rich.box import SIMPLE
from rich.console import Console
from rich.progress import Progress
from rich.table import Table

from ...atomic import to_json, write
from ...data.regions import open_regions
from ...device import usable_device
from ...errors import InputError
from ...explain.gradients import KIN
from ...explain.methods import METHODS
from ...predict.output import check_not_read
from ...pretrained.checkpoint import load
from .benchmark import benchmark
from .faithfulness import Fill
from .results import LEVEL, Benchmark, Measure, MethodResult

DEFAULT = ("interpreter", "interpreter:all", *(m for m in METHODS if m not in ("interpreter", "memorability")))
ARROWS = {1: " ↑", -1: " ↓", 0: ""}
PLOTS = ".png", ".pdf", ".svg"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The options of the command."""
    parser.add_argument("checkpoint", help="file of model.save(), folder of a run, or 'box' for the model in the box")
    parser.add_argument(
        "data",
        help="parquet with bbox or mask, a folder of it, a folder with images/ and masks/, or gtsegs_ijcv.mat",
    )
    parser.add_argument(
        "--methods",
        nargs="+",
        default=DEFAULT,
        metavar="METHOD",
        help=f"of {', '.join(METHODS)}, {', '.join(KIN)}; interpreter:G for group G or `all`, attention:B for block B,"
        " counted from 1 (default: all except memorability, whose weights are large)",
    )
    parser.add_argument("--limit", type=int, default=1000, help="photos to draw at random (default: %(default)s)")
    parser.add_argument("--batch-size", type=int, default=64)
    parser.add_argument("--steps", type=int, default=16, help="steps of insertion and deletion (default: %(default)s)")
    parser.add_argument(
        "--fill", default="blur", choices=get_args(Fill), help="fill of the blanked patches (default: %(default)s)"
    )
    parser.add_argument("--split", default="validation", help="split of parquet files (default: %(default)s)")
    parser.add_argument("--region", help="column of the regions (default: mask, else bbox)")
    parser.add_argument("--label", help="column of the labels (default: label, else class_id)")
    parser.add_argument("--only", default="", metavar="COLUMN", help="use only the rows where this column is true")
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--json", help="also write the results to this file")
    parser.add_argument("--plot", help="plot the results to this file: .png, .pdf or .svg")


def run(args: argparse.Namespace) -> int:
    """Run the command. Returns the exit status.

    Raises:
        InputError: an argument is wrong (checked before any work); or see ``benchmark``.
    """
    for option, file in (("--json", args.json), ("--plot", args.plot)):
        if file and (Path(file).is_dir() or not Path(file).absolute().parent.is_dir()):
            raise InputError(f"{option} {file}: give the name of a file, in a folder that is there")
    if args.json and args.json == args.plot:
        raise InputError(f"--json and --plot are both {args.json}; give two names")
    if args.plot and Path(args.plot).suffix.lower() not in PLOTS:
        raise InputError(f"--plot {args.plot}: unknown kind of picture; end the name in {', '.join(PLOTS)}")
    if min(args.limit, args.batch_size, args.steps) < 1 or not 0 <= args.seed < 1 << 63:
        raise InputError("--limit, --batch-size and --steps must be 1 or more, and --seed 0 or more, below 2⁶³")
    data = (Path(folder, name) for folder, _, names in os.walk(args.data) for name in names)
    check_not_read(filter(None, (args.json, args.plot)), chain([args.checkpoint, args.data], data))
    device = usable_device(args.device)
    regions = open_regions(args.data, split=args.split, region=args.region, label=args.label, only=args.only)
    model = load(args.checkpoint).to(device)

    screen = Console(stderr=True)
    with Progress(console=screen, transient=True, disable=not screen.is_terminal) as progress:
        task = progress.add_task("photos", total=min(args.limit, len(regions)))
        result = benchmark(
            model,
            regions,
            args.methods,
            limit=args.limit,
            batch_size=args.batch_size,
            device=device,
            steps=args.steps,
            fill=args.fill,
            seed=args.seed,
            advance=lambda images: progress.advance(task, images),
        )
    text = to_json(result.to_dict())
    if args.json:
        write(args.json, text + "\n")
    if args.plot:
        write(args.plot, picture(result, Path(args.plot).suffix[1:].lower()))
    console = Console()
    for table in tables(result):
        console.print(table)
    print(text)
    return 0


def headline(result: Benchmark) -> str:
    """What was measured, in one sentence."""
    skipped = ", ".join(f"{count} skipped: {reason}" for reason, count in result.skipped.items() if count)
    target = "its label" if result.target == "label" else "the model's own top-1"
    return (
        f"{result.images:,} photos with a {result.region} each{f' ({skipped})' if skipped else ''}; the class explained"
        f" is {target}. Percent, with {100 * LEVEL:.0f} % bootstrap intervals over the photos"
    )


def tables(result: Benchmark) -> list[Table]:
    """Tables to print: one per kind of measure; the best method and those within its interval in bold."""
    notes = {
        "localisation": "Localisation. ms: one heat map, including its forward pass; the reduced forward pass alone"
        f" takes {result.forward_milliseconds:.2f}",
        "segmentation": "Weakly supervised segmentation, at the map's mean. Sparsity only describes",
        "faithfulness": "Faithfulness. Insertion and deletion: area under the curve. The last two: the dense prediction"
        f" after all but {100 * result.keep_ratio:.0f} % of the patches are blanked ({result.fill})",
    }
    made: list[Table] = []
    for kind, note in notes.items():
        columns = [measure for measure in result.columns if measure.kind == kind]
        table = Table(title=f"{headline(result)}.\n{note}." if not made else f"{note}.", box=SIMPLE)
        table.add_column("method", overflow="fold")
        for measure in columns:
            table.add_column(measure.name + ARROWS[measure.sign], justify="right", min_width=9)
        if kind == "localisation":
            table.add_column("ms", justify="right")
        for row in result.methods:
            cells = [_cell(result, row, measure) for measure in columns]
            cells += [f"{row.milliseconds:.2f}"] if kind == "localisation" else []
            table.add_row(row.method, *cells)
        made.append(table)
    return made


def _cell(result: Benchmark, row: MethodResult, measure: Measure) -> str:
    figure = row.measures[measure.name]
    text = f"{100 * figure.value:.1f}"
    text = f"[bold]{text}[/bold]" if row.method in result.leaders(measure) else text
    return f"{text}\n{100 * figure.low:.1f}–{100 * figure.high:.1f}"


def picture(result: Benchmark, kind: str) -> bytes:
    """The plot as a file of this kind (png, pdf, svg): one panel per measure, a dot with interval per method."""
    names = [row.method for row in result.methods]
    canvas = Figure(figsize=(14, 2 + 0.75 * len(names)), layout="constrained")
    panels = list(canvas.subplots(3, 5, sharey=True).flat)
    colors = ["tab:red" if name.startswith("interpreter") else "tab:blue" for name in names]
    for measure in result.columns:
        panel = panels.pop(0)
        for y, (row, color) in enumerate(zip(result.methods, colors, strict=True)):
            figure = row.measures[measure.name]
            panel.plot([100 * figure.low, 100 * figure.high], [y, y], color=color, linewidth=2, solid_capstyle="butt")
            panel.plot(100 * figure.value, y, "o", color=color, markersize=5)
        panel.set_title(measure.name + ARROWS[measure.sign] + ", %", fontsize=10)
        panel.set_yticks(range(len(names)), names)
        panel.grid(axis="x", alpha=0.3)
    panel = panels.pop(0)
    panel.barh(range(len(names)), [row.milliseconds for row in result.methods], color=colors)
    panel.axvline(result.forward_milliseconds, color="black", linewidth=1)
    panel.set_xscale("log")
    panel.set_title("ms per image; line: one forward pass", fontsize=10)
    panel.invert_yaxis()  # of all: they share it
    for panel in panels:
        panel.remove()
    canvas.suptitle(headline(result), fontsize=10)
    buffer = io.BytesIO()
    canvas.savefig(buffer, format=kind, dpi=120)
    return buffer.getvalue()
