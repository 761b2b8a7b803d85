"""Data sets of every kind are found, and what is wrong with one is a line of text before training begins."""

from __future__ import annotations

import builtins
import json
import os
import socket
from pathlib import Path

import datasets
import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from pictures import jpeg, write_folder, write_parquet
from PIL import Image
from timm.data.readers import create_reader

from iared2 import InputError
from iared2.data import sources
from iared2.data.images import Samples
from iared2.data.sources import ALL, Source, find_splits

LABELS = [0, 1, 2, 0, 1, 2]


def open_split(path: Path | str, split: str = ALL) -> Source:
    return find_splits(str(path), "image", "label")[split]()


def refused(path: Path | str, *words: str, split: str = ALL) -> None:
    """Opening it is one line with these words."""
    with pytest.raises(InputError) as error:
        open_split(path, split)
    message = str(error.value)
    assert "\n" not in message
    for word in words:
        assert word in message


@pytest.fixture(autouse=True)
def cache(tmp_path_factory: pytest.TempPathFactory, monkeypatch: pytest.MonkeyPatch) -> Path:
    """`datasets` keeps its copies out of the home of whoever runs the tests."""
    path = tmp_path_factory.mktemp("cache")
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", path)
    return path


class TestFolders:
    def test_classes_by_name(self, tmp_path: Path):
        source = open_split(write_folder(tmp_path, ("cat", "ant"), each=2))
        assert source.names == ("ant", "cat")
        assert source.labels.tolist() == [0, 0, 1, 1]
        assert source.reader.filename(3) == os.path.join("cat", "1.jpg")

    @pytest.mark.parametrize("names", [("train", "val"), ("training", "validation"), ("train", "test", "extra")])
    def test_splits(self, tmp_path: Path, names: tuple[str, ...]):
        for name in names:
            write_folder(tmp_path / name)
        assert set(find_splits(str(tmp_path), "image", "label")) == {*names} - {"extra"}

    def test_a_class_may_be_called_train(self, tmp_path: Path):
        write_folder(tmp_path, ("train", "bus"))
        assert open_split(tmp_path).names == ("bus", "train")

    def test_split_folders_by_other_names(self, tmp_path: Path):
        write_folder(tmp_path / "a")
        write_folder(tmp_path / "b")
        assert set(find_splits(str(tmp_path), "image", "label", ("a", "b"))) == {"a", "b"}

    def test_refused(self, tmp_path: Path):
        refused("", "no data set", "--data")
        refused(tmp_path / "nowhere", "nowhere", "no such file")
        refused(tmp_path, str(tmp_path), "no images")
        (tmp_path / "photo.jpg").write_bytes(jpeg(0))
        refused(tmp_path, "photo.jpg", "outside the class folders")
        refused(tmp_path / "photo.jpg", "not a data set")

    def test_a_stray_image_beside_class_folders(self, tmp_path: Path):
        (write_folder(tmp_path) / "stray.jpg").write_bytes(jpeg(0))
        refused(tmp_path, "stray.jpg", "outside the class folders")

    def test_the_first_level_is_the_class(self, tmp_path: Path):
        """Whatever lies deeper; hidden folders and files are nothing."""
        for name in ("cat/front/1.jpg", "cat/back/old/2.jpg", "dog/front/3.jpg", "dog/4.jpg"):
            (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
            (tmp_path / name).write_bytes(jpeg(0))
        for name in (".ipynb_checkpoints/5.jpg", "cat/.ipynb_checkpoints/5.jpg", "dog/._4.jpg", ".6.jpg"):
            (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
            (tmp_path / name).write_bytes(b"-")
        (tmp_path / "._train.parquet").write_bytes(b"-")
        source = open_split(tmp_path)
        assert source.names == ("cat", "dog")
        names = [source.reader.filename(i) for i in range(len(source.labels))]
        assert names == ["cat/back/old/2.jpg", "cat/front/1.jpg", "dog/4.jpg", "dog/front/3.jpg"]
        assert source.labels.tolist() == [0, 0, 1, 1]

    def test_what_the_tool_reads_is_read_here(self, tmp_path: Path):
        """And what is left out is counted in one line."""
        kinds = ("webp", "tif", "tiff", "bmp", "gif", "avif", "jp2", "PNG", "jpe")
        for label in ("cat", "dog"):
            (tmp_path / label).mkdir()
            for kind in kinds:
                Image.new("RGB", (4, 4), "red").save(tmp_path / label / f"a.{kind}")
            (tmp_path / label / "notes.txt").touch()
        (tmp_path / "cat" / "Makefile").touch()
        (tmp_path / "cat" / "b.heic").touch()
        with pytest.warns(UserWarning, match=": files that are no images .* left out: 2 .txt, 1 ") as caught:
            source = open_split(tmp_path)
        assert len(caught) == 1
        assert all(kind in str(caught[0].message) for kind in ("1 .heic", "1 without a suffix"))
        assert source.labels.tolist() == [0] * len(kinds) + [1] * len(kinds)
        samples = Samples(source.reader, np.arange(len(source.labels)), source.labels, source.names)
        assert all(samples[i][0].getpixel((1, 1))[0] > 250 for i in range(len(samples)))

    @pytest.mark.parametrize("where", ["cat/pipe.jpg", "pipe.jpg", "pipe.parquet", "data/pipe.tar", "socket.jpg"])
    def test_what_is_no_file_is_not_opened(self, tmp_path: Path, where: str):
        """Reading a pipe would wait for ever."""
        write_folder(tmp_path)
        (tmp_path / where).parent.mkdir(exist_ok=True)
        if where.startswith("socket"):
            with socket.socket(socket.AF_UNIX) as server:
                server.bind(os.path.relpath(tmp_path / where))  # the path of one is short
        else:
            os.mkfifo(tmp_path / where)
        if (tmp_path / "data").exists():
            refused(tmp_path, "data", "a class folder without images")
        else:
            assert len(open_split(tmp_path).labels) == 8
        if where == "pipe.parquet":
            refused(tmp_path / where, "not a data set")

    def test_links_that_lead_upwards(self, tmp_path: Path):
        """Two of them double the walk at every level; and a photo belongs to the class whose folder it lies in."""
        root = write_folder(tmp_path / "root")
        for name in ("a", "b"):
            (root / "cat" / name).symlink_to("..")
            (root / "dog" / name).symlink_to("../..")
        (root / "cat" / "c").symlink_to(root / "dog")
        (root / "dog" / "self").symlink_to("self")
        (root / "dog" / "gone").symlink_to("nowhere")
        write_folder(tmp_path / "elsewhere", ("bird",), each=3)
        (root / "bird").symlink_to(tmp_path / "elsewhere" / "bird")
        (root / "dog" / "x").symlink_to(tmp_path / "elsewhere")
        assert np.bincount(open_split(root).labels).tolist() == [3, 4, 4]
        (root / "puma").symlink_to("cat")
        refused(root, "links to the same folder")

    def test_splits_without_class_folders(self, tmp_path: Path):
        for name in ("train", "val"):  # not two classes, "train" and "val"
            (tmp_path / name).mkdir()
            (tmp_path / name / "photo.jpg").write_bytes(jpeg(0))
        refused(tmp_path, "photo.jpg", "outside the class folders", split="train")

    def test_an_empty_class_folder(self, tmp_path: Path):
        (write_folder(tmp_path) / "bird").mkdir()
        refused(tmp_path, "bird", "without images")

    @pytest.mark.skipif(os.geteuid() == 0, reason="root may read everything")
    def test_an_unreadable_class_folder(self, tmp_path: Path):
        (write_folder(tmp_path) / "dog").chmod(0)
        refused(tmp_path, "dog", "make it readable")


class TestParquet:
    def test_one_file(self, tmp_path: Path):
        source = open_split(write_parquet(tmp_path / "photos.parquet", LABELS, ("ant", "bee", "cat")))
        assert source.names == ("ant", "bee", "cat")
        assert source.complete
        assert source.labels.tolist() == LABELS
        assert source.reader[3].read() == jpeg(3)
        assert [source.reader.filename(3, absolute) for absolute in (False, True)] == ["row 3", "3.jpg"]

    @pytest.mark.parametrize("folder", [".", "data"])
    def test_shards_are_splits(self, tmp_path: Path, folder: str):
        root = tmp_path / folder
        for k in range(2):
            write_parquet(root / f"train-{k:05}-of-00002.parquet", LABELS, images=[jpeg(10 * k + i) for i in range(6)])
        write_parquet(root / "validation.parquet", LABELS[:2])
        assert list(find_splits(str(tmp_path), "image", "label")) == ["train", "validation"]
        train = open_split(tmp_path, "train")
        assert train.labels.tolist() == LABELS * 2
        assert train.reader[8].read() == jpeg(12)

    def test_names_from_a_file_win(self, tmp_path: Path):
        file = write_parquet(tmp_path / "train.parquet", LABELS, ("n01", "n02", "n03"))
        entries = [{"index": 2, "name": "cat"}, {"index": 0, "name": "ant", "wnid": "n01", "synonyms": "ant, emmet"}]
        (tmp_path / "classes.json").write_text(json.dumps([*entries, {"index": 1, "name": "bee"}]))
        source = open_split(file)
        assert source.names == ("ant", "bee", "cat")
        assert source.aliases == ({"n01", "emmet"}, {"n02"}, {"n03"})

    def test_names_from_a_plain_list(self, tmp_path: Path):
        file = write_parquet(tmp_path / "train.parquet", LABELS)
        (tmp_path / "classes.json").write_text('["ant", "bee", "cat", "dog"]')
        assert open_split(file).names == ("ant", "bee", "cat", "dog")

    def test_numbers_for_want_of_names(self, tmp_path: Path):
        source = open_split(write_parquet(tmp_path / "train.parquet", LABELS))
        assert source.names == ("0", "1", "2")
        assert not source.complete

    def test_large_files_are_mapped_from_disk(
        self, tmp_path: Path, cache: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture
    ):
        file = write_parquet(tmp_path / "train.parquet", LABELS)
        small = open_split(file)
        assert not list(cache.rglob("*.arrow"))
        monkeypatch.setattr(sources, "MAX_IN_MEMORY", 0)
        large = open_split(file)
        assert list(cache.rglob("*.arrow"))
        assert np.array_equal(large.labels, small.labels)
        assert large.reader[4].read() == small.reader[4].read()
        assert capfd.readouterr() == ("", "")  # no bars, no chatter

    def test_other_columns(self, tmp_path: Path):
        file = write_parquet(tmp_path / "train.parquet", LABELS)
        assert find_splits(str(file), "image", "box")[ALL]().labels.tolist() == [0] * 6
        with pytest.raises(
            InputError, match=r"no column 'img', there is image, box, label; give image_column or label_column"
        ):
            find_splits(str(file), "img", "label")[ALL]()
        with pytest.raises(InputError, match="cannot be opened"):
            find_splits(str(file), "box", "label")[ALL]()

    @pytest.mark.parametrize(
        ("labels", "words"),
        [
            ([], "no rows"),
            ([0, 1, -1], "row 2 has the label -1"),
            ([0, 1, 3], "row 2 has the label 3; labels must be in 0…2"),
            ([0.0, 1.5], "has 0.0; labels must be integers"),
            (["cat", "dog"], "has 'cat'; labels must be integers"),
            ([0, None, 1], "has None; labels must be integers"),
            ([0, 10**9], "row 1 has the label 1000000000; labels must be in 0…2"),
        ],
    )
    def test_wrong_labels(self, tmp_path: Path, labels: list, words: str):
        file = write_parquet(tmp_path / "train.parquet", labels)
        (tmp_path / "classes.json").write_text('["ant", "bee", "cat"]')
        refused(file, "train.parquet", words)

    @pytest.mark.parametrize(
        "text",
        ["", "{", "[" * 100_000, '{"0": "ant"}', "[]", "[1, 2]", '[{"name": "ant"}]', '[{"index": 1, "name": "ant"}]'],
    )
    def test_wrong_names(self, tmp_path: Path, text: str):
        file = write_parquet(tmp_path / "train.parquet", LABELS)
        (tmp_path / "classes.json").write_text(text)
        refused(file, "classes.json")

    @pytest.mark.parametrize("label", [10**9, 2**62, 70_000])
    def test_labels_without_names_have_an_end(self, tmp_path: Path, label: int):
        """Names were made for a thousand million classes, until the memory was full."""
        file = write_parquet(tmp_path / "train.parquet", [0, label])
        refused(file, f"row 1 has the label {label}; labels must be in 0…65535")
        assert open_split(write_parquet(file, [0, 999])).names[-1] == "999"

    def test_a_path_in_a_cell_is_not_opened(self, tmp_path: Path):
        (tmp_path / "secret.jpg").write_bytes(jpeg(0))
        cells = pa.array([{"bytes": None, "path": str(tmp_path / "secret.jpg")}] * 2)
        pq.write_table(pa.table({"image": cells, "label": [0, 1]}), tmp_path / "train.parquet")
        assert open_split(tmp_path / "train.parquet").reader[0].read() == b""

    def test_more_labels_than_names(self, tmp_path: Path):
        file = write_parquet(tmp_path / "train.parquet", LABELS, ("n01", "n02", "n03"))
        (tmp_path / "classes.json").write_text('["ant", "bee"]')
        refused(file, "classes.json", "0…2")

    def test_not_a_parquet_file(self, tmp_path: Path):
        (tmp_path / "train.parquet").write_text("no")
        refused(tmp_path, "train.parquet", "cannot be opened", split="train")


class TestHub:
    def test_a_hugging_face_data_set(self, tmp_path: Path):
        """A folder in their layout takes the same way through `datasets` as a name on the hub."""
        write_parquet(tmp_path / "train-00000-of-00001.parquet", LABELS, ("ant", "bee", "cat"))
        write_parquet(tmp_path / "test-00000-of-00001.parquet", LABELS[:4], ("ant", "bee", "cat"))
        assert set(find_splits(f"hf:{tmp_path}", "image", "label")) == {"train", "test"}
        source = open_split(f"hf:{tmp_path}", "test")
        assert source.labels.tolist() == LABELS[:4]
        assert source.names == ("ant", "bee", "cat")
        # held to timm's reader
        theirs = create_reader(f"hfds/{tmp_path}", split="test")
        assert [source.reader[i].read() for i in range(4)] == [theirs[i][0].read() for i in range(4)]
        assert source.labels.tolist() == [theirs[i][1] for i in range(4)]
        assert [source.reader.filename(i, absolute=True) for i in range(4)] == theirs.filenames()

    def test_a_configuration(self, monkeypatch: pytest.MonkeyPatch):
        asked = []
        monkeypatch.setattr(datasets, "get_dataset_split_names", lambda *names: asked.append(names) or ["train"])
        for path in ("hf:mnist", "hf:ylecun/mnist", "hf:owner/name/some/config"):
            find_splits(path, "image", "label")
        assert asked == [("mnist", None), ("ylecun/mnist", None), ("owner/name", "some/config")]

    def test_out_of_reach(self, tmp_path: Path):
        refused(f"hf:{tmp_path}", str(tmp_path), "cannot be opened")


def test_without_the_package(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    real_import = builtins.__import__

    def no_datasets(name: str, *args, **kwargs):
        if name == "datasets":
            raise ImportError
        return real_import(name, *args, **kwargs)

    file = write_parquet(tmp_path / "train.parquet", LABELS)
    monkeypatch.setattr(builtins, "__import__", no_datasets)
    refused(file, "pip install '.[train]'")
    open_split(write_folder(tmp_path / "folder"))  # needs none


@pytest.mark.parametrize(
    ("name", "split", "size", "classes"),
    [("cifar10", "test", 10_000, 10), ("tiny-imagenet-200", "validation", 5_000, 200)],
)
def test_real_data(data_dir: Path, name: str, split: str, size: int, classes: int):
    source = open_split(data_dir / name, split)
    assert np.array_equal(np.bincount(source.labels), [size // classes] * classes)
    assert source.names[2] in ("bird", "volleyball")  # in words, not in WordNet ids
