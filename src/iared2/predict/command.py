"""`iared2 interpret`, the paper's tool: photos or videos -> pictures and a JSON file each.

A thin client of the predictors: owns the options of the command, its output, and the paths of the files. The model
determines whether the input is photos or videos. Groups are counted from 1 here, as in the paper.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from contextlib import nullcontext
from dataclasses import replace
from pathlib import Path
from typing import TypeVar

import torch
from rich.console import Console
from rich.markup import escape
from rich.progress import Progress

from ..data.clips import find_videos
from ..data.photo import find_photos
from ..device import usable_device
from ..errors import InputError, printable
from ..explain.heatmap import colors
from ..pretrained.checkpoint import load
from .output import check_not_read, check_writable, folder_names
from .photo import Interpretation, Predictor
from .result import Result
from .video import ClipInterpretation, VideoPredictor

_Number = TypeVar("_Number", int, float)


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The options of the command."""
    parser.add_argument(
        "-p",
        "--photo",
        nargs="+",
        action="extend",
        required=True,
        help="images, or videos for a video model; folders or quoted globs of them",
    )
    parser.add_argument("-r", "--recursive", action="store_true", help="also the subfolders of folders")
    parser.add_argument(
        "-o", "--output", required=True, help="folder for the results; several files get one subfolder each"
    )
    parser.add_argument(
        "-c", "--checkpoint", help="your own model, or the authors' ckpt.pth (default: the one in the box, for photos)"
    )
    parser.add_argument(
        "-t", "--threshold", nargs="+", metavar="T", help="keep patches that score above T: one number or one per group"
    )
    parser.add_argument("--spread", help="spread the kept patches: 0 as published, 1 as if sampled")
    parser.add_argument(
        "-g", "--group", help="group whose scores make the heat map, from 1 (default: the last; of 3, the second)"
    )
    parser.add_argument("--colormap", default="jet", help="a colormap of matplotlib (default: %(default)s)")
    parser.add_argument("--device", help="cpu, cuda, cuda:1, … (default: cuda if there is one)")


def run(args: argparse.Namespace) -> int:
    """Run the command. Returns the exit status."""
    return interpret(
        args.photo,
        args.output,
        checkpoint=args.checkpoint,
        threshold=None if args.threshold is None else [_number(text, float, "threshold") for text in args.threshold],
        spread=None if args.spread is None else _number(args.spread, float, "spread"),
        group=None if args.group is None else _number(args.group, int, "group"),
        colormap=args.colormap,
        device=args.device,
        recursive=args.recursive,
    )


def interpret(
    patterns: Sequence[str | Path],
    output: str | Path,
    *,
    checkpoint: str | Path | None = None,
    threshold: float | Sequence[float] | None = None,
    spread: float | None = None,
    group: int | None = None,
    colormap: str = "jet",
    device: str | None = None,
    recursive: bool = False,
) -> int:
    """Interpret photos, or videos for a model of clips, write the results, and print a few lines for each.

    Args:
        patterns: files, folders, globs. The results of a single file are written to `output` itself, otherwise to one
            subfolder per file, named after the file.
        output: created if missing. Other files in it are kept.
        checkpoint: for `iared2.load`.
        threshold: one number or one per group; the model's own if None.
        spread: see `model.decide.Decision`; the model's own if None.
        group: the group whose scores make the heat map, from 1; if None, see `explain.heatmap.default_group`.
        colormap: a colormap of matplotlib.
        device: for torch; if None, `cuda` if available, else `cpu`.
        recursive: also the files in subfolders of folders.

    Returns:
        0, or 1 if some files could not be read; each is named on stderr, and the others are processed.

    Raises:
        InputError: an argument is wrong, or a result would replace an input file (checked before any work). Or the
            only file cannot be read.
    """
    output = Path(output)
    check_writable(output)
    colors(colormap)
    torch_device = usable_device(device or ("cuda" if torch.cuda.is_available() else "cpu"))
    model = load(checkpoint)
    if spread is not None:
        model.spread = spread
    if group is not None and not 1 <= group <= model.num_groups:
        raise InputError(f"there is no group {group}; the model has groups 1 to {model.num_groups}")
    predictor = (VideoPredictor if model.is_video else Predictor)(model, torch_device, checkpoint)
    thresholds = predictor.thresholds(threshold)
    files = (find_videos if model.is_video else find_photos)(patterns, recursive)
    is_one = files == list(map(Path, patterns)) and len(files) == 1  # a file, not a folder or glob of one
    folders = [output] if is_one else [output / name for name in folder_names(files)]
    kind = ClipInterpretation if model.is_video else Interpretation
    check_not_read((path for folder in folders for path in kind.files(folder)), [*files, checkpoint])

    console = Console(stderr=True)
    # Lines for stdout go through the bar only where both are the same screen, and there is no bar in a log file.
    bar = Progress(console=console, disable=not console.is_terminal, redirect_stdout=sys.stdout.isatty())

    def process(file: Path, folder: Path) -> None:
        if isinstance(predictor, VideoPredictor):
            frames = bar.add_task(escape(printable(file.name)), total=predictor.num_frames)
            result: Result = predictor(file, thresholds, lambda n: bar.advance(frames, n))
            bar.remove_task(frames)
        else:
            result = predictor(file, thresholds)
            dense = result if result.kept.all() else predictor(result.photo, 0.0)
            result = replace(result, dense_top5=dense.top5)
        result.save(folder, None if group is None else group - 1, colormap)
        print(summary(result, folder))

    if is_one:
        with bar if model.is_video else nullcontext():
            process(files[0], output)
        return 0
    failed, what = 0, predictor.TAKES
    with bar:
        for file, folder in bar.track(list(zip(files, folders, strict=True)), description=what):
            try:
                process(file, folder)
            except InputError as error:
                failed += 1
                print(f"error: {error}", file=sys.stderr)
    if failed:
        print(f"error: {failed} of {len(files)} {what} failed", file=sys.stderr)
    return int(failed > 0)


def summary(result: Result, folder: Path) -> str:
    """A summary in five lines."""
    best = ", ".join(f"{name} {100 * p:.1f} %" for name, p in result.top5[:1]) or "no classes"
    best += "".join(f" (with every patch: {name} {100 * p:.1f} %)" for name, p in (result.dense_top5 or ())[:1])
    kept = " > ".join(f"{ratio:.2f}" for ratio in (1, *result.keep_ratio))
    change = 100 * (result.macs / result.dense_macs - 1)
    lines = (
        f"{result.file}: {best}",
        f"  patches       {kept} of {result.kept.shape[1]}",
        f"  MACs          {result.cost} ({change:+.1f} %)",
        f"  forward pass  {result.milliseconds:.1f} ms",
        f"  results       {', '.join(map(str, result.files(folder)))}",
    )
    return "\n".join(map(printable, lines))


def _number(text: str, kind: type[_Number], option: str) -> _Number:
    try:
        return kind(text)
    except ValueError:
        raise InputError(f"--{option} {text}: not a number") from None
