"""Evaluates methods of explanation on photos with regions, with intervals and times.

    RegionBatch ── target ──> for each method:  heatmap -> maps (B, H, W), timed
                                 │ measures       (maps, masks)          -> localisation, sparsity, pixel counts
                                 │ faithfulness   (model, images, maps)  -> insertion, deletion, blanking
                                 ▼
    columns {name: (n,)} per method ── resample the images ──> Benchmark: Estimate(value, low, high) per method, measure

All methods explain the same class of the same images: the label if the data's classes are the model's, else the model's
own top-1.
"""

from __future__ import annotations

import statistics
from collections import defaultdict
from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

import numpy as np
import torch
from torch import Tensor

from ... import keyed
from ...data.batches import model_transform
from ...data.regions import NO_REGION, Regions, region_batches
from ...device import timed
from ...errors import InputError
from ...explain.heatmap import grid_of
from ...explain.methods import heatmap
from ...explain.names import EVERY, KIN
from ...model.reduced import ReducedVisionTransformer
from . import faithfulness, measures
from .results import COUNTS, Benchmark, MethodResult, estimate


def class_numbers(regions: Regions, model: ReducedVisionTransformer) -> np.ndarray | None:
    """The model's number of each class of the data, or None if these are not classes of the model.

    Classes match by name. For a model without names, data with the same number of classes match in their order.
    """
    if regions.labels is None:
        return None
    if model.class_names is None:
        return np.arange(model.num_classes) if len(regions.class_names) == model.num_classes else None
    number = {name: i for i, name in enumerate(model.class_names)}
    if not number.keys() >= set(regions.class_names):
        return None
    return np.array([number[name] for name in regions.class_names])


def benchmark(
    model: ReducedVisionTransformer,
    regions: Regions,
    methods: Sequence[str],
    *,
    limit: int | None = None,
    batch_size: int = 64,
    device: torch.device | str = "cpu",
    steps: int = 16,
    fill: faithfulness.Fill = "blur",
    seed: int = 0,
    advance: Callable[[int], None] = lambda images: None,
) -> Benchmark:
    """Measure methods on photos with regions.

    Args:
        model: in evaluation mode, on ``device``. Insertion and deletion run this model, and blanking runs its dense
            backbone.
        regions: the data set.
        methods: as ``read_method`` takes them.
        limit: maximum number of photos, drawn at random.
        batch_size: photos per batch; the time per image depends on it.
        device: where the model is.
        steps: of insertion and deletion; 0: no faithfulness, which takes most of the time.
        fill: of blanked patches, see ``faithfulness.fills``.
        seed: of the choice of photos, the method `random` and the bootstrap.
        advance: called with the number of images after each batch.

    Raises:
        InputError: the model has no classes, no photo can be read, an unknown method, or one whose package is missing.
    """
    if not model.num_classes:
        raise InputError("the model has no classes, and so no prediction that a map could explain")
    calls = {method: read_method(method, model) for method in methods}
    columns: dict[str, dict[str, list[Tensor]]] = {method: defaultdict(list) for method in calls}
    seconds: dict[str, list[float]] = defaultdict(list)
    numbers = class_numbers(regions, model)
    skipped: list[tuple[str, str]] = []
    batches = region_batches(
        regions,
        model_transform(model.pretrained_cfg),
        batch_size=batch_size,
        order=keyed.permutation(seed, 0, len(regions)),
        limit=limit,
        skipped=skipped,
    )
    where = "cpu" if torch.device(device).type == "mps" else device  # which has no float64
    done, shares = 0, 0.0
    for batch in batches:
        images = batch.images.to(device)
        output, spent = _timed(device, partial(torch.no_grad()(model.trace), images), warm=done > 0)
        seconds["forward"].append(spent / len(images))
        target = output.logits.argmax(1)
        if numbers is not None and regions.labels is not None:
            target = torch.from_numpy(numbers[regions.labels[batch.rows.numpy()]]).to(device)
        kept = output.kept[-1]
        shares += kept.float().mean(1).sum().item()
        for method, call in calls.items():
            explain = partial(heatmap, model, images, target=target, seed=seed, **call)
            maps, spent = _timed(device, explain, warm=done > 0)
            seconds[method].append(spent / len(images))
            # our map is also the decision: what was dropped is what is blanked; a baseline shows the same number
            is_ours = call["method"] == "interpreter"
            grid = grid_of(model, images.shape[-2:])
            shown = kept if is_ours else faithfulness.best_patches(maps, kept.sum(1), grid)
            found = _about_maps(maps.to(where), batch.masks.to(where))
            if steps:
                found |= _about_predictions(model, images, maps, target, shown, steps, fill)
            for name, column in found.items():
                columns[method][name].append(column.double().cpu())
        done += len(images)
        advance(len(images))

    without_region = sum(reason == NO_REGION for _, reason in skipped)
    return Benchmark(
        images=done,
        skipped={"unreadable": len(skipped) - without_region, NO_REGION: without_region},
        region="box" if regions.is_box else "mask",
        target="top-1" if numbers is None else "label",
        steps=steps,
        fill=fill,
        seed=seed,
        keep_ratio=shares / done,
        forward_milliseconds=1000 * statistics.median(seconds["forward"]),
        methods=[
            MethodResult(
                method,
                1000 * statistics.median(seconds[method]),
                estimate({name: torch.cat(parts).numpy() for name, parts in columns[method].items()}, seed),
            )
            for method in calls
        ],
    )


