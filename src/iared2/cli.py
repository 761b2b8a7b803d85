"""The command line: it reads arguments and prints results, and leaves the work to others."""

from __future__ import annotations

import argparse
import json
import logging
import os
import sys
from collections.abc import Sequence
from importlib.metadata import version
from pathlib import Path

from . import export
from .errors import InputError, NoSplit
from .evaluate.explanations import command as explain_bench
from .evaluate.speed import command as bench
from .predict import command as interpret
from .predict import figure as paper_figures

CALIBRATION_IMAGES = 512


def main(argv: Sequence[str] | None = None) -> int:
    """Run one command; 0 if all went well. What a person got wrong is one line on stderr and status 1."""
    parser = argparse.ArgumentParser(
        prog="iared2", description="Vision transformers that drop uninformative patches, and show which."
    )
    parser.add_argument("--version", action="version", version=version("iared2"))
    commands = parser.add_subparsers(required=True, metavar="COMMAND")

    command = commands.add_parser("interpret", help="show which patches of a photo the model keeps")
    interpret.add_arguments(command)
    command.set_defaults(run=interpret.run)

    command = commands.add_parser("figure", help="the figures of the paper for your photos, for print")
    paper_figures.add_arguments(command)
    command.set_defaults(run=paper_figures.run)

    command = commands.add_parser("train", help="train a model by Algorithm 1; a killed run goes on where it was")
    command.add_argument("recipe", help="TOML file, see recipes/")
    command.add_argument("--data", help="folder of class folders, folder of parquet files, or hf:NAME")
    command.add_argument("-o", "--output", required=True, help="folder of the run: checkpoints, logs, result")
    command.add_argument(
        "--set", action="append", default=[], metavar="KEY=VALUE", help="change a setting, e.g. finetune.epochs=2"
    )
    command.set_defaults(run=_train)

    command = commands.add_parser(
        "evaluate", help="top-1, patches kept, multiply-adds and speed on labelled images or videos"
    )
    command.add_argument("checkpoint", help="file of model.save(), folder of a run, or 'box' for the model in the box")
    command.add_argument(
        "data", help="folder of class folders, folder of parquet files, hf:NAME; of videos, also a CSV"
    )
    command.add_argument("--split", default="validation", help="split to evaluate on (default: validation, or test)")
    command.add_argument("--classes", nargs="+", default=[], help="only these classes, in the model's order")
    command.add_argument("--threshold", type=float, nargs="+", help="one number, or one for each group")
    command.add_argument(
        "--budget",
        type=float,
        nargs="+",
        metavar="SHARE",
        help="also at these shares of the dense multiply-adds, e.g. 0.4 0.5 0.6, calibrated on training images",
    )
    command.add_argument("--clips", type=int, default=1, help="of videos: clips a video, spread over it (default: 1)")
    command.add_argument("--span", type=float, default=0.0, help="of videos: seconds of a clip (default: all of it)")
    command.add_argument("--crops", type=int, default=1, help="of videos: crops a clip, from end to end (default: 1)")
    command.add_argument("--plot", help="write accuracy against multiply-adds to this .png, .pdf or .svg")
    command.add_argument("--batch-size", type=int, default=64)
    command.add_argument("--workers", type=int, default=2)
    command.add_argument("--device", default="cpu")
    command.add_argument("--limit", type=int, help="only so many images")
    command.add_argument("--json", help="write the figures to this file too")
    command.set_defaults(run=_evaluate)

    command = commands.add_parser("bench", help="speed: reduced against dense, masked, padded and random, in one run")
    bench.add_arguments(command)
    command.set_defaults(run=bench.run)

    command = commands.add_parser("export", help="write a static model: ONNX or torch.export")
    export.add_arguments(command)
    command.set_defaults(run=export.run)

    command = commands.add_parser("explain-bench", help="methods of explanation against measures, on boxes or masks")
    explain_bench.add_arguments(command)
    command.set_defaults(run=explain_bench.run)

    command = commands.add_parser("demo", help="a page to play with, in the browser")
    command.add_argument("-c", "--checkpoint", help="a model of your own; else the one in the box")
    command.add_argument("--host", default="127.0.0.1", help="0.0.0.0 lets other machines in (default: %(default)s)")
    command.add_argument("--port", type=int, default=7860, help="(default: %(default)s)")
    command.add_argument("--root-path", help="where a reverse proxy shows the page, e.g. /iared2")
    command.add_argument(
        "--max-file-size", type=int, default=20, metavar="MB", help="of an upload (default: %(default)s)"
    )
    command.add_argument("--device", default="cpu")
    command.set_defaults(run=_demo)

    arguments = parser.parse_args(argv)
    for stream in (sys.stdout, sys.stderr):  # a file name that the terminal cannot show must not end the work
        if hasattr(stream, "reconfigure"):
            stream.reconfigure(errors="backslashreplace")
    logging.getLogger("timm").setLevel(logging.ERROR)
    try:
        return arguments.run(arguments)
    except InputError as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    except KeyboardInterrupt as stop:
        print(stop if stop.args else "stopped", file=sys.stderr)
        return getattr(stop, "status", 130)


