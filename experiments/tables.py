"""The tables of the paper's supplementary material, and ours, by one command each.

    python experiments/tables.py table1 --data DATA --backbone runs/backbone/model.safetensors
    python experiments/tables.py all    --data DATA --backbone runs/backbone/model.safetensors

DATA is a folder with the parquet files of Tiny-ImageNet (docs/results.md). Finished runs are not trained again, killed
ones are resumed. Each table is written to OUT as JSON and Markdown, and as a plot where a curve is better.
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from lab import Lab, Measured, Table, Trained, row, versus
from looks import centre_like, enrichment, maps, score_share, upside_down
from matplotlib.figure import Figure
from variants import CLUTTER, CLUTTER_BACKBONE, CLUTTER_OURS, GENTLE, MERGED, SHORT, SIGMOID

from iared2 import ReducedVisionTransformer
from iared2.data.batches import Batch
from iared2.data.cluttered import patch_truth
from iared2.data.images import open_samples
from iared2.data.regions import open_regions
from iared2.errors import InputError
from iared2.model.decide import Decide, keep_all

VARIANTS: dict[str, tuple[str, list[str]]] = {"paper": ("paper", []), "ours": ("ours", []), "merged": ("ours", MERGED)}
BUDGETS = (0.65, 0.5)
SIZE = "tiny_imagenet_cpu"
PHOTO = 64, 64  # the frame of Tiny-ImageNet's boxes


class Experiments:
    """One method per table; `lab` has the runs, `seeds` says how many of each."""

    def __init__(self, lab: Lab, seeds: int, out: Path) -> None:
        self.lab, self.seeds, self.out = lab, range(seeds), out
        out.mkdir(parents=True, exist_ok=True)  # pictures are written before the first table

    def write(self, name: str, title: str, columns: list[str], rows: list[list[str]], notes: list[str]) -> None:
        size = "" if self.lab.size == SIZE else f" --size {self.lab.size}"
        size += f" --photos {self.lab.photos}" if self.lab.photos else ""
        command = f"python experiments/tables.py {name}{size} --data DATA --backbone BACKBONE"
        Table(title, command, columns, rows, notes).write(self.out, name)

    # ---- variants ------------------------------------------------------------------------------------------------

    def learned(self, name: str, seed: int = 0) -> Trained:
        """One of ``VARIANTS``."""
        kind, settings = VARIANTS[name]
        return self.lab.run(name, kind, settings, seed)

    def baseline(self, of: Trained, name: str, seed: int, decisions: str) -> Trained:
        """A baseline that keeps as much as ``of``, the variant ``name``, on average, on images new to both."""
        kind, settings = VARIANTS[name]
        keep = of.recipe.policy.keep or self.measured_keep(of)
        chosen = [f"policy.keep={list(keep)}", f"policy.decisions={decisions}"]
        return self.lab.run(f"{name}-{decisions}", kind, [*settings, *chosen], seed)

    @staticmethod
    def measured_keep(of: Trained) -> list[float]:
        """At least a patch, so that a baseline can be asked for it."""
        return [max(k, 0.02) for k in of.measure(part="holdout").keep_ratio]

    def tuned_dense(self) -> Trained:
        """The backbone, trained for as long as all fine-tuning stages together, without dropping."""
        tune = self.lab.recipe("ours").finetune
        settings = [
            f"backbone.epochs={3 * tune.epochs}",
            *(f"backbone.{key}={getattr(tune, key)}" for key in ("lr", "weight_decay", "clip_grad", "label_smoothing")),
            f"backbone.batch_size={tune.batch_size}",
            f"backbone.augment.min_scale={tune.augment.min_scale}",
            f"backbone.augment.color_jitter={tune.augment.color_jitter}",
            "policy_gradient.epochs=0",
            "finetune.epochs=0",
        ]
        return self.lab.run("dense", "paper", settings)

    # ---- tables --------------------------------------------------------------------------------------------------

    def headline(self) -> None:
        """Top-1 lost against the better dense model, at budgets of its MACs."""
        before, tuned = self.lab.dense().measure(keep_all), self.tuned_dense().measure(keep_all)
        dense = max(before, tuned, key=lambda m: m.top1)
        rows = [row("dense, before Algorithm 1", before, "–"), row("dense, trained equally long", tuned, "–")]
        points: dict[str, list[tuple[float, float]]] = {}
        for name in VARIANTS:
            run = self.learned(name)
            settings: list[tuple[str, Decide]] = [
                (f"{name}, as trained", run.decide),
                (f"{name}, threshold 0", keep_all),
            ]
            settings += [(f"{name} at {100 * b:.0f} %", run.at(b)) for b in (0.8, *BUDGETS, 0.4)]
            for label, decide in settings:
                m = run.measure(decide)
                rows.append(row(label, m, versus([m], [dense])))
                points.setdefault(name, []).append((m.share, m.top1))
        gentle = self.lab.run("ours-gentle", "ours", [f"policy.keep={GENTLE}"]).measure()
        rows.append(row("ours, trained at 65 %", gentle, versus([gentle], [dense])))
        notes = ["The last column: points against the better dense model, 95 % of paired bootstraps."]
        notes += ["Thresholds of a budget: chosen on a holdout of the training images. Results: on validation images."]
        self.write(
            "headline", "Accuracy at a budget.", ["model", "top-1 %", "alive", "MACs", "against dense"], rows, notes
        )
        figure = Figure(figsize=(5.5, 4), layout="constrained")
        axes = figure.add_subplot(xlabel="MACs ÷ dense", ylabel="top-1 (%)")
        for name, found in points.items():
            axes.plot(*zip(*sorted(found), strict=True), "o-", label=name)
        axes.axhline(dense.top1, color="black", lw=1, ls=":", label="dense")
        axes.grid(alpha=0.3)
        axes.legend()
        figure.savefig(self.out / "headline.png", dpi=120)

    def table1(self) -> None:
        """Random dropping and other baselines against the learned policy, each fine-tuned with its own decisions."""
        rows, notes = [], []
        for name, baselines in (
            ("paper", ("random",)),
            ("ours", ("random", "attention", "centre", "spread")),
            ("merged", ("random", "attention")),
        ):
            learned = [self.learned(name, seed) for seed in self.seeds]
            measured = [run.measure() for run in learned]
            rows += [row(f"{name}, seed {seed}", m, "") for seed, m in zip(self.seeds, measured, strict=True)]
            for decisions in baselines:
                others = [
                    self.baseline(run, name, seed, decisions).measure()
                    for seed, run in zip(self.seeds, learned, strict=True)
                ]
                for seed, own, other in zip(self.seeds, measured, others, strict=True):
                    rows.append(row(f"{decisions}, seed {seed}", other, versus([own], [other])))
                notes.append(f"{name} − {decisions}, mean of {len(others)} seeds: {versus(measured, others)} points.")
        self.write(
            "table1",
            "Table 1: learned against random, attention, centre and spread; equal mean counts, same fine-tuning.",
            ["decisions", "top-1 %", "alive", "MACs", "learned − baseline"],
            rows,
            notes,
        )

    def gumbel(self) -> None:
        """Section 4: REINFORCE against straight-through Gumbel at equal MACs, and where each looks."""
        learned = self.learned("paper")
        keep = self.measured_keep(learned)
        gumbel = self.lab.run("gumbel", "paper", [f"policy.keep={keep}", "policy.decisions=gumbel"])
        inside = self.inside()
        rows = []
        maps(self.out / "gumbel.png", {"REINFORCE": learned, "Gumbel": gumbel})
        for name, run, decide in (
            ("REINFORCE", learned, None),
            ("Gumbel", gumbel, None),
            ("Gumbel, upside down", gumbel, upside_down(keep)),
        ):
            m = run.measure(decide)
            rows.append(row(name, m, *(f"{score_share(m.scores[g], inside):.2f}" for g in range(m.scores.shape[0]))))
        self.write(
            "gumbel",
            "Section 4: REINFORCE and straight-through Gumbel-softmax.",
            ["decisions", "top-1 %", "alive", "MACs", "score in the box, group 1", "group 2", "group 3"],
            rows,
            [
                "Score in the box: mean rank (0…1 within the image) of the patches alive inside the object's box ÷"
                " mean rank of all patches alive; 1 is chance.",
                "Upside down keeps as many of the lowest scores: the polarity that the supplement reports for Gumbel.",
            ],
        )

    def table2(self) -> None:
        """The threshold swept after training."""
        run = self.learned("paper")
        rows = []
        for t in (0.2, 0.4, 0.45, 0.48, 0.49, 0.5, 0.51, 0.52, 0.55, 0.6, 0.8):
            rows.append(row(f"{t:.2f}", run.measure(run.model.decision.at([t] * run.model.num_groups))))
        self.write(
            "table2",
            "Table 2: the threshold, swept after training (`paper`). Published, DeiT-B at 0.48 … 0.52: 81.7 81.5 80.9"
            " 77.5 63.7 % at 16.5 15.3 11.8 8.2 4.9 G.",
            ["threshold", "top-1 %", "alive", "MACs"],
            rows,
            [],
        )

    def table3(self) -> None:
        """Squared and linear reward, three penalties."""
        rows = []
        for squared in (True, False):
            for tau in (0.5, 1.0, 1.5):
                name = f"tau{tau:g}-{'squared' if squared else 'linear'}"
                settings = [f"reward.tau={tau}", f"reward.squared={str(squared).lower()}", *SHORT[self.lab.size]]
                run = self.lab.run(name, "paper", settings)
                rows.append(row(f"{'squared' if squared else 'linear'}, τ = {tau:g}", run.measure()))
        self.write(
            "table3",
            "Table 3: the reward (`paper`). Published, DeiT-S, τ = 0.5 1.0 1.5: squared 76.0 78.1 79.1 % at 2.5 2.9 3.4"
            " G, linear 12.0 70.9 78.2 % at 0.4 2.2 3.1 G.",
            ["reward", "top-1 %", "alive", "MACs"],
            rows,
            [],
        )

    def cost(self) -> None:
        """Section 2: what share of the training time each stage takes."""
        rows = []
        for name in ("paper", "ours"):
            run = self.learned(name)
            assert run.folder is not None
            seconds: dict[str, float] = {}
            for line in (run.folder / "metrics.jsonl").read_text().splitlines():
                step = json.loads(line)
                if step["kind"] == "step":
                    config = getattr(run.recipe, step["stage"].split()[0])
                    seconds[step["stage"]] = (
                        seconds.get(step["stage"], 0) + config.batch_size / step["images_per_second"]
                    )
            total = sum(seconds.values())
            rows += [[name, stage, f"{s:.0f} s", f"{100 * s / total:.0f} %"] for stage, s in seconds.items()]
        self.write("cost", "Section 2: the cost of training.", ["recipe", "stage", "time", "share"], rows, [])

    def boxes(self) -> None:
        """Do the kept patches lie on the object?"""
        inside = self.inside()
        degenerate = ~inside.any(1)
        rows = []
        for name in ("paper", "ours"):
            run = self.learned(name)
            m = run.measure()
            for group, kept in enumerate(m.kept):
                if kept.all():
                    continue
                centre = centre_like(torch.from_numpy(kept), run.model.grid_size)
                found = [enrichment(k[~degenerate], inside[~degenerate]) for k in (kept, centre.numpy())]
                rows.append([f"{name}, group {group + 1}", f"{100 * kept.mean():.0f} %", *(f"{f:.2f}" for f in found)])
        self.write(
            "boxes",
            "Share of the kept patches inside the object's box ÷ share of all patches inside it.",
            ["model", "alive", "learned", "static centre, equal counts"],
            rows,
            [f"{degenerate.sum()} photos without a usable box are left out; a patch counts by its share in the box."],
        )

    def ablation(self) -> None:
        """`ours` without each of its parts."""
        full = self.learned("ours").measure()
        columns, rows = ["recipe", "top-1 %", "alive", "MACs", "− ours"], [row("ours", full, "")]
        longer = "policy_gradient.epochs=0.8" if self.lab.size == "tiny_imagenet_cpu" else "policy_gradient.epochs=10"
        for name, settings in {
            "no policy stage": ["policy_gradient.epochs=0"],
            "the paper's interpreter": [*SIGMOID, longer],
            "hard reward for the true label": ["reward.soft_reward=false", "reward.label='true'"],
            "one sample, greedy baseline": ["policy.samples=1", "policy.rloo=false"],
            "no distillation": ["finetune.distill=0.0"],
            "dropped patches merged": MERGED[:1],
            "equal counts per photo": MERGED[1:],
            "three groups, none whole": ["model.groups=3", "policy.keep=[0.75, 0.45, 0.28]"],
        }.items():
            folder = "ours-" + name.replace(", ", "-").replace(" ", "-").replace("'", "")
            m = self.lab.run(folder, "ours", settings).measure()
            rows.append(row(name, m, versus([m], [full])))
            title = "`ours`, one part removed or added."
            self.write("ablation", title, columns, rows, [])  # of the rows that are there

    def cluttered(self) -> None:
        """The set where the answer is known, a backbone of its own, and what each decision keeps there."""
        common = CLUTTER[self.lab.size]
        dense_run = self.lab.run("cluttered-dense", "backbone", [*common, *CLUTTER_BACKBONE[self.lab.size]])
        lab = replace(self.lab, backbone=self.lab.runs / "cluttered-dense-0" / "model.safetensors")
        dense = dense_run.measure(keep_all)
        truth = np.concatenate(
            [self.truth(batch, dense_run.model) for batch in dense_run.batches("eval", dense_run.model)]
        )
        rows = [row("dense", dense, *["–"] * 6)]

        def add(name: str, m: Measured, *over: str) -> None:
            kept = m.kept[-1]
            precision, recall = (truth * kept).sum() / kept.sum(), (truth * kept).sum() / truth.sum()
            found = f"{100 * precision:.0f} %", f"{precision / truth.mean():.2f}", f"{100 * recall:.0f} %"
            rows.append(row(name, m, versus([m], [dense]), *found, *over, *[""] * (2 - len(over))))

        ours = [*common, *CLUTTER_OURS]
        for kind, settings, baselines in (("ours", ours, ("random", "attention")), ("paper", common, ("random",))):
            learned = lab.run(f"cluttered-{kind}", kind, settings)
            keep = list(learned.recipe.policy.keep) or self.measured_keep(learned)
            chosen = [f"policy.keep={keep}"]
            others = {
                decisions: lab.run(
                    f"cluttered-{kind}-{decisions}", kind, [*settings, *chosen, f"policy.decisions={decisions}"]
                ).measure()
                for decisions in baselines
            }
            own = learned.measure()
            add(kind, own, *(versus([own], [other]) for other in others.values()))
            if kind == "paper":
                add("paper at 40 %", learned.measure(learned.at(0.4)))
            for decisions, other in others.items():
                add(f"{decisions}, same count as {kind}", other)
        columns = [
            "model",
            "top-1 %",
            "alive",
            "MACs",
            "− dense",
            "precision",
            "÷ chance",
            "recall",
            "learned − random",
            "learned − attention",
        ]
        side, photos = dense_run.model.pretrained_cfg["input_size"][1], len(dense.correct) // dense.draws
        canvases = f"{dense.draws} canvases of {side} pixels"
        title = f"The cluttered set: {photos} photos, each on {canvases}, among pieces of others."
        notes = ["Precision: share of the area kept by the last group that is photo. Recall: share of the photo kept."]
        self.write("cluttered", title, columns, rows, notes)

    @staticmethod
    def truth(batch: Batch, model: ReducedVisionTransformer) -> np.ndarray:
        """``(B, N)`` share of each patch that the labelled photo covers."""
        assert batch.boxes is not None
        size = model.pretrained_cfg["input_size"][1:]
        return patch_truth(batch.boxes, size, model.grid_size).numpy()

    def inside(self) -> np.ndarray:
        """``(n, N)`` share of each patch that lies in the object's box; 0 where there is no box. Validation images."""
        config = self.lab.recipe("paper").data
        model = self.lab.dense().model
        regions = open_regions(config.path, region="bbox")
        masks = [regions.mask(row, PHOTO) for row in open_samples(config, "eval").rows[: self.lab.photos]]
        pooled = F.adaptive_avg_pool2d(torch.from_numpy(np.stack(masks)).float()[:, None], model.grid_size)
        return pooled.flatten(1).numpy()


