"""`iared2.accelerate`: your model and your photos -> a faster model that says what it lost and gained.

Photos are divided at random. On one half, the choice of patches, the schedule and its level are found, and a policy is
trained if there are minutes for it. Nothing is chosen on the other half, which the `Report` is about.
"""

from __future__ import annotations

import copy
import os
from dataclasses import replace
from pathlib import Path
from typing import Any

import timm
import torch
from rich.console import Console
from torch import Tensor, nn

from ..device import usable_device
from ..errors import InputError
from ..evaluate.agreement import photos_needed
from ..model.decide import keep_all
from ..model.reduced import ReducedVisionTransformer
from ..model.schedule import Schedule
from ..pretrained.build import from_timm
from ..pretrained.checkpoint import BOX, load
from ..train.policy_gradient import dropping
from .decision import Choice, Half, Target, at_shape, choose, find
from .photos import read
from .policy import train
from .report import outputs, reported

MAX_DROP = 0.01
MAX_PHOTOS = 2000
LEAST_PHOTOS = 8


def accelerate(
    model: ReducedVisionTransformer | nn.Module | str | Path,
    images: Any,
    *,
    max_drop: float | None = None,
    macs: float | None = None,
    minutes: float = 0,
    device: str | torch.device | None = None,
    embedding: bool = False,
    limit: int = MAX_PHOTOS,
    workers: int = 0,
) -> ReducedVisionTransformer:
    """Make a vision transformer faster by dropping patches, on photos without labels, and print what that costs.

    Without ``minutes``, nothing is trained: patches are chosen by the attention of the class token and evenly over the
    image, and are merged or dropped, whichever stays closest to the dense model. Its weights stay as they are.

    Args:
        model: a timm model, used unchanged, but moved to ``device``; its name, whose pretrained weights are loaded; or
            a file for `iared2.load`, or what that returns, whose own policy is then a choice as well, and is trained if
            there are minutes. Without classes (``num_classes=0``), its embeddings are compared in place of its
            predictions.
        images: photos like those that the model will see: a path or several (folders, tar, parquet, ``hf:NAME``),
            Pillow images, arrays or bytes, or ``(n, in_chans, height, width)``, normalised. One half finds the
            decision, the other one reports.
        max_drop: at most this share of photos, in (0, 1), may change their predicted class, or their nearest neighbour
            among the photos: the upper 95 % bound on the finding half is below it. It is the bound of each decision
            that is tried, and the cheapest one is taken, so it is a little optimistic; what the other half reports is
            not. By default 0.01. Photos of whose class the model is not sure may take a second pass with every patch
            (`Decision.confidence`, found anew).
        macs: in place of it, the mean MACs of an image, as a share of the dense model's, in (0, 1). Without second
            passes, whose number depends on the photos.
        minutes: time for training the interpreters by policy gradient, with what the dense model says as the label. The
            result is used only if it is better than the untrained choice.
        device: where to run; None: where the given module is; for names and files, cuda if there is one, else cpu.
        embedding: leave the classifier out; a given module keeps its own, and a copy of it is made faster.
        limit: at most so many photos, drawn at random, are read; at most 2 GB of them.
        workers: processes that read photos, for paths.

    Returns:
        A model in evaluation mode. ``model.report`` is the `adapt.report.Report` that was printed. If dropping does not
        pay, or no decision keeps what was asked for, it says so, and the threshold is 0: every patch stays.

    Raises:
        InputError: the model is not supported or one of clips, a number is out of its range, no photo can be read, or
            they are too few to promise ``max_drop`` (says how many are needed).
    """
    target = _target(max_drop, macs, minutes, limit, workers)
    console = Console(stderr=True)
    with console.status("loading the model"):
        reduced, own = _opened(copy.deepcopy(model) if embedding and isinstance(model, nn.Module) else model)
        if device is not None or not isinstance(model, nn.Module):
            reduced.to(usable_device(device))
    if reduced.is_video:
        raise InputError("accelerate is for models of photos, and this one takes clips")
    if embedding and reduced.num_classes:
        reduced.reset_classifier(0)
    pixels, unreadable = read(images, reduced, limit, workers)
    _check_number(len(pixels), target)
    reduced = _accelerated(reduced, own, pixels, unreadable, target, minutes, console)
    Console().print(reduced.report.table())
    return reduced


