"""Makes the model in the box from a finished run, and measures what is shipped.

    python experiments/box.py RUN --data DATA -o src/iared2/box/model.safetensors --macs 0.65 \\
        --first-pass 1 1 1 0.5 0.35 0.25 --scale 0.625

RUN is the folder of a run of `iared2 train`, or a file of `model.save`; DATA is its data set. The thresholds are
calibrated on training photos: for a share of the dense MACs, or with --first-pass for the shares that the first pass
keeps, of photos made smaller by --scale. Then second passes use the rest of the budget (model/second_pass.py): the
confidence for it is set on the validation photos, without their labels, since a model is surer of photos that it was
trained on. The weights are stored in 8 bits, and loaded again. The full weights, unless they have 8 bits already, and
the shipped ones then see the validation photos. Writes the file, and a table to --json for the model card.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import numpy as np
import torch
from lab import Table, interval, second_passes, shares
from rich.console import Console
from rich.progress import track
from torch import Tensor

import iared2
from iared2 import ReducedVisionTransformer
from iared2.atomic import to_json, write
from iared2.data.batches import Batch, eval_batches, model_transform
from iared2.data.images import DataConfig, Samples, open_samples
from iared2.device import usable_device
from iared2.errors import InputError, printable
from iared2.keyed import permutation
from iared2.model.decide import confidence_for
from iared2.model.second_pass import again_macs

FIGURES = Path(__file__).resolve().parents[1] / "docs" / "figures" / "box.json"
CALIBRATION_IMAGES = 512


def some(samples: Samples, count: int) -> Samples:
    """At most ``count`` of the samples, drawn evenly."""
    rows = permutation(0, 0, len(samples))[:count].numpy()
    return replace(samples, rows=samples.rows[rows], labels=samples.labels[rows])


def make(
    run: str,
    data: str,
    macs: float,
    first_pass: Sequence[float] | None,
    scale: float,
    images: int,
    device: torch.device,
) -> ReducedVisionTransformer:
    """The model of a run, calibrated for one pass."""
    model = iared2.load(run).to(device)
    share = model.pretrained_cfg.get("holdout") or 0.0
    samples = open_samples(DataConfig(path=data, classes=model.class_names or (), holdout=share), "train")
    if len(samples.class_names) != model.num_classes:
        raise InputError(f"{data} has {len(samples.class_names)} classes, the model {model.num_classes}")
    model.class_names = samples.class_names
    model.backbone.pretrained_cfg = {**model.pretrained_cfg, "tag": "", "license": "apache-2.0"}  # not timm's
    model.decision = model.decision.but(confidence=0.0, scale=scale)
    sample = some(samples, images)
    (batch,) = eval_batches(sample, model_transform(model.pretrained_cfg), batch_size=len(sample))
    budget = {"keep": first_pass} if first_pass else {"gmacs": macs * model.dense_macs / 1e9}
    model.calibrate(batch.images.to(device), **budget)
    return model


@dataclass(frozen=True)
class Answers:
    """What a model says of n photos: dense, in the first pass, and in both.

    Attributes:
        dense, first, reduced: ``(n, K)`` logits.
        kept: ``(n, D)`` shares of the patches alive, in the first pass.
        first_macs, macs: ``(n,)`` of the first pass, and of both.
    """

    dense: Tensor
    first: Tensor
    reduced: Tensor
    kept: Tensor
    first_macs: Tensor
    macs: Tensor

    @property
    def unsure(self) -> Tensor:
        """``(n,)`` bool, the photos that take a second pass."""
        return self.macs > self.first_macs


@torch.inference_mode()
def measure(models: Sequence[ReducedVisionTransformer], batches: Iterable[Batch], bf16: bool) -> tuple[Any, Any]:
    """The labels ``(n,)``, and the answers of each model, which makes one pass."""
    found: list[list[Any]] = [[] for _ in models]
    labels = []
    for batch in batches:
        labels.append(batch.labels)
        for model, rows in zip(models, found, strict=True):
            images = batch.images.to(next(model.parameters()).device)
            with torch.autocast(images.device.type, torch.bfloat16, enabled=bf16):
                out, dense = model.trace(images), model.backbone(images)
            kept = out.kept.float().mean(-1).T
            rows.append([part.cpu() for part in (dense, out.logits, kept, out.macs)])
    answers = []
    for rows in found:
        dense, first, kept, macs = map(torch.cat, zip(*rows, strict=True))
        answers.append(Answers(dense, first, first, kept, macs, macs))
    return torch.cat(labels), answers


def with_second_pass(model: ReducedVisionTransformer, once: Answers) -> Answers:
    """The answers by the model's confidence. Nothing is run: the second pass is the dense model."""
    unsure = model.decision.unsure(once.first)
    each = again_macs(model, model.decision, model.grid_size)
    reduced = torch.where(unsure[:, None], once.dense, once.first)
    return replace(once, reduced=reduced, macs=once.first_macs + each * unsure)


