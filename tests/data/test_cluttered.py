"""Canvases are functions of their keys, the box is where the photo is, and nothing but content tells it apart."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from pictures import write_folder, write_parquet
from scipy import stats
from torch import Tensor

from iared2 import InputError, keyed
from iared2.data.batches import Batch
from iared2.data.cluttered import LOOSE, WHOLE, ClutteredImages, open_cluttered, patch_truth
from iared2.data.device_dataset import BatchAugment, ResidentImages
from iared2.data.images import DataConfig, open_samples

SIZE, CANVAS = 16, 64
ZERO, ONE = (0.0, 0.0, 0.0), (1.0, 1.0, 1.0)
PLAIN = BatchAugment(1.0, 0.0, 0.0, 0.0, ZERO, ONE)
STRONG = BatchAugment(0.3, 0.5, 0.4, 0.0, ZERO, ONE)


def painted(colours: Tensor) -> Tensor:
    """``(n, 3)`` -> one-coloured pictures ``(n, 3, SIZE, SIZE)`` uint8."""
    return colours.to(torch.uint8)[:, :, None, None].expand(-1, -1, SIZE, SIZE).contiguous()


def noise(n: int, seed: int = 0) -> Tensor:
    return torch.randint(0, 256, (n, 3, SIZE, SIZE), dtype=torch.uint8, generator=torch.Generator().manual_seed(seed))


def clutter(pictures: Tensor, labels: Tensor, filling: Tensor, filling_labels: Tensor | None = None) -> ClutteredImages:
    photos = ResidentImages(pictures, labels, 3 * torch.arange(len(labels)) + 5, [])
    filling_labels = torch.full((len(filling),), -1) if filling_labels is None else filling_labels
    return ClutteredImages(photos, filling, filling_labels, CANVAS, 20, 32)


@pytest.fixture(scope="module")
def red() -> ClutteredImages:
    """Red photos among grey noise."""
    filling = noise(50)[:, :1].expand(-1, 3, -1, -1).contiguous()
    return clutter(painted(torch.tensor([[255, 0, 0]] * 40)), torch.arange(40) % 4, filling)


@pytest.fixture(scope="module")
def noisy() -> ClutteredImages:
    return clutter(noise(40, 1), torch.arange(40) % 4, noise(50))


@pytest.fixture(scope="module")
def squares() -> tuple[Tensor, Tensor]:
    """Of many canvases: x0, y0, side of the photo, ``(n, 3)``, and of the whole squares that are not it."""
    cluttered = clutter(noise(4), torch.arange(4), noise(4))
    layers = cluttered._layers(keyed.sample_keys(0, 0, torch.arange(4000)))
    low, size = layers.low[:, -WHOLE:], (layers.high - layers.low)[:, -WHOLE:]
    assert torch.equal(size[..., 0], size[..., 1])
    number = layers.low.shape[1]
    is_photo = torch.arange(number - WHOLE, number) == layers.photo[:, None]
    assert (is_photo.sum(1) == 1).all()
    there = size[..., 0] > 0
    assert there.sum(1).unique().tolist() == [3, 4]
    found = torch.cat([low, size[..., :1]], 2)
    return found[is_photo], found[there & ~is_photo]


def inside(boxes: Tensor) -> Tensor:
    """Pixels within the boxes, ``(B, CANVAS, CANVAS)`` bool."""
    return patch_truth(boxes, (CANVAS, CANVAS), (CANVAS, CANVAS)).view(-1, CANVAS, CANVAS) == 1


def is_red(images: Tensor) -> Tensor:
    """Where red outshines green, in canvases of ``red``: ``(B, CANVAS, CANVAS)`` bool."""
    return images[:, 0] > images[:, 1]


def same(a: list[Batch], b: list[Batch]) -> bool:
    names = ("images", "labels", "samples", "boxes")
    return len(a) == len(b) and all(
        torch.equal(getattr(x, name), getattr(y, name)) for x, y in zip(a, b, strict=True) for name in names
    )


class TestCanvases:
    def test_a_function_of_the_key(self, noisy: ClutteredImages):
        """Not of the neighbours in the batch, nor of the process's generators."""
        rows, keys = torch.arange(40), torch.arange(40) + 7
        images, boxes = noisy.canvases(rows, keys)
        assert images.shape == (40, 3, CANVAS, CANVAS)
        assert images.dtype == torch.uint8
        some = torch.tensor([33, 2, 17])
        again = noisy.canvases(rows[some], keys[some])
        assert torch.equal(again[0], images[some])
        assert torch.equal(again[1], boxes[some])
        other = noisy.canvases(rows, keys + 1000)
        assert not (other[0] == images).flatten(1).all(1).any()
        assert not (other[1] == boxes).all(1).any()

    def test_the_box_is_where_the_photo_is(self, red: ClutteredImages):
        images, boxes = red.canvases(torch.arange(40), torch.arange(40))
        assert torch.equal(is_red(images), inside(boxes))
        photo = images.movedim(1, 3)[inside(boxes)]
        assert (photo == torch.tensor([255, 0, 0])).all()

    def test_the_photo_is_whole_and_upright(self):
        """A picture whose colour says which place it shows."""
        ramp = torch.linspace(0, 240, SIZE).round()
        picture = torch.stack([ramp.expand(SIZE, SIZE), ramp[:, None].expand(SIZE, SIZE), torch.zeros(SIZE, SIZE)])
        cluttered = clutter(picture[None].to(torch.uint8), torch.zeros(1, dtype=torch.int64), noise(5))
        images, boxes = cluttered.canvases(torch.zeros(8, dtype=torch.int64), torch.arange(8))
        for image, (x0, y0, x1, y1) in zip(images, boxes.int().tolist(), strict=True):
            photo = image[:, y0:y1, x0:x1].float()
            place = ((torch.arange(x1 - x0) + 0.5) * SIZE / (x1 - x0) - 0.5).clamp(0, SIZE - 1) * 16
            assert torch.allclose(photo[0], place.expand_as(photo[0]), atol=1)
            assert torch.allclose(photo[1], place[:, None].expand_as(photo[1]), atol=1)
            assert (photo[2] == 0).all()

    def test_boxes_are_squares_on_the_canvas_of_all_sizes(self, noisy: ClutteredImages):
        _, boxes = noisy.canvases(torch.arange(600) % 40, torch.arange(600))
        assert boxes.min() == 0
        assert boxes.max() == CANVAS
        sides = boxes[:, 2:] - boxes[:, :2]
        assert torch.equal(sides[:, 0], sides[:, 1])
        counts = sides[:, 0].long().bincount(minlength=33)[20:]
        assert len(counts) == 13
        assert stats.chisquare(counts.numpy()).pvalue > 1e-3

    def test_the_photo_comes_everywhere(self, noisy: ClutteredImages):
        """No place is without it, and none has it so often that a fixed mask would do."""
        _, boxes = noisy.canvases(torch.arange(600) % 40, torch.arange(600))
        share = patch_truth(boxes, (CANVAS, CANVAS), (8, 8)).mean(0)
        assert share.min() > 0.04
        assert share.max() < 2 * share.mean()

    @pytest.mark.parametrize(("canvas", "low", "high"), [(128, 40, 64), (128, 64, 64), (64, 8, 32), (130, 17, 65)])
    def test_every_pixel_is_filled(self, canvas: int, low: int, high: int):
        """White pictures make a white canvas, whatever the sizes: no pixel is drawn from outside a picture's piece."""
        white = painted(torch.full((4, 3), 255))
        photos = ResidentImages(white, torch.arange(4), torch.arange(4), [])
        cluttered = ClutteredImages(photos, white, torch.full((4,), -1), canvas, low, high)
        layers = cluttered._layers(torch.arange(64))
        cells = slice(0, -LOOSE - WHOLE)
        area = (layers.high - layers.low)[:, cells].clamp(min=0).prod(2).sum(1)
        assert (area == canvas**2).all()  # the cells of a row, and the rows, follow one another
        assert (layers.low >= layers.origin).all()
        assert (layers.high <= layers.origin + layers.side).all()
        images, _ = cluttered.canvases(torch.arange(4), torch.arange(4))
        assert (images == 255).all()


