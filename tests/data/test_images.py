"""Batches depend on their keys and on nothing else; unreadable images are named; classes mean the same everywhere."""

from __future__ import annotations

import io
import json
import os
import random
import warnings
from pathlib import Path

import numpy as np
import pytest
import torch
from pictures import jpeg, samples_of, write_folder, write_parquet, write_shard
from PIL import Image
from timm.data import create_transform

from iared2 import InputError
from iared2.data.batches import MAX_UNREADABLE, Batch, eval_batches, eval_transform, steps_per_epoch, train_batches
from iared2.data.images import DataConfig, Samples, open_samples

# a worker is forked from a process with threads of torch; Python 3.12 and later remark on it
pytestmark = pytest.mark.filterwarnings("ignore:.*multi-threaded.*fork:DeprecationWarning")

HALF = (0.5, 0.5, 0.5)
TRANSFORM = create_transform(8, is_training=True, auto_augment="rand-m9-mstd0.5", re_prob=0.5, mean=HALF, std=HALF)
"""Draws from the generators of Python, numpy and torch."""
PLAIN = eval_transform((8, 8), HALF, HALF)


@pytest.fixture
def samples(tmp_path: Path) -> Samples:
    return open_samples(DataConfig(str(write_folder(tmp_path / "photos", ("ant", "bee", "cat"), each=9))), "train")


def run(samples: Samples, **options) -> list[Batch]:
    options = {"seed": 1, "epoch": 2, "batch_size": 4} | options
    return list(train_batches(samples, TRANSFORM, **options))


def same(a: list[Batch], b: list[Batch]) -> bool:
    return len(a) == len(b) and all(
        torch.equal(x.images, y.images) and torch.equal(x.labels, y.labels) and torch.equal(x.samples, y.samples)
        for x, y in zip(a, b, strict=True)
    )


def test_some_are_drawn_at_random(samples: Samples):
    few = samples.draw(8)
    assert len(few) == len({*few.rows}) == 8
    assert {*few.labels} == {0, 1, 2}
    assert [few.name(i) for i in range(8)] == [samples.name(i) for i in few.rows]
    assert few.rows.tolist() == sorted(few.rows)
    assert len(samples.draw(99)) == 27


class TestTrainBatches:
    def test_a_shuffled_pass(self, samples: Samples):
        batches = run(samples)
        assert len(batches) == steps_per_epoch(samples, 4) == 6
        assert batches[0].images.shape == (4, 3, 8, 8)
        order = torch.cat([batch.samples for batch in batches])
        assert order.unique().numel() == 24
        assert not torch.equal(order, order.sort().values)
        assert torch.equal(torch.cat([batch.labels for batch in batches]), torch.from_numpy(samples.labels)[order])

    def test_a_function_of_the_key(self, samples: Samples):
        batches = run(samples)
        assert same(batches, run(samples))
        assert not same(batches, run(samples, seed=2))
        assert not same(batches, run(samples, epoch=3))

    def test_augmentation_is_keyed_by_epoch(self, samples: Samples):
        """Not only the order differs: the same image is changed in another way."""
        images = [
            {int(i): x for b in run(samples, epoch=e) for i, x in zip(b.samples, b.images, strict=True)} for e in (0, 1)
        ]
        for i in images[0].keys() & images[1].keys():
            assert not torch.equal(images[0][i], images[1][i])

    @pytest.mark.parametrize("workers", [1, 2])
    def test_not_of_the_workers(self, samples: Samples, workers: int):
        assert same(run(samples), run(samples, workers=workers))

    @pytest.mark.parametrize("start", [1, 5, 6])
    def test_not_of_where_it_starts(self, samples: Samples, start: int):
        assert same(run(samples)[start:], run(samples, start_step=start))

    def test_skipped_steps_are_not_read(self, samples: Samples, monkeypatch: pytest.MonkeyPatch):
        read = []
        monkeypatch.setattr(Samples, "__getitem__", lambda self, i: read.append(i) or (Image.new("RGB", (8, 8)), 0))
        run(samples, start_step=5)
        assert len(read) == 4

    def test_not_of_the_number_of_processes(self, samples: Samples):
        one = run(samples, batch_size=8)
        two = [run(samples, batch_size=4, rank=rank, world_size=2) for rank in range(2)]
        both = [
            Batch(*(torch.cat([getattr(a, name), getattr(b, name)]) for name in ("images", "labels", "samples")), [])
            for a, b in zip(*two, strict=True)
        ]
        assert same(one, both)

    @pytest.mark.parametrize("workers", [0, 1])
    def test_generators_of_the_caller_stay(self, samples: Samples, workers: int):
        def draw() -> list[float]:
            return [random.random(), np.random.rand(), torch.rand(()).item()]  # noqa: NPY002

        for seed in (random.seed, np.random.seed, torch.manual_seed):
            seed(0)
        expected = draw()
        for seed in (random.seed, np.random.seed, torch.manual_seed):
            seed(0)
        run(samples, workers=workers)
        assert draw() == expected

    def test_too_few_images(self, samples: Samples):
        with pytest.raises(
            InputError, match=r"27 training images do not fill one batch of 14 × 2 .*smaller batch_size"
        ):
            train_batches(samples, TRANSFORM, seed=0, epoch=0, batch_size=14, world_size=2)


