"""The simplest way to fewer patches: smaller photos. The dense model on them, against a model that drops patches.

    python experiments/smaller.py box --data DATA [--sharp FILE] -o OUT

The same weights in each row: with every patch, at the model's own size and at --sizes (positions are resampled, as
timm does), and with its decision in one pass. Answers are kept if they are those of every patch at its own size. Where
a pass costs less than --macs, there is a second row: the least sure photos take a second pass with every patch until so
many MACs are used (model/second_pass.py), also after a pass on smaller photos (Wang et al., NeurIPS 2021). The table is
OUT/smaller.json and OUT/smaller.md.
"""

from __future__ import annotations

import argparse
from pathlib import Path

from choices import Photos, ready
from lab import Table, interval
from torch import Tensor

import iared2
from iared2.data.images import DataConfig, open_samples
from iared2.model.decide import margin
from iared2.model.macs import second_pass_macs


def main() -> None:
    """See above."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", help="what iared2.load takes")
    parser.add_argument("--data", required=True, help="photos with labels, as for iared2 train")
    parser.add_argument("--sharp", help="parquet file of larger photos, whose labels are not used")
    parser.add_argument("--sizes", type=int, nargs="*", default=[182, 154], help="pixels")
    parser.add_argument("--macs", type=float, default=0.65, help="of two passes, as a share of every patch")
    parser.add_argument("--photos", type=int, default=2000)
    parser.add_argument("--sharp-photos", type=int, default=500)
    parser.add_argument("-o", "--output", type=Path, required=True)
    arguments = parser.parse_args()

    model = iared2.load(arguments.model)
    own, side, full = model.decision, model.pretrained_cfg["input_size"][1], model.dense_macs
    sets = {"photos": (DataConfig(path=arguments.data, classes=model.class_names or ()), arguments.photos)}
    if arguments.sharp:
        sets["sharp"] = DataConfig(path=arguments.sharp), arguments.sharp_photos
    passes = [(f"every patch, {side} pixels", side, own.whole()), ("its decision", side, own.but(confidence=0.0))]
    passes += [(f"every patch, {size} pixels", size, own.whole()) for size in arguments.sizes]
    rows: list[list[str]] = []
    dense: dict[str, Tensor] = {}
    for name, size, decision in passes:
        model = iared2.load(arguments.model)
        model.set_input_size(size)
        model, first = ready(model), decision.first_drop(model.num_patches) if size == side else 0
        once, twice = [name], [f"{name}, then every patch where it is not sure"]
        for kind, (data, number) in sets.items():
            photos = Photos(open_samples(data, "eval", whole=kind == "sharp"), model, number)
            out, macs = photos.outputs(model, decision.for_model(model.grid_size, model.num_groups))
            answers = dense.setdefault(kind, out.argmax(1))  # of the first row
            labels = photos.labels if kind == "photos" else None
            once += cells(out.argmax(1), answers, macs / full, labels)
            if (share := macs.double().mean().item() / full) < arguments.macs - 0.01:
                each = second_pass_macs(model, first, model.num_patches) / full if size == side else 1.0
                again = margin(out).argsort()[: round((arguments.macs - share) * number / each)]
                found, cost = out.argmax(1), macs.double() / full
                found[again], cost[again] = answers[again], cost[again] + each
                twice += cells(found, answers, cost, labels)
        rows += [once, twice] if len(twice) == len(once) else [once]
        heads = ["model", "MACs", "answers kept, %", "top-1, %", "against every patch"]
        heads += ["MACs, sharp", "answers kept, sharp, %"] if arguments.sharp else []
        several = f", and {arguments.sharp_photos:,} sharp ones" if arguments.sharp else ""
        notes = [
            f"{arguments.photos:,} validation photos{several}.",
            "Against every patch at its own size: in points, with 95 % of paired bootstraps.",
        ]
        title, command = "The same weights on smaller photos.", "python experiments/smaller.py box --data DATA"
        Table(title, command + " --sharp SHARP" * bool(several), heads, rows, notes).write(arguments.output, "smaller")


def cells(answers: Tensor, dense: Tensor, macs: Tensor, labels: Tensor | None) -> list[str]:
    """MACs and answers kept; with labels ``(n,)`` also top-1 and what it differs by."""
    found = [f"{100 * macs.double().mean().item():.0f} %", f"{100 * (answers == dense).double().mean().item():.1f}"]
    if labels is None:
        return found
    right, before = ((a == labels).double() for a in (answers, dense))
    low, high = interval((right - before).numpy())
    lost = f"{100 * (right - before).mean().item():+.2f} ({low:+.2f} … {high:+.2f})"
    return [*found, f"{100 * right.mean().item():.2f}", lost]


if __name__ == "__main__":
    main()
