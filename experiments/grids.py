"""Grids of four photos of different classes, for the Grid Pointing Game: `iared2 explain-bench` on the result.

    python experiments/grids.py CHECKPOINT --data DATA -o grids.parquet
    iared2 explain-bench CHECKPOINT grids.parquet

Does the map of a class lie in its quarter (Böhle et al., Convolutional Dynamic Alignment Networks, CVPR 2021)? A photo
is used if the dense model is right on it alone, at the size that it has in the grid: then its evidence is there to be
found. One class of each grid is asked for. A map that does not depend on the class has a quarter of its energy in it.
"""

from __future__ import annotations

import argparse
import io
import json
import sys
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import torch
from PIL import Image

import iared2
from iared2.data.batches import model_transform
from iared2.data.images import DataConfig, Samples, open_samples
from iared2.errors import InputError, printable
from iared2.keyed import permutation


def known(model: iared2.ReducedVisionTransformer, samples: Samples, side: int) -> Iterator[tuple[Image.Image, int]]:
    """The photos and classes on which the dense model is right, each shown on a quarter of a grey canvas."""
    transform = model_transform(model.pretrained_cfg)
    for row in permutation(0, 0, len(samples)).tolist():
        whole, label = samples[row]
        photo = whole.resize((side, side), Image.Resampling.BICUBIC)
        canvas = Image.new("RGB", (2 * side, 2 * side), (124, 116, 104))
        canvas.paste(photo, (side // 2, side // 2))
        with torch.inference_mode():
            if int(model.backbone(transform(canvas)[None]).argmax()) == label:
                yield photo, label


def grids(photos: Iterator[tuple[Image.Image, int]], count: int, side: int) -> Iterator[tuple[bytes, int, list[int]]]:
    """PNG, the class that is asked for, and its quarter as inclusive corners."""
    for number in range(count):
        four: dict[int, Image.Image] = {}
        while len(four) < 4:
            found = next(photos, None)
            if found is None:
                raise InputError(f"the model knows enough photos for {number} grids; give --grids {number}")
            photo, label = found
            four.setdefault(label, photo)
        grid = Image.new("RGB", (2 * side, 2 * side))
        for place, photo in enumerate(four.values()):
            grid.paste(photo, (place % 2 * side, place // 2 * side))
        asked = number % 4
        left, top = asked % 2 * side, asked // 2 * side
        buffer = io.BytesIO()
        grid.save(buffer, "PNG")
        yield buffer.getvalue(), list(four)[asked], [left, top, left + side - 1, top + side - 1]


def main() -> int:
    """Run the command; returns the exit status."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("checkpoint", help="a model, or 'box'")
    parser.add_argument("--data", required=True, help="labelled photos of the model's classes, with a validation split")
    parser.add_argument("-o", "--output", type=Path, required=True, help="the parquet file")
    parser.add_argument("--grids", type=int, default=100, help="(default: %(default)s)")
    arguments = parser.parse_args()
    try:
        model = iared2.load(arguments.checkpoint)
        model.decision = model.decision.whole()
        samples = open_samples(DataConfig(path=arguments.data, classes=model.class_names or ()), "eval")
        side = model.pretrained_cfg["input_size"][1] // 2
        rows = list(grids(known(model, samples, side), arguments.grids, side))
    except InputError as error:
        print(printable(f"error: {error}"), file=sys.stderr)
        return 1
    images, labels, boxes = zip(*rows, strict=True)
    cells = [{"bytes": data, "path": f"grid-{i}.png"} for i, data in enumerate(images)]
    table = pa.table({"image": cells, "label": list(labels), "bbox": np.array(boxes).tolist()})
    names = {"names": list(samples.class_names), "_type": "ClassLabel"}
    info = {"info": {"features": {"image": {"_type": "Image"}, "label": names}}}
    pq.write_table(table.replace_schema_metadata({"huggingface": json.dumps(info)}), arguments.output)
    print(f"{arguments.output}: {len(rows)} grids")
    return 0


if __name__ == "__main__":
    sys.exit(main())
