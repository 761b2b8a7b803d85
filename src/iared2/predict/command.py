"""`iared2 interpret`, the paper's tool: photos or videos -> pictures and a JSON file each.

A thin client of the predictors: owns the output of the command, and the paths of the files. The model
determines whether the input is photos or videos. Groups are counted from 1 here, as in the paper.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from contextlib import nullcontext, suppress
from dataclasses import replace
from pathlib import Path

import torch
from rich.console import Console
from rich.markup import escape
from rich.progress import Progress

from ..atomic import to_json, write
from ..data.clips import find_videos
from ..data.photo import find_photos, read_photo
from ..device import usable_device
from ..errors import InputError, printable
from ..explain.heatmap import colors
from ..model.calibrate import decision_at
from ..model.decide import Decision
from ..pretrained.checkpoint import load
from .output import STDOUT, check_file, check_not_read, check_writable, folder_names
from .photo import Interpretation, Predictor
from .result import Result, decision_for
from .video import ClipInterpretation, VideoPredictor

CALIBRATION_PHOTOS = 512


def run(args: argparse.Namespace) -> int:
    """Run the command. Returns the exit status."""
    names = "checkpoint image_size threshold budget spread confidence scale method group colormap json device recursive"
    return interpret(args.photo, args.output, **{name: getattr(args, name) for name in names.split()})


def interpret(
    patterns: Sequence[str | Path],
    output: str | Path | None,
    *,
    checkpoint: str | Path | None = None,
    image_size: Sequence[int] | None = None,
    threshold: float | Sequence[float] | None = None,
    budget: float | None = None,
    spread: float | None = None,
    confidence: float | None = None,
    scale: float | None = None,
    method: str = "interpreter",
    group: int | None = None,
    colormap: str = "jet",
    json: str | None = None,
    device: str | None = None,
    recursive: bool = False,
) -> int:
    """Interpret photos, or videos for a model of clips, write the results, and print a few lines for each.

    Args:
        patterns: files, folders, globs. The results of a single file are written to `output` itself, otherwise to one
            subfolder per file, named after the file.
        output: created if missing. Other files in it are kept. None: no files, which needs ``json``.
        checkpoint: for `iared2.load`.
        image_size: side, or height and width, in pixels, to which photos are resized; the model's own if None.
        threshold: one number or one per group; the model's own if None.
        budget: share of the dense MACs, in (0, 1], met on average over the first ``CALIBRATION_PHOTOS`` photos by the
            thresholds, without second passes.
        spread, confidence, scale: see `model.decide.Decision`; the model's own if None.
        method: of the heat map, see `explain.methods.heatmap`.
        group: the group whose scores make the heat map, from 1; if None, see `explain.heatmap.default_group`.
        colormap: a colormap of matplotlib.
        json: a file that receives the contents of every `result.json`, one line per photo; "-": stdout, and then the
            summaries go to stderr.
        device: for torch; if None, `cuda` if available, else `cpu`.
        recursive: also the files in subfolders of folders.

    Returns:
        0, or 1 if some files could not be read; each is named on stderr, and the others are processed.

    Raises:
        InputError: an argument is wrong, or a result would replace an input file (checked before any work). Or the
            only file cannot be read.
    """
    if output is None and json is None:
        raise InputError("nothing to write: give -o FOLDER for pictures and numbers, --json for numbers, or both")
    if output is not None:
        check_writable(Path(output))
    check_file("--json", json)
    colors(colormap)
    if budget is not None and (threshold is not None or not 0 < budget <= 1):
        raise InputError(f"--budget {budget:g}: give a share above 0 and up to 1 of the dense MACs, and no --threshold")
    if budget is not None and (confidence or (scale or 1) != 1):
        raise InputError("--budget is met in one pass: leave out --confidence and --scale")
    torch_device = usable_device(device)
    model = load(checkpoint)
    if image_size is not None:
        model.set_input_size(image_size)
    given = {"spread": spread, "confidence": confidence, "scale": scale}
    model.decision = model.decision.but(**{name: value for name, value in given.items() if value is not None})
    if group is not None and not 1 <= group <= model.num_groups:
        raise InputError(f"there is no group {group}; the model has groups 1 to {model.num_groups}")
    if model.is_video and (budget is not None or method != "interpreter"):
        raise InputError("--budget and --method take photos, and this is a model of videos: leave them out")
    predictor = (VideoPredictor if model.is_video else Predictor)(model, torch_device, checkpoint)
    decision = decision_for(model, threshold)
    files = (find_videos if model.is_video else find_photos)(patterns, recursive)
    is_one = files == list(map(Path, patterns)) and len(files) == 1  # a file, not a folder or glob of one
    folders: list[Path | None] = [None] * len(files)
    if output is not None:
        folders = [Path(output)] if is_one else [Path(output, name) for name in folder_names(files)]
    kind = ClipInterpretation if model.is_video else Interpretation
    written = [path for folder in folders if folder for path in kind.files(folder)]
    check_not_read([*written, *([json] if json and json != STDOUT else [])], [*files, checkpoint])
    if budget is not None and isinstance(predictor, Predictor):
        decision = _at_budget(predictor, files, budget)

    screen, lines = Console(stderr=True), []
    # Lines for stdout go through the bar only where both are the same screen, and there is no bar in a log file.
    bar = Progress(console=screen, disable=not screen.is_terminal, redirect_stdout=sys.stdout.isatty())

    def process(file: Path, folder: Path | None) -> None:
        if isinstance(predictor, VideoPredictor):
            frames = bar.add_task(escape(printable(file.name)), total=predictor.num_frames)
            result: Result = predictor(file, decision, lambda n: bar.advance(frames, n))
            bar.remove_task(frames)
        else:
            result = predictor(file, decision)
            is_dense = result.kept.all() and "scale" not in result.model
            dense = result if is_dense else predictor(result.photo, decision.whole())
            result = replace(result, dense_top5=dense.top5)
            if method != "interpreter":
                heat = predictor.heatmap(result.photo, method, decision)
                result = replace(result, method=method, heat=heat)
        if folder is not None:
            result.save(folder, None if group is None else group - 1, colormap)
        print(summary(result, folder), file=sys.stderr if json == STDOUT else sys.stdout)
        if json == STDOUT:
            print(to_json(result.to_dict()))
        elif json is not None:
            lines.append(to_json(result.to_dict()) + "\n")

    if is_one:
        with bar if model.is_video else nullcontext():
            process(files[0], folders[0])
        _write(json, lines)
        return 0
    failed, what = 0, predictor.TAKES
    with bar:
        for file, folder in bar.track(list(zip(files, folders, strict=True)), description=what):
            try:
                process(file, folder)
            except InputError as error:
                failed += 1
                print(f"error: {error}", file=sys.stderr)
    _write(json, lines)
    if failed:
        print(f"error: {failed} of {len(files)} {what} failed", file=sys.stderr)
    return int(failed > 0)


def _write(json: str | None, lines: list[str]) -> None:
    if json not in (None, STDOUT):
        write(str(json), "".join(lines))


def _at_budget(predictor: Predictor, files: Sequence[Path], budget: float) -> Decision:
    """The one that meets a share of the dense MACs on the photos; the model's own if none of them can be read."""
    model, images = predictor.model, []
    for file in files[:CALIBRATION_PHOTOS]:
        with suppress(InputError):  # it is named when its turn comes
            images.append(predictor.prepare(read_photo(file)))
    if not images:
        return model.decision
    return decision_at(model, torch.cat(images), gmacs=budget * model.dense_macs / 1e9)


def summary(result: Result, folder: Path | None) -> str:
    """A summary in five lines; in four without a folder. A second pass takes one more."""
    best = ", ".join(f"{name} {100 * p:.1f} %" for name, p in result.top5[:1]) or "no classes"
    best += "".join(f" (with every patch: {name} {100 * p:.1f} %)" for name, p in (result.dense_top5 or ())[:1])
    kept = " > ".join(f"{ratio:.2f}" for ratio in (1, *result.keep_ratio))
    change = 100 * (result.macs / result.dense_macs - 1)
    lines = [
        f"{result.file}: {best}",
        f"  patches       {kept} of {result.kept.shape[1]}",
        f"  MACs          {result.cost} ({change:+.1f} %)",
        *(["  second pass   with every patch, since the first was not sure"] if result.second_pass else []),
        f"  forward pass  {result.milliseconds:.1f} ms",
        *([f"  results       {', '.join(map(str, result.files(folder)))}"] if folder else []),
    ]
    return "\n".join(map(printable, lines))
