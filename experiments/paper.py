"""A finished run of a policy against patches that are spread evenly or at random: equal counts, the same weights.

    python experiments/paper.py RUN --data DATA --backbone FILE -o OUT

RUN is the folder of a run of `iared2 train`, whose blocks may be fine-tuned, FILE the dense model before it. The policy
is measured at its own thresholds, and at --macs of the dense model, with the thresholds of the paper and with
`Decision.spread`. Thresholds are set on training photos. The other choices keep as many patches of every photo as the
policy does on average. The table is OUT/paper.json and OUT/paper.md.
"""

from __future__ import annotations

import argparse
import copy
from pathlib import Path

import numpy as np
import torch
from choices import BATCH, Photos, ready
from lab import Table, interval, shares
from torch import nn

import iared2
from iared2 import ReducedVisionTransformer
from iared2.data.images import DataConfig, open_samples
from iared2.errors import InputError
from iared2.model.baselines import baseline_scores
from iared2.model.calibrate import thresholds_for
from iared2.model.decide import Decide, Decision, keep_all
from iared2.pretrained.checkpoint import load_backbone_weights


def measure(
    photos: Photos, model: ReducedVisionTransformer, decide: Decide | None = None
) -> tuple[np.ndarray, list[float], float]:
    """Which answers are right ``(n,)``, D shares of the patches alive, and MACs as a share of the dense model's."""
    with torch.inference_mode():
        batches = zip(photos.images.split(BATCH), photos.keys.split(BATCH), strict=True)
        found = [model.trace(images, decide, keys) for images, keys in batches]
    answers = torch.cat([out.logits for out in found]).argmax(1)
    kept = torch.cat([out.keep_ratio for out in found], 1).double().mean(1).tolist()
    macs = torch.cat([out.macs for out in found]).double().mean().item()
    return (answers == photos.labels).numpy().astype(float), kept, macs / model.dense_macs


def main() -> None:
    """See above."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("run", help="folder of a finished run, or a file of model.save()")
    parser.add_argument("--data", required=True, help="photos with labels, as for iared2 train")
    parser.add_argument("--backbone", type=Path, required=True, help="weights of the dense model before the run")
    parser.add_argument("--macs", type=float, nargs="*", default=[0.65], help="shares of the dense model's")
    parser.add_argument("--photos", type=int, default=1000, help="to measure on")
    parser.add_argument("--calibration-photos", type=int, default=128)
    parser.add_argument("-o", "--output", type=Path, required=True)
    arguments = parser.parse_args()
    if min(arguments.photos, arguments.calibration_photos) < 1:
        raise InputError("--photos, --calibration-photos: give 1 or more")

    trained = iared2.load(arguments.run).eval()
    data = DataConfig(path=arguments.data, classes=trained.class_names or ())
    calibrated_on = Photos(open_samples(data, "train"), trained, arguments.calibration_photos)
    photos = Photos(open_samples(data, "eval"), trained, arguments.photos)
    before = copy.deepcopy(trained)
    load_backbone_weights(before.backbone, arguments.backbone)
    model, before = ready(trained), ready(before)
    dense = measure(photos, before, keep_all)[0]
    rows = [["dense, before the run", f"{100 * dense.mean():.1f}", shares([1.0] * model.num_groups), "100 %", "–"]]

    def add(name: str, decision: Decision) -> list[float]:
        """One row; returns the shares that it keeps."""
        model.decision = decision
        found, kept, macs = measure(photos, model)
        low, high = interval(found - dense)
        lost = f"{100 * (found - dense).mean():+.1f} ({low:+.1f} … {high:+.1f})"
        rows.append([name, f"{100 * found.mean():.1f}", shares(kept), f"{100 * macs:.0f} %", lost])
        return kept

    own, policy = trained.decision, list(model.interpreters)
    add("every patch", own.at(0.0))
    settings = [("its own thresholds", own)]
    for macs in arguments.macs:
        for spread in (0.0, 1.0):
            model.decision = own.but(spread=spread)
            found = thresholds_for(model, calibrated_on.images, gmacs=macs * model.dense_macs / 1e9)
            settings.append((f"at {100 * macs:g} % of the MACs, spread {spread:g}", model.decision.at(found)))
    for name, decision in settings:
        kept = add(f"policy, {name}", decision)
        counts = [round(share * model.num_patches) for share in kept]
        for kind in ("spread", "random") if decision.spread == own.spread else ():  # else as many as in the other row
            for group in range(model.num_groups):
                model.interpreters[group] = baseline_scores(kind, model, group)
            add(f"{kind}, as many", Decision(thresholds=None, num_keep=counts))
            model.interpreters = nn.ModuleList(policy)
    Table(
        f"A policy against choices that know nothing, with the weights of its run; {len(dense):,} validation photos.",
        "python experiments/paper.py RUN --data DATA --backbone BACKBONE",
        ["choice", "top-1 %", "patches alive after each group", "MACs", "against the dense model"],
        rows,
        ["In points, with 95 % of paired bootstraps."],
    ).write(arguments.output, "paper")


if __name__ == "__main__":
    main()