class TestNoCue:
    """The photo and the other whole squares are drawn alike."""

    @pytest.mark.parametrize("what", [0, 1, 2], ids=["x", "y", "side"])
    def test_place_and_size(self, squares: tuple[Tensor, Tensor], what: int):
        photo, other = (found[:, what].numpy() for found in squares)
        assert stats.ks_2samp(photo, other).pvalue > 1e-3

    def test_x_and_y_are_alike(self, squares: tuple[Tensor, Tensor]):
        assert stats.ks_2samp(squares[0][:, 0].numpy(), squares[0][:, 1].numpy()).pvalue > 1e-3

    def test_whole_squares_do_not_overlap(self):
        cluttered = clutter(noise(4), torch.arange(4), noise(4))
        layers = cluttered._layers(torch.arange(500))
        low, high = layers.low[:, -WHOLE:], layers.high[:, -WHOLE:]
        there = (high > low).all(2)
        assert (low[there] >= 0).all()
        assert (high[there] <= CANVAS).all()
        for a in range(WHOLE):
            for b in range(a):
                shared = high[:, a].minimum(high[:, b]) - low[:, a].maximum(low[:, b])
                assert not (shared > 0).all(1).any()

    def test_sides_of_all_pictures(self):
        """Also of those that only a piece is shown of: all are as sharp as the photo."""
        layers = clutter(noise(4), torch.arange(4), noise(4))._layers(torch.arange(500))
        photo = layers.side[torch.arange(500), layers.photo].flatten().numpy()
        assert stats.ks_2samp(photo, layers.side.flatten().numpy()).pvalue > 1e-3

    def test_pieces_are_of_any_part_of_a_picture(self):
        layers = clutter(noise(4), torch.arange(4), noise(4))._layers(torch.arange(500))
        before, after = layers.low - layers.origin, layers.origin + layers.side - layers.high
        for kind in (slice(0, -LOOSE - WHOLE), slice(-LOOSE - WHOLE, -WHOLE)):
            cut = (before + after)[:, kind] > 0
            ahead, behind = before[:, kind][cut], after[:, kind][cut]
            assert ahead.min() == behind.min() == 0
            assert stats.ks_2samp(ahead.numpy(), behind.numpy()).pvalue > 1e-3

    @pytest.mark.parametrize("augment", [None, STRONG])
    def test_photo_and_filling_are_rendered_alike(self, augment: BatchAugment | None):
        """Where all pictures are one, which of them is the photo cannot be seen: it may be any of the squares."""
        one = noise(1)
        cluttered = clutter(one, torch.zeros(1, dtype=torch.int64), one)
        pixels, boxes = cluttered._render(torch.zeros(300, dtype=torch.int64), torch.arange(300), augment)
        layers = cluttered._layers(torch.arange(300))
        number = layers.low.shape[1]
        swapped = (layers.photo - (number - WHOLE) + 1) % 3 + number - WHOLE  # the first three are always there
        other = torch.cat([layers.low, layers.high], 2)[torch.arange(300), swapped]
        for measure in (torch.mean, torch.std):
            values = [
                [measure(image[:, mask]).item() for image, mask in zip(pixels, inside(b), strict=True)]
                for b in (boxes, other)
            ]
            assert stats.ks_2samp(*values).pvalue > 1e-3


