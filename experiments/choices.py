"""Which patches stay, and where: every choice on one frozen backbone, each with the schedule that suits it best.

    python experiments/choices.py --data DATA --backbone FILE [--sharp FILE] [--policy FILE ...] -o OUT

For each choice and budget, `iared2.model.schedule.search` looks for the best schedule on training photos without
labels: with one count for all photos, and for a policy also with counts that differ. Then the share of the dense
model's answers that are kept is measured on photos that nothing was chosen on: the validation photos of DATA, and with
``--sharp`` a parquet file of larger photos.

With ``--first-pass 0.9``, schedules are searched for that part of each budget, and the rest of it goes to second passes
with every patch for the photos whose answers are the least sure (model/second_pass.py). The confidence that says so is
set on the measured photos, without their answers, as thresholds are. The table is then OUT/second.json.

The untrained choices are those of ``model/baselines.py``, and attention with `Decision.spread`; dropped patches are
gone, or merged into kept ones. A policy is a file of ``model.save_policy``. Rows are written to OUT/rows.json after
each choice, and a killed run goes on where it was. The table is OUT/choices.json and OUT/choices.md.
"""

from __future__ import annotations

import argparse
import json
import time
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from lab import Table, interval, second_passes
from torch import Tensor

import iared2
from iared2 import ReducedVisionTransformer, keyed
from iared2.data.batches import eval_batches, model_transform
from iared2.data.images import DataConfig, Samples, open_samples
from iared2.device import has_fast_bf16
from iared2.measure import RANDOM_EPOCH
from iared2.model.baselines import KINDS, baseline_scores
from iared2.model.calibrate import thresholds_for
from iared2.model.decide import Decision, keep_all
from iared2.model.schedule import Schedule, search
from iared2.model.second_pass import again_macs
from iared2.pretrained.checkpoint import load_backbone_weights

BATCH = 50
SPREADS = (0.5, 1.0, 2.0)
LEARNED = "learned"
Make = Callable[[], ReducedVisionTransformer]


def dense_model(arguments: argparse.Namespace, classes: int, dropped: str = "gone") -> ReducedVisionTransformer:
    """The backbone with interpreters that start as its attention."""
    model = iared2.from_timm(
        arguments.model,
        groups=arguments.groups,
        interpreter="attention",
        dropped=dropped,
        img_size=arguments.size,
        num_classes=classes,
    )
    load_backbone_weights(model.backbone, arguments.backbone)
    model.start_interpreters()
    return model


def choices(arguments: argparse.Namespace, classes: int) -> Iterator[tuple[str, Make]]:
    """``(name, how to make the model)``."""

    def baseline(kind: str, dropped: str) -> ReducedVisionTransformer:
        model = dense_model(arguments, classes, dropped)
        for group in range(model.num_groups):
            model.interpreters[group] = baseline_scores(kind, model, group)
        return model

    def spread(strength: float, dropped: str) -> ReducedVisionTransformer:
        model = dense_model(arguments, classes, dropped)
        model.spread = strength
        return model

    def learned(path: Path) -> ReducedVisionTransformer:
        model = iared2.load(path, arguments.backbone)
        model.decision = model.decision.but(scale=1.0, confidence=0.0)
        return model

    for dropped in ("gone", "merged"):
        suffix = ", merged" * (dropped == "merged")
        for kind in KINDS:
            yield kind + suffix, partial(baseline, kind, dropped)
        for strength in SPREADS:
            yield f"attention + spread {strength:g}{suffix}", partial(spread, strength, dropped)
    for path in arguments.policy:
        yield f"{LEARNED}: {path.parent.name}", partial(learned, path)


