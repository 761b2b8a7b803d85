"""What a model lost and gained, as a value: a table to print, and JSON."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from functools import partial
from typing import Any

import torch
from rich.table import Table
from torch import Tensor

from ..errors import printable
from ..evaluate.agreement import NEIGHBOURS, Agreement, agreement
from ..evaluate.speed.inference import take_turns, undropped
from ..model.calibrate import BATCH_SIZE
from ..model.decide import Decision
from ..model.reduced import ReducedVisionTransformer
from ..model.schedule import Schedule
from .decision import Choice, Half, Target

SECONDS = 2.0
"""Of timing, and at least `speed.inference.MIN_ROUNDS`."""
SPEED_BATCH = {"cpu": 8}
"""Photos of a timed batch, by the kind of device; 64 elsewhere."""


@dataclass(frozen=True)
class Report:
    """The result of `iared2.accelerate`.

    Attributes:
        model: timm's name of the backbone.
        classes: whether predictions are compared; false: embeddings.
        max_drop, macs_target: what was asked for; one of them is None.
        choice: how patches are chosen, and what becomes of dropped ones.
        found: agreement on the photos on which the decision was found; None if no decision was.
        reported: agreement on the other photos.
        macs: mean MACs of an image on these, as a share of the dense model's.
        dense_gmacs: 10⁹ MACs per image of the dense model.
        keep_ratio: share of the patches alive after each group.
        second_pass: share of the photos that are computed again with every patch (`Decision.confidence`).
        device, batch_size: of the timing.
        images_per_second: of timm's model, of our engine without dropping, and with it, taking turns; the fastest round
            of each, which other load on the machine affects least.
        decision: what was found, also if it does not pay.
        pays: dropping makes the model faster, and keeps what was asked for. If not, the model drops nothing.
        notes: what else has to be said.
    """

    model: str
    classes: bool
    max_drop: float | None
    macs_target: float | None
    choice: str
    found: Agreement | None
    reported: Agreement | None
    macs: float
    dense_gmacs: float
    keep_ratio: Sequence[float]
    second_pass: float
    device: str
    batch_size: int
    images_per_second: tuple[float, float, float] | None
    decision: Decision | None
    pays: bool
    notes: tuple[str, ...]

    @property
    def speed_up(self) -> float | None:
        """Against timm's model."""
        return self.images_per_second and self.images_per_second[2] / self.images_per_second[0]

    @property
    def speed_up_of_dropping(self) -> float | None:
        """Against our engine without dropping."""
        return self.images_per_second and self.images_per_second[2] / self.images_per_second[1]

    def to_dict(self) -> dict[str, Any]:
        """The result as JSON types."""
        halves = {name: half and half.to_dict() for name, half in (("found", self.found), ("reported", self.reported))}
        speeds = {"speed_up": self.speed_up, "speed_up_of_dropping": self.speed_up_of_dropping}
        return {**asdict(self), **halves, **speeds}

    def table(self) -> Table:
        """The table to print, notes below it."""
        table = Table("", "dense", "reduced", caption="\n".join(map(printable, self.notes)), caption_justify="left")
        table.title = self.model
        if self.found is None or self.reported is None:
            return table
        table.title += f", {self.found.photos} photos to find the decision, {self.reported.photos} others to report"
        for half, where in ((self.found, "finding"), (self.reported, "reporting")):
            low, high = half.interval
            what = "answers" if self.classes else "nearest neighbours"
            kept = f"{100 * half.kept:.1f} % (95 %: {100 * low:.1f} … {100 * high:.1f})"
            table.add_row(f"{what} kept, {where}", "100 %", kept)
        if self.reported.cosine is not None and self.reported.neighbours is not None:
            cosines = f"{self.reported.cosine:.4f}, {self.reported.cosine_p1:.4f}"
            table.add_row("cosine, mean and 1st percentile", "1", cosines)
            table.add_row(f"{NEIGHBOURS} nearest neighbours kept", "100 %", f"{100 * self.reported.neighbours:.1f} %")
        cost = f"{self.macs * self.dense_gmacs:.3g} ({100 * self.macs:.0f} %)"
        table.add_row("GMACs per photo", f"{self.dense_gmacs:.3g}", cost)
        if self.images_per_second:
            dense, _, reduced = self.images_per_second
            speed = f"{reduced:.1f} ({self.speed_up:.2f}× timm, {self.speed_up_of_dropping:.2f}× ours with every patch)"
            table.add_row(f"photos/s, {self.device}, batches of {self.batch_size}", f"{dense:.1f}", speed)
        table.add_row("patches after each group", "", " ".join(f"{100 * ratio:.0f} %" for ratio in self.keep_ratio))
        if self.decision and self.decision.scale < 1:
            table.add_row("photo in the first pass", "", f"{100 * self.decision.scale:.3g} % of its width and height")
        if self.decision and self.decision.confidence:
            table.add_row("second pass with every patch", "", f"{100 * self.second_pass:.0f} % of the photos")
        table.add_row("choice", "", self.choice)
        return table