class TestEvalBatches:
    def test_each_image_once_in_order(self, samples: Samples):
        batches = list(eval_batches(samples, PLAIN, batch_size=10))
        assert [len(batch.labels) for batch in batches] == [10, 10, 7]
        assert torch.cat([batch.samples for batch in batches]).tolist() == list(range(27))

    def test_not_of_workers_and_processes(self, samples: Samples):
        batches = list(eval_batches(samples, PLAIN, batch_size=10))
        assert same(batches, list(eval_batches(samples, PLAIN, batch_size=10, workers=1)))
        shares = [list(eval_batches(samples, PLAIN, batch_size=10, rank=r, world_size=2)) for r in range(2)]
        assert same(batches, [shares[0][0], shares[1][0], shares[0][1]])
        assert list(eval_batches(samples, PLAIN, batch_size=10, rank=3, world_size=4)) == []

    def test_the_whole_image(self):
        """Both margins of a wide photo are in the picture; timm's crop has cut them off."""
        photo = Image.new("RGB", (100, 20))
        photo.paste((255, 255, 255), (0, 0, 10, 20))
        photo.paste((255, 255, 255), (90, 0, 100, 20))
        whole = eval_transform((3, 20, 50), HALF, HALF)(photo)
        assert whole.shape == (3, 20, 50)
        assert whole[:, :, [1, -2]].min() > 0.9
        assert create_transform((20, 50), mean=HALF, std=HALF, crop_pct=1.0)(photo)[:, :, [1, -2]].max() < -0.9


def bomb() -> bytes:
    buffer = io.BytesIO()
    Image.new("1", (10_000, 9_000)).save(buffer, "PNG")
    return buffer.getvalue()


BROKEN = {
    "truncated": jpeg(0, 64)[:-600],
    "text": b"this is no image",
    "empty": b"",
    "header only": jpeg(0)[:20],
    "bomb": bomb(),
}


@pytest.fixture
def broken(tmp_path: Path) -> Samples:
    """Every kind of broken file is the first of its class, beside one good image."""
    root = tmp_path / "broken"
    for name, content in BROKEN.items():
        write_folder(root, [name], each=2)
        (root / name / "0.jpg").write_bytes(content)
    return open_samples(DataConfig(str(root)), "train")