def read_method(text: str, model: ReducedVisionTransformer) -> dict[str, Any]:
    """``METHOD`` or ``METHOD:WHICH`` -> arguments of ``heatmap``.

    WHICH is a group of the interpreter, from 1, or `all`; or a block of attention or Grad-CAM, from 1.

    Raises:
        InputError: there is no such method, group or block.
    """
    method, _, which = text.partition(":")
    if method not in EVERY:
        raise InputError(f"there is no method {method!r}; take some of {', '.join(EVERY)}")
    if not which:
        return {"method": method}
    if (method, which) == ("interpreter", "all"):
        return {"method": method, "group": "all"}
    blocks = len(model.backbone.blocks)
    counts = {"interpreter": ("group", model.num_groups)} | dict.fromkeys(("attention", *KIN), ("block", blocks))
    what, count = counts.get(method, ("group or block", 0))
    if not which.isdecimal() or not 1 <= int(which) <= count:
        raise InputError(f"{text}: there is no {what} {which}; " + (f"take 1 to {count}" if count else "leave it out"))
    return {"method": method, what: int(which) - 1}


def _timed(device: torch.device | str, run: Callable[[], Any], warm: bool) -> tuple[Any, float]:
    """The result and the seconds, after a warm-up pass that includes allocations and the choice of kernels."""
    if not warm:
        run()
    return timed(device, run)


def _about_maps(maps: Tensor, masks: Tensor) -> dict[str, Tensor]:
    counts = measures.confusion(maps, masks).flatten(1)
    return {
        "pointing game": measures.pointing_game(maps, masks),
        "energy in box": measures.energy_in_box(maps, masks),
        "mass accuracy": measures.mass_accuracy(maps, masks),
        "rank accuracy": measures.rank_accuracy(maps, masks),
        "sparsity": measures.sparsity(maps),
        "mAP": measures.average_precision(maps, masks),
        **dict(zip(COUNTS, counts.unbind(1), strict=True)),
    }


def _about_predictions(
    model: ReducedVisionTransformer,
    images: Tensor,
    maps: Tensor,
    target: Tensor,
    shown: Tensor,
    steps: int,
    fill: faithfulness.Fill,
) -> dict[str, Tensor]:
    lost, agreement = faithfulness.blanking(model.backbone, images, shown, grid_of(model, images.shape[-2:]), fill=fill)
    return {
        "insertion": faithfulness.insertion(model, images, maps, target, steps=steps),
        "deletion": faithfulness.deletion(model, images, maps, target, steps=steps),
        "probability lost": lost,
        "agreement": agreement,
    }
