"""Tiny-ImageNet-200 as the other experiments read it: Stanford's archive -> parquet files.

    python experiments/tiny_imagenet.py tiny-imagenet-200.zip -o DATA

The archive is http://cs231n.stanford.edu/tiny-imagenet-200.zip (CS231n, 2015; its terms are ImageNet's). Photos stay
the JPEG files that they are. Each training shard has as many photos of each class as the others. DATA has
`train-0000?-of-00005.parquet`, `validation.parquet` and `classes.json`. Rows are `image`, `label`, and `bbox`: left,
top, right and bottom in pixels, the last ones included.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Iterator
from pathlib import Path
from zipfile import BadZipFile, ZipFile

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from iared2.atomic import whole, write
from iared2.errors import InputError

ROOT, SHARDS = "tiny-imagenet-200", 5
SCHEMA = pa.schema(
    {
        "image": pa.struct({"bytes": pa.binary(), "path": pa.string()}),
        "label": pa.int64(),
        "bbox": pa.list_(pa.int32(), 4),
    }
)
Entry = tuple[str, str, list[int]]
"""A file in the archive, its WordNet id, and the box of the object."""


def lines(archive: ZipFile, name: str) -> Iterator[list[str]]:
    """The fields of each line of a table in the archive."""
    for line in archive.read(f"{ROOT}/{name}").decode().splitlines():
        yield line.split("\t")


def train(archive: ZipFile, wnid: str) -> list[Entry]:
    """The training photos of a class."""
    rows = lines(archive, f"train/{wnid}/{wnid}_boxes.txt")
    return [(f"train/{wnid}/images/{file}", wnid, [int(n) for n in box]) for file, *box in rows]


def validation(archive: ZipFile) -> list[Entry]:
    """The validation photos."""
    rows = lines(archive, "val/val_annotations.txt")
    return [(f"val/images/{file}", wnid, [int(n) for n in box]) for file, wnid, *box in rows]


def save(archive: ZipFile, entries: list[Entry], number: dict[str, int], path: Path) -> None:
    """One parquet file."""
    rows = []
    for file, wnid, box in entries:
        image = {"bytes": archive.read(f"{ROOT}/{file}"), "path": Path(file).name}
        rows.append({"image": image, "label": number[wnid], "bbox": box})
    with whole(path) as place:
        pq.write_table(pa.Table.from_pylist(rows, SCHEMA), place, compression="zstd", row_group_size=1000)
    print(f"{path}: {len(rows):,} photos")


def main() -> None:
    """See above."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("archive", type=Path)
    parser.add_argument("-o", "--output", type=Path, required=True)
    arguments = parser.parse_args()
    random = np.random.default_rng(0)
    try:
        with ZipFile(arguments.archive) as archive:
            wnids = [wnid for [wnid] in lines(archive, "wnids.txt")]
            words = {row[0]: row[1] for row in lines(archive, "words.txt")}
            number = {wnid: index for index, wnid in enumerate(wnids)}
            shards: list[list[Entry]] = [[] for _ in range(SHARDS)]
            for wnid in wnids:
                entries = train(archive, wnid)
                for place, row in enumerate(random.permutation(len(entries))):
                    shards[place % SHARDS].append(entries[row])
            arguments.output.mkdir(parents=True, exist_ok=True)
            for index, shard in enumerate(shards):
                random.shuffle(shard)
                save(archive, shard, number, arguments.output / f"train-{index:05d}-of-{SHARDS:05d}.parquet")
            held = validation(archive)
            random.shuffle(held)
            save(archive, held, number, arguments.output / "validation.parquet")
    except (BadZipFile, OSError, IndexError, KeyError, ValueError) as error:
        raise InputError(f"{arguments.archive} is not the archive of Tiny-ImageNet-200: {error}") from None
    classes = [
        {"index": i, "wnid": wnid, "name": words[wnid].split(", ")[0], "synonyms": words[wnid]}
        for i, wnid in enumerate(wnids)
    ]
    write(arguments.output / "classes.json", json.dumps(classes, ensure_ascii=False, indent=1) + "\n")


if __name__ == "__main__":
    main()
