"""What a reduced model keeps of the dense one on photos without labels: its answers, or its nearest neighbours.

Shares of photos have exact intervals (Clopper & Pearson 1934). Neighbours are among the given photos, by cosine, so a
photo has them in common with others, and their intervals are approximate.
"""

from __future__ import annotations

import math
from dataclasses import asdict, dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from ..model.schedule import divergence

NEIGHBOURS = 10
CONFIDENCE = 0.95
KNN_TEMPERATURE = 0.07
"""Of the weights of the neighbours in `knn_top1`, as for DINO (Caron et al. 2021)."""
ROWS_AT_ONCE = 1024


@dataclass(frozen=True)
class Agreement:
    """How far a model agrees with the dense one.

    Attributes:
        photos: their number n.
        changed: photos whose predicted class, or without classes, whose nearest neighbour is another.
        divergence: mean of `schedule.divergence`.
        cosine, cosine_p1: mean and 1st percentile of the cosine with the dense embedding; None for a model of classes.
        neighbours: share of the dense model's 10 nearest neighbours that are found; None for a model of classes.
    """

    photos: int
    changed: int
    divergence: float
    cosine: float | None = None
    cosine_p1: float | None = None
    neighbours: float | None = None

    @property
    def kept(self) -> float:
        """Share of the photos that are not ``changed``, 0…1."""
        return 1 - self.changed / self.photos

    @property
    def interval(self) -> tuple[float, float]:
        """95 % interval of ``kept``."""
        tail = (1 - CONFIDENCE) / 2
        return (
            1 - upper_bound(self.changed, self.photos, 1 - tail),
            upper_bound(self.photos - self.changed, self.photos, 1 - tail),
        )

    @property
    def bound(self) -> float:
        """Upper 95 % bound of the share that changes, one-sided."""
        return upper_bound(self.changed, self.photos)

    def to_dict(self) -> dict[str, Any]:
        """As JSON types."""
        return {**asdict(self), "kept": self.kept, "interval": list(self.interval), "bound": self.bound}


def agreement(dense: Tensor, reduced: Tensor, classes: bool = True) -> Agreement:
    """Compare outputs ``(n, K)`` with those of the dense model: logits, or features if there are no ``classes``."""
    dense, reduced = dense.float(), reduced.float()
    far = divergence(dense, reduced, classes=classes).double().mean().item()
    if classes:
        return Agreement(len(dense), int((dense.argmax(1) != reduced.argmax(1)).sum()), far)
    cosine = F.cosine_similarity(dense, reduced)
    k = min(NEIGHBOURS, len(dense) - 1)
    if k < 1:
        return Agreement(len(dense), 0, far, cosine.mean().item(), cosine.min().item(), 1.0)
    expected, found = (nearest(features, k)[0] for features in (dense, reduced))
    share = (expected[:, :, None] == found[:, None]).any(2).double().mean().item()
    changed = int((expected[:, 0] != found[:, 0]).sum())
    return Agreement(len(dense), changed, far, cosine.mean().item(), cosine.quantile(0.01).item(), share)


def nearest(features: Tensor, k: int) -> tuple[Tensor, Tensor]:
    """The k nearest other rows of each row ``(n, k)`` by cosine, the nearest first, and the cosines ``(n, k)``."""
    features, rows, cosines = F.normalize(features.float()), [], []
    for start in range(0, len(features), ROWS_AT_ONCE):
        alike = features[start : start + ROWS_AT_ONCE] @ features.T
        alike.diagonal(start).fill_(-math.inf)  # not itself
        best = alike.topk(k)
        rows.append(best.indices)
        cosines.append(best.values)
    return torch.cat(rows), torch.cat(cosines)


def knn_top1(features: Tensor, labels: Tensor, k: int = NEIGHBOURS) -> float:
    """Accuracy in percent of k nearest neighbours among the others, weighted by ``exp(cosine / 0.07)``.

    Args:
        features: ``(n, C)``.
        labels: ``(n,)`` int64.
        k: at most n − 1 are used.
    """
    rows, cosines = nearest(features, min(k, len(features) - 1))
    votes = torch.zeros(len(features), int(labels.max()) + 1, device=features.device)
    votes.scatter_add_(1, labels[rows], (cosines / KNN_TEMPERATURE).softmax(1))
    return 100 * (votes.argmax(1) == labels).double().mean().item()


def upper_bound(changed: int, photos: int, confidence: float = CONFIDENCE) -> float:
    """Clopper and Pearson's upper bound of a share of which ``changed`` of ``photos`` were seen, one-sided."""
    if changed >= photos:
        return 1.0
    counts = torch.arange(changed + 1, dtype=torch.float64)
    low, high = changed / photos, 1.0
    for _ in range(50):
        middle = (low + high) / 2
        binomial = torch.distributions.Binomial(photos, torch.tensor(middle, dtype=torch.float64))
        as_few = binomial.log_prob(counts).logsumexp(0).exp().item()
        low, high = (middle, high) if as_few > 1 - confidence else (low, middle)
    return high


def photos_needed(share: float) -> int:
    """Photos without any change after which the `upper_bound` lies below a share in (0, 1)."""
    return math.floor(math.log(1 - CONFIDENCE) / math.log1p(-share)) + 1
