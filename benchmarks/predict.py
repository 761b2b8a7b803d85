"""Photos/s of `iared2 predict` against what one core allows: 1 / (1 / bare forward passes + 1 / bare decoding).

Bare: nothing but `model.trace` on batches in memory, or nothing but decoding and resizing of photos in memory. The
three take turns on the same photos, in this process, and the medians count. CPU seconds, since others may use the core.

OMP_NUM_THREADS=1 python benchmarks/predict.py PHOTOS
"""

from __future__ import annotations

import argparse
import statistics
import time
from pathlib import Path
from tempfile import TemporaryDirectory

import torch
from rich.progress import track

from iared2.atomic import to_json
from iared2.data.photo_batches import read_images
from iared2.data.unlabelled import open_photos
from iared2.predict.batch import BatchPredictor
from iared2.predict.many import Plan, predict


def seconds(run) -> float:
    """CPU seconds of this process."""
    start = time.process_time()
    run()
    return time.process_time() - start


def main() -> None:
    """Print the three speeds and their ratio, as a table and as JSON."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("photos", help="as for `iared2 predict`")
    parser.add_argument("-c", "--checkpoint", help="a model (default: the one in the box)")
    parser.add_argument("--number", type=int, default=1024, help="photos per measurement")
    parser.add_argument("--batch-size", type=int, default=64)
    parser.add_argument("--rounds", type=int, default=3)
    arguments = parser.parse_args()

    predictor, photos = BatchPredictor(arguments.checkpoint, "cpu"), open_photos([arguments.photos])
    number = min(arguments.number, len(photos))
    encoded = [photos[row].read() for row in range(number)]
    batches = [
        read_images(encoded[i : i + arguments.batch_size], predictor.transform)[0]
        for i in range(0, number, arguments.batch_size)
    ]

    def forward() -> None:
        with torch.inference_mode():
            for images in batches:
                predictor.model.trace(images)

    def decode() -> None:
        for start in range(0, number, arguments.batch_size):
            read_images(encoded[start : start + arguments.batch_size], predictor.transform)

    def whole() -> None:
        with TemporaryDirectory() as folder:
            plan = Plan(Path(folder), number, 1024, arguments.batch_size)
            plan.begin(photos, predictor)
            predict(plan, photos, predictor, plan.units)

    runs = {"forward": forward, "decode": decode, "predict": whole}
    measured: dict[str, list[float]] = {name: [] for name in runs}
    for run in runs.values():  # warm-up
        run()
    for _ in track(range(arguments.rounds), "measuring"):
        for name, run in runs.items():
            measured[name].append(number / seconds(run))
    speed = {name: statistics.median(values) for name, values in measured.items()}
    bound = 1 / (1 / speed["forward"] + 1 / speed["decode"])
    for name, value in {**speed, "bound": bound}.items():
        print(f"{name:8} {value:8.1f} photos/s")
    print(
        to_json(
            {
                "photos": number,
                "batch_size": arguments.batch_size,
                **speed,
                "bound": bound,
                "ratio": speed["predict"] / bound,
            }
        )
    )


if __name__ == "__main__":
    main()
