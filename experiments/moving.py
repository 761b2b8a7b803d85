"""The learning test of clips: does the policy keep a moving object, and nothing else?

    python experiments/moving.py --data DATA -o runs/moving

DATA is a folder with the parquet files of Tiny-ImageNet (docs/results.md). The clips are those of moving_clips.py: a
small object over a still photo, whose class needs every frame. A small JointST TimeSformer learns them without dropping
anything, then by Algorithm 1: with our settings, as published, and with the same number of random patches. Finished
runs are not trained again, killed ones are resumed. OUT gets ``moving.json``, ``moving.md`` and ``moving.png``, and one
folder per run.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
import torch
from lab import Measured, Part, Table, Trained, row
from moving_clips import MovingClips
from PIL import Image
from torchvision.transforms.functional import pil_to_tensor, to_pil_image

from iared2 import InputError, ReducedVisionTransformer, keyed
from iared2.data.batches import Batch
from iared2.data.device_dataset import ResidentImages
from iared2.data.images import DataConfig, open_samples
from iared2.explain.figures import blank, fit, table
from iared2.model.decide import Decide, keep_all
from iared2.train.augment import AugmentConfig
from iared2.train.curriculum import RunData, train
from iared2.train.policy_gradient import PolicyConfig
from iared2.train.recipe import ModelConfig, Recipe, StageConfig
from iared2.train.reward import RewardConfig

FRAMES, SIZE, PATCH = 8, 32, 8
PHOTO = 40
"""Side to which photos are read: a frame is a crop of it."""
PHOTOS: dict[Part, int] = {"train": 20_000, "holdout": 1_000, "eval": 2_000}
"""So many photos of each part; a photo is a clip in every epoch."""
QUARTER = 0.25
"""A patch is the object's if it covers so much of it."""
BUDGET = 0.39
"""Share of the dense MACs: thresholds chosen for it on clips that were not trained on."""
PANEL = 96
"""Pixels along a frame's side in the picture."""
EXAMPLES = Path(__file__).resolve().parents[1] / "examples"

NOTHING = StageConfig(epochs=0)
COLOURS = AugmentConfig(min_scale=1.0, hflip=0.0, color_jitter=0.2)
PLAIN = AugmentConfig(min_scale=1.0, hflip=0.0, color_jitter=0.0)
MODEL = ModelConfig(
    backbone="timesformer_joint_base_patch16_224",
    groups=3,
    timm={
        "img_size": [FRAMES, SIZE, SIZE],
        "patch_size": [1, PATCH, PATCH],
        "embed_dim": 96,
        "depth": 6,
        "num_heads": 3,
    },
)
DENSE = Recipe(
    precision="bf16",
    eval_epochs=4,
    model=MODEL,
    backbone=StageConfig(
        epochs=16,
        batch_size=128,
        optimizer="muon",
        lr=2e-3,
        weight_decay=0.05,
        warmup_epochs=1,
        clip_grad=1.0,
        augment=COLOURS,
    ),
    policy_gradient=NOTHING,
    finetune=NOTHING,
)
PAPER = replace(
    DENSE,
    backbone=NOTHING,
    policy_gradient=StageConfig(epochs=1.5, batch_size=64, lr=2e-3, augment=PLAIN),
    finetune=StageConfig(epochs=2, batch_size=128, lr=3e-4, weight_decay=0.05, clip_grad=1.0, augment=COLOURS),
)
OURS = replace(
    PAPER,
    # six groups of one block: the first looks at everything, and only the second and the fourth learn to drop
    model=replace(MODEL, groups=6),
    reward=RewardConfig(label="dense", soft_reward=True),
    policy=PolicyConfig(
        keep=(1.0, 0.3, 0.3, 0.22, 0.22, 0.22), samples=4, rloo=True, temperature=0.2
    ),  # the object touches 23 % of the patches, and nine tenths of it lie on 15 %
    finetune=replace(PAPER.finetune, distill=0.5),
)