def main() -> int:
    """The command."""
    tables: dict[str, Callable[[Experiments], None]] = {
        name: getattr(Experiments, name)
        for name in ("headline", "table1", "gumbel", "table2", "table3", "cost", "boxes", "ablation", "cluttered")
    }
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("table", nargs="+", choices=[*tables, "all"])
    parser.add_argument("--data", required=True, help="folder with Tiny-ImageNet's parquet files")
    parser.add_argument("--backbone", required=True, type=Path, help="model.safetensors of the backbone recipe")
    parser.add_argument("--size", default=SIZE, choices=list(SHORT))
    parser.add_argument("--seeds", type=int, default=4)
    parser.add_argument("--runs", type=Path, default=Path("runs/tables"))
    parser.add_argument("-o", "--out", type=Path, default=Path("runs/tables"))
    parser.add_argument("--photos", type=int, help="number of validation photos to measure on; default: all")
    parser.add_argument("--set", action="append", default=[], help="settings for every recipe")
    args = parser.parse_args()
    lab = Lab(args.data, args.backbone, args.runs, args.size, tuple(args.set), args.photos)
    experiments = Experiments(lab, args.seeds, args.out)
    try:
        for name in tables if "all" in args.table else args.table:
            tables[name](experiments)
    except InputError as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
