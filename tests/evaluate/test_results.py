"""Figures over the images: their intervals against scipy's, and who is first."""

from __future__ import annotations

import numpy as np
import pytest
import scipy.stats

from iared2.evaluate.explanations import results


def test_intervals_are_those_of_scipy() -> None:
    """Of a mean, against scipy's percentile bootstrap; of a ratio of sums, against its own definition there."""
    generator = np.random.default_rng(0)
    n = 200
    columns = {
        m.name: generator.random(n) for m in results.MEASURES if m.name not in ("pixel accuracy", "mean accuracy")
    }
    columns |= {name: generator.integers(1, 50, n).astype(float) for name in results.COUNTS}
    del columns["mean IoU"]
    ours = results.estimate(columns)
    arguments = {"n_resamples": 4000, "method": "percentile", "rng": np.random.default_rng(1)}
    mean = scipy.stats.bootstrap((columns["mAP"],), np.mean, **arguments).confidence_interval

    def iou(tn, fp, fn, tp):
        tn, fp, fn, tp = tn.sum(), fp.sum(), fn.sum(), tp.sum()
        return (tp / (tp + fp + fn) + tn / (tn + fp + fn)) / 2

    counts = tuple(columns[name] for name in results.COUNTS)
    pooled = scipy.stats.bootstrap(counts, iou, paired=True, vectorized=False, **arguments).confidence_interval
    assert ours["mAP"].value == pytest.approx(columns["mAP"].mean())
    assert ours["mean IoU"].value == pytest.approx(iou(*counts))
    for figure, theirs in ((ours["mAP"], mean), (ours["mean IoU"], pooled)):
        width = theirs.high - theirs.low
        assert figure.low == pytest.approx(theirs.low, abs=0.06 * width)
        assert figure.high == pytest.approx(theirs.high, abs=0.06 * width)


def test_resamples_in_pieces_are_as_many(monkeypatch: pytest.MonkeyPatch) -> None:
    """Of many images, the resamples do not fit in memory together."""
    columns = {m.name: np.arange(4.0) for m in results.MEASURES} | {name: np.arange(4.0) + 1 for name in results.COUNTS}
    whole = results.estimate(columns)
    monkeypatch.setattr(results, "MAX_COUNTS", 4 * 7)
    assert results.estimate(columns) == whole


def test_leaders() -> None:
    """The first, and who lies within its interval; lower is better in deletion, and no one leads in sparsity."""

    def row(method: str, value: float, spread: float) -> results.MethodResult:
        figure = results.Estimate(value, value - spread, value + spread)
        return results.MethodResult(method, 1.0, {m.name: figure for m in results.MEASURES})

    rows = [row("a", 0.5, 0.1), row("b", 0.41, 0.3), row("c", 0.3, 0.05)]
    result = results.Benchmark(9, {}, "box", "label", 4, "blur", 0, 1.0, 0.5, rows)
    measure = {m.name: m for m in results.MEASURES}
    assert result.leaders(measure["mAP"]) == {"a", "b"}
    assert result.leaders(measure["deletion"]) == {"c"}
    assert result.leaders(measure["sparsity"]) == set()