def describe(
    labels: Tensor, answers: dict[str, Answers], model: ReducedVisionTransformer, size: int, command: str, bf16: bool
) -> Table:
    """The table of the model card. ``answers`` are of the full precision, if there is one, and as shipped."""
    dense_macs, rows, notes = model.dense_macs, [], []

    def add(name: str, logits: Tensor, kept: list[float], macs: float) -> np.ndarray:
        right = (logits.argmax(1) == labels).numpy().astype(float)
        cost = [f"{macs / 1e9:.3f}", f"{100 * macs / dense_macs:.1f} %"]
        rows.append([name, f"{100 * right.mean():.2f}", shares(kept), *cost])
        return right

    right = {}
    for name, one in answers.items():
        kept = one.kept.double().mean(0).tolist()
        right["dense", name] = add(f"dense backbone, {name}", one.dense, [1.0] * model.num_groups, dense_macs)
        if model.confidence:
            add(f"first pass alone, {name}", one.first, kept, one.first_macs.double().mean().item())
        right["reduced", name] = add(f"reduced, {name}", one.reduced, kept, one.macs.double().mean().item())

    def against(difference: np.ndarray) -> str:
        return "{:+.2f} points ({:+.2f} … {:+.2f})".format(100 * difference.mean(), *interval(difference))

    *full, shipped = answers
    lost = against(right["reduced", shipped] - right["dense", shipped])
    same = (answers[shipped].reduced.argmax(1) == answers[shipped].dense.argmax(1)).double().mean().item()
    notes.append(
        f"As shipped, reduced against dense: {lost}, with the 95 % interval over photos; {100 * same:.1f} % of the"
        " answers are equal."
    )
    if model.confidence:
        again = answers[shipped].unsure.double().mean().item()
        notes.append(f"{100 * again:.1f} % of the photos take a second pass with every patch.")
    for name in full:
        parts = []
        for kind in ("dense", "reduced"):
            said = [getattr(answers[one], kind).argmax(1) for one in (name, shipped)]
            difference = against(right[kind, shipped] - right[kind, name])
            equal = 100 * (said[0] == said[1]).double().mean().item()
            parts.append(f"{kind} {difference}, {equal:.1f} % of the answers are equal")
        notes.append(f"8 bits against full precision: {'; '.join(parts)}.")
    notes.append(f"The file has {size / 1e6:.1f} MB. Its {model.decision!r}.")
    title = f"The model in the box, its shipped weights, on {len(labels):,} validation photos"
    title += f" ({'bf16 autocast' if bf16 else 'float32'})."
    return Table(
        title, command, ["model", "top-1 %", "patches alive after each group", "GMACs", "of dense"], rows, notes
    )


