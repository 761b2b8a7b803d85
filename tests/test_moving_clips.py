"""Clips are functions of their keys, the truth is where the object is, and no frame can be spared."""

from __future__ import annotations

import sys
from itertools import combinations
from pathlib import Path

import pytest
import torch
from torch import Tensor

from iared2 import InputError
from iared2.data.batches import Batch
from iared2.data.device_dataset import BatchAugment, ResidentImages

sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "experiments"))
from moving_clips import COLOUR, MovingClips

SIDE = 20
ZERO, ONE = (0.0, 0.0, 0.0), (1.0, 1.0, 1.0)
PLAIN = BatchAugment(1.0, 0.0, 0.0, 0.0, ZERO, ONE)
COLOURS = BatchAugment(1.0, 0.0, 0.4, 0.0, ZERO, ONE)


def moving(pictures: Tensor, frames: int = 3, size: int = 16, sides: tuple[int, int] = (5, 8)) -> MovingClips:
    number = len(pictures)
    photos = ResidentImages(pictures, torch.zeros(number, dtype=torch.int64), 3 * torch.arange(number) + 5, [])
    return MovingClips(photos, frames, size, sides)


def noise(number: int) -> Tensor:
    draws = torch.Generator().manual_seed(0)
    return torch.randint(0, 200, (number, 3, SIDE, SIDE), dtype=torch.uint8, generator=draws)


@pytest.fixture(scope="module")
def noisy() -> MovingClips:
    return moving(noise(40))


