"""Makes the model in the box from a finished run, and measures what is shipped.

    python experiments/box.py RUN --data DATA -o src/iared2/box/model.safetensors --macs 0.65

RUN is the folder of a run of `iared2 train`, or a file of `model.save`; DATA is its data set. The thresholds are
calibrated on training photos for a share of the dense MACs, the weights are stored in 8 bits, and the file is loaded
again. Both models then see the validation photos. Prints a table and writes it to --json, for the model card.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Iterable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from lab import Table, interval, shares
from rich.console import Console
from rich.progress import track
from torch import Tensor

import iared2
from iared2.atomic import to_json, write
from iared2.data.batches import Batch, eval_batches, model_transform
from iared2.data.images import DataConfig, Samples, open_samples
from iared2.device import usable_device
from iared2.errors import InputError, printable
from iared2.keyed import permutation

FIGURES = Path(__file__).resolve().parents[1] / "docs" / "figures" / "box.json"
CALIBRATION_IMAGES = 512


def some(samples: Samples, count: int) -> Samples:
    """At most ``count`` of the samples, drawn evenly."""
    rows = permutation(0, 0, len(samples))[:count].numpy()
    return replace(samples, rows=samples.rows[rows], labels=samples.labels[rows])


def make(run: str, data: str, output: Path, macs: float, images: int, device: torch.device) -> Any:
    """Calibrate the model of a run, save it in 8 bits, and return it in full precision."""
    model = iared2.load(run).to(device)
    share = model.pretrained_cfg.get("holdout") or 0.0
    samples = open_samples(DataConfig(path=data, classes=model.class_names or (), holdout=share), "train")
    if len(samples.class_names) != model.num_classes:
        raise InputError(f"{data} has {len(samples.class_names)} classes, the model {model.num_classes}")
    model.class_names = samples.class_names
    model.backbone.pretrained_cfg = {**model.pretrained_cfg, "tag": "", "license": "apache-2.0"}  # not timm's
    sample = some(samples, images)
    (batch,) = eval_batches(sample, model_transform(model.pretrained_cfg), batch_size=len(sample))
    model.calibrate(batch.images.to(device), gmacs=macs * model.dense_macs / 1e9)
    model.save(output, int8=True)
    return model


class Answers:
    """What one model says of the photos, dense and reduced."""

    def __init__(self, model: iared2.ReducedVisionTransformer) -> None:
        self.model = model
        self.found: list[list[Tensor]] = []

    def add(self, images: Tensor) -> None:
        """The answers for one more batch."""
        out = self.model.trace(images)
        parts = self.model.backbone(images).argmax(1), out.logits.argmax(1), out.kept.float().mean(-1).T, out.macs
        self.found.append([part.cpu() for part in parts])

    def all(self) -> list[np.ndarray]:
        """Dense and reduced answers ``(n,)``, shares kept ``(n, D)``, MACs ``(n,)``."""
        return [torch.cat(parts).numpy() for parts in zip(*self.found, strict=True)]


@torch.inference_mode()
def measure(models: Iterable[Any], batches: Iterable[Batch], bf16: bool) -> tuple[np.ndarray, list[list[np.ndarray]]]:
    """The labels ``(n,)``, and the answers of each model."""
    answers, labels = [Answers(model) for model in models], []
    for batch in batches:
        device = next(answers[0].model.parameters()).device
        labels.append(batch.labels.numpy())
        with torch.autocast(device.type, torch.bfloat16, enabled=bf16):
            for one in answers:
                one.add(batch.images.to(device))
    return np.concatenate(labels), [one.all() for one in answers]


def describe(
    labels: np.ndarray,
    full: list[np.ndarray],
    shipped: list[np.ndarray],
    model: Any,
    size: int,
    command: str,
    bf16: bool,
) -> Table:
    """The table of the model card."""
    right = [[part == labels for part in one[:2]] for one in (full, shipped)]
    dense_macs, alive = model.dense_macs, shares([1.0] * model.num_groups)
    rows = []
    for name, dense, reduced, (_, _, kept, macs) in zip(
        ("full precision", "as shipped, 8 bits"), *zip(*right, strict=True), (full, shipped), strict=True
    ):
        rows.append([f"dense backbone, {name}", f"{100 * dense.mean():.2f}", alive, f"{dense_macs / 1e9:.3f}", "100 %"])
        cost = [f"{macs.mean() / 1e9:.3f}", f"{100 * macs.mean() / dense_macs:.1f} %"]
        rows.append([f"reduced, {name}", f"{100 * reduced.mean():.2f}", shares(kept.mean(0).tolist()), *cost])

    def against(a: np.ndarray, b: np.ndarray) -> str:
        difference = a.astype(float) - b
        return "{:+.2f} points ({:+.2f} … {:+.2f})".format(100 * difference.mean(), *interval(difference))

    (full_dense, full_reduced), (dense, reduced) = right
    same = [100 * (a == b).mean() for a, b in zip(full[:2], shipped[:2], strict=True)]
    notes = [
        f"As shipped, reduced against dense: {against(reduced, dense)}, with the 95 % interval over photos.",
        f"8 bits against full precision: dense {against(dense, full_dense)}, {same[0]:.1f} % of the answers are equal;"
        f" reduced {against(reduced, full_reduced)}, {same[1]:.1f} % are equal.",
        f"The file has {size / 1e6:.1f} MB. Its {model.decision!r}.",
    ]
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
        device = usable_device(arguments.device)
        full = make(
            arguments.run, arguments.data, arguments.output, arguments.macs, arguments.calibration_images, device
        )
        shipped = iared2.load(arguments.output).to(device)
        samples = open_samples(DataConfig(path=arguments.data, classes=shipped.class_names or ()), "eval")
        samples = some(samples, arguments.limit or len(samples))
        batches = eval_batches(samples, model_transform(shipped.pretrained_cfg), batch_size=arguments.batch_size)
        steps, console = -(-len(samples) // arguments.batch_size), Console(stderr=True)
        progress = track(batches, "measuring", steps, console=console, disable=not console.is_terminal)
        labels, (before, after) = measure([full, shipped], progress, arguments.bf16)
    except InputError as error:
        print(printable(f"error: {error}"), file=sys.stderr)
        return 1
    command = f"python experiments/box.py RUN --data DATA -o src/iared2/box/model.safetensors --macs {arguments.macs:g}"
    command += f" --limit {arguments.limit}" * bool(arguments.limit) + " --bf16" * arguments.bf16
    size = arguments.output.stat().st_size
    table = describe(labels, before, after, shipped, size, command, arguments.bf16)
    write(arguments.json, to_json({"experiment": arguments.json.stem, **table.__dict__}) + "\n", parents=True)
    print(table.markdown())
    return 0


if __name__ == "__main__":
    sys.exit(main())