@dataclass(frozen=True)
class MovingRun(Trained):
    """A run on moving clips."""

    clips: dict[Part, MovingClips]

    @property
    def num_classes(self) -> int:
        return self.clips["train"].num_classes

    def train(self) -> None:
        """Unless it is finished."""
        assert self.folder is not None
        if (self.folder / "done").exists():
            return
        clips, held_out = self.clips["train"], self.clips["eval"]
        names = tuple(f"number {i + 1}" for i in range(self.num_classes))
        train(self.recipe, self.folder, RunData(names, len(clips), True, lambda _: (clips, held_out)))
        (self.folder / "done").touch()

    def batches(self, part: Part, model: ReducedVisionTransformer, batch_size: int = 250) -> Iterator[Batch]:
        """Batches of a part, normalised for the model."""
        cfg = model.pretrained_cfg
        return self.clips[part].eval_batches(cfg["mean"], cfg["std"], batch_size=batch_size)


def open_clips(data: str) -> dict[Part, MovingClips]:
    """The clips of each part, of a random choice of its photos that is always the same."""
    config = DataConfig(path=data, holdout=0.05)
    clips: dict[Part, MovingClips] = {}
    for part, number in PHOTOS.items():
        samples = open_samples(config, part)
        chosen = keyed.permutation(0, 0, len(samples))[:number].numpy()
        samples = replace(samples, rows=samples.rows[chosen], labels=samples.labels[chosen])
        photos = ResidentImages.read(samples, (PHOTO, PHOTO), workers=config.workers)
        clips[part] = MovingClips(photos, FRAMES, SIZE)
    return clips


def shorter(recipe: Recipe, factor: float) -> Recipe:
    """The recipe with ``factor`` times the epochs."""
    stages = {name: getattr(recipe, name) for name in ("backbone", "policy_gradient", "finetune")}
    return replace(recipe, **{name: replace(stage, epochs=factor * stage.epochs) for name, stage in stages.items()})


def truth_of(run: MovingRun) -> np.ndarray:
    """``(n, N)`` share of each patch of the clips to evaluate on that the object covers."""
    found = []
    for batch in run.batches("eval", run.model):
        assert batch.boxes is not None
        found.append(run.clips["eval"].truth(batch.boxes, run.model.grid_size))
    return torch.cat(found).numpy()


def found_in(kept: np.ndarray, truth: np.ndarray) -> tuple[float, float, float]:
    """What the last group keeps: of the object's area, of its patches, and of the patches that it does not touch.

    Args:
        kept: ``(n, N)`` bool.
        truth: ``(n, N)`` share of each patch that the object covers.
    """
    area = (truth * kept).sum() / truth.sum()
    return float(area), float(kept[truth >= QUARTER].mean()), float(kept[truth == 0].mean())


def example_clips() -> MovingClips:
    """Over the example photos, which are nobody's and may be shown."""
    photos = [Image.open(path).convert("RGB").resize((PHOTO, PHOTO)) for path in sorted(EXAMPLES.glob("*.jpg"))]
    images = torch.stack([pil_to_tensor(photo) for photo in photos])
    rows = torch.arange(len(images))
    return MovingClips(ResidentImages(images, torch.zeros_like(rows), rows, []), FRAMES, SIZE)


def picture(run: MovingRun) -> Image.Image:
    """Clips over photos, a row of frames and a row for each group that drops something, dropped patches blank."""
    model, keep, clips = run.model, run.recipe.policy.keep, example_clips()
    cfg = model.pretrained_cfg
    batch = next(clips.eval_batches(cfg["mean"], cfg["std"], batch_size=len(clips)))
    with torch.inference_mode():
        kept = model.trace(batch.images, run.decide).kept.unflatten(2, model.grid_size)  # (D, B, T, rows, columns)
    groups = [g for g, share in enumerate(keep) if share < (1.0, *keep)[g]]
    shown = next(clips.eval_batches((0.0,) * 3, (1.0,) * 3, batch_size=len(clips))).images  # in [0, 1]
    rows = []
    for clip, dropped in zip(shown, kept[groups].transpose(0, 1).numpy(), strict=True):
        frames = [fit(to_pil_image(frame), PANEL, PANEL) for frame in clip.unbind(1)]
        rows.append([(frame, "") for frame in frames])
        rows += [[(blank(frame, k), "") for frame, k in zip(frames, group, strict=True)] for group in dropped]
    return table(rows)


