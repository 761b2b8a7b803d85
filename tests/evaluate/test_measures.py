"""Every measure against an implementation that is not ours, on random maps and masks, and on the ties of real ones."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from sklearn.metrics import average_precision_score
from torchmetrics.functional.classification import (
    binary_accuracy,
    binary_average_precision,
    binary_jaccard_index,
    multiclass_accuracy,
    multiclass_jaccard_index,
)

from iared2.evaluate.explanations import measures

B, H, W = 24, 11, 7
CLOSE = {"rtol": 0, "atol": 1e-6}


def random_maps(kind: str = "continuous") -> tuple[torch.Tensor, torch.Tensor]:
    """Maps in [0, 1] and masks of every size from one pixel to all; "tied" maps have few levels, and are mostly 0."""
    generator = torch.Generator().manual_seed(0)
    maps = torch.rand(B, H, W, generator=generator)
    if kind == "tied":
        maps = (maps * 5 - 2).round().clamp_min(0) / 3
    masks = torch.rand(B, H, W, generator=generator) < torch.linspace(0, 1, B)[:, None, None]
    masks[:, 4, 3] = True
    masks[-1] = True
    return maps, masks


@pytest.fixture(params=["continuous", "tied"])
def pair(request: pytest.FixtureRequest) -> tuple[torch.Tensor, torch.Tensor]:
    return random_maps(request.param)


def expected_over_ties(maps: torch.Tensor, score, rounds: int = 4000) -> np.ndarray:
    """A measure that knows no ties, averaged over random orders of the tied pixels."""
    generator = np.random.default_rng(0)
    total = 0
    for _ in range(rounds):
        total = total + score(maps.numpy() + 1e-5 * generator.random(maps.shape))
    return total / rounds


def pointing_game(maps: np.ndarray, masks: np.ndarray) -> np.ndarray:
    return np.array([mask.ravel()[map_.argmax()] for map_, mask in zip(maps, masks, strict=True)], dtype=float)


def rank_accuracy(maps: np.ndarray, masks: np.ndarray) -> np.ndarray:
    scores = []
    for map_, mask in zip(maps, masks, strict=True):
        highest = set(np.argsort(-map_.ravel())[: mask.sum()])
        scores.append(len(highest & set(np.flatnonzero(mask))) / mask.sum())
    return np.array(scores)


@pytest.mark.parametrize("name", ["pointing_game", "rank_accuracy"])
def test_measures_of_order(name: str) -> None:
    maps, masks = random_maps()
    ours = getattr(measures, name)(maps, masks)
    assert np.allclose(ours, globals()[name](maps.numpy(), masks.numpy()), **CLOSE)


@pytest.mark.parametrize("name", ["pointing_game", "rank_accuracy"])
def test_ties_are_expectations_over_orders(name: str) -> None:
    maps, masks = random_maps("tied")
    expected = expected_over_ties(maps, lambda broken: globals()[name](broken, masks.numpy()))
    assert np.allclose(getattr(measures, name)(maps, masks), expected, atol=0.05)


def test_mass(pair) -> None:
    maps, masks = pair
    inside = np.array([m.numpy()[k.numpy()].sum() / m.numpy().sum() for m, k in zip(maps, masks, strict=True)])
    assert np.allclose(measures.mass_accuracy(maps, masks), inside, **CLOSE)
    energy = []
    for map_, mask in zip(maps.numpy(), masks.numpy(), strict=True):
        rows, columns = np.nonzero(mask)
        energy.append(map_[rows.min() : rows.max() + 1, columns.min() : columns.max() + 1].sum() / map_.sum())
    assert np.allclose(measures.energy_in_box(maps, masks), energy, **CLOSE)


def test_sparsity(pair) -> None:
    maps, _ = pair
    values = maps.double().flatten(1).numpy()
    # Gini as half the relative mean absolute difference: another formula of the same index
    gini = [np.abs(v[:, None] - v[None]).mean() / (2 * v.mean()) for v in values]
    assert np.allclose(measures.sparsity(maps), gini, **CLOSE)


def test_average_precision(pair) -> None:
    maps, masks = pair
    ours = measures.average_precision(maps, masks)
    for value, map_, mask in zip(ours, maps.double(), masks, strict=True):
        both = torch.cat([map_.flatten(), 1 - map_.flatten()])
        truth = torch.cat([mask.flatten(), ~mask.flatten()])
        assert value.item() == pytest.approx(average_precision_score(truth, both), abs=1e-6)
        # torchmetrics keeps the areas in float32, and so may see ties where there are none
        assert value.item() == pytest.approx(binary_average_precision(both, truth.int()).item(), abs=1e-4)


def test_segmentation(pair) -> None:
    maps, masks = pair
    counts = measures.confusion(maps, masks)
    assert counts.sum() == maps.numel()
    found = maps.double() > maps.double().mean((1, 2), keepdim=True)
    guess, truth = found.long().flatten(), masks.long().flatten()
    pooled = measures.segmentation(counts.sum(0))
    expected = {
        "pixel accuracy": binary_accuracy(guess, truth),
        "mean accuracy": multiclass_accuracy(guess, truth, 2, average="macro"),
        "mean IoU": multiclass_jaccard_index(guess, truth, 2, average="macro"),
    }
    for name, value in expected.items():
        assert pooled[name].item() == pytest.approx(value.item(), abs=1e-6), name
    for i, image in enumerate(counts):
        assert image[1, 1] / (image.sum() - image[0, 0]) == pytest.approx(
            binary_jaccard_index(found[i].long(), masks[i].long()).item(), abs=1e-6
        )


def test_a_class_that_is_not_there_is_left_out() -> None:
    counts = torch.tensor([[[0.0, 0.0], [1.0, 3.0]], [[2.0, 2.0], [0.0, 0.0]]])  # no background, no foreground
    scores = measures.segmentation(counts)
    assert scores["mean accuracy"].tolist() == [0.75, 0.5]
    assert scores["mean IoU"].tolist() == [0.375, 0.25]


@pytest.mark.parametrize("level", [0.0, 0.7, 1.0])
def test_a_constant_map_scores_what_chance_does(level: float) -> None:
    _, masks = random_maps()
    maps = torch.full((B, H, W), level)
    area = masks.double().mean((1, 2))
    for measure in (measures.pointing_game, measures.mass_accuracy, measures.rank_accuracy):
        assert torch.allclose(measure(maps, masks), area, **CLOSE), measure.__name__
    assert torch.allclose(measures.sparsity(maps), torch.zeros(B).double(), **CLOSE)


def test_the_perfect_map_and_its_opposite() -> None:
    _, masks = random_maps()
    masks = masks[:-1]  # the last has no outside
    measured = [measures.pointing_game, measures.mass_accuracy, measures.rank_accuracy, measures.average_precision]
    for measure in measured:
        assert torch.allclose(measure(masks.float(), masks), torch.ones(B - 1).double(), **CLOSE), measure.__name__
    few = masks[: B // 4]  # of so few pixels that none of the highest is inside
    for measure in measured[:3]:
        assert torch.allclose(measure(1 - few.float(), few), torch.zeros(len(few)).double(), **CLOSE), measure.__name__
    assert measures.segmentation(measures.confusion(masks.float(), masks).sum(0))["mean IoU"] == 1


@pytest.mark.parametrize(
    "masks", [torch.zeros(2, 4, 4), torch.zeros(2, 4, 3, dtype=torch.bool), torch.zeros(4, 4, dtype=torch.bool)]
)
def test_shapes_and_types_are_checked(masks: torch.Tensor) -> None:
    with pytest.raises(ValueError, match="bool"):
        measures.pointing_game(torch.rand(2, 4, 4), masks)


def test_against_quantus() -> None:
    """The reference toolkit, where it is there: it pins too much to be a dependency of the tests."""
    quantus = pytest.importorskip("quantus", reason="pip install quantus, to compare with it as well")
    maps, masks = random_maps()
    plain = {"abs": False, "normalise": False, "disable_warnings": True}
    inputs = {
        "model": None,
        "x_batch": np.zeros((B, 1, H, W)),
        "y_batch": np.zeros(B, dtype=int),
        "a_batch": maps[:, None].double().numpy(),
        "s_batch": masks[:, None].numpy(),
    }
    for metric, ours in {
        quantus.PointingGame(**plain): measures.pointing_game(maps, masks),
        quantus.RelevanceMassAccuracy(**plain): measures.mass_accuracy(maps, masks),
        quantus.RelevanceRankAccuracy(**plain): measures.rank_accuracy(maps, masks),
        quantus.Sparseness(**plain | {"abs": True}): measures.sparsity(maps),
    }.items():
        assert np.allclose(metric(**inputs), ours, **CLOSE), type(metric).__name__
