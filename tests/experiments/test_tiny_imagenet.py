"""The archive of Tiny-ImageNet becomes files that training reads."""

from __future__ import annotations

import sys
from io import BytesIO
from pathlib import Path
from typing import Any
from zipfile import ZipFile

import pytest
from pictures import jpeg
from PIL import Image

from iared2.data.images import DataConfig, open_samples
from iared2.data.regions import open_regions
from iared2.errors import InputError

NAMES = {"n01": "Egyptian cat", "n02": "lion, king of beasts", "n03": "reel"}


@pytest.fixture
def archive(tmp_path: Path) -> Path:
    """Three classes of ten photos of the same layout as Stanford's."""
    path = tmp_path / "tiny.zip"
    with ZipFile(path, "w") as file:
        root = "tiny-imagenet-200/"
        file.writestr(root + "wnids.txt", "n02\nn01\nn03\n")
        file.writestr(root + "words.txt", "".join(f"{w}\t{names}\n" for w, names in [*NAMES.items(), ("n09", "sock")]))
        annotations = ""
        for c, wnid in enumerate(NAMES):
            boxes = ""
            for n in range(10):
                file.writestr(f"{root}train/{wnid}/images/{wnid}_{n}.JPEG", jpeg(10 * c + n, 64))
                boxes += f"{wnid}_{n}.JPEG\t{c}\t{n}\t40\t63\n"
            file.writestr(f"{root}train/{wnid}/{wnid}_boxes.txt", boxes)
            file.writestr(f"{root}val/images/val_{c}.JPEG", jpeg(90 + c, 64))
            annotations += f"val_{c}.JPEG\t{wnid}\t8\t9\t10\t11\n"
        file.writestr(root + "val/val_annotations.txt", annotations)
    return path


def test_files_from_the_archive(experiments: Any, archive: Path, tmp_path: Path, monkeypatch: Any) -> None:
    import tiny_imagenet

    data = tmp_path / "data"
    monkeypatch.setattr(sys, "argv", ["tiny_imagenet.py", str(archive), "-o", str(data)])
    tiny_imagenet.main()
    train = open_samples(DataConfig(path=str(data)), "train")
    assert train.class_names == ("lion", "Egyptian cat", "reel")
    assert sorted(train.labels.tolist()) == [0] * 10 + [1] * 10 + [2] * 10
    first = open_samples(DataConfig(path=str(data / "train-00000-of-00005.parquet")), "train", whole=True)
    assert sorted(first.labels.tolist()) == [0, 0, 1, 1, 2, 2]
    pixels = {train[i][0].tobytes() for i in range(30) if train.labels[i] == 0}  # n02 is the second one written
    assert pixels == {Image.open(BytesIO(jpeg(10 + n, 64))).convert("RGB").tobytes() for n in range(10)}
    regions = open_regions(str(data), region="bbox")
    assert len(regions) == 3
    masks = regions.mask(0, (64, 64))
    assert masks.sum() == 9


@pytest.mark.parametrize("content", [b"no archive", None])
def test_what_is_no_such_archive(experiments: Any, tmp_path: Path, monkeypatch: Any, content: bytes | None) -> None:
    import tiny_imagenet

    path = tmp_path / "other.zip"
    if content:
        path.write_bytes(content)
    else:
        with ZipFile(path, "w") as file:
            file.writestr("readme.txt", "hello")
    monkeypatch.setattr(sys, "argv", ["tiny_imagenet.py", str(path), "-o", str(tmp_path / "data")])
    with pytest.raises(InputError, match="is not the archive of Tiny-ImageNet-200"):
        tiny_imagenet.main()
    assert not (tmp_path / "data").exists()
