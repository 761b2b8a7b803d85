"""``iared2 evaluate``: evaluate a model on labelled images or videos, also at other budgets."""

from __future__ import annotations

import argparse
import sys
from contextlib import suppress
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from rich.console import Console
from rich.progress import track

from ..atomic import whole
from ..data.batches import Batch, clip_length, eval_batches, model_transform, per_batch
from ..data.images import DataConfig, Samples
from ..data.unlabelled import open_photos
from ..data.videos import ClipConfig, open_for, views_transform
from ..device import usable_device
from ..errors import InputError, NoSplit
from ..model.calibrate import decision_at
from ..model.reduced import ReducedVisionTransformer
from ..predict.output import check_outputs, console, write_json
from ..pretrained.checkpoint import load
from .accuracy import evaluate
from .embeddings import evaluate_embeddings

CALIBRATION_IMAGES = 512
"""Fewer clips, with as many frames. A budget is met to s / √n of the dense MACs, s the standard deviation between
images: if it is 0.1, to 0.4 % by 512 images and to 1.3 % by 64 clips."""
MAX_WORKERS, MAX_BATCH = 256, 1 << 16


def run(arguments: argparse.Namespace) -> int:
    """Run ``iared2 evaluate``."""
    device = usable_device(arguments.device)
    model = load(arguments.checkpoint).to(device)
    if arguments.image_size:
        model.set_input_size(arguments.image_size)
    model.pack_weights()
    if arguments.threshold:
        model.threshold = arguments.threshold
    given = {name: getattr(arguments, name) for name in ("spread", "confidence", "scale")}
    model.decision = model.decision.but(**{name: value for name, value in given.items() if value is not None})
    _check(arguments, clip_length(model.pretrained_cfg))
    samples, train_samples = _open(arguments, model) if model.num_classes else _open_any(arguments, model)
    if model.num_classes and len(samples.class_names) != model.num_classes:
        raise InputError(f"{arguments.data} has {len(samples.class_names)} classes, the model {model.num_classes}")
    if arguments.limit is not None:
        samples = samples.draw(arguments.limit)
    cfg, crops = model.pretrained_cfg, arguments.crops
    transform = views_transform(cfg, crops) if crops > 1 else model_transform(cfg)  # which shows the whole frame
    reading = {"batch_size": arguments.batch_size, "workers": arguments.workers}
    budgets = {}
    if arguments.budget:
        calibrated_on = "training images"
        if train_samples is None:
            train_samples = samples
            calibrated_on = "the evaluated images, without their labels: there is no training split"
        sample = train_samples.draw(per_batch(CALIBRATION_IMAGES, cfg))
        print(f"budgets are calibrated on {len(sample)} of {calibrated_on}", file=sys.stderr)
        images = torch.cat([_one_view(batch) for batch in eval_batches(sample, transform, **reading)]).to(device)
        dense = model.dense_macs / 1e9
        budgets = {f"budget {s:g}": decision_at(model, images, gmacs=s * dense) for s in arguments.budget}
    steps, screen = -(-len(samples) // arguments.batch_size), Console(stderr=True)
    batches = eval_batches(samples, transform, **reading)
    progress = track(batches, "evaluating", steps, console=screen, transient=True)
    compare = evaluate if model.num_classes else evaluate_embeddings
    result = compare(model, progress, device, budgets=budgets)
    console(arguments.json).print(result.table())
    write_json(arguments.json, result.to_dict())
    if arguments.plot:
        with whole(arguments.plot) as file:
            result.figure().savefig(file, format=Path(arguments.plot).suffix[1:].lower(), dpi=200)
    return 0


def _check(arguments: argparse.Namespace, frames: int) -> None:
    outputs = {"--json": arguments.json, "--plot": arguments.plot}
    check_outputs(outputs, arguments.checkpoint, arguments.data)
    if not all(0 < share <= 1 for share in arguments.budget or ()):
        raise InputError("--budget: give shares of the dense MACs, above 0 and up to 1")
    if min(arguments.batch_size, 1 if arguments.limit is None else arguments.limit, arguments.crops) < 1:
        raise InputError("--batch-size, --limit and --crops must be 1 or more")
    if not 0 <= arguments.workers <= MAX_WORKERS or arguments.batch_size > MAX_BATCH:
        raise InputError(f"give --workers from 0 to {MAX_WORKERS}, and --batch-size up to {MAX_BATCH:,}")
    if not frames and (arguments.clips, arguments.span, arguments.crops) != (1, 0, 1):
        raise InputError("--clips, --span and --crops are of videos, and this is a model of images")


def _open(arguments: argparse.Namespace, model: ReducedVisionTransformer) -> tuple[Any, Any]:
    """The samples to evaluate, and those to calibrate budgets on, if requested and available."""
    # a model with class names gets the classes in its own order, whatever the order of the folders
    classes = tuple(arguments.classes or model.class_names or ())
    columns = {"image_column": arguments.image_column, "label_column": arguments.label_column}
    data = DataConfig(path=arguments.data, eval_split=arguments.split, classes=classes, **columns)
    frames, share = clip_length(model.pretrained_cfg), model.pretrained_cfg.get("holdout") or 0.0
    clips = ClipConfig(span=arguments.span, test_clips=arguments.clips)
    train_samples = None
    if arguments.budget:
        with suppress(NoSplit):
            train_samples = open_for(frames, replace(data, holdout=share), "train", clips)
    try:
        return open_for(frames, data, "eval", clips), train_samples
    except NoSplit:  # then the holdout of the training is new to the model
        if share and not arguments.all:
            message = f"there is no split to evaluate on: using the {share:.0%} that training held out; --all uses all"
            print(message, file=sys.stderr)
            return open_for(frames, replace(data, holdout=share), "holdout", clips), train_samples
        if share:
            print("warning: if the model was trained on this data, it has seen most of it", file=sys.stderr)
        return open_for(frames, data, "eval", clips, whole=True), train_samples


def _open_any(arguments: argparse.Namespace, model: ReducedVisionTransformer) -> tuple[Any, Any]:
    """`_open` for a model without classes, which needs no labels: other photos have the label −1."""
    if model.is_video:
        raise InputError("embeddings are evaluated of photos, and this is a model of clips")
    try:
        return _open(arguments, model)
    except InputError as error:
        try:
            photos = open_photos([arguments.data], arguments.image_column)
        except InputError:
            raise error from None
        return Samples(photos, np.arange(len(photos)), np.full(len(photos), -1), ()), None


def _one_view(batch: Batch) -> torch.Tensor:
    """Images, or a clip of each video: another view in every video, since those of one video look alike."""
    if batch.views == 1:
        return batch.images
    return batch.images[torch.arange(len(batch.images)), batch.samples % batch.views]
