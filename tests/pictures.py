"""Small data sets of noise for the tests of data and sources: images as files in folders, and as rows of parquet."""

from __future__ import annotations

import io
import json
from collections.abc import Sequence
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
