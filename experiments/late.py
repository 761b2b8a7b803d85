"""Fine-tuning of the blocks behind the first decision, alike for every choice of patches.

    python experiments/late.py --data DATA --backbone FILE [--policy FILE ...] -o OUT

The first groups keep every patch and do not learn. So what leaves them is computed once per photo, and kept in
OUT/*.safetensors (0.2 MB a photo for a ViT-S/14 at 224 pixels) with what the dense model says of the photo. Of each
choice, the later blocks, the norm and the head then learn to say the same from fewer tokens: the target is the
probabilities and the features of the dense model, without labels (`FinetuneStage` with ``distill`` and
``distill_features``). That is how `iared2 train` fine-tunes such a model; here, an epoch takes a quarter of the time.

Every choice keeps the same number of patches of every photo. With ``--macs``, those photos of which the model is the
least sure take a second pass with every patch, so many that the MACs are met (model/second_pass.py); the confidence
that says so is set on the measured photos, without their labels. The training photos are random crops, one of each.
Rows are written to OUT/rows.json after each run, and a killed one goes on where it was. The table is OUT/late.json and
OUT/late.md.
"""

from __future__ import annotations

import argparse
import copy
import json
import time
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from choices import LEARNED, choices, dense_model
from lab import Table, interval, second_passes
from safetensors.torch import load_file, save_file
from timm.layers import DropPath
from timm.models.eva import Eva
from timm.scheduler import CosineLRScheduler
from torch import Tensor

from iared2 import ReducedVisionTransformer, keyed
from iared2.atomic import whole
from iared2.data.batches import eval_batches, model_transform, train_batches
from iared2.data.images import DataConfig, open_samples
from iared2.errors import InputError
from iared2.measure import RANDOM_EPOCH
from iared2.model import backbone as vit
from iared2.model.decide import keep_all
from iared2.model.file import fingerprint
from iared2.model.macs import second_pass_macs
from iared2.model.tokens import PackedTokens
from iared2.train.augment import AugmentConfig
from iared2.train.finetune import Dense, FinetuneStage

BATCH, WARMUP = 48, 0.05
SETTINGS = ("model", "size", "shares", "macs", "photos", "eval_photos", "epochs", "lr", "matrices")
"""Of all rows in one folder, with the weights of the backbone."""
ONLY = ("random, merged", "spread, merged", "attention, merged", "attention + spread 1, merged")


@dataclass(frozen=True)
class Tokens:
    """Photos at the entrance of the first group that drops.

    Attributes:
        x: ``(n, S, C)`` float16.
        logits, features: what the dense model says, float32.
        labels, samples: ``(n,)`` int64.
    """

    x: Tensor
    logits: Tensor
    features: Tensor
    labels: Tensor
    samples: Tensor

    def batch(self, rows: Tensor, model: ReducedVisionTransformer, epoch: int) -> tuple[PackedTokens, Dense, Tensor]:
        """Some rows as the stage takes them. Draws are functions of ``epoch`` and the photo."""
        keys = keyed.sample_keys(0, epoch, self.samples[rows])
        prefix = model.backbone.num_prefix_tokens
        packed = PackedTokens.from_dense(self.x[rows].float(), prefix, keys=keys, grid_size=model.grid_size)
        return packed, Dense(self.logits[rows], self.features[rows]), self.labels[rows]


@torch.inference_mode()
def tokens(path: Path, batches: Any, number: int, model: ReducedVisionTransformer, first: int) -> Tokens:
    """The tokens of ``number`` photos, from the file if it is there."""
    if not path.exists():
        found: list[list[Tensor]] = []
        for batch in batches:
            packed = model.reduce(model.embed(batch.images), range(first), keep_all)[0]
            x = packed.x.unflatten(0, (len(batch.images), -1)).half()
            for group in range(first, model.num_groups):
                packed = model.run_blocks(packed, group)
            features = vit.head(model.backbone, packed, pre_logits=True)
            found.append([x, model.head(packed), features, batch.labels, batch.samples])
            print(f"{path.name}: {BATCH * len(found)} of {number}", end="\r", flush=True)
            if sum(len(row[0]) for row in found) >= number:
                break
        parts = (torch.cat(column)[:number].clone() for column in zip(*found, strict=True))
        with whole(path) as file:
            save_file(dict(zip(Tokens.__annotations__, parts, strict=True)), file)
    columns = load_file(path)
    if len(columns["x"]) < number:
        raise InputError(f"{path} has {len(columns['x'])} photos, not {number}: ask for fewer, or give another -o")
    return Tokens(**{name: column[:number] for name, column in columns.items()})