class TestUnreadable:
    @pytest.mark.parametrize("workers", [0, 1])
    def test_left_out_of_evaluation(self, broken: Samples, workers: int):
        batches = list(eval_batches(broken, PLAIN, batch_size=5, workers=workers))
        assert torch.cat([batch.samples for batch in batches]).tolist() == [1, 3, 5, 7, 9]
        assert torch.cat([batch.labels for batch in batches]).tolist() == [0, 1, 2, 3, 4]
        skipped = [file for batch in batches for file in batch.skipped]
        assert [name for name, _ in skipped] == [broken.name(i) for i in range(0, 10, 2)]
        assert all(reason and "\n" not in reason for _, reason in skipped)

    @pytest.mark.parametrize("workers", [0, 1])
    def test_replaced_in_training(self, broken: Samples, workers: int):
        (batch,) = train_batches(broken, PLAIN, seed=0, epoch=0, batch_size=10, workers=workers)
        assert sorted(batch.samples.tolist()) == list(range(10))
        images = dict(zip(batch.samples.tolist(), zip(batch.images, batch.labels.tolist(), strict=True), strict=True))
        for i in range(0, 10, 2):
            assert torch.equal(images[i][0], images[i + 1][0])
            assert images[i][1] == images[i + 1][1]
        assert sorted(name for name, _ in batch.skipped) == [broken.name(i) for i in range(0, 10, 2)]

    def test_the_file_is_named(self, broken: Samples):
        assert Path(broken.name(0)).is_file()

    def test_a_batch_without_images(self, broken: Samples):
        batches = list(eval_batches(broken, PLAIN, batch_size=1))
        assert [len(batch.labels) for batch in batches] == [0, 1] * 5
        assert batches[0].labels.dtype == torch.int64

    @pytest.mark.parametrize("count", [4, MAX_UNREADABLE + 50])
    def test_nothing_to_read(self, tmp_path: Path, count: int):
        file = write_parquet(tmp_path / "train.parquet", [0, 1] * (count // 2), images=[b"no"] * count)
        samples = open_samples(DataConfig(str(file)), "train")
        for batches in (
            eval_batches(samples, PLAIN, batch_size=3, workers=1),
            train_batches(samples, PLAIN, seed=0, epoch=0, batch_size=3, workers=1),
        ):
            with pytest.raises(InputError, match=r"cannot be read, the last is \d+\.jpg \(cannot identify") as error:
                list(batches)
            assert "\n" not in str(error.value)

    def test_too_many_in_a_row(self, tmp_path: Path):
        """A long stretch of them is a broken data set, even if something can be read."""
        images = [b"no"] * (MAX_UNREADABLE + 50) + [jpeg(0)] * 2
        file = write_parquet(tmp_path / "train.parquet", [0, 1] * (len(images) // 2), images=images)
        samples = open_samples(DataConfig(str(file)), "train")
        with pytest.raises(InputError, match="image after image cannot be read"):
            list(train_batches(samples, PLAIN, seed=0, epoch=0, batch_size=50))
        assert sum(len(batch.labels) for batch in eval_batches(samples, PLAIN, batch_size=50)) == 2

    def test_cells_of_a_table(self, tmp_path: Path):
        file = write_parquet(tmp_path / "train.parquet", [0, 1, 0, 1], images=[jpeg(0), None, b"", jpeg(3)])
        samples = open_samples(DataConfig(str(file)), "train")
        (batch,) = eval_batches(samples, PLAIN, batch_size=4)
        assert batch.samples.tolist() == [0, 3]
        assert [name for name, _ in batch.skipped] == ["row 1", "2.jpg"]

    def test_a_broken_transform_is_a_bug(self, samples: Samples):
        """Only images are skipped: an error of ours keeps its traceback."""
        with pytest.raises(ZeroDivisionError):
            next(eval_batches(samples, lambda image: 1 / 0, batch_size=4))

    def test_no_warnings(self, broken: Samples):
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            list(eval_batches(broken, PLAIN, batch_size=5))
        assert not caught


def test_images_as_a_viewer_shows_them(tmp_path: Path):
    write_folder(tmp_path, each=1)
    upright = Image.new("RGB", (16, 8), "red")
    exif = Image.Exif()
    exif[0x0112] = 6  # turned by a quarter
    upright.save(tmp_path / "cat" / "0.jpg", exif=exif)
    Image.fromarray(np.full((8, 8), 0x8080, np.uint16)).save(tmp_path / "dog" / "1.png")
    samples = open_samples(DataConfig(str(tmp_path)), "train")
    turned, label = samples[0]
    assert (turned.size, turned.mode, label) == ((8, 16), "RGB", 0)
    assert samples[2][0].getpixel((0, 0)) == (128, 128, 128)


class TestSplits:
    def test_train_and_eval(self, tmp_path: Path):
        write_folder(tmp_path / "train", ("ant", "bee", "cat"))
        write_folder(tmp_path / "val", ("ant", "cat"), each=1)  # whose own numbers would be 0, 1
        assert open_samples(DataConfig(str(tmp_path)), "train").labels.tolist() == [0] * 4 + [1] * 4 + [2] * 4
        evaluation = open_samples(DataConfig(str(tmp_path)), "eval")
        assert evaluation.labels.tolist() == [0, 2]
        assert evaluation.class_names == ("ant", "bee", "cat")

    @pytest.mark.parametrize("name", ["validation", "val", "valid", "test"])
    def test_other_names(self, tmp_path: Path, name: str):
        write_parquet(tmp_path / "train.parquet", [0, 1])
        write_parquet(tmp_path / f"{name}.parquet", [1])
        assert open_samples(DataConfig(str(tmp_path)), "eval").labels.tolist() == [1]
        if name != "test":
            with pytest.raises(InputError, match=rf"no split 'test', there is train, {name}; give another eval_split"):
                open_samples(DataConfig(str(tmp_path), eval_split="test"), "eval")

    def test_a_class_that_training_does_not_know(self, tmp_path: Path):
        write_folder(tmp_path / "train", ("cat", "dog"))
        write_folder(tmp_path / "val", ("cat", "dogs"))
        with pytest.raises(InputError, match=r"'dogs'.* not a class of the training split; did you mean 'dog'\?"):
            open_samples(DataConfig(str(tmp_path)), "eval")

    def test_a_number_that_training_does_not_know(self, tmp_path: Path):
        write_parquet(tmp_path / "train.parquet", [0, 1])
        write_parquet(tmp_path / "test.parquet", [0, 2])
        with pytest.raises(InputError, match="'2', a class to evaluate on"):
            open_samples(DataConfig(str(tmp_path)), "eval")

    @pytest.mark.parametrize("order", [("bee", "cat", "ant"), ("ant", "bee", "cat")])
    @pytest.mark.parametrize("with_file", [False, True])
    def test_names_decide_and_not_numbers(self, tmp_path: Path, order: tuple[str, ...], with_file: bool):
        """Two files of a data set that number their classes in another order, with other names in a file or without."""
        write_parquet(tmp_path / "train.parquet", [0, 1, 2, 2], ("ant", "bee", "cat"))
        write_parquet(tmp_path / "validation.parquet", [0, 0, 1, 2], order)
        entries = [{"index": i, "name": f"the {name}", "wnid": name} for i, name in enumerate(("cat", "ant", "bee"))]
        if with_file:
            (tmp_path / "classes.json").write_text(json.dumps(entries))
        samples = open_samples(DataConfig(str(tmp_path)), "eval")
        the = "the " * with_file
        assert samples.class_names == (f"{the}ant", f"{the}bee", f"{the}cat")
        assert samples.class_names == open_samples(DataConfig(str(tmp_path)), "train").class_names
        found = [samples.class_names[label].removeprefix("the ") for label in samples.labels]
        assert found == [order[0], order[0], order[1], order[2]]

    @pytest.mark.parametrize("names", [("ant", "bee", "dog"), ("ant", "bee"), ("ant", "bee", "cat", "dog"), ()])
    def test_splits_of_other_classes(self, tmp_path: Path, names: tuple[str, ...]):
        write_parquet(tmp_path / "train.parquet", [0, 1, 2], ("ant", "bee", "cat"))
        write_parquet(tmp_path / "validation.parquet", [0, 1], names)
        with pytest.raises(
            InputError, match=r"validation\.parquet declares other classes than .*train\.parquet"
        ) as error:
            open_samples(DataConfig(str(tmp_path)), "eval")
        assert "\n" not in str(error.value)

    def test_shards_of_one_split_in_another_order(self, tmp_path: Path):
        write_parquet(tmp_path / "train-00000-of-00002.parquet", [0, 1], ("ant", "bee"))
        write_parquet(tmp_path / "train-00001-of-00002.parquet", [0, 1], ("bee", "ant"))
        with pytest.raises(InputError, match=r"other classes than .*, or in another order"):
            open_samples(DataConfig(str(tmp_path)), "train")

    def test_no_split_to_evaluate_on(self, tmp_path: Path):
        config = DataConfig(str(write_folder(tmp_path)))
        with pytest.raises(
            InputError, match=r"no split 'validation', there is all; give another eval_split or a holdout"
        ):
            open_samples(config, "eval")
        assert len(open_samples(config, "eval", whole=True)) == 8
        held = open_samples(DataConfig(config.path, holdout=0.5), "eval")
        assert held.rows.tolist() == open_samples(DataConfig(config.path, holdout=0.5), "holdout").rows.tolist()

    def test_only_a_split_to_evaluate_on(self, tmp_path: Path):
        write_folder(tmp_path / "val")
        assert len(open_samples(DataConfig(str(tmp_path)), "eval")) == 8
        with pytest.raises(InputError, match="no split 'train', there is val"):
            open_samples(DataConfig(str(tmp_path)), "train")

    def test_one_class(self, tmp_path: Path):
        config = DataConfig(str(write_folder(tmp_path, ("cat",))))
        with pytest.raises(InputError, match="all training images are of one class, 'cat'"):
            open_samples(config, "train")


class TestHoldout:
    def test_a_share_of_the_rows(self, tmp_path: Path):
        file = write_parquet(tmp_path / "train.parquet", [0, 1, 1, 0, 2] * 400, images=[b"-"] * 2000)
        config = DataConfig(str(file), holdout=0.1)
        train, held = open_samples(config, "train"), open_samples(config, "holdout")
        assert np.bincount(held.labels) == pytest.approx([80, 80, 40], abs=20)
        assert sorted([*train.rows, *held.rows]) == list(range(2000))
        assert held.rows.tolist() != list(range(len(held)))
        # a subset of the classes puts the same images aside
        subset = open_samples(DataConfig(str(file), holdout=0.1, classes=("2", "0")), "holdout")
        assert set(subset.rows) == set(held.rows[held.labels != 1])

    @pytest.mark.parametrize("kind", ["folder", "shards"])
    def test_images_that_come_and_go_change_nothing_for_the_others(self, tmp_path: Path, kind: str):
        """Nor does the place of the data set. Else an image that was trained on could be held out another time."""

        def names(root: Path, split: str) -> set[str]:
            samples = open_samples(DataConfig(str(root), holdout=0.3), split)
            return {os.path.relpath(samples.name(i), root) for i in range(len(samples))}

        first, second = tmp_path / "a", tmp_path / "b" / "c"
        if kind == "folder":
            write_folder(first, each=30)
            write_folder(second, each=40)
            (second / "cat" / "3.jpg").unlink()
        else:
            for root, count in ((first, 60), (second, 80)):
                write_shard(root / "train-0.tar", samples_of([0, 1] * (count // 2)))
        held, other = names(first, "holdout"), names(second, "holdout")
        assert 5 < len(held) < 30
        assert not held & names(first, "train")
        assert {name for name in held if "cat/3.jpg" not in name} <= other
        assert not other & names(first, "train")

    @pytest.mark.parametrize("share", [-0.1, 1.0, 0.0, 0.01, "a lot", None])
    def test_none(self, tmp_path: Path, share: float):
        config = DataConfig(str(write_folder(tmp_path)), holdout=share)
        with pytest.raises(InputError, match="holdout"):
            open_samples(config, "holdout")


class TestClasses:
    @pytest.fixture
    def path(self, tmp_path: Path) -> str:
        """Two kinds of crane, told apart by their WordNet ids."""
        names = [("crane", "n1", "crane, bird"), ("ant", "n2", "ant, emmet, pismire"), ("crane", "n3", "crane")]
        entries = [{"index": i, "name": n, "wnid": w, "synonyms": s} for i, (n, w, s) in enumerate(names)]
        (tmp_path / "classes.json").write_text(json.dumps(entries))
        return str(write_parquet(tmp_path / "train.parquet", [0, 1, 2, 1, 0]))

    @pytest.mark.parametrize("classes", [("ant", "n1"), ("emmet", "bird"), ("n2", "n1")])
    def test_a_subset_in_this_order(self, path: str, classes: tuple[str, ...]):
        samples = open_samples(DataConfig(path, classes=classes), "train")
        assert samples.class_names == classes
        assert samples.rows.tolist() == [0, 1, 3, 4]
        assert samples.labels.tolist() == [1, 0, 0, 1]
        assert samples.name(1) == "1.jpg"

    @pytest.mark.parametrize(
        ("classes", "words"),
        [
            (("ant", "pismier"), "no class 'pismier' among 3; did you mean 'pismire'?"),
            (("ant", "zebra"), "no class 'zebra' among 3; there is crane, ant, crane"),
            (("ant", "crane"), "2 classes are called 'crane'; name the one you mean by: bird, n1, n3"),
            (("ant", "n1", "emmet"), "'emmet' is 'ant'; name each class once"),
        ],
    )
    def test_refused(self, path: str, classes: tuple[str, ...], words: str):
        with pytest.raises(InputError) as error:
            open_samples(DataConfig(path, classes=classes), "train")
        assert words in str(error.value)

    def test_all_of_them_may_share_names(self, path: str):
        """What a checkpoint remembers of its data set finds it again."""
        names = open_samples(DataConfig(path), "train").class_names
        assert names == ("crane", "ant", "crane")
        assert len(open_samples(DataConfig(path, classes=names), "train")) == 5

    def test_no_images_of_them(self, tmp_path: Path):
        file = write_parquet(tmp_path / "train.parquet", [0, 1, 0], ("ant", "bee", "cat", "dog"))
        with pytest.raises(InputError, match="no images in the train split"):
            open_samples(DataConfig(str(file), classes=("dog", "cat")), "train")


def test_real_images(data_dir: Path):
    """Grey ones among them; the figures are those of the data's own description."""
    config = DataConfig(str(data_dir / "tiny-imagenet-200"), classes=("n02124075", "reel"))
    samples = open_samples(config, "eval")
    (batch,) = eval_batches(samples, eval_transform((64, 64), HALF, HALF), batch_size=50)
    assert batch.images.shape == (50, 3, 64, 64)
    assert batch.labels.bincount().tolist() == [25, 25]
    assert not batch.skipped
