"""How well a heat map finds a region: localisation, segmentation, sparsity. Pure functions, batched.

Every function takes ``maps (B, H, W)``, finite and at least 0, and ``masks (B, H, W)`` bool, True inside the region, on
one device that supports float64, in which everything is computed. It returns ``(B,)`` float64, one number per image in
[0, 1]. Every region must have a pixel, otherwise the measures of localisation are NaN. Shapes that differ raise
ValueError. Does not depend on models, data or pictures.

Ties occur in real maps (a constant map, or a map that is 0 where patches were dropped), and are never resolved by pixel
position: a measure takes the expectation over all orders of the tied pixels. So a constant map scores at chance, the
share of the region in the image, and a map of zeros counts as constant. Without ties, every measure is the published
one.
"""

from __future__ import annotations

import torch
from torch import Tensor


def pointing_game(maps: Tensor, masks: Tensor) -> Tensor:
    """Whether the highest pixel lies in the region (Zhang et al., Excitation Backprop, IJCV 2018): 0 or 1.

    If several pixels are highest, the share of them in the region. There is no tolerance around the region: the
    published one, 15 pixels, is for photos of 500 pixels.
    """
    values, inside = _flat(maps, masks)
    highest = values == values.amax(1, keepdim=True)
    return (highest & inside).sum(1) / highest.double().sum(1)


def mass_accuracy(maps: Tensor, masks: Tensor) -> Tensor:
    """Share of the map's sum that lies in the region (relevance mass accuracy: Arras et al., CLEVR-XAI, 2022)."""
    values, inside = _flat(maps, masks)
    total = values.sum(1)
    share = (values * inside).sum(1) / total
    return torch.where(total > 0, share, inside.double().mean(1))


def energy_in_box(maps: Tensor, masks: Tensor) -> Tensor:
    """Share of the map's sum in the region's bounding box (energy-based pointing game: Wang et al., Score-CAM, 2020).

    For a region that is a box, this equals ``mass_accuracy``.
    """
    return mass_accuracy(maps, bounding_boxes(masks))


def bounding_boxes(masks: Tensor) -> Tensor:
    """``(B, H, W)`` bool, the smallest box around each region; empty if the region is empty."""

    def between(line: Tensor) -> Tensor:  # (B, L) -> True from the first True to the last
        ahead = line.int().cummax(1).values
        behind = line.flip(1).int().cummax(1).values.flip(1)
        return (ahead & behind).bool()

    return between(masks.any(2))[:, :, None] & between(masks.any(1))[:, None, :]


def rank_accuracy(maps: Tensor, masks: Tensor) -> Tensor:
    """Share of the k highest pixels that lies in the region of k pixels (Arras et al., CLEVR-XAI, 2022)."""
    values, inside = _flat(maps, masks)
    size = inside.sum(1, keepdim=True)
    last = values.sort(1, descending=True).values.gather(1, (size - 1).clamp_min(0))  # the value of the k-th
    above, tied = values > last, values == last
    chance = (size - above.sum(1, keepdim=True)) / tied.sum(1, keepdim=True)  # of a tied pixel to be among the k
    return ((above + tied * chance) * inside).sum(1) / size[:, 0].double()


def sparsity(maps: Tensor) -> Tensor:
    """Gini index of the pixels: 0 for a constant map, towards 1 for a single bright pixel (Chalasani et al., 2020)."""
    values = maps.double().flatten(1).sort(1).values
    pixels = values.shape[1]
    weights = 2 * torch.arange(1, pixels + 1, device=values.device, dtype=torch.float64) - pixels - 1
    total = values.sum(1)
    return torch.where(total > 0, values @ weights / (pixels * total), 0.0)


def average_precision(maps: Tensor, masks: Tensor) -> Tensor:
    """Average precision of the map as a segmentation, over foreground and background pooled: the mean is mAP.

    The convention of the ImageNet-Segmentation table (Chefer et al., CVPR 2021, `imagenet_seg_eval.py`): each pixel is
    retrieved twice, as foreground by its value and as background by one minus it, so maps must be in [0, 1]. Equal
    values are one threshold, as in scikit-learn, and the curve is not interpolated.
    """
    values, inside = _flat(maps, masks)
    return _average_precision(torch.cat([values, 1 - values], 1), torch.cat([inside, ~inside], 1))


def _average_precision(values: Tensor, relevant: Tensor) -> Tensor:
    """``(B, n) -> (B,)``: for each relevant item the precision at its own threshold, averaged."""
    values, order = values.sort(1, descending=True)
    relevant = relevant.gather(1, order)
    count = torch.arange(1, values.shape[1] + 1, device=values.device)
    is_last = torch.ones_like(relevant)
    is_last[:, :-1] = values[:, :-1] != values[:, 1:]
    # the last item of equal values stands for all of them
    last = torch.where(is_last, count, count[-1]).flip(1).cummin(1).values.flip(1)
    precision = relevant.cumsum(1).gather(1, last - 1) / last.double()
    return (precision * relevant).sum(1) / relevant.sum(1)


def confusion(maps: Tensor, masks: Tensor) -> Tensor:
    """``(B, 2, 2)`` float64 pixel counts [truth, prediction], background first.

    A pixel is foreground if it is above its map's own mean, as in Chefer et al. (`imagenet_seg_eval.py`).
    """
    values, inside = _flat(maps, masks)
    found = values > values.mean(1, keepdim=True)
    cells = [(truth & guess).sum(1) for truth in (~inside, inside) for guess in (~found, found)]
    return torch.stack(cells, 1).double().unflatten(1, (2, 2))


def segmentation(counts: Tensor) -> dict[str, Tensor]:
    """Counts ``(..., 2, 2)`` of ``confusion`` -> "pixel accuracy", "mean accuracy" and "mean IoU", each ``(...)``.

    For a data set, pass its *summed* counts, as in Chefer et al. and in PASCAL VOC, instead of averaging over images.
    "Mean" is over the two classes; a class without a pixel is left out.
    """
    right = counts.diagonal(dim1=-2, dim2=-1)
    truth, guess = counts.sum(-1), counts.sum(-2)
    return {
        "pixel accuracy": right.sum(-1) / truth.sum(-1),
        "mean accuracy": (right / truth).nanmean(-1),
        "mean IoU": (right / (truth + guess - right)).nanmean(-1),
    }


def _flat(maps: Tensor, masks: Tensor) -> tuple[Tensor, Tensor]:
    """``(B, H·W)`` each, the values in float64."""
    if maps.ndim != 3 or maps.shape != masks.shape or masks.dtype != torch.bool:
        raise ValueError(f"maps {tuple(maps.shape)} and masks {tuple(masks.shape)} {masks.dtype}: give (B, H, W), bool")
    return maps.double().flatten(1), masks.flatten(1)