def reported(
    choice: Choice,
    half: Half,
    found: Schedule | None,
    pixels: Tensor,
    dense: Tensor,
    target: Target,
    notes: list[str],
) -> Report:
    """Set the decision that was found on one half of the photos, and measure it on the other one.

    Args:
        choice: its model gets the decision.
        half: the photos on which it was found.
        found: the decision; None: there is none.
        pixels: ``(n, in_chans, height, width)``, the other photos.
        dense: ``(n, K)``, what the dense model says of them.
        target: what was asked for.
        notes: what else has to be said.
    """
    model = choice.model
    device, weight = half.images.device, next(model.parameters())
    size = min(len(pixels), SPEED_BATCH.get(device.type, 64))
    about: dict[str, Any] = {
        "model": str(model.pretrained_cfg.get("architecture") or type(model.backbone).__name__),
        "classes": half.classes,
        "max_drop": target.max_drop,
        "macs_target": target.macs,
        "choice": choice.name,
        "dense_gmacs": model.dense_macs / 1e9,
        "device": str(device),
        "batch_size": size,
    }
    if found is None:
        notes.append(
            f"no decision with fewer MACs changes so few {half.kind} that the bound on {len(half.images)} photos is"
            f" below max_drop={target.max_drop:g}. Give a larger max_drop, or more photos, whose bound is closer"
        )
        about |= {"found": None, "reported": None, "images_per_second": None, "macs": 1.0, "pays": False}
        about["decision"] = None
        return Report(**about, keep_ratio=(1.0,) * model.num_groups, second_pass=0.0, notes=tuple(notes))
    model.decision = found.decision
    costs, ratios, second = [], [], []

    def run(chunk: Tensor) -> Tensor:
        output = model.trace(chunk)
        costs.append(output.macs)
        ratios.append(output.keep_ratio)
        second.append(output.unsure)
        return output.logits

    reduced = outputs(pixels, weight, run)
    unsure = torch.cat(second)
    again = unsure.double().mean().item()
    # as many second passes as on average
    chosen = torch.cat([unsure.nonzero()[: round(again * size), 0], (~unsure).nonzero()[:, 0]])[:size]
    speeds = _speeds(model, pixels[chosen.to(pixels.device)].to(weight))
    macs = torch.cat(costs).double().mean().item() / model.dense_macs
    pays = speeds[2] > max(speeds[:2]) and macs < 1
    if not pays:
        notes.append(
            f"dropping does not pay here: {macs:.0%} of the MACs, {speeds[2] / max(speeds[:2]):.2f} times as fast as"
            " without dropping. Nothing is dropped (model.decision = model.report.decision would). Models with more"
            " patches, or larger batches, gain more"
        )
    return Report(
        **about,
        found=half.agreement(found),
        reported=agreement(dense, reduced, half.classes),
        macs=macs,
        keep_ratio=tuple(torch.cat(ratios, 1).mean(1).tolist()),
        second_pass=again,
        images_per_second=speeds,
        decision=found.decision,
        pays=pays,
        notes=tuple(notes),
    )


@torch.inference_mode()
def _speeds(model: ReducedVisionTransformer, batch: Tensor) -> tuple[float, float, float]:
    """Photos per second of timm's model, of ours without dropping, and of ours."""
    ways = {
        "timm": partial(model.backbone, batch),
        "whole": partial(undropped, model, batch),
        "ours": partial(model, batch),
    }
    timm, whole, ours = (len(batch) / min(seconds) for seconds in take_turns(ways, batch.device, SECONDS).values())
    return timm, whole, ours


@torch.inference_mode()
def outputs(pixels: Tensor, like: Tensor, run: Callable[[Tensor], Tensor]) -> Tensor:
    """What ``run`` says of photos, batch by batch, in the precision and on the device of a weight ``like`` theirs."""
    return torch.cat([run(chunk.to(like)) for chunk in pixels.split(BATCH_SIZE)])
