"""What the tests of the experiments share: their modules, and data of the form of Tiny-ImageNet's."""

from __future__ import annotations

import json
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from accelerate.state import AcceleratorState
from pictures import jpeg

from iared2.train.recipe import read_recipe

ROOT = Path(__file__).resolve().parents[2]


@pytest.fixture(scope="module")
def experiments() -> Iterator[Any]:
    """The module experiments/tables.py; its neighbours are then modules of their own names."""
    sys.path.insert(0, str(ROOT / "experiments"))
    try:
        import tables

        yield tables
    finally:
        sys.path.remove(str(ROOT / "experiments"))


@pytest.fixture(autouse=True)
def fresh_accelerator() -> Iterator[None]:
    """Accelerate holds on to the first precision of a process."""
    AcceleratorState._reset_state(reset_partial_state=True)
    yield
    AcceleratorState._reset_state(reset_partial_state=True)


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Files like Tiny-ImageNet's: the 40 classes of the recipe and two others, noise, a box a photo."""
    folder = tmp_path_factory.mktemp("data")
    classes = [*read_recipe(ROOT / "recipes" / "tiny_imagenet_cpu.toml").data.classes, "sock", "broom"]
    (folder / "classes.json").write_text(json.dumps(classes))
    for file, each in (("train-00000-of-00001.parquet", 20), ("validation.parquet", 1)):
        labels = list(range(len(classes))) * each
        cells = [{"bytes": jpeg(i, 64), "path": f"{i}.jpg"} for i in range(len(labels))]
        columns = {"image": cells, "label": labels, "bbox": [[8, 16, 47, 63]] * len(labels)}
        label = {"names": classes, "_type": "ClassLabel"}
        features = {"image": {"_type": "Image"}, "label": label}
        table = pa.table(columns).replace_schema_metadata({"huggingface": json.dumps({"info": {"features": features}})})
        pq.write_table(table, folder / file)
    return folder