class Photos:
    """Some photos in memory, as the model wants them, with keys of their own for random draws."""

    def __init__(self, samples: Samples, model: ReducedVisionTransformer, number: int) -> None:
        transform = model_transform(model.pretrained_cfg)
        found: list[Any] = []
        for batch in eval_batches(samples, transform, batch_size=BATCH, workers=0):
            images = batch.images.bfloat16() if has_fast_bf16("cpu") else batch.images
            found.append((images, batch.labels, keyed.sample_keys(0, RANDOM_EPOCH, batch.samples)))
            if sum(len(labels) for _, labels, _ in found) >= number:
                break
        self.images, self.labels, self.keys = (torch.cat(parts)[:number] for parts in zip(*found, strict=True))

    def outputs(self, model: ReducedVisionTransformer, decide: Any) -> tuple[Tensor, Tensor]:
        """Logits ``(n, K)`` and MACs ``(n,)``."""
        with torch.inference_mode():
            parts = zip(self.images.split(BATCH), self.keys.split(BATCH), strict=True)
            found = [model.trace(images, decide, keys) for images, keys in parts]
        return torch.cat([out.logits for out in found]), torch.cat([out.macs for out in found])


def at(model: ReducedVisionTransformer, schedule: Schedule, images: Tensor, macs: float) -> Decision:
    """The decision of a schedule on other photos; thresholds are set on these, without their answers."""
    if schedule.decision.num_keep is not None:
        return schedule.decision
    gmacs = macs * model.dense_macs / 1e9
    return model.decision.at(thresholds_for(model, images, gmacs=gmacs, shape=schedule.shares))


def main() -> None:
    """See above."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", required=True, help="photos with labels, as for iared2 train")
    parser.add_argument("--sharp", type=Path, help="parquet file of photos whose labels are not used")
    parser.add_argument("--backbone", type=Path, required=True, help="weights of the dense model")
    parser.add_argument("--model", default="vit_small_patch14_dinov2", help="its timm name")
    parser.add_argument("--size", type=int, default=224, help="pixels")
    parser.add_argument("--groups", type=int, default=6)
    parser.add_argument("--policy", type=Path, nargs="*", default=[], help="files of model.save_policy")
    parser.add_argument("--only", nargs="*", help="names of choices; default: all")
    parser.add_argument("--macs", type=float, nargs="*", default=[0.65, 0.5, 0.38])
    parser.add_argument("--first-pass", type=float, help="part of each budget, below 1; the rest is for second passes")
    parser.add_argument("--trials", type=int, default=40)
    parser.add_argument("--search-photos", type=int, default=200)
    parser.add_argument("--photos", type=int, default=1000)
    parser.add_argument("--sharp-photos", type=int, default=500)
    parser.add_argument("-o", "--output", type=Path, required=True)
    arguments = parser.parse_args()
    arguments.output.mkdir(parents=True, exist_ok=True)

    data = DataConfig(path=arguments.data)
    train, validation = open_samples(data, "train"), open_samples(data, "eval")
    classes = len(train.class_names)
    model = dense_model(arguments, classes)
    chosen_on = Photos(train, model, arguments.search_photos)
    measured_on = {"photos": Photos(validation, model, arguments.photos)}
    if arguments.sharp:
        sharp = open_samples(DataConfig(path=str(arguments.sharp)), "eval", whole=True)
        measured_on["sharp"] = Photos(sharp, model, arguments.sharp_photos)
    title = "second" if arguments.first_pass else "choices"
    file = arguments.output / ("second_rows.json" if arguments.first_pass else "rows.json")
    rows = json.loads(file.read_text()) if file.exists() else {}
    model = ready(model)
    dense = {name: photos.outputs(model, keep_all)[0] for name, photos in measured_on.items()}
    top1 = (dense["photos"].argmax(1) == measured_on["photos"].labels).double().mean().item()
    print(f"dense: top-1 {100 * top1:.1f} of {len(dense['photos'])} photos", flush=True)

    for name, make in choices(arguments, classes):
        if name in rows or (arguments.only and name not in arguments.only):
            continue
        start, model = time.monotonic(), ready(make())
        row: dict[str, Any] = {"schedules": {}, "measured": {}}
        for macs in arguments.macs:
            once = macs * (arguments.first_pass or 1)
            found = [
                search(model, chosen_on.images, once, trials=arguments.trials, equal_counts=equal)
                for equal in ((True, False) if name.startswith(LEARNED) else (True,))
            ]
            best = min(found, key=lambda schedule: schedule.divergence)
            row["schedules"][f"{macs:g}"] = best.shares, best.decision.num_keep is not None, best.divergence
            for kind, photos in measured_on.items():
                decision = at(model, best, photos.images, once)
                out, cost = photos.outputs(model, decision)
                if arguments.first_pass:
                    again = again_macs(model, decision, model.grid_size)
                    rows_again = second_passes(out, cost, macs * model.dense_macs, again)
                    out[rows_again], cost[rows_again] = dense[kind][rows_again], cost[rows_again] + again
                answers = out.argmax(1)
                row["measured"][f"{macs:g} {kind}"] = {
                    "macs": cost.double().mean().item() / model.dense_macs,
                    "kept": (answers == dense[kind].argmax(1)).int().tolist(),
                    **({"top1": (answers == photos.labels).double().mean().item()} if kind == "photos" else {}),
                }
        row["seconds"] = time.monotonic() - start
        rows[name] = row
        file.write_text(json.dumps(rows) + "\n")
        table(rows, arguments.first_pass).write(arguments.output, title)


def ready(model: ReducedVisionTransformer) -> ReducedVisionTransformer:
    """For inference in bfloat16 where that is fast, the interpreters' scores in float32."""
    model.eval().requires_grad_(False)
    if has_fast_bf16("cpu"):
        model.backbone.bfloat16()
    model.pack_weights()
    return model


