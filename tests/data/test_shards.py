"""WebDataset shards are read at random access, by any process, and their headers only once."""

from __future__ import annotations

import json
import pickle
import tarfile
from pathlib import Path

import datasets
import numpy as np
import pytest
from pictures import jpeg, samples_of, write_folder, write_shard

from iared2 import InputError
from iared2.data import shards
from iared2.data.batches import eval_transform, train_batches
from iared2.data.images import DataConfig, open_samples
from iared2.data.sources import ALL, Source, find_splits

LABELS = [0, 1, 2, 0, 1, 2]


@pytest.fixture(autouse=True)
def cache(tmp_path_factory: pytest.TempPathFactory, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The index goes nowhere near the home of whoever runs the tests."""
    path = tmp_path_factory.mktemp("cache")
    monkeypatch.setenv("XDG_CACHE_HOME", str(path))
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", path)
    return path


def write_splits(root: Path, train: str = "imagenet1k-train-000{}.tar", val: str = "imagenet1k-validation-00.tar"):
    """Two shards of six training images, one of three others."""
    for k in range(2):
        write_shard(root / train.format(k), samples_of(LABELS, [jpeg(10 * k + i) for i in range(6)]))
    write_shard(root / val, samples_of(LABELS[:3], [jpeg(90 + i) for i in range(3)]))
    return root


def open_split(path: Path, split: str = ALL, label_column: str = "label") -> Source:
    return find_splits(str(path), "image", label_column)[split]()


def refused(path: Path, *words: str) -> None:
    """Opening it is one line with these words."""
    with pytest.raises(InputError) as error:
        open_split(path)
    message = str(error.value)
    assert "\n" not in message
    for word in words:
        assert word in message


class TestShards:
    def test_as_timm_ships_imagenet(self, tmp_path: Path):
        write_splits(tmp_path)
        assert list(find_splits(str(tmp_path), "image", "label")) == ["train", "validation"]
        source = open_split(tmp_path, "train")
        assert source.labels.tolist() == LABELS * 2
        assert source.names == ("0", "1", "2")
        assert not source.complete
        assert source.reader[10].read() == jpeg(14)  # at random access, from the second shard
        assert source.reader.filename(10) == "imagenet1k-train-0001.tar/n04_7.jpg"
        assert len(source.reader) == 12

    def test_held_to_the_streaming_reader(self, tmp_path: Path):
        """`datasets` reads the same samples, one after the other."""
        write_splits(tmp_path)
        files = sorted(map(str, tmp_path.glob("*train*")))
        stream = datasets.load_dataset("webdataset", data_files={"train": files}, split="train", streaming=True)
        stream = stream.cast_column("jpg", datasets.Image(decode=False))
        source = open_split(tmp_path, "train")
        theirs = [(row["jpg"]["bytes"], row["cls"]) for row in stream]
        assert [(source.reader[i].read(), source.labels[i]) for i in range(12)] == theirs

    @pytest.mark.parametrize(
        ("train", "val", "splits"),
        [
            ("train-00000{}.tar", "val-000000.tar", ["train", "val"]),
            ("data/train-0000{}-of-00002.tar", "data/test-00000-of-00001.tar", ["test", "train"]),
            ("cats_train_{}.tar", "cats_valid.tar", ["train", "valid"]),
            ("a-{}.tar", "b-0.tar", ["a", "b"]),
            ("0000{}.tar", "00002.tar", [ALL]),
        ],
    )
    def test_names_of_splits(self, tmp_path: Path, train: str, val: str, splits: list[str]):
        write_splits(tmp_path, train, val)
        assert sorted(find_splits(str(tmp_path), "image", "label")) == splits

    def test_splits_that_are_asked_for_by_name(self, tmp_path: Path):
        write_splits(tmp_path, "in1k-train-{}.tar", "in1k-mini-0.tar")
        config = DataConfig(str(tmp_path), train_split="in1k-train", eval_split="mini")
        assert (len(open_samples(config, "train")), len(open_samples(config, "eval"))) == (12, 3)

    def test_one_shard(self, tmp_path: Path):
        assert open_split(write_shard(tmp_path / "photos.tar", samples_of(LABELS))).labels.tolist() == LABELS

    def test_names_from_a_file(self, tmp_path: Path):
        write_splits(tmp_path)
        (tmp_path / "classes.json").write_text('["ant", "bee", "cat", "dog"]')
        source = open_split(tmp_path, "validation")
        assert source.names == ("ant", "bee", "cat", "dog")
        assert source.complete

    def test_other_layouts(self, tmp_path: Path):
        """Folders in a shard, capitals, images of other kinds, a field of JSON, what belongs to no image."""
        members = {
            "README.txt": b"hello",
            "cat/1.JPG": jpeg(1),
            "cat/1.json": b'{"class_id": 2}',
            "dog/1.png": jpeg(2),
            "dog/1.cls": b" 1\n",
            "emu/1.tiff": jpeg(3),
            "emu/1.cls": b"0",
            "dog/1.seg.png": b"-",
            "dog/._1.jpg": b"-",
            "dog/.hidden": b"-",
        }
        source = open_split(write_shard(tmp_path / "a.tar", members), label_column="class_id")
        assert source.labels.tolist() == [2, 1, 0]
        assert [source.reader[i].read() for i in range(3)] == [jpeg(1), jpeg(2), jpeg(3)]
        assert source.reader.filename(1) == "a.tar/dog/1.png"

    def test_folders_of_classes_come_first(self, tmp_path: Path):
        """Beside them may lie the archive that they came from."""
        write_shard(write_folder(tmp_path) / "train.tar", samples_of(LABELS))
        assert open_split(tmp_path).names == ("cat", "dog")


class TestRefused:
    @pytest.mark.parametrize(
        ("members", "words"),
        [
            ({}, "no images in this shard"),
            ({"1.cls": b"1", "1.txt": b"a cat"}, "no images in this shard"),
            ({"n01440764.tar": b"-"}, "no images in this shard"),
            ({**samples_of([0, 1]), "x.jpg": b""}, "x has no class number (there is neither); give a KEY.cls"),
            ({"a/x.jpg": b"", "a/x.cls": b"cat"}, "a/x has no class number (cls is b'cat')"),
            ({"x.jpg": b"", "x.json": b'{"class": 1}'}, "or a KEY.json with 'label'"),
            ({"x.jpg": b"", "x.json": b'{"label": "cat"}'}, "json is"),
            ({"x.jpg": b"", "x.json": b"[1]"}, "json is"),
            ({"x.jpg": b"", "x.json": b"\xff"}, "json is"),
            ({"x.jpg": b"", "x.json": b"[" * 100_000}, "json is"),
            ({"x.jpg": b"", "x.cls": b"9" * 30}, "cls is"),
            ({**samples_of([0]), "x.jpg": b"", "x.cls": b"1000000000"}, "x.jpg has the label 1000000000"),
            (samples_of([0, 1, -1]), "n02_7.jpg has the label -1; labels must be in 0…65535"),
        ],
    )
    def test_contents(self, tmp_path: Path, members: dict[str, bytes], words: str):
        refused(write_shard(tmp_path / "train.tar", members), "train.tar", words)

    def test_more_labels_than_names(self, tmp_path: Path):
        (tmp_path / "classes.json").write_text('["ant", "bee"]')
        refused(write_shard(tmp_path / "train.tar", samples_of(LABELS)), "n02_7.jpg has the label 2", "0…1")

    @pytest.mark.parametrize("damage", ["text", "empty", "compressed", "cut off", "a header overwritten", "a folder"])
    def test_files(self, tmp_path: Path, damage: str):
        file = write_shard(tmp_path / "train.tar", samples_of(LABELS, [b"-" * 5000] * 6))
        content = file.read_bytes()
        if damage == "text":
            file.write_text("no tar " * 200)
        elif damage == "empty":
            file.write_bytes(b"")
        elif damage == "compressed":
            with tarfile.open(file, "w:gz") as tar:
                tar.addfile(tarfile.TarInfo("x.jpg"))
        elif damage == "cut off":
            file.write_bytes(content[:20_000])
        elif damage == "a header overwritten":
            at = content.index(b"n03_7.cls")
            file.write_bytes(content[:at] + b"#" * 512 + content[at + 512 :])
        else:
            file.unlink()
            (tmp_path / "b.tar" / "c").mkdir(parents=True)
            refused(tmp_path, "no images")
            return
        refused(file, "train.tar", "not a tar file, or a damaged one")


class TestIndex:
    def test_headers_are_read_once(self, tmp_path: Path, cache: Path, monkeypatch: pytest.MonkeyPatch):
        write_splits(tmp_path)
        first = open_split(tmp_path, "train")
        (kept,) = cache.rglob("*.npy")
        with monkeypatch.context() as patch:
            patch.setattr(shards, "_read_headers", lambda *_: pytest.fail("read again"))
            second = open_split(tmp_path, "train")
        assert np.array_equal(second.labels, first.labels)
        assert second.reader[7].read() == jpeg(11)
        kept.write_bytes(kept.read_bytes()[:-8])
        assert open_split(tmp_path, "train").labels.tolist() == LABELS * 2
        kept.write_bytes(b"")
        assert open_split(tmp_path, "train").labels.tolist() == LABELS * 2
        assert list(cache.rglob("*.*")) == [kept]

    def test_what_changes_is_read_again(self, tmp_path: Path):
        file = write_shard(tmp_path / "train.tar", samples_of(LABELS))
        open_split(file)
        write_shard(file, samples_of([2, 1]))
        assert open_split(file).labels.tolist() == [2, 1]

    def test_the_field_is_part_of_it(self, tmp_path: Path):
        members = {"x.jpg": b"", "x.json": json.dumps({"label": 1, "coarse": 0}).encode()}
        file = write_shard(tmp_path / "train.tar", members)
        assert open_split(file).labels.tolist() == [1]
        assert open_split(file, label_column="coarse").labels.tolist() == [0]

    def test_it_does_without(self, tmp_path: Path, cache: Path):
        (cache / "iared2").write_text("not a folder")
        file = write_shard(tmp_path / "train.tar", samples_of(LABELS))
        assert open_split(file).labels.tolist() == LABELS


@pytest.mark.filterwarnings("ignore:.*multi-threaded.*fork:DeprecationWarning")
def test_any_process_can_read(tmp_path: Path):
    """Worker processes and pickled copies see the same images as this one; an unreadable image is named."""
    write_splits(tmp_path)
    write_shard(tmp_path / "imagenet1k-train-0002.tar", samples_of([0, 1], [b"no", jpeg(5)]))
    samples = open_samples(DataConfig(str(tmp_path)), "train")
    transform = eval_transform((8, 8), (0.5,) * 3, (0.5,) * 3)
    options = {"seed": 0, "epoch": 0, "batch_size": 7}
    here = list(train_batches(samples, transform, **options))
    copied = train_batches(pickle.loads(pickle.dumps(samples)), transform, **options)
    for batches in (copied, train_batches(samples, transform, **options, workers=2)):
        for a, b in zip(here, batches, strict=True):
            assert a.images.equal(b.images)
            assert a.labels.equal(b.labels)
    ((name, reason),) = [skipped for batch in here for skipped in batch.skipped]
    assert name == str(tmp_path / "imagenet1k-train-0002.tar" / "n00_7.jpg")
    assert "cannot identify" in reason
