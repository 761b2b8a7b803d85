"""Photos without labels: every kind of source, in one order, and one clear line for what is none."""

from __future__ import annotations

import io
import os
import shutil
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
from pictures import jpeg, write_folder, write_parquet, write_shard
from PIL import Image

from iared2 import InputError
from iared2.data.batches import eval_transform
from iared2.data.photo_batches import photo_batches, read_images
from iared2.data.unlabelled import Names, open_photos

TRANSFORM = eval_transform((12, 12), (0, 0, 0), (1, 1, 1))


@pytest.fixture(autouse=True)
def place(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))


def contents(*paths: str, **options) -> dict[str, bytes]:
    """Names and bytes, in order; no name twice."""
    photos = open_photos(paths, **options)
    found = {}
    for row in range(len(photos)):
        with photos[row] as file:
            found[photos.name(row)] = file.read()
    assert len(found) == len(photos)
    return found


def test_a_folder_at_any_depth():
    write_folder(Path("photos"), each=2)
    Path("photos/cat/deep").mkdir()
    Path("photos/cat/deep/x.PNG").write_bytes(b"x")
    Path("photos/top.jpg").write_bytes(jpeg(7))
    Path("photos/.hidden.jpg").write_bytes(jpeg(8))
    Path("photos/notes.txt").write_text("no photo")
    with pytest.warns(UserWarning, match=r"^photos: files that are no photos are left out: 1 \.txt$"):
        found = contents("photos")
    names = ["cat/0.jpg", "cat/1.jpg", "cat/deep/x.PNG", "dog/0.jpg", "dog/1.jpg", "top.jpg"]
    assert sorted(found) == [f"photos/{name}" for name in names]
    assert found["photos/dog/1.jpg"] == jpeg(101)


def test_names_that_are_no_text_stay_apart():
    Path("photos").mkdir()
    for name in (b"photos/\xff.jpg", "photos/ÿ.jpg".encode(), b"photos/\xfe.jpg"):
        Path(os.fsdecode(name)).write_bytes(name)
    assert contents("photos") == {
        r"photos/\xfe.jpg": b"photos/\xfe.jpg",
        r"photos/\xff.jpg": b"photos/\xff.jpg",
        "photos/ÿ.jpg": "photos/ÿ.jpg".encode(),
    }


def test_shards_need_no_labels():
    members = {"a/1.jpg": jpeg(1), "a/2.png": jpeg(2), "a/2.txt": b"a caption"}
    write_shard(Path("one.tar"), members)
    write_shard(Path("set/s-01.tar"), {"b.jpg": jpeg(3), "b.cls": b"many"})
    write_shard(Path("set/s-00.tar"), {"a-much-longer-name.jpg": jpeg(4)})
    assert contents("one.tar") == {"one.tar/a/1.jpg": jpeg(1), "one.tar/a/2.png": jpeg(2)}
    assert contents("set") == {"set/s-00.tar/a-much-longer-name.jpg": jpeg(4), "set/s-01.tar/b.jpg": jpeg(3)}
    assert contents("set") == contents("set/s-00.tar", "set/s-01.tar"), "from the index that was stored"


@pytest.mark.parametrize("kind", ["struct", "bytes", "large"])
def test_parquet_is_read_in_any_order(kind: str):
    cells = [jpeg(i) for i in range(200)]
    types = {"struct": pa.struct([("bytes", pa.binary()), ("path", pa.string())])}
    kinds = {**types, "bytes": pa.binary(), "large": pa.large_binary()}
    column = pa.array([{"bytes": b, "path": "x"} for b in cells] if kind == "struct" else cells, kinds[kind])
    Path("data").mkdir()
    pq.write_table(pa.table({"photo": column[:150]}), "data/train-0.parquet", row_group_size=100)
    pq.write_table(pa.table({"photo": column[150:]}), "data/train-1.parquet", row_group_size=7)
    photos = open_photos(["."], "photo")
    assert len(photos) == 200
    assert (photos.name(149), photos.name(150)) == ("data/train-0.parquet/149", "data/train-1.parquet/0")
    order = [*range(200), 199, 0, 63, 64, 64, 65, 99, 100, 98, 150, 149, *np.random.default_rng(0).permutation(200)]
    assert [photos[int(row)].read() for row in order] == [cells[row] for row in order]


def test_a_damaged_row_group_leaves_the_others():
    file = write_parquet(Path("a.parquet"), [0] * 300, images=[jpeg(i) for i in range(300)])
    options = {"write_page_checksum": True, "use_dictionary": False, "compression": "none"}
    pq.write_table(pq.read_table(file), file, row_group_size=100, **options)
    data = bytearray(file.read_bytes())
    data[data.index(jpeg(150)[-200:-100])] ^= 255
    file.write_bytes(data)
    photos = open_photos(["a.parquet"])
    _, errors = read_images((lambda row=row: photos[row] for row in range(300)), TRANSFORM)
    bad = [row for row in range(300) if errors[row]]
    assert set(bad) <= set(range(100, 200))
    assert 150 in bad
    assert photos[299].read() == jpeg(299)


def test_a_hugging_face_data_set(monkeypatch: pytest.MonkeyPatch, tmp_path: Path):
    monkeypatch.setattr("datasets.config.HF_DATASETS_CACHE", tmp_path / "hub")
    for split, count in (("train", 3), ("test", 2)):
        file = Path(f"set/data/{split}-00000-of-00001.parquet")
        pq.write_table(pq.read_table(write_parquet(file, [0] * count)).drop_columns("label"), file)
    found = contents("hf:set")
    assert list(found) == [*(f"hf:set/train/{i}" for i in range(3)), "hf:set/test/0", "hf:set/test/1"]
    assert found["hf:set/test/1"] == jpeg(1)
    assert list(contents("hf:set", split="test")) == ["hf:set/test/0", "hf:set/test/1"]
    with pytest.raises(InputError, match="no split 'dev', there is train, test"):
        open_photos(["hf:set"], split="dev")
    with pytest.raises(InputError, match="no column 'photo', there is image, box; give --image-column"):
        open_photos(["hf:set"], "photo")


