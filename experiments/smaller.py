"""The simplest way to fewer patches: smaller photos. With every patch of them, with fewer, and against dropping alone.

    python experiments/smaller.py box --data DATA [--sharp FILE] --first 224:1,1,1,0.25,0.14,0.094 154 140 -o OUT

The same weights in each row: with every patch; with the model's own decision in one pass; and with --first in one pass:
photos of so many pixels (`Decision.scale`), with every patch or with these shares alive after each group, the
best-scored; with --choices also as many patches that are evenly spread, and the best by untrained attention and spread.
Answers are kept if they are those of every patch at the model's own size. Where a pass costs less than one
of --macs, there is another row: the least sure photos take a second pass with every patch, at the model's own size,
until so many MACs are used (model/second_pass.py; Wang et al., NeurIPS 2021). The table is OUT/smaller.json and
OUT/smaller.md.
"""

from __future__ import annotations

import argparse
import copy
from collections.abc import Callable
from pathlib import Path

import torch
from choices import Photos, ready
from lab import Table, interval, second_passes
from torch import Tensor

import iared2
from iared2.data.images import DataConfig, open_samples
from iared2.model.decide import Decide, Decision, by_share, keep_all
from iared2.model.second_pass import again_macs, same_passes

ATTENTION = ", attention + spread"


def main() -> None:
    """See above."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", help="what iared2.load takes")
    parser.add_argument("--data", required=True, help="photos with labels, as for iared2 train")
    parser.add_argument("--sharp", help="parquet file of larger photos, whose labels are not used")
    parser.add_argument(
        "--first", type=first_pass, nargs="*", default=[(154, ()), (140, ())], metavar="PIXELS[:SHARES]"
    )
    parser.add_argument("--macs", type=float, nargs="*", default=[0.65, 0.5], help="of two passes, shares of the dense")
    parser.add_argument("--choices", action="store_true", help="of the patches: evenly spread and attention as well")
    parser.add_argument("--photos", type=int, default=2000)
    parser.add_argument("--sharp-photos", type=int, default=500)
    parser.add_argument("-o", "--output", type=Path, required=True)
    arguments = parser.parse_args()

    model = ready(iared2.load(arguments.model))
    own, side, full = model.decision.but(confidence=0.0), model.pretrained_cfg["input_size"][1], model.dense_macs
    sets = {"photos": (DataConfig(path=arguments.data, classes=model.class_names or ()), arguments.photos)}
    if arguments.sharp:
        sets["sharp"] = DataConfig(path=arguments.sharp), arguments.sharp_photos
    seen = {
        kind: Photos(open_samples(data, "eval", whole=kind == "sharp"), model, n) for kind, (data, n) in sets.items()
    }
    untrained = copy.deepcopy(model)
    untrained.start_interpreters()
    passes: list[tuple[str, Decision, Decide]] = [(f"every patch, {side} pixels", whole := own.whole(), whole)]
    passes.append(("its decision", own, own))
    if model.confidence:
        passes.append(("its decision and confidence", model.decision, model.decision))
    for size, shares in arguments.first:
        small = own.but(scale=size / side).for_model(model.grid_size, model.num_groups)
        alive = " → ".join(f"{share:g}" for share in shares)
        if not shares:
            passes.append((f"every patch, {size} pixels", small, same_passes(model, small, keep_all)))
            continue
        chosen = ways(small) if arguments.choices else {"": small.standing}
        for kind, standing in chosen.items():
            decide = same_passes(model, small, by_share(shares, standing))
            passes.append((f"{alive} of the patches{kind}, {size} pixels", small, decide))
    rows: list[list[str]] = []
    dense: dict[str, Tensor] = {}
    for name, decision, decide in passes:
        again = again_macs(model, decision, model.grid_size)
        once, twice = [name], [[f"{name}, then every patch where it is not sure"] for _ in arguments.macs]
        for kind, photos in seen.items():
            out, macs = photos.outputs(untrained if ATTENTION in name else model, decide)
            answers = dense.setdefault(kind, out.argmax(1))  # of the first row
            labels = photos.labels if kind == "photos" else None
            once += cells(out.argmax(1), answers, macs / full, labels)
            for row, budget in zip(twice, arguments.macs, strict=True):
                if macs.double().mean().item() / full < budget - 0.01 and not decision.confidence:
                    least = second_passes(out, macs, budget * full, again)
                    found, cost = out.argmax(1), macs.clone()
                    found[least], cost[least] = answers[least], cost[least] + again
                    row += cells(found, answers, cost / full, labels)
        rows += [once, *(row for row in twice if len(row) == len(once))]
        heads = ["model", "MACs", "answers kept, %", "top-1, %", "against every patch"]
        heads += ["MACs, sharp", "answers kept, sharp, %"] if arguments.sharp else []
        several = f", and {arguments.sharp_photos:,} sharp ones" if arguments.sharp else ""
        notes = [
            f"{arguments.photos:,} validation photos{several}.",
            "Against every patch at its own size: in points, with 95 % of paired bootstraps.",
        ]
        command = "python experiments/smaller.py box --data DATA" + " --sharp SHARP" * bool(several)
        command += f" --macs {' '.join(f'{macs:g}' for macs in arguments.macs)} --first"
        for size, shares in arguments.first:
            command += f" {size}" + ":" * bool(shares) + ",".join(f"{share:g}" for share in shares)
        command += " --choices" * arguments.choices
        Table("The same weights on smaller photos.", command, heads, rows, notes).write(arguments.output, "smaller")


def ways(decision: Decision) -> dict[str, Callable[[Tensor], Tensor]]:
    """Choices of patches by name, and by what they order them; attention is that of another model."""
    return {
        ", by the policy": decision.standing,
        ", evenly spread": lambda scores: decision.standing(torch.full_like(scores, 0.5)),
        ATTENTION: decision.standing,
    }


def first_pass(text: str) -> tuple[int, tuple[float, ...]]:
    """``PIXELS[:SHARE,SHARE,…]``."""
    size, _, shares = text.partition(":")
    return int(size), tuple(map(float, shares.split(","))) if shares else ()


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
