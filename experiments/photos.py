"""Where the last group looks on ten free photos, around whose object a box was drawn by hand (photos.json).

    python experiments/photos.py box -o runs/photos

Counts the photos in which at least half of the patches that the last group keeps lie in the box, and writes the
pictures of `iared2 interpret` for each. A patch lies in the box if they overlap, since a rocket is thinner than a
patch; the share of all patches that do is what a random choice would find.
"""

from __future__ import annotations

import argparse
import importlib.resources
import json
from pathlib import Path

import matplotlib
import numpy as np
from PIL import Image

import iared2

BOXES = Path(__file__).with_name("photos.json")


def open_photo(name: str, place: str) -> Image.Image:
    """A photo of a package that is installed for the tests."""
    folder = Path(matplotlib.get_data_path(), "sample_data")
    if place != "matplotlib sample_data":
        folder = Path(str(importlib.resources.files(place)))
    file = next(file for suffix in (".png", ".jpg") if (file := folder / f"{name}{suffix}").exists())
    return Image.open(file).convert("RGB")


def inside(box: list[int], size: tuple[int, int], grid: tuple[int, ...]) -> np.ndarray:
    """``(N,)`` bool: the patches that overlap a box of pixels x0, y0, x1, y1 of a photo of width × height."""
    columns, rows = (
        (np.arange(count) * side < high * count) & (np.arange(1, count + 1) * side > low * count)
        for count, side, low, high in zip(grid[::-1], size, box[:2], box[2:], strict=True)
    )
    return (rows[:, None] & columns).ravel()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("checkpoint")
    parser.add_argument("-o", "--output", type=Path, help="folder for the pictures (default: none)")
    arguments = parser.parse_args()
    predictor, found = iared2.Predictor(iared2.load(arguments.checkpoint)), []
    for photo in json.loads(BOXES.read_text(encoding="utf-8"))["photos"]:
        image = open_photo(photo["name"], photo["from"])
        result = predictor(image)
        box, kept = inside(photo["box"], image.size, result.grid_size), result.kept[-1]
        found.append(kept[box].sum() / max(kept.sum(), 1))
        classes = ", ".join(f"{name} {100 * p:.0f} %" for name, p in result.top5[:2])
        print(f"{photo['name']:16} {100 * found[-1]:3.0f} % of {kept.sum():3} patches in the box", end="")
        print(f" ({100 * box.mean():.0f} % of all)   {classes}", flush=True)
        if arguments.output:
            result.save(arguments.output / photo["name"])
    print(
        f"{np.sum(np.array(found) >= 0.5)} of {len(found)} photos: at least half of the last group's patches in the box"
    )


if __name__ == "__main__":
    main()
