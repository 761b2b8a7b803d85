"""The simplest way to fewer patches: smaller photos. The dense model on them, against a model that drops patches.

    python experiments/smaller.py box --data DATA [--sharp FILE] -o OUT

Each row is the same weights: the model with every patch, at its own size and at --sizes (positions are resampled, as
timm does), and as it is, with its decision. Answers are kept if they are those of the dense model at its own size. The
table is OUT/smaller.json and OUT/smaller.md.
"""

from __future__ import annotations

import argparse
from pathlib import Path

from choices import Photos, ready
from lab import Table, interval

import iared2
from iared2.data.images import DataConfig, open_samples


def main() -> None:
    """See above."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", help="what iared2.load takes")
    parser.add_argument("--data", required=True, help="photos with labels, as for iared2 train")
    parser.add_argument("--sharp", help="parquet file of larger photos, whose labels are not used")
    parser.add_argument("--sizes", type=int, nargs="*", default=[182, 168], help="pixels")
    parser.add_argument("--photos", type=int, default=2000)
    parser.add_argument("--sharp-photos", type=int, default=500)
    parser.add_argument("-o", "--output", type=Path, required=True)
    arguments = parser.parse_args()

    model = iared2.load(arguments.model)
    own, side, full = model.decision, model.pretrained_cfg["input_size"][1], model.dense_macs
    classes = model.class_names or ()
    sets = {"photos": (open_samples(DataConfig(path=arguments.data, classes=classes), "eval"), arguments.photos)}
    if arguments.sharp:
        sets["sharp"] = open_samples(DataConfig(path=arguments.sharp), "eval", whole=True), arguments.sharp_photos
    settings = [(f"every patch, {side} pixels", side, own.whole()), ("its decision", side, own)]
    settings += [(f"every patch, {size} pixels", size, own.whole()) for size in arguments.sizes]
    rows, dense = [], {}
    for name, size, decision in settings:
        model = iared2.load(arguments.model)
        model.set_input_size(size)
        model = ready(model)
        cells = [name]
        for kind, (samples, number) in sets.items():
            photos = Photos(samples, model, number)
            logits, macs = photos.outputs(model, decision.for_model(model.grid_size, model.num_groups))
            answers, labels = logits.argmax(1), photos.labels
            first = dense.setdefault(kind, answers)
            cells += [f"{100 * macs.double().mean().item() / full:.0f} %"]
            cells += [f"{100 * (answers == first).double().mean().item():.1f}"]
            if kind == "photos":
                right, before = (answers == labels).double(), (first == labels).double()
                low, high = interval((right - before).numpy())
                change = f"{100 * (right - before).mean().item():+.2f} ({low:+.2f} … {high:+.2f})"
                cells += [f"{100 * right.mean().item():.2f}", change if name != settings[0][0] else "–"]
        rows.append(cells)
        heads = ["model", "MACs", "answers kept, %", "top-1, %", "against every patch"]
        heads += ["MACs, sharp", "answers kept, sharp, %"] if arguments.sharp else []
        Table(
            "The same weights on smaller photos.",
            "python experiments/smaller.py box --data DATA --sharp SHARP",
            heads,
            rows,
            [
                f"{arguments.photos:,} validation photos"
                + (f", and {arguments.sharp_photos:,} sharp ones." if arguments.sharp else "."),
                "Against every patch at its own size: in points, with 95 % of paired bootstraps.",
            ],
        ).write(arguments.output, "smaller")


if __name__ == "__main__":
    main()
