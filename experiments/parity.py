"""How far `iared2.runtime.Engine` is from the torch model on photos, and how many scores lie near a threshold.

    python experiments/parity.py box PHOTOS [--limit 320] [--engine openvino onnxruntime]

A score that rounds to the other side of its threshold changes which patches stay. So a photo counts as near if one of
its patches has a score within a margin of the threshold at its place. And a dropped patch that is as similar to two
kept ones may be merged into the other one; such photos are counted by their logits.
"""

from __future__ import annotations

import argparse
from pathlib import Path

import numpy as np
import torch
from lab import Table
from torch import Tensor

import iared2
from iared2 import ReducedVisionTransformer
from iared2.data.photo_batches import photo_batches
from iared2.data.unlabelled import open_photos
from iared2.export.served import exported
from iared2.model.reduced import Output

MARGINS = (1e-4, 1e-5, 1e-6)
BATCH = 16


def gaps(model: ReducedVisionTransformer, output: Output) -> Tensor:
    """``(B,)``: the smallest distance of a score of each photo to the threshold at its place."""
    decision = model.decision
    assert decision.thresholds is not None
    shift = decision.offsets(output.scores.double()) if decision.spread else torch.zeros(())
    alive = torch.cat([torch.ones_like(output.kept[:1]), output.kept[:-1]])
    smallest = torch.full(output.logits.shape[:1], torch.inf, dtype=torch.float64)
    for threshold, scores, there in zip(decision.thresholds, output.scores.double(), alive, strict=True):
        if 0 < threshold < 1:
            at = (torch.tensor(threshold, dtype=torch.float64).logit() + shift).sigmoid()
            smallest = smallest.minimum((scores - at).abs().masked_fill(~there, torch.inf).amin(1))
    return smallest


def main() -> None:
    """See above."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("checkpoint")
    parser.add_argument("photos", nargs="+", help="as for iared2 predict")
    parser.add_argument("--limit", type=int, default=320, help="photos at most, evenly (default: %(default)s)")
    parser.add_argument("--engine", nargs="+", default=["openvino", "onnxruntime"], help="onnxruntime:int8 is another")
    parser.add_argument("-o", "--output", type=Path, default=Path("runs"), help="folder of the table (default: runs)")
    arguments = parser.parse_args()
    model = iared2.load(arguments.checkpoint)
    predictor = iared2.BatchPredictor(model, "cpu")
    photos = open_photos(arguments.photos)
    rows = np.unique(np.linspace(0, len(photos) - 1, min(arguments.limit, len(photos))).round().astype(int)).tolist()
    engines = {}
    for name in arguments.engine:
        backend, _, precision = name.partition(":")
        engines[name] = exported(model, backend, torch.get_num_threads(), precision or "fp32")
    found: dict[str, list[Tensor]] = {name: [] for name in ("gap", *engines)}
    batches = [range(row, row + 1) for row in rows]
    images = torch.cat([b.images for b in photo_batches(photos, predictor.transform, batches)])
    for chunk in images.split(BATCH):
        with torch.inference_mode():
            output = model.trace(chunk)
        found["gap"].append(gaps(model, output))
        for name, engine in engines.items():
            other = engine(chunk.numpy())
            same = torch.from_numpy((other.kept == output.kept.numpy()).all((0, 2)))
            logits = (torch.from_numpy(other.logits) - output.logits).abs().amax(1)
            scores = (torch.from_numpy(other.scores) - output.scores).abs().amax((0, 2))
            answers = torch.from_numpy(other.logits).argmax(1) == output.logits.argmax(1)
            found[name].append(torch.stack([~same, logits, scores, answers]))
    gap = torch.cat(found["gap"])
    cells = []
    for name in engines:
        differs, logits, scores, answers = torch.cat(found[name], 1)
        same = differs == 0
        off = same & (logits > MARGINS[0])
        counts = [f"{differs.sum():.0f}", f"{off.sum():.0f}"]
        worst = [f"{what[same & ~off].max():.1e}" if (same & ~off).any() else "–" for what in (logits, scores)]
        cells.append([name, f"{100 * answers.double().mean():.1f}", *counts, *worst])
    near = ", ".join(f"{100 * (gap < margin).double().mean():.1f} % within {margin:g}" for margin in MARGINS)
    Table(
        f"{len(gap)} photos, against torch in float32.",
        f"python experiments/parity.py box PHOTOS --engine {' '.join(arguments.engine)}",
        [
            "engine",
            "the same answer, %",
            "photos that keep other patches than in torch",
            f"others with a logit off by more than {MARGINS[0]:g}",
            "largest difference of a logit of the rest",
            "of a score",
        ],
        cells,
        [f"Photos with a score near its threshold: {near}."],
    ).write(arguments.output, "parity")


if __name__ == "__main__":
    main()