def _train(arguments: argparse.Namespace) -> int:
    try:
        from .train.curriculum import train
        from .train.recipe import read_recipe
    except ModuleNotFoundError as error:
        raise InputError(f"training needs the package {error.name}: pip install 'iared2[train]'") from None
    settings = list(arguments.set)
    if arguments.data:
        settings.append(f"data.path={json.dumps(arguments.data)}")
    train(read_recipe(arguments.recipe, settings), Path(arguments.output))
    return 0


def _evaluate(arguments: argparse.Namespace) -> int:
    from dataclasses import replace

    from rich.console import Console
    from rich.progress import track

    from .data.batches import eval_batches, model_transform
    from .data.images import DataConfig
    from .data.videos import ClipConfig, open_for, views_transform
    from .device import usable_device
    from .evaluate.accuracy import evaluate
    from .keyed import permutation
    from .measure import to_json
    from .model.calibrate import thresholds_for
    from .pretrained.checkpoint import load

    device = usable_device(arguments.device)
    model = load(None if arguments.checkpoint == "box" else arguments.checkpoint).to(device)
    model.pack_weights()
    if arguments.threshold:
        if len(arguments.threshold) not in (1, model.num_groups):
            raise InputError(f"--threshold: give one number, or {model.num_groups}, one for each group")
        model.threshold = arguments.threshold
    if not all(0 < share <= 1 for share in arguments.budget or ()):
        raise InputError("--budget: give shares of the dense multiply-adds, above 0 and up to 1")
    if min(arguments.batch_size, arguments.limit or 1) < 1:
        raise InputError("--batch-size and --limit must be 1 or more")
    # a model that knows its classes by name gets them in its own order, whatever the order of the folders
    classes = arguments.classes or model.class_names or ()
    data = DataConfig(path=arguments.data, eval_split=arguments.split, classes=tuple(classes))
    input_size = model.pretrained_cfg["input_size"]
    is_video = len(input_size) == 4
    if not is_video and (arguments.clips, arguments.span, arguments.crops) != (1, 0, 1):
        raise InputError("--clips, --span and --crops are of videos, and this is a model of images")
    if arguments.crops < 1:
        raise InputError("--crops must be 1 or more")
    clips = ClipConfig(span=arguments.span, test_clips=arguments.clips)
    samples = open_for(input_size, data, "eval", clips, whole=True)
    if len(samples.class_names) != model.num_classes:
        raise InputError(f"{arguments.data} has {len(samples.class_names)} classes, the model {model.num_classes}")
    if arguments.limit:
        samples = replace(samples, rows=samples.rows[: arguments.limit], labels=samples.labels[: arguments.limit])
    cfg, crops = model.pretrained_cfg, arguments.crops
    transform = views_transform(cfg, crops) if crops > 1 else model_transform(cfg)  # which shows the whole frame
    batches = eval_batches(samples, transform, batch_size=arguments.batch_size, workers=arguments.workers)
    steps = -(-len(samples) // arguments.batch_size)
    console = Console(stderr=True)
    budgets = {}
    if arguments.budget:
        try:
            sample, calibrated_on = open_for(input_size, data, "train", clips), "training images"
        except NoSplit:
            sample, calibrated_on = samples, "the evaluated images, without their labels: there is no training split"
        chosen = permutation(0, 0, len(sample))[:CALIBRATION_IMAGES].numpy()
        sample = replace(sample, rows=sample.rows[chosen], labels=sample.labels[chosen])
        read = next(iter(eval_batches(sample, transform, batch_size=len(sample), workers=0)))
        print(f"budgets are calibrated on {len(sample)} of {calibrated_on}", file=sys.stderr)
        views = read.images.flatten(0, -1 - len(input_size)).to(device)
        for share in arguments.budget:
            gmacs = share * model.dense_macs / 1e9
            budgets[f"budget {share:g}"] = thresholds_for(model, views, gmacs=gmacs)
    progress = track(batches, "evaluating", steps, console=console, transient=True)
    result = evaluate(model, progress, device, budgets=budgets)
    Console().print(result.table())
    text = to_json(result.to_dict())
    print(text)
    path = arguments.json
    try:
        if arguments.json:
            Path(path).write_text(text + "\n")
        if path := arguments.plot:
            result.figure().savefig(path, dpi=200)
    except (OSError, ValueError) as error:  # ValueError: matplotlib does not know the suffix
        raise InputError(f"cannot write {path}: {error}") from None
    return 0


def _demo(arguments: argparse.Namespace) -> int:
    from .predict.photo import Predictor
    from .pretrained.checkpoint import load

    try:
        from .demo.page import build, serve
    except ModuleNotFoundError as error:
        raise InputError(f"the page needs the package {error.name}: pip install 'iared2[demo]'") from None
    checkpoint = arguments.checkpoint and Path(arguments.checkpoint)
    # visitors need not know where the server keeps its files
    predictor = Predictor(load(checkpoint), arguments.device, checkpoint and checkpoint.name)
    predictor.model.pack_weights()
    try:
        serve(
            build(predictor),
            arguments.host,
            arguments.port,
            root_path=arguments.root_path,
            max_file_size=arguments.max_file_size,
        )
    except KeyboardInterrupt:  # all is cleaned up, but threads of the server may still be in torch: Python would abort
        print("stopped", file=sys.stderr, flush=True)
        os._exit(130)
    return 0


if __name__ == "__main__":
    sys.exit(main())
