"""How a photo becomes the square that a model sees: squash, crop or pad. Which is right more often on sharp photos.

    python experiments/resizing.py box PHOTOS.parquet CLASSES.json [--leave-out OVERLAP.json]

PHOTOS has the columns `image` and `label`; CLASSES is a list with `imagenet1k_index`, the label in PHOTOS of each class
of the model, in its order; photos of other classes are left out. OVERLAP is a list of the photos (`sample`:
WNID_….JPEG) that training has seen; PHOTOS then also has the column `wnid`.
"""

from __future__ import annotations

import argparse
import io
import json
from pathlib import Path

import pyarrow.parquet as pq
import torch
from lab import Table
from PIL import Image
from timm.data import create_transform, resolve_model_data_config

import iared2

PARTS = "reduced", "dense"
WAYS = {
    "squash": {"crop_mode": "squash", "crop_pct": 1.0},
    "centre crop": {"crop_mode": "center", "crop_pct": 1.0},
    "centre crop of 87.5 %": {"crop_mode": "center", "crop_pct": 0.875},
    "pad": {"crop_mode": "border", "crop_pct": 1.0},
}


def photos_of(file: Path, classes: Path, leave_out: Path | None) -> list[tuple[Image.Image, int]]:
    """The photos of the model's classes, with their labels there."""
    number = {one["imagenet1k_index"]: i for i, one in enumerate(json.loads(classes.read_text()))}
    seen = {one["sample"].split("_")[0] for one in json.loads(leave_out.read_text())} if leave_out else set()
    rows = pq.read_table(file).to_pylist()
    return [
        (Image.open(io.BytesIO(row["image"]["bytes"])).convert("RGB"), number[row["label"]])
        for row in rows
        if row["label"] in number and row["wnid"] not in seen
    ]


def main() -> None:
    """See above."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("checkpoint")
    parser.add_argument("photos", type=Path)
    parser.add_argument("classes", type=Path)
    parser.add_argument("--leave-out", type=Path)
    parser.add_argument("-o", "--output", type=Path, default=Path("runs"), help="folder of the table (default: runs)")
    arguments = parser.parse_args()
    model = iared2.load(arguments.checkpoint)
    photos = photos_of(arguments.photos, arguments.classes, arguments.leave_out)
    labels, rows = torch.tensor([label for _, label in photos]), []
    for name, crop in WAYS.items():
        transform = create_transform(**resolve_model_data_config(model) | crop)
        found = []
        for chunk in torch.arange(len(photos)).split(32):
            images = torch.stack([transform(photos[i][0]) for i in chunk.tolist()])
            with torch.inference_mode():
                found.append(torch.stack([model(images), model.backbone(images)]).topk(5).indices)
        best = torch.cat(found, 1)  # (2, n, 5)
        right = best == labels[:, None]
        counts = [f"{r[:, 0].sum()} · {r.any(1).sum()}" for r in right]
        rows.append([name, *counts, f"{(best[0, :, 0] == best[1, :, 0]).sum()}"])
    Table(
        f"Right answers of {len(photos)} photos, {sum(a.width != a.height for a, _ in photos)} of them not square.",
        "python experiments/resizing.py box PHOTOS.parquet CLASSES.json --leave-out OVERLAP.json",
        ["photos are made square by", *(f"{part}: top-1 · top-5" for part in PARTS), "dense answers kept"],
        rows,
        [],
    ).write(arguments.output, "resizing")


if __name__ == "__main__":
    main()
