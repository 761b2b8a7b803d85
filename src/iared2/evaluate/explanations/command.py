"""`iared2 explain-bench`: methods of explanation × measures on photos with boxes or masks, as a table and a plot.

A thin client of benchmark.py: owns the output of the command, and the paths of the files.
"""

from __future__ import annotations

import argparse
import io
from pathlib import Path

from matplotlib.figure import Figure
from rich.box import SIMPLE
from rich.console import Console
from rich.progress import Progress
from rich.table import Table

from ...atomic import write
from ...data.regions import open_regions
from ...device import usable_device
from ...errors import InputError
from ...predict.output import check_outputs, console, write_json
from ...pretrained.checkpoint import load
from .benchmark import benchmark
from .results import LEVEL, Benchmark, Measure, MethodResult

ARROWS = {1: " ↑", -1: " ↓", 0: ""}


def run(args: argparse.Namespace) -> int:
    """Run the command. Returns the exit status.

    Raises:
        InputError: an argument is wrong (checked before any work); or see ``benchmark``.
    """
    check_outputs({"--json": args.json, "--plot": args.plot}, args.checkpoint, args.data)
    if min(args.limit, args.batch_size, args.steps + 1) < 1 or not 0 <= args.seed < 1 << 63:
        raise InputError("--limit and --batch-size must be 1 or more, --steps and --seed 0 or more, --seed below 2⁶³")
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
    write_json(args.json, result.to_dict())
    if args.plot:
        write(args.plot, picture(result, Path(args.plot).suffix[1:].lower()))
    for table in tables(result):
        console(args.json).print(table)
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
        if not columns:
            continue
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