class TestFilling:
    LABELS = torch.arange(40) % 4
    COLOURS = torch.tensor([[250, 0, 0], [0, 250, 0], [0, 0, 250], [250, 250, 0]])
    """One a class, at least 250 levels apart, so that a mixture at no seam can be taken for another."""

    def test_never_of_the_own_class(self):
        """The photo is white; no other picture of its class is there, all other classes are."""
        white = painted(torch.full((40, 3), 255))
        cluttered = clutter(white, self.LABELS, painted(self.COLOURS[self.LABELS]), self.LABELS)
        images, boxes = cluttered.canvases(torch.arange(40), torch.arange(40))
        for image, box, label in zip(images, inside(boxes), self.LABELS, strict=True):
            colours = image[:, ~box].T.unique(dim=0)
            expected = self.COLOURS[torch.arange(4) != label].unique(dim=0)
            assert torch.equal(colours.long(), expected)

    def test_all_others_alike(self):
        """Leaving a class out does not make its neighbours more frequent."""
        cluttered = clutter(noise(40), self.LABELS, noise(40), self.LABELS)
        drawn = cluttered._draw_filling(torch.tensor([1]), keyed.sample_keys(0, 0, torch.arange(1)), 3000)
        counts = drawn.flatten().bincount(minlength=40)
        assert counts[10:20].sum() == 0  # the filling lies in the order of its labels
        assert stats.chisquare(torch.cat([counts[:10], counts[20:]]).numpy()).pvalue > 1e-3

    def test_labels_follow_their_pictures(self):
        cluttered = clutter(noise(40), self.LABELS, painted(self.COLOURS[self.LABELS]), self.LABELS)
        assert torch.equal(cluttered.filling, painted(self.COLOURS[cluttered.filling_labels]))

    def test_of_one_class_only(self):
        with pytest.raises(InputError, match="own class"):
            clutter(noise(3), torch.tensor([0, 1, 1]), noise(2), torch.tensor([1, 1]))
        clutter(noise(3), torch.tensor([0, 2, 2]), noise(2), torch.tensor([1, 1]))

    def test_of_another_size(self):
        with pytest.raises(InputError, match="one size"):
            clutter(noise(3), torch.arange(3), noise(2)[..., :8, :8])

    @pytest.mark.parametrize(("low", "high"), [(20, 33), (32, 31), (4, 32)])
    def test_sides_that_do_not_fit(self, red: ClutteredImages, low: int, high: int):
        with pytest.raises(InputError, match="max_side ≤ canvas / 2"):
            replace(red, min_side=low, max_side=high)