def tune(
    model: ReducedVisionTransformer, data: Tokens, first: int, lr: float, epochs: float, seed: int, matrices: bool
) -> None:
    """Train the groups from ``first`` on."""
    targets: dict[str, Any] = {"teacher": copy.deepcopy(model.backbone), "distill": 1.0, "distill_features": 1.0}
    stage = FinetuneStage(model, first, last=model.num_groups - 1, vectors_only=not matrices, **targets).train()
    for module in model.modules():
        if isinstance(module, DropPath):  # of a policy's recipe: it would be most of the error
            module.drop_prob = 0.0
    trained = [p for p in model.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(trained, lr, weight_decay=0.0)
    steps = int(epochs * len(data.x) / BATCH)
    schedule = CosineLRScheduler(optimizer, steps, warmup_t=round(WARMUP * steps), warmup_prefix=True)
    start, step = time.monotonic(), 0
    while step < steps:
        epoch = step // (len(data.x) // BATCH)
        for rows in keyed.permutation(seed, epoch, len(data.x)).split(BATCH)[: len(data.x) // BATCH]:
            schedule.step(step)
            loss, metrics = stage.step(*data.batch(rows, model, 1000 * seed + epoch))
            optimizer.zero_grad()
            loss.backward()
            torch.nn.utils.clip_grad_norm_(trained, 1.0)
            optimizer.step()
            step += 1
            if step % 20 == 0:
                speed = step * BATCH / (time.monotonic() - start)
                print(f"step {step} of {steps}: error {metrics['feature_error']:.4f}, {speed:.1f} photos/s", flush=True)
            if step == steps:
                break
    model.eval().requires_grad_(False)


def answers(
    model: ReducedVisionTransformer, data: Tokens, first: int, decide: Any, rows: Tensor
) -> tuple[Tensor, Tensor]:
    """Logits of some photos ``(n, K)``, and their MACs ``(n,)``."""
    logits, macs = [], []
    for some in rows.split(BATCH):
        packed, _, _ = data.batch(some, model, RANDOM_EPOCH)
        packed, _, kept = model.reduce(packed, range(first, model.num_groups), decide)
        logits.append(model.head(packed))
        counts = torch.full((model.num_groups, len(some)), packed.num_patches)
        counts[first:] = torch.stack(kept).sum(-1)
        macs.append(model.count_macs(counts))
    return torch.cat(logits), torch.cat(macs)


@torch.inference_mode()
def measure(
    model: ReducedVisionTransformer, data: Tokens, first: int, decide: Any = None, macs: float | None = None
) -> dict[str, Any]:
    """Who keeps the dense answer, who is right, the divergence, and the MACs as a share of the dense model's.

    With ``macs``, a share of the dense model's, photos take a second pass until that many are used.
    """
    out, cost = answers(model, data, first, decide, torch.arange(len(data.x)))
    dense = data.logits
    if macs is not None:
        again = second_pass_macs(model, first, model.num_patches)
        rows = second_passes(out, cost, macs * model.dense_macs, again)
        out[rows] = answers(model, data, first, keep_all, rows)[0]
        cost[rows] += again
    divergence = torch.nn.functional.kl_div(out.log_softmax(1), dense.log_softmax(1), log_target=True, reduction="none")
    return {
        "kept": (out.argmax(1) == dense.argmax(1)).int().tolist(),
        "right": (out.argmax(1) == data.labels).int().tolist(),
        "divergence": divergence.sum(1).mean().item(),
        "macs": cost.double().mean().item() / model.dense_macs,
    }


def main() -> None:
    """See above."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", required=True, help="photos with labels, as for iared2 train")
    parser.add_argument("--backbone", type=Path, required=True, help="weights of the dense model")
    parser.add_argument("--model", default="vit_small_patch14_dinov2", help="its timm name")
    parser.add_argument("--size", type=int, default=224, help="pixels")
    parser.add_argument("--shares", type=float, nargs="+", default=[1, 1, 1, 0.46, 0.26, 0.18], help="one per group")
    parser.add_argument("--macs", type=float, help="of the dense model's, with second passes (default: none)")
    parser.add_argument("--policy", type=Path, nargs="*", default=[], help="files of model.save_policy")
    parser.add_argument("--only", nargs="*", default=ONLY, help="names of untrained choices")
    parser.add_argument("--photos", type=int, default=5000, help="to train on")
    parser.add_argument("--eval-photos", type=int, default=5000)
    parser.add_argument("--epochs", type=float, default=1)
    parser.add_argument("--matrices", action="store_true", help="train them, too, not only biases, norms and scales")
    parser.add_argument("--lr", type=float, help="default: 3e-4, with --matrices 1e-5")
    parser.add_argument("--seeds", type=int, default=1)
    parser.add_argument("-o", "--output", type=Path, required=True)
    arguments = parser.parse_args()
    arguments.output.mkdir(parents=True, exist_ok=True)
    arguments.groups = len(arguments.shares)
    arguments.lr = arguments.lr or (1e-5 if arguments.matrices else 3e-4)
    first = next((group for group, share in enumerate(arguments.shares) if share < 1), 0)
    if arguments.photos < BATCH or arguments.eval_photos < 1:
        raise InputError(f"--photos: give {BATCH} or more; --eval-photos: 1 or more")

    config = DataConfig(path=arguments.data)
    train, validation = open_samples(config, "train"), open_samples(config, "eval")
    classes = len(train.class_names)
    model = dense_model(arguments, classes).eval().requires_grad_(False)
    if isinstance(model.backbone, Eva):
        raise InputError("rotary embeddings are not kept with the tokens: give a VisionTransformer")
    settings = {name: getattr(arguments, name) for name in SETTINGS} | {"weights": fingerprint(model.backbone)}
    file = arguments.output / "rows.json"
    rows = json.loads(file.read_text()) if file.exists() else {"settings": settings}
    if rows["settings"] != settings:
        raise InputError(f"{arguments.output} has rows of other settings, {rows['settings']}; give another -o")
    crops = AugmentConfig(min_scale=0.5, color_jitter=0.0).transform(model)
    batches = train_batches(train, crops, seed=0, epoch=0, batch_size=BATCH)
    learn_from = tokens(arguments.output / "train.safetensors", batches, arguments.photos, model, first)
    batches = eval_batches(validation, model_transform(model.pretrained_cfg), batch_size=BATCH)
    measured_on = tokens(arguments.output / "eval.safetensors", batches, arguments.eval_photos, model, first)

    rows["dense"] = {"right": (measured_on.logits.argmax(1) == measured_on.labels).int().tolist()}
    for seed in range(arguments.seeds):
        for name, make in choices(arguments, classes):
            if not name.startswith(LEARNED) and name not in arguments.only:
                continue
            model = make().eval().requires_grad_(False)
            model.num_keep = [round(share * model.num_patches) for share in arguments.shares]
            check = partial(measure, model, measured_on, first)
            row = rows[name] if name in rows else {"frozen": check(macs=arguments.macs), "tuned": []}
            rows[name] = row
            if len(row["tuned"]) <= seed:
                tune(model, learn_from, first, arguments.lr, arguments.epochs, seed, arguments.matrices)
                row["tuned"].append(check(macs=arguments.macs))
                if name.startswith(LEARNED):
                    row["tuned"][-1]["whole"] = check(keep_all)["right"]
            with whole(file) as part:
                part.write_text(json.dumps(rows))
            table(rows, arguments).write(arguments.output, "late")


def table(rows: dict[str, Any], arguments: argparse.Namespace) -> Table:
    """Of each choice: answers kept and top-1, frozen and tuned; and what the tuned ones have lost."""
    dense = np.array(rows["dense"]["right"])
    cells, right = [], {}
    for name, row in rows.items():
        if name in ("dense", "settings") or not row["tuned"]:
            continue
        tuned, frozen = row["tuned"], row["frozen"]
        right[name] = np.mean([one["right"] for one in tuned], axis=0)

        def each(what: str, tuned: list[dict[str, Any]] = tuned) -> str:
            return " · ".join(f"{100 * np.mean(one[what]):.2f}" for one in tuned if what in one) or "–"

        cells.append([name, f"{100 * frozen['macs']:.1f} %"])
        cells[-1] += [f"{100 * np.mean(frozen[what]):.2f}" for what in ("kept", "right")]
        cells[-1].append(points(np.array(frozen["right"]) - dense))
        cells[-1] += [each("kept"), each("right"), each("whole"), points(right[name] - dense)]
        cells[-1] += [f"{frozen['divergence']:.4f} → " + " · ".join(f"{one['divergence']:.4f}" for one in tuned)]
    notes = [
        f"{len(dense):,} validation photos; the dense model has {100 * dense.mean():.2f} % top-1. Trained on"
        f" {arguments.photos:,} random crops, {arguments.epochs:g} epochs, learning rate {arguments.lr:g}.",
        "Against the dense model: in points, with 95 % of paired bootstraps. All choices keep as many patches.",
    ]
    for name in right:
        if name.startswith(LEARNED):
            others = ", ".join(f"{points(right[name] - right[o])} on {o}" for o in right if not o.startswith(LEARNED))
            notes.append(f"Tuned, {name}: {others}.")
    heads = [
        "frozen: answers kept, %",
        "top-1, %",
        "against the dense model",
        "tuned: answers kept, %",
        "top-1, %",
        "with every patch, %",
        "against the dense model",
    ]
    return Table(
        "Blocks fine-tuned behind each choice of patches alike.",
        "python experiments/late.py --data DATA --backbone BACKBONE --policy POLICY"
        f" --photos {arguments.photos} --eval-photos {arguments.eval_photos} --lr {arguments.lr:g}"
        + (
            f" --shares {' '.join(f'{share:g}' for share in arguments.shares)} --macs {arguments.macs:g}"
            if arguments.macs
            else ""
        )
        + " --matrices" * arguments.matrices,
        ["choice", "MACs", *heads, "divergence"],
        cells,
        notes,
    )


def points(difference: np.ndarray) -> str:
    """A mean difference in points, and its interval."""
    low, high = interval(difference)
    return f"{100 * difference.mean():+.2f} ({low:+.2f} … {high:+.2f})"


if __name__ == "__main__":
    main()
