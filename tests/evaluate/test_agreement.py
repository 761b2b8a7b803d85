"""What is kept of the dense model: `evaluate.agreement`."""

from __future__ import annotations

import math

import pytest
import torch
from scipy.stats import beta
from sklearn.datasets import load_digits
from sklearn.neighbors import KNeighborsClassifier, NearestNeighbors

from iared2.evaluate.agreement import Agreement, agreement, knn_top1, nearest, photos_needed, upper_bound


@pytest.mark.parametrize(("changed", "photos"), [(0, 299), (6, 250), (7, 250), (16, 500), (249, 250), (3, 10)])
@pytest.mark.parametrize("confidence", [0.95, 0.975])
def test_the_bound_is_that_of_clopper_and_pearson(changed, photos, confidence):
    expected = beta.ppf(confidence, changed + 1, photos - changed)
    assert upper_bound(changed, photos, confidence) == pytest.approx(expected, abs=1e-9)


def test_the_interval_of_all_and_of_none():
    assert upper_bound(5, 5) == 1
    low, high = Agreement(250, 6, 0.0).interval
    assert (1 - low, 1 - high) == pytest.approx((beta.ppf(0.975, 7, 244), beta.ppf(0.025, 6, 245)))
    assert Agreement(20, 0, 0.0).interval[1] == 1
    assert Agreement(20, 20, 0.0).interval[0] == 0


@pytest.mark.parametrize("share", [0.001, 0.01, 0.05, 0.3])
def test_so_many_photos_are_needed_and_no_more(share):
    needed = photos_needed(share)
    assert needed == math.ceil(math.log(0.05) / math.log(1 - share))
    assert upper_bound(0, needed) < share <= upper_bound(0, needed - 1)


def test_answers():
    dense = torch.eye(4)[[0, 1, 2, 3, 0]]
    reduced = torch.eye(4)[[0, 1, 2, 0, 1]]
    found = agreement(dense, reduced)
    assert (found.photos, found.changed, found.kept) == (5, 2, pytest.approx(0.6))
    assert found.cosine is None
    assert found.divergence > 0


@pytest.fixture(scope="module")
def digits():
    pixels, labels = load_digits(return_X_y=True)
    return torch.tensor(pixels[:1300]).float(), torch.tensor(labels[:1300])  # more than one block of rows


def test_neighbours_are_those_of_scikit_learn(digits):
    features, labels = digits
    rows, cosines = nearest(features, 10)
    expected = NearestNeighbors(n_neighbors=11, metric="cosine").fit(features)
    distances, _ = expected.kneighbors(features)
    torch.testing.assert_close(1 - cosines, torch.tensor(distances)[:, 1:].float(), atol=1e-5, rtol=0)
    assert not (rows == torch.arange(len(rows))[:, None]).any()

    one = KNeighborsClassifier(1, metric="cosine").fit(features, labels)
    others = one.kneighbors(features, 2)[1][:, 1]
    assert knn_top1(features, labels, 1) == pytest.approx(100 * (labels[others] == labels).double().mean().item())
    assert knn_top1(features, labels) > 97


def test_embeddings(digits):
    features, _ = digits
    same = agreement(features, 3 * features, classes=False)
    assert (same.changed, same.neighbours) == (0, 1)
    assert (same.cosine, same.cosine_p1) == (pytest.approx(1), pytest.approx(1))
    few = agreement(features, features[:, :32].repeat(1, 2), classes=False)
    assert 0 < few.changed < len(features)
    assert 0.1 < few.neighbours < 0.9
    assert few.cosine_p1 < few.cosine < 1
    assert few.divergence == pytest.approx(1 - few.cosine, abs=1e-6)
    # the nearest of three points changes for the one that moved, and for none that kept its own
    dense = torch.tensor([[1.0, 0.0], [1.0, 0.1], [0.0, 1.0], [0.1, 1.0]])
    reduced = torch.tensor([[1.0, 0.0], [0.05, 1.0], [0.0, 1.0], [0.1, 1.0]])
    moved = agreement(dense, reduced, classes=False)
    assert moved.changed == 4
    assert agreement(dense[:1], reduced[:1], classes=False).changed == 0
