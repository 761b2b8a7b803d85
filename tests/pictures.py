"""Small data sets of noise for the tests of data and sources: in folders, as rows of parquet, in tar shards."""

from __future__ import annotations

import io
import json
import tarfile
from collections.abc import Mapping, Sequence
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from PIL import Image


def jpeg(seed: int, size: int = 12) -> bytes:
    """Noise, another one for each seed, that a loader cannot confuse with its neighbour."""
    pixels = np.random.default_rng(seed).integers(0, 256, (size, size, 3), dtype=np.uint8)
    buffer = io.BytesIO()
    Image.fromarray(pixels).save(buffer, "JPEG")
    return buffer.getvalue()


def write_folder(root: Path, classes: Sequence[str] = ("cat", "dog"), each: int = 4) -> Path:
    """``root/CLASS/0.jpg`` …"""
    for c, name in enumerate(classes):
        (root / name).mkdir(parents=True)
        for i in range(each):
            (root / name / f"{i}.jpg").write_bytes(jpeg(100 * c + i))
    return root


def write_parquet(
    file: Path,
    labels: Sequence[int | float | str | None],
    names: Sequence[str] = (),
    images: Sequence[bytes | None] = (),
) -> Path:
    """One row a label; ``names`` as a ClassLabel column in the way of Hugging Face, ``images`` instead of noise."""
    images = images or [jpeg(i) for i in range(len(labels))]
    cells = [None if b is None else {"bytes": b, "path": f"{i}.jpg"} for i, b in enumerate(images)]
    image_type = pa.struct([("bytes", pa.binary()), ("path", pa.string())])
    table = pa.table(
        {"image": pa.array(cells, image_type), "box": pa.array([0] * len(cells)), "label": pa.array(labels)}
    )
    if names:
        label = {"names": list(names), "_type": "ClassLabel"}
        features = {"image": {"_type": "Image"}, "box": {"dtype": "int64", "_type": "Value"}, "label": label}
        table = table.replace_schema_metadata({"huggingface": json.dumps({"info": {"features": features}})})
    file.parent.mkdir(parents=True, exist_ok=True)
    pq.write_table(table, file)
    return file


def write_shard(file: Path, members: Mapping[str, bytes]) -> Path:
    """A tar of these files."""
    file.parent.mkdir(parents=True, exist_ok=True)
    with tarfile.open(file, "w") as tar:
        for name, content in members.items():
            info = tarfile.TarInfo(name)
            info.size = len(content)
            tar.addfile(info, io.BytesIO(content))
    return file


def samples_of(labels: Sequence[int], images: Sequence[bytes] = ()) -> dict[str, bytes]:
    """The files of WebDataset samples as in timm/imagenet-1k-wds; image i is noise i unless ``images`` are given."""
    members: dict[str, bytes] = {}
    for i, label in enumerate(labels):
        members[f"n{i:02}_7.cls"] = str(label).encode()
        members[f"n{i:02}_7.jpg"] = images[i] if images else jpeg(i)
        members[f"n{i:02}_7.json"] = json.dumps({"label": label, "filename": f"{i}.JPEG"}).encode()
    return members