class TestTrainBatches:
    def run(self, cluttered: ClutteredImages, augment: BatchAugment = STRONG, **options) -> list[Batch]:
        return list(cluttered.train_batches(augment, **{"seed": 1, "epoch": 2, "batch_size": 8} | options))

    def test_a_shuffled_pass(self, noisy: ClutteredImages):
        batches = self.run(noisy)
        assert [batch.images.shape for batch in batches] == [(8, 3, CANVAS, CANVAS)] * 5
        samples = torch.cat([batch.samples for batch in batches])
        assert torch.equal(samples.sort().values, noisy.photos.rows)
        assert not torch.equal(samples, noisy.photos.rows)
        assert torch.equal(torch.cat([batch.labels for batch in batches]), noisy.photos.labels[(samples - 5) // 3])

    def test_a_function_of_the_key(self, noisy: ClutteredImages):
        batches = self.run(noisy)
        assert same(batches, self.run(noisy))
        assert not same(batches, self.run(noisy, seed=2))
        assert not same(batches, self.run(noisy, epoch=3))
        assert same(batches[3:], self.run(noisy, start_step=3))
        one = self.run(noisy, batch_size=20)
        two = [self.run(noisy, batch_size=10, rank=rank, world_size=2) for rank in range(2)]
        for whole, *parts in zip(one, *two, strict=True):
            assert torch.equal(whole.images, torch.cat([part.images for part in parts]))

    def test_without_changes_it_is_the_canvas(self):
        """The pictures are one-coloured: a crop of the least strength is still of another aspect."""
        colours = torch.randint(0, 256, (40, 3), generator=torch.Generator().manual_seed(0))
        cluttered = clutter(painted(colours), torch.arange(40), painted(colours.flip(0)))
        (batch,) = self.run(cluttered, PLAIN, batch_size=40)
        images, boxes = cluttered.canvases((batch.samples - 5) // 3, keyed.sample_keys(1, 2, batch.samples))
        assert torch.equal(batch.boxes, boxes)
        assert torch.allclose(batch.images, images / 255, atol=1 / 255)

    def test_no_change_moves_the_photo(self, red: ClutteredImages):
        for batch in self.run(red, replace(STRONG, color_jitter=0.3)):
            assert torch.equal(is_red(batch.images), inside(batch.boxes))

    def test_colours_change_photo_and_filling_alike(self):
        """All pictures are one colour: the photos' colours are spread as all pixels' are, and both do change."""
        colour = painted(torch.tensor([[150, 100, 50]] * 40))
        cluttered = clutter(colour, torch.arange(40), colour)
        pixels, boxes = cluttered._render(torch.arange(300) % 40, torch.arange(300), STRONG)
        photo = torch.stack([image[:, mask].mean(1) for image, mask in zip(pixels, inside(boxes), strict=True)])
        corner = pixels[:, :, 0, 0]
        for channel in range(3):
            assert photo[:, channel].std() > 0.02
            assert stats.ks_2samp(photo[:, channel].numpy(), corner[:, channel].numpy()).pvalue > 1e-3

    def test_contrast_is_about_each_pictures_mean(self):
        """Of one-coloured grey pictures, only the brightness changes."""
        levels = (50 + 5 * torch.arange(40))[:, None].expand(-1, 3)
        cluttered = clutter(painted(levels), torch.arange(40), painted(levels))
        pixels, boxes = cluttered._render(torch.arange(40), torch.arange(40), replace(STRONG, color_jitter=0.2))
        for image, mask, level in zip(pixels, inside(boxes), levels[:, 0].tolist(), strict=True):
            photo = image[:, mask]
            assert photo.std() < 1e-5
            assert 0.799 <= photo.mean() / (level / 255) <= 1.201

    def test_normalised_and_erased(self, noisy: ClutteredImages):
        plain = self.run(noisy, PLAIN)[0].images
        mean, std = (0.5, 0.4, 0.3), (0.2, 0.3, 0.4)
        scaled = self.run(noisy, replace(PLAIN, mean=mean, std=std))[0].images
        assert torch.allclose(scaled[:, 1], (plain[:, 1] - 0.4) / 0.3, atol=1e-5)
        erased = self.run(noisy, replace(PLAIN, mean=mean, std=std, random_erasing=1.0))[0].images
        gone = (erased == 0).all(1)
        assert (gone.flatten(1).float().mean(1) > 0.01).all()
        assert torch.equal(erased.movedim(1, 3)[~gone], scaled.movedim(1, 3)[~gone])

    def test_too_few_images(self, noisy: ClutteredImages):
        with pytest.raises(InputError, match="do not fill one batch"):
            self.run(noisy, batch_size=41)


class TestEvalBatches:
    def test_each_once_in_order_and_always_the_same(self, noisy: ClutteredImages):
        batches = list(noisy.eval_batches(ZERO, ONE, batch_size=16))
        assert [len(batch.labels) for batch in batches] == [16, 16, 8]
        assert torch.equal(torch.cat([batch.samples for batch in batches]), noisy.photos.rows)
        assert torch.equal(torch.cat([batch.labels for batch in batches]), noisy.photos.labels)
        assert same(batches, list(noisy.eval_batches(ZERO, ONE, batch_size=16)))

    def test_not_of_the_batch_size_or_processes(self, noisy: ClutteredImages):
        images = torch.cat([batch.images for batch in noisy.eval_batches(ZERO, ONE, batch_size=16)])
        parts = [list(noisy.eval_batches(ZERO, ONE, batch_size=5, rank=rank, world_size=2)) for rank in range(2)]
        found = {int(i): x for part in parts for b in part for i, x in zip(b.samples, b.images, strict=True)}
        assert torch.equal(torch.stack([found[int(i)] for i in noisy.photos.rows]), images)

    def test_the_box_is_where_the_photo_is(self, red: ClutteredImages):
        for batch in red.eval_batches(ZERO, ONE, batch_size=16):
            assert torch.equal(is_red(batch.images), inside(batch.boxes))


class TestPatchTruth:
    def test_by_hand(self):
        truth = patch_truth(torch.tensor([[4.0, 0.0, 12.0, 6.0]]), (8, 16), (2, 4))
        assert truth.tolist() == [[0, 1, 1, 0, 0, 0.5, 0.5, 0]]

    def test_sums_to_the_area(self):
        draws = 100 * torch.rand(50, 2, 2, generator=torch.Generator().manual_seed(0))
        low, high = draws.amin(1), draws.amax(1)
        truth = patch_truth(torch.cat([low, high], 1), (100, 100), (5, 20))
        assert truth.shape == (50, 100)
        assert truth.min() >= 0
        assert truth.max() <= 1 + 1e-6
        assert torch.allclose(truth.sum(1) * 20 * 5, (high - low).prod(1), rtol=1e-4, atol=1e-2)


def pictures(images: Tensor) -> set[bytes]:
    return {image.numpy().tobytes() for image in images}


class TestOpenCluttered:
    @pytest.fixture
    def config(self, tmp_path: Path) -> DataConfig:
        root = write_folder(tmp_path / "photos", ("ant", "bee", "cat", "dog", "eel"), each=8)
        return DataConfig(str(root), holdout=0.25, workers=0)

    @pytest.mark.parametrize("classes", [(), ("dog", "bee")])
    def test_splits_share_no_picture(self, config: DataConfig, classes: tuple[str, ...]):
        config = replace(config, classes=classes)
        train, holdout = (open_cluttered(config, split, 64, photo_size=12) for split in ("train", "holdout"))
        seen = [pictures(torch.cat([part.photos.images, part.filling])) for part in (train, holdout)]
        assert not seen[0] & seen[1]
        assert len(seen[0] | seen[1]) == 40

    def test_filling_is_of_other_classes(self, config: DataConfig):
        every = open_cluttered(config, "train", 64, photo_size=12)
        some = open_cluttered(replace(config, classes=("dog", "bee")), "train", 64, photo_size=12)
        assert (every.canvas, every.min_side, every.max_side) == (64, 20, 32)
        assert every.photos.images.shape == (len(open_samples(config, "train")), 3, 12, 12)
        assert pictures(some.photos.images) == pictures(every.photos.images[(every.photos.labels % 2) == 1])
        assert pictures(some.filling) == pictures(every.photos.images[(every.photos.labels % 2) == 0])
        assert (some.filling_labels == -1).all()

    def test_without_other_classes(self, config: DataConfig):
        """Then the photos fill one another's canvases, and carry their labels."""
        every = open_cluttered(config, "train", 64, photo_size=12)
        assert pictures(every.filling) == pictures(every.photos.images)
        label = dict(zip([x.numpy().tobytes() for x in every.photos.images], every.photos.labels.tolist(), strict=True))
        assert [label[x.numpy().tobytes()] for x in every.filling] == every.filling_labels.tolist()

    @pytest.mark.parametrize("classes", [(), ("dog", "bee")])
    def test_a_choice_that_is_always_the_same(self, config: DataConfig, classes: tuple[str, ...]):
        config = replace(config, classes=classes)
        few, again = (open_cluttered(config, "train", 64, photo_size=12, max_filling=7) for _ in range(2))
        assert len(few.filling) == 7
        assert torch.equal(few.filling, again.filling)

    def test_classes_of_one_name(self, tmp_path: Path):
        """Told apart by their identifiers, as in the recipe: the other crane is filling."""
        write_parquet(tmp_path / "train.parquet", [0, 1, 2] * 4, names=("n1", "n2", "n3"))
        names = [{"index": i, "name": n, "wnid": f"n{i + 1}"} for i, n in enumerate(("crane", "crane", "cat"))]
        (tmp_path / "classes.json").write_text(json.dumps(names))
        config = DataConfig(str(tmp_path), classes=("n2", "cat"), workers=0)
        cluttered = open_cluttered(config, "train", 64, photo_size=12)
        every = open_cluttered(replace(config, classes=()), "train", 64, photo_size=12)
        assert pictures(cluttered.filling) == pictures(every.photos.images[every.photos.labels == 0])