def by_frame(kept: np.ndarray, truth: np.ndarray) -> str:
    """Of the object's area in each frame, how much is kept; and in how many frames at least half of it."""
    both = [a.reshape(len(a), FRAMES, -1) for a in (truth * kept, truth)]
    share = both[0].sum(2) / both[1].sum(2)  # (n, T)
    frames = " · ".join(f"{100 * s:.0f} %" for s in share.mean(0))
    half = f"at least half of it is kept in {100 * (share >= 0.5).mean():.0f} % of the frames"
    return f"share of the object kept in each frame {frames}; {half}"


def main() -> int:
    """The command."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", required=True, help="folder with Tiny-ImageNet's parquet files")
    parser.add_argument("-o", "--out", type=Path, default=Path("runs/moving"))
    parser.add_argument("--epochs", type=float, default=1.0, help="so many times the epochs of each stage")
    args = parser.parse_args()
    try:
        experiment(args.data, args.out, args.epochs)
    except InputError as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    return 0


def experiment(data: str, out: Path, epochs: float) -> None:
    """All runs, the table and the picture."""
    clips = open_clips(data)

    def run(name: str, recipe: Recipe) -> MovingRun:
        print(f"== {out / name}", flush=True)
        found = MovingRun(out / name, shorter(recipe, epochs), clips)
        found.train()
        return found

    dense = run("dense", DENSE)
    truth = truth_of(dense)
    rows = [row("dense", dense.measure(keep_all), "–", "–", "–")]
    notes = [
        "Object: share of its area that the last group keeps. Its patches: those that it covers by a quarter or more."
        " Rest: patches that it does not touch.",
        f"The object covers {100 * truth.mean():.1f} % of the pixels and touches {100 * (truth > 0).mean():.0f} % of"
        " the patches. Clips of photos that were not trained on.",
    ]

    def add(name: str, of: MovingRun, decide: Decide | None = None) -> Measured:
        found = of.measure(decide)
        rows.append(row(name, found, *(f"{100 * s:.0f} %" for s in found_in(found.kept[-1], truth))))
        notes.append(f"{name}: {by_frame(found.kept[-1], truth)}.")
        return found

    for name, recipe in (("ours", OURS), ("paper", PAPER)):
        recipe = replace(recipe, model=replace(recipe.model, checkpoint=str(out / "dense" / "model.safetensors")))
        learned = run(name, recipe)
        add(name, learned)
        if name == "ours":
            add(f"ours at {100 * BUDGET:.0f} %", learned, learned.at(BUDGET))
            picture(learned).save(out / "moving.png")
        # as many as it keeps on photos that neither has seen, at least a patch
        keep = recipe.policy.keep or tuple(max(k, 0.01) for k in learned.measure(part="holdout").keep_ratio)
        baseline = replace(recipe, policy=replace(recipe.policy, keep=keep, decisions="random"))
        add(f"random, same count as {name}", run(f"{name}-random", baseline))

    columns = ["model", "top-1 %", "alive", "MACs", "object kept", "its patches kept", "rest kept"]
    title = (
        f"Moving objects: {FRAMES} frames of {SIZE} × {SIZE} pixels, {truth.shape[1]} patches,"
        f" {dense.model.num_classes} classes."
    )
    Table(title, "python experiments/moving.py --data DATA", columns, rows, notes).write(out, "moving")


if __name__ == "__main__":
    sys.exit(main())
