"""`iared2 predict`: any number of photos -> Parquet files. Killed anywhere, the same command goes on.

Photo i belongs to unit ``i // shard_size``, and each unit becomes one file, written whole or not at all. A file that is
there is done: there is no other state. The run that the files belong to is described beside them, in ``RUN``. Processes
share nothing but the output folder: process r of n takes every n-th unit.
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import sys
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, ProgressColumn, Task, TextColumn, TimeRemainingColumn
from rich.text import Text

from ..atomic import to_json, whole, write
from ..data.photo_batches import photo_batches
from ..data.unlabelled import Photos, open_photos
from ..errors import InputError
from .batch import BatchPredictor
from .output import check_writable

RUN = "_predict.json"
"""With an underscore, since readers of folders of Parquet files leave such files out."""
MAX_WORKERS, MAX_BATCH, MAX_SHARD = 256, 1 << 16, 1 << 20


def run(arguments: argparse.Namespace) -> int:
    """Run ``iared2 predict``. A photo that cannot be read is a row with its error, and no failure of the command."""
    _check(arguments)
    output = Path(arguments.output)
    check_writable(output)
    rank, world_size, local_rank = _process()
    has_gpu = torch.cuda.is_available() and arguments.engine == "torch"
    device = arguments.device or (f"cuda:{local_rank}" if has_gpu else "cpu")
    names = "embedding", "scores", "threshold", "image_size", "engine"
    wanted = {name: getattr(arguments, name) for name in names}
    predictor = BatchPredictor(arguments.checkpoint, device, **wanted)
    photos = open_photos(arguments.photos, arguments.image_column, arguments.split)
    for path in arguments.photos:
        if output.resolve() in (Path(path).resolve(), Path(path, "data").resolve()):
            raise InputError(f"{output}: photos are read from there; choose another output")
    plan = Plan(output, len(photos), arguments.shard_size, arguments.batch_size)
    plan.begin(photos, predictor)
    bar = Progress(
        *("photos", BarColumn(), MofNCompleteColumn(), _Speed(), TimeRemainingColumn(), TextColumn("left")),
        console=Console(stderr=True),
        disable=rank > 0 or not sys.stderr.isatty(),
    )
    with bar:
        task = bar.add_task("photos", total=len(photos), completed=plan.num_done())
        failed = predict(plan, photos, predictor, plan.units[rank::world_size], arguments.workers, bar, task)
    print(plan.summary(failed))
    return 0


@dataclass(frozen=True)
class Plan:
    """Which photos go into which file."""

    output: Path
    num_photos: int
    shard_size: int
    """Photos per file."""
    batch_size: int
    """Photos per forward pass; a batch lies in one file."""

    @property
    def units(self) -> range:
        """The numbers of the files."""
        return range(-(-self.num_photos // self.shard_size))

    def file(self, unit: int) -> Path:
        """The file of a unit, named as Hugging Face names shards."""
        return self.output / f"photos-{unit:05d}-of-{len(self.units):05d}.parquet"

    def rows(self, unit: int) -> range:
        """The photos of a unit."""
        return range(unit * self.shard_size, min((unit + 1) * self.shard_size, self.num_photos))

    def batches(self, unit: int) -> list[range]:
        """The photos of each forward pass of a unit."""
        rows = self.rows(unit)
        return [rows[start : start + self.batch_size] for start in range(0, len(rows), self.batch_size)]

    def num_done(self) -> int:
        """The photos in files that are there, of all processes."""
        return sum(len(self.rows(unit)) for unit in self.units if self.file(unit).exists())

    def begin(self, photos: Photos, predictor: BatchPredictor) -> None:
        """Describe this run beside its files.

        Raises:
            InputError: the folder has files of another run.
        """
        file, model = self.output / RUN, predictor.model
        about: dict[str, Any] = {name: value for name, value in asdict(self).items() if name != "output"}
        about |= {
            "photos": photos.digest(),
            "model": predictor.digest(),
            "decision": repr(predictor.decision),
            "embedding": predictor.embedding,
            "scores": predictor.scores,
            "device": predictor.device.type,
            "engine": predictor.engine,
            "grid_size": list(predictor.grid_size),
            "num_groups": model.num_groups,
            "dense_macs": model.dense_macs,
            "class_names": model.class_names and list(model.class_names),
        }
        there = next(self.output.glob("*.parquet"), None)
        if not file.exists():  # asked after the glob: another process may just write both
            if there:
                raise InputError(f"{there}: a Parquet file of something else; choose another output")
            write(file, to_json(about) + "\n", parents=True)
        try:
            found = json.loads(file.read_text(encoding="utf-8"))
            other = [name for name in about if found.get(name) != about[name]]
        except (OSError, ValueError, AttributeError, RecursionError) as error:
            raise InputError(f"{file}: cannot be read ({error!r:.200}); choose another output") from None
        if other:
            raise InputError(f"{self.output}: has another run, with other {', '.join(other)}; choose another output")

    def summary(self, failed: int) -> str:
        """What is there now; ``failed`` photos of this process could not be read."""
        done = self.num_done()
        if done == self.num_photos:  # nobody writes any more: what killed processes have left can go
            for folder in self.output.glob(".iared2-*"):
                shutil.rmtree(folder, ignore_errors=True)
        text = f"{done} of {self.num_photos} photos are in {self.output}/photos-*.parquet"
        return text + (f"; {failed} of this process could not be read, see the column error" if failed else "")


def predict(
    plan: Plan,
    photos: Photos,
    predictor: BatchPredictor,
    units: Sequence[int],
    workers: int = 0,
    bar: Progress | None = None,
    task: Any = 0,
) -> int:
    """Write the files of these units that are not there. Returns the number of photos that could not be read.

    Raises:
        InputError: a file cannot be written.
    """
    import pyarrow as pa
    import pyarrow.parquet as pq

    failed = 0
    missing = [unit for unit in units if not plan.file(unit).exists()]
    batches = [batch for unit in missing for batch in plan.batches(unit)]
    read = photo_batches(photos, predictor.transform, batches, workers, predictor.device.type == "cuda")
    for unit in missing:
        tables, last = [], plan.rows(unit)[-1]
        for batch in read:
            found = predictor.predict(batch.images, batch.errors)
            names = pa.array(batch.names, pa.string())
            tables.append(pa.table([names, *found.columns], ["photo", *found.schema.names]))
            failed += len(batch.errors) - len(batch.images)
            if bar:
                bar.advance(task, len(batch.rows))
            if last in batch.rows:
                break
        with whole(plan.file(unit), errors=pa.ArrowException) as file:
            pq.write_table(pa.concat_tables(tables).combine_chunks(), file, compression="zstd")
        if bar and not bar.disable:  # other processes have gone on, too
            bar.update(task, completed=plan.num_done())
    return failed


class _Speed(ProgressColumn):
    def render(self, task: Task) -> Text:
        return Text(f"{task.speed or 0:.0f} photos/s", style="progress.data.speed")


def _check(arguments: argparse.Namespace) -> None:
    limits = {"batch_size": (1, MAX_BATCH), "shard_size": (1, MAX_SHARD), "workers": (0, MAX_WORKERS)}
    for name, (low, high) in limits.items():
        if not low <= getattr(arguments, name) <= high:
            raise InputError(f"--{name.replace('_', '-')} must be from {low} to {high:,}")


def _process() -> tuple[int, int, int]:
    """Rank, number of processes, and rank on this machine, as `torchrun` sets them."""
    values = [os.environ.get(name, default) for name, default in (("RANK", "0"), ("WORLD_SIZE", "1"))]
    values.append(os.environ.get("LOCAL_RANK", values[0]))
    if not all(value.isdecimal() for value in values) or int(values[0]) >= int(values[1]):
        raise InputError(f"RANK={values[0]}, WORLD_SIZE={values[1]}, LOCAL_RANK={values[2]}: set them as torchrun does")
    return int(values[0]), int(values[1]), int(values[2])