def main() -> int:
    """Run the command; returns the exit status."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("run", help="folder of a finished run, or a file of model.save()")
    parser.add_argument("--data", required=True, help="the data set of the run, with a validation split")
    parser.add_argument("-o", "--output", type=Path, required=True, help="the file to write")
    parser.add_argument("--macs", type=float, default=0.65, help="share of the dense MACs (default: %(default)s)")
    parser.add_argument(
        "--first-pass", type=float, nargs="+", metavar="SHARE", help="of the patches that each group keeps in it"
    )
    parser.add_argument("--scale", type=float, default=1.0, help="of the first pass, see Decision (default: 1)")
    parser.add_argument("--calibration-images", type=int, default=CALIBRATION_IMAGES, help="(default: %(default)s)")
    parser.add_argument("--limit", type=int, help="validation photos at most, drawn evenly (default: all)")
    parser.add_argument("--batch-size", type=int, default=64)
    parser.add_argument("--bf16", action="store_true", help="measure under bf16 autocast")
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--json", type=Path, default=FIGURES, help="file of the table (default: docs/figures/box.json)")
    arguments = parser.parse_args()
    try:
        if not 0 < arguments.macs <= 1 or min(arguments.calibration_images, arguments.batch_size) < 1:
            raise InputError("--macs: give a share of the dense MACs in (0, 1]; counts are 1 or more")
        table = run(arguments, usable_device(arguments.device))
    except InputError as error:
        print(printable(f"error: {error}"), file=sys.stderr)
        return 1
    write(arguments.json, to_json({"experiment": arguments.json.stem, **table.__dict__}) + "\n", parents=True)
    print(table.markdown())
    return 0


def run(arguments: argparse.Namespace, device: torch.device) -> Table:
    """Make the file and measure it."""
    output, keep = arguments.output, arguments.first_pass
    images = arguments.calibration_images
    full = make(arguments.run, arguments.data, arguments.macs, keep, arguments.scale, images, device)
    if keep and len(keep) != full.num_groups:
        raise InputError(f"--first-pass: give {full.num_groups} shares, one per group")
    with TemporaryDirectory() as folder:
        full.save(Path(folder, output.name), int8=True)
        shipped = iared2.load(Path(folder, output.name)).to(device)
    models = {"full precision": full, "as shipped, 8 bits": shipped}
    if all(map(torch.equal, full.state_dict().values(), shipped.state_dict().values())):
        del models["full precision"]
    samples = open_samples(DataConfig(path=arguments.data, classes=shipped.class_names or ()), "eval")
    samples = some(samples, arguments.limit or len(samples))
    batches = eval_batches(samples, model_transform(shipped.pretrained_cfg), batch_size=arguments.batch_size)
    steps, console = -(-len(samples) // arguments.batch_size), Console(stderr=True)
    progress = track(batches, "measuring", steps, console=console, disable=not console.is_terminal)
    labels, found = measure(list(models.values()), progress, arguments.bf16)
    answers = dict(zip(models, found, strict=True))
    if keep:
        once = found[-1]
        again = again_macs(shipped, shipped.decision, shipped.grid_size)
        rows = second_passes(once.first, once.first_macs, arguments.macs * shipped.dense_macs, again)
        if not len(rows):
            raise InputError(f"the first pass takes all of {arguments.macs:.1%} of the MACs: give smaller shares")
        full.confidence = shipped.confidence = confidence_for(once.first, len(rows))
        answers = {name: with_second_pass(shipped, one) for name, one in answers.items()}
    full.save(output, int8=True)
    command = f"python experiments/box.py RUN --data DATA -o src/iared2/box/model.safetensors --macs {arguments.macs:g}"
    command += f" --first-pass {' '.join(f'{share:g}' for share in keep)}" if keep else ""
    command += f" --scale {arguments.scale:g}" * (arguments.scale < 1)
    command += f" --limit {arguments.limit}" * bool(arguments.limit) + " --bf16" * arguments.bf16
    return describe(labels, answers, shipped, output.stat().st_size, command, arguments.bf16)


if __name__ == "__main__":
    sys.exit(main())