def test_several_sources_follow_one_another_once():
    write_folder(Path("photos"), ("cat",), 2)
    write_shard(Path("s.tar"), {"k.jpg": jpeg(5)})
    write_parquet(Path("t.parquet"), [0])
    Path("other.jpg").write_bytes(jpeg(9))
    names = ["other.jpg", "s.tar/k.jpg", "photos/cat/0.jpg", "photos/cat/1.jpg", "t.parquet/0"]
    assert list(contents("other.jpg", "s.tar", "photos", "s.tar", "t.parquet", "other.jpg")) == names


def test_the_digest_changes_with_the_photos():
    write_folder(Path("photos"), ("cat",), 3)
    write_parquet(Path("t.parquet"), [0, 0])
    digests = {open_photos(["photos"]).digest(), open_photos(["t.parquet"]).digest()}
    assert {open_photos(["photos"]).digest(), open_photos(["t.parquet"]).digest()} == digests
    os.rename("photos/cat/1.jpg", "photos/cat/8.jpg")
    write_parquet(Path("t.parquet"), [0, 0], images=[jpeg(0), jpeg(1, 40)])
    digests |= {open_photos(["photos"]).digest(), open_photos(["t.parquet"]).digest()}
    digests |= {open_photos(["photos", "t.parquet"]).digest(), open_photos(["t.parquet", "photos"]).digest()}
    assert len(digests) == 6


def test_names_are_a_sequence():
    names = Names(["a", "", "ü", os.fsdecode(b"\xff")])
    assert list(names) == ["a", "", "ü", os.fsdecode(b"\xff")]
    assert names[1:3] == ["", "ü"]
    assert not Names([])


@pytest.mark.parametrize(
    ("path", "message"),
    [
        ("missing", r"^missing: no such file or folder; give photos"),
        ("empty", r"^empty: no photos there"),
        ("bad.parquet", r"^bad\.parquet: cannot be opened \(.*; fetch it again$"),
        ("bad.tar", r"^bad\.tar: not a tar file, or a damaged one"),
        ("none.parquet", r"^none\.parquet: no column 'image', there is label; give --image-column$"),
        ("words.parquet", r"^words\.parquet: the column 'image' has string, not encoded images; give --image-column$"),
        ("zero.parquet", r"^zero\.parquet: no photos there"),
    ],
)
def test_what_is_no_source_is_one_line(path: str, message: str):
    Path("empty").mkdir()
    for name in ("bad.parquet", "bad.tar"):
        Path(name).write_bytes(b"nothing of the kind")
    pq.write_table(pa.table({"label": [1]}), "none.parquet")
    pq.write_table(pa.table({"image": ["a.jpg"]}), "words.parquet")
    pq.write_table(pa.table({"image": pa.array([], pa.binary())}), "zero.parquet")
    with pytest.raises(InputError, match=message):
        open_photos([path])


@pytest.mark.parametrize("kind", ["folder", "parquet"])
def test_workers_read_the_same(kind: str):
    if kind == "folder":
        write_folder(Path("photos"), each=9)
        Path("photos/cat/3.jpg").write_bytes(b"damaged")
    else:
        cells = [None if i == 3 else jpeg(i) for i in range(18)]
        file = write_parquet(Path("photos/a.parquet"), [0] * 18, images=cells)
        pq.write_table(pq.read_table(file), file, row_group_size=5)
    batches = [range(0, 4), range(4, 8), range(10, 18)]
    alone, shared = (list(photo_batches(open_photos(["photos"]), TRANSFORM, batches, workers)) for workers in (0, 2))
    for one, other, rows in zip(alone, shared, batches, strict=True):
        assert one.rows == other.rows == rows
        assert (one.names, one.errors) == (other.names, other.errors)
        assert torch.equal(one.images, other.images)
        assert len(one.images) == sum(error is None for error in one.errors)
    assert sum(error is not None for batch in alone for error in batch.errors) == 1


def test_what_a_photo_may_be():
    grey = np.arange(144, dtype=np.uint8).reshape(12, 12)
    colour = np.repeat(grey[..., None], 3, 2)
    png = io.BytesIO()
    Image.fromarray(grey).save(png, "PNG")
    data = png.getvalue()
    kinds = [grey, grey[..., None], colour, Image.fromarray(grey), data, memoryview(data), {"bytes": data, "path": "x"}]
    kinds += [io.BytesIO(data), lambda: io.BytesIO(data)]
    images, errors = read_images(kinds, TRANSFORM)
    assert errors == [None] * len(kinds)
    assert all(torch.equal(image, images[0]) for image in images)


def test_what_is_no_photo_is_an_error_of_its_own(tmp_path: Path):
    (tmp_path / "x.jpg").write_bytes(jpeg(0))
    kinds = [None, b"", {"path": str(tmp_path / "x.jpg")}, str(tmp_path / "x.jpg"), np.zeros((4, 4)), 7, jpeg(0)]
    images, errors = read_images(kinds, TRANSFORM)
    assert len(images) == 1, "a path in a table is not opened"
    assert errors[-1] is None
    assert all(errors[:-1])
    assert (errors[4] or "").startswith("(4, 4) float64 is no photo: give ")
    shutil.rmtree(tmp_path / "cache", ignore_errors=True)
    assert read_images([], TRANSFORM)[1] == []