def _target(max_drop: float | None, macs: float | None, minutes: float, limit: int, workers: int) -> Target:
    if max_drop is not None and macs is not None:
        raise InputError("give max_drop= or macs=, not both: one follows from the other")
    for name, value in (("max_drop", max_drop), ("macs", macs)):
        if value is not None and not 0 < value < 1:
            raise InputError(f"{name}={value}: give a share above 0 and below 1")
    if not 0 <= minutes < float("inf"):
        raise InputError(f"minutes={minutes}: give 0 or more")
    if limit < LEAST_PHOTOS:
        raise InputError(f"limit={limit}: give {LEAST_PHOTOS} or more")
    if workers < 0:
        raise InputError(f"workers={workers}: give 0 or more")
    return Target(MAX_DROP if max_drop is None and macs is None else max_drop, macs)


def _check_number(photos: int, target: Target) -> None:
    if photos < LEAST_PHOTOS:
        raise InputError(f"{photos} photos are too few: give {LEAST_PHOTOS} at least")
    if target.max_drop is not None and photos // 2 < (needed := photos_needed(target.max_drop)):
        raise InputError(
            f"max_drop={target.max_drop:g} cannot be promised on {photos} photos, of which one half finds the decision:"
            f" give {2 * needed} at least, or a larger max_drop, or macs="
        )


def _opened(model: ReducedVisionTransformer | nn.Module | str | Path) -> tuple[ReducedVisionTransformer, bool]:
    """The model, in evaluation mode, and whether it has a policy of its own."""
    if isinstance(model, ReducedVisionTransformer):
        return model.eval(), True
    if isinstance(model, nn.Module):
        return from_timm(model, groups=1).eval(), False
    if str(model) != BOX and not os.path.exists(model) and timm.is_model(str(model)):
        return from_timm(str(model), groups=1, pretrained=True).eval(), False
    return load(model), True


def _accelerated(
    model: ReducedVisionTransformer,
    own: bool,
    pixels: Tensor,
    unreadable: int,
    target: Target,
    minutes: float,
    console: Console,
) -> ReducedVisionTransformer:
    weight, classes = next(model.parameters()), model.num_classes > 0
    model.pack_weights()
    with console.status("asking the dense model"):
        dense = outputs(pixels, weight, lambda chunk: model(chunk, keep_all))
    model.scale = 1.0  # others are tried
    half = len(pixels) // 2
    finding = Half(pixels[:half].to(weight), dense[:half], classes)
    with console.status("choosing which patches stay"):
        choice = choose(model, own, finding, target)
    with console.status("looking for the schedule"):
        found = find(choice, finding, target)
    notes = [f"{unreadable} photos could not be read and are left out"] if unreadable else []
    if found and minutes:
        choice, found = _trained(choice, finding, target, found, minutes, notes, console)
    model = choice.model
    with console.status("measuring on the other photos"):
        model.report = reported(choice, finding, found, pixels[half:], dense[half:], target, notes)
    if not model.report.pays:
        model.decision = model.decision.whole()
    return model


def _trained(
    choice: Choice,
    half: Half,
    target: Target,
    untrained: Schedule,
    minutes: float,
    notes: list[str],
    console: Console,
) -> tuple[Choice, Schedule]:
    """Train the policy, and keep it if it is better on the photos on which it was trained."""
    model, least = choice.model, len(dropping(untrained.shares))
    if len(half.images) < least:
        notes.append(
            f"{len(half.images)} photos are too few to train the policy of {least} groups: nothing was trained"
        )
        return choice, untrained
    before = copy.deepcopy(model.interpreters.state_dict())
    training = train(model, half.images, untrained.shares, choice.equal_counts, minutes)
    model.pack_weights()
    with console.status("comparing the trained policy"):
        found = at_shape(choice, half, target, untrained.shares)
    ended = "the reward stopped rising" if training.stopped_early else "the time was over"
    done = f"{training.steps} steps in {training.seconds / 60:.1f} minutes; {ended}"
    if found and target.better(found, untrained):
        return replace(choice, name=f"{choice.name}, then trained: {done}"), found
    model.interpreters.load_state_dict(before)
    notes.append(f"training ({done}) found no better policy, so the untrained choice is kept")
    return choice, untrained