def table(rows: dict[str, Any], first_pass: float | None = None) -> Table:
    """Share of the dense answers that each choice keeps; of a policy, also the difference to the best untrained one."""
    some = next(iter(rows.values()))
    columns, budgets = list(some["measured"]), list(some["schedules"])
    kept = {name: {c: np.array(row["measured"][c]["kept"]) for c in columns} for name, row in rows.items()}
    untrained = [name for name in rows if not name.startswith(LEARNED)]
    cells = []
    for name, row in rows.items():
        cells.append([name])
        for shares, equal, _ in (row["schedules"][budget] for budget in budgets):
            cells[-1].append(" ".join(f"{share:.2f}" for share in shares) + ", differ" * (not equal))
        for column in columns:
            cell = f"{100 * kept[name][column].mean():.1f}"
            if name.startswith(LEARNED) and untrained:
                rival = max(untrained, key=lambda other: kept[other][column].mean())
                difference = kept[name][column].astype(float) - kept[rival][column]
                low, high = interval(difference)
                cell += f"; {100 * difference.mean():+.1f} ({low:+.1f} … {high:+.1f}) on {rival}"
            cells[-1].append(cell)
    numbers = [len(next(iter(kept.values()))[column]) for column in columns]
    heads = [f"shares at {100 * float(budget):.0f} %" for budget in budgets]
    heads += [f"{column.split()[1]}, {100 * float(column.split()[0]):.0f} %" for column in columns]
    off = max(abs(row["measured"][c]["macs"] - float(c.split()[0])) for row in rows.values() for c in columns)
    return Table(
        "Share of the dense answers that are kept, in percent, by kind of photo and share of the MACs"
        + (", with second passes." if first_pass else "."),
        "python experiments/choices.py --data DATA --sharp SHARP --backbone BACKBONE"
        + (f" --first-pass {first_pass:g}" if first_pass else ""),
        ["choice", *heads],
        cells,
        [
            f"{max(numbers):,} photos of the validation split, {min(numbers):,} at least in a column.",
            f"The shares of the MACs are met to {100 * off:.1f} points.",
            "In brackets: the 95 % interval of the paired difference to the best untrained choice of the column.",
        ],
    )


if __name__ == "__main__":
    main()