def paths(frames: int, number: int) -> tuple[Tensor, Tensor]:
    """Classes ``(number,)`` and the object's cells ``(number, T)`` of many clips, read off the boxes."""
    rows = round((frames + 1) ** 0.5)
    clips = moving(noise(2), frames, 4 * rows, (4, 4))
    _, labels, boxes = clips.clips(torch.zeros(number, dtype=torch.int64), torch.arange(number))
    x, y = ((boxes[..., :2] + boxes[..., 2:]) / 2 // 4).unbind(2)
    return labels, (rows * y + x).long()


def best_guess(labels: Tensor, seen: Tensor) -> float:
    """How often one is right who guesses the most frequent class of all clips that look the same: ``seen (n, m)``."""
    number = int(labels.max()) + 1
    _, look = (seen * number ** torch.arange(seen.shape[1])).sum(1).unique(return_inverse=True)
    counts = (look * number + labels).bincount(minlength=number * (int(look.max()) + 1))
    return float(counts.view(-1, number).amax(1).sum() / len(labels))


def same(a: list[Batch], b: list[Batch]) -> bool:
    names = ("images", "labels", "samples", "boxes")
    return len(a) == len(b) and all(
        torch.equal(getattr(x, name), getattr(y, name)) for x, y in zip(a, b, strict=True) for name in names
    )


class TestClips:
    def test_a_function_of_the_key(self, noisy):
        rows, keys = torch.arange(40), torch.arange(40) + 7
        everything = noisy.clips(rows, keys)
        assert everything[0].shape == (40, 3, 3, 16, 16)
        some = torch.tensor([33, 2, 17])
        for whole, part in zip(everything, noisy.clips(rows[some], keys[some]), strict=True):
            assert torch.equal(whole[some], part)
        other = noisy.clips(rows, keys + 1000)
        assert not (other[0] == everything[0]).flatten(1).all(1).any()

    def test_the_truth_is_where_the_object_is(self):
        """Two one-coloured photos: each is the background of one clip, and the object of the other."""
        colours = torch.tensor([[20, 30, 40], [90, 200, 10]], dtype=torch.uint8)
        clips = moving(colours[:, :, None, None].expand(-1, -1, SIDE, SIDE).contiguous())
        rows = torch.arange(200) % 2
        pixels, _, boxes = clips.clips(rows, torch.arange(200))
        behind = (colours[rows].float() / 255)[:, :, None, None, None]
        there = (pixels != behind).any(1)  # (B, T, V, V)
        assert torch.equal(clips.truth(boxes, (3, 16, 16)).view_as(there), there.float())
        by_hand = there.float().view(200, 3, 2, 8, 2, 8).mean((3, 5))
        assert torch.equal(clips.truth(boxes, (3, 2, 2)), by_hand.flatten(1))
        for direction, first in ((2, 0), (3, 1)):  # the boxes are tight
            along = there.any(direction)
            at = torch.arange(16)
            assert torch.equal(torch.where(along, at, 99).amin(2), boxes[..., first].long())
            assert torch.equal(torch.where(along, at, -1).amax(2) + 1, boxes[..., first + 2].long())
        outline = (pixels == torch.tensor(COLOUR).view(3, 1, 1, 1)).all(1)
        within = (pixels == (colours[1 - rows].float() / 255)[:, :, None, None, None]).all(1)
        assert torch.equal(outline | within, there)
        assert (outline.flatten(2).any(2) & within.flatten(2).any(2)).all()

    def test_the_photo_lies_still(self, noisy):
        pixels, _, boxes = noisy.clips(torch.arange(40), torch.arange(40))
        free = noisy.truth(boxes, (3, 16, 16)).view(40, 1, 3, 16, 16) == 0
        first, last = free[:, :, 0] & free[:, :, 2], (pixels[:, :, 0] == pixels[:, :, 2])
        assert last[first.expand_as(last)].all()

    def test_places_differ_within_their_cell(self):
        """Not always in the same spot: the object moves by less than a patch, too."""
        _, _, boxes = moving(noise(2)).clips(torch.zeros(500, dtype=torch.int64), torch.arange(500))
        side = boxes[..., 2] - boxes[..., 0]
        assert side.unique().tolist() == [5, 6, 7, 8]
        assert (boxes[..., :2][side == 5] % 8).unique().tolist() == [0, 1, 2]
        assert (side == side[:, :1]).all()


class TestTheClass:
    @pytest.mark.parametrize("frames", [3, 8])
    def test_it_is_the_number_left_out(self, frames):
        labels, places = paths(frames, 3000)
        first = places[:, : (frames + 1) // 2]
        rows = round((frames + 1) ** 0.5)
        y, x = places[:, (frames + 1) // 2 :] // rows, places[:, (frames + 1) // 2 :] % rows
        last = rows * (rows - 1 - x) + y  # the square was turned clockwise: what is on the right was on top
        numbers = torch.cat([first, last, labels[:, None]], 1).sort(1).values
        assert torch.equal(numbers, torch.arange(frames + 1).expand_as(numbers))
        counts = labels.bincount()
        expected = 3000 / (frames + 1)
        assert (counts - expected).abs().max() < 5 * expected**0.5

    def test_every_frame_is_needed(self):
        """Of P classes the P − m that were not ruled out are equally likely, whichever m frames were seen."""
        labels, places = paths(3, 20_000)
        for seen in range(4):
            for frames in combinations(range(3), seen):
                found = best_guess(labels, places[:, list(frames)])
                assert found == pytest.approx(1 / (4 - seen), abs=0.03)

    def test_neither_one_frame_nor_two_of_eight_tell_it(self):
        labels, places = paths(8, 20_000)
        assert all(best_guess(labels, places[:, [t]]) < 1 / 8 + 0.03 for t in range(8))
        assert all(best_guess(labels, places[:, list(pair)]) < 1 / 7 + 0.08 for pair in combinations(range(8), 2))

    def test_the_order_matters(self):
        """The same places, visited in another order, may be another class."""
        labels, places = paths(8, 20_000)
        assert best_guess(labels, places) == 1
        assert best_guess(labels, places.sort(1).values) < 0.9


class TestBatches:
    def test_training_goes_on_where_it_stopped(self, noisy):
        read = {"seed": 1, "epoch": 2, "batch_size": 8}
        whole = list(noisy.train_batches(COLOURS, **read))
        assert [len(batch.labels) for batch in whole] == [8] * 5
        assert torch.cat([batch.samples for batch in whole]).unique().tolist() == noisy.photos.rows.tolist()
        assert same(whole[3:], list(noisy.train_batches(COLOURS, **read, start_step=3)))
        read["batch_size"] = 4
        halves = [list(noisy.train_batches(COLOURS, **read, rank=rank, world_size=2)) for rank in (0, 1)]
        pairs = zip(whole, *halves, strict=True)
        assert all(torch.equal(b.images, torch.cat([x.images, y.images])) for b, x, y in pairs)
        assert not same(whole, list(noisy.train_batches(COLOURS, seed=1, epoch=3, batch_size=8)))

    def test_colours_change_and_nothing_else(self, noisy):
        read = {"seed": 1, "epoch": 0, "batch_size": 40}
        (plain,), (coloured,) = (list(noisy.train_batches(augment, **read)) for augment in (PLAIN, COLOURS))
        assert torch.equal(plain.boxes, coloured.boxes)
        assert torch.equal(plain.labels, coloured.labels)
        assert not torch.equal(plain.images, coloured.images)

    def test_evaluation_is_always_the_same(self, noisy):
        whole = list(noisy.eval_batches(ZERO, ONE, batch_size=16))
        assert [len(batch.labels) for batch in whole] == [16, 16, 8]
        assert same(whole, list(noisy.eval_batches(ZERO, ONE, batch_size=16)))
        ranks = [list(noisy.eval_batches(ZERO, ONE, batch_size=16, rank=r, world_size=2)) for r in (0, 1)]
        assert same(whole, [ranks[0][0], ranks[1][0], ranks[0][1]])

    def test_normalised(self, noisy):
        mean, std = (0.2, 0.3, 0.4), (0.5, 0.25, 2.0)
        (plain,) = noisy.eval_batches(ZERO, ONE, batch_size=40)
        (found,) = noisy.eval_batches(mean, std, batch_size=40)
        channels = torch.tensor([mean, std])[:, :, None, None, None]
        assert torch.allclose(found.images * channels[1] + channels[0], plain.images, atol=1e-6)


@pytest.mark.parametrize(
    "settings",
    [{"frames": 4}, {"frames": 0}, {"sides": (5, 9)}, {"sides": (2, 5)}, {"sides": (7, 5)}, {"size": SIDE + 1}],
)
def test_what_does_not_fit_is_refused(settings):
    with pytest.raises(InputError, match="moving"):
        moving(noise(4), **settings)


def test_one_photo_is_not_enough():
    with pytest.raises(InputError, match="two or more"):
        moving(noise(1))
