"""Whether a prediction is based on what a heat map shows: insertion, deletion, and blanking the dropped patches.

All of them change the photo and measure the model's prediction; no region is needed. Data flow:

    maps (B, H, W) -> order of the pixels -> images with some pixels replaced -> probabilities (B, steps + 1)
    kept (B, N)    -> images with the other patches replaced -> the dense prediction, before and after (B,)

Images are normalised, on the model's device. A *fill* (``fills``) replaces pixels. Tied pixels have a random order,
the same for every image and map, so no position is favoured and methods are comparable.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Literal

import torch
from torch import Tensor
from torch.nn import functional as F
from torchvision.transforms.v2.functional import gaussian_blur

from ...model.decide import top_k

Model = Callable[[Tensor], Tensor]
"""Images ``(B, 3, H, W)`` -> logits ``(B, K)``."""
Fill = Literal["blur", "zero", "mean"]

BLUR = 1 / 10
"""Standard deviation of "blur" as a share of the image's longer side. RISE takes 5 of 224 pixels, which leaves objects
recognisable and a 32-pixel image as it is."""


def fills(images: Tensor, fill: Fill) -> Tensor:
    """The replacement of the pixels of ``images (B, C, H, W)``, of the same shape.

    "blur": the image under a Gaussian of ``BLUR``, reflected at the border. "zero": 0 after normalisation, the mean
    colour of the data set. "mean": the mean colour of the image itself.
    """
    if fill == "zero":
        return torch.zeros_like(images)
    if fill == "mean":
        return images.mean((2, 3), keepdim=True).expand_as(images)
    height, width = images.shape[-2:]
    sigma = BLUR * max(height, width)
    across, down = (2 * min(round(3 * sigma), side - 1) + 1 for side in (width, height))  # reflection needs a pixel
    images = gaussian_blur(images, [across, 1], [sigma, sigma])  # one way after the other: a square kernel is slow
    return gaussian_blur(images, [1, down], [sigma, sigma])


@torch.no_grad()
def curve(
    model: Model,
    images: Tensor,
    maps: Tensor,
    target: Tensor,
    way: Literal["insertion", "deletion"],
    fill: Fill,
    steps: int,
) -> Tensor:
    """Probability of the target while pixels appear or disappear, the highest of the map first (Petsiuk et al., RISE).

    Args:
        model: images to logits.
        images: ``(B, C, H, W)``.
        maps: ``(B, H, W)``.
        target: ``(B,)`` class indices.
        way: "insertion" goes from the fill to the image, "deletion" from the image to the fill.
        fill: see ``fills``.
        steps: 1 or more; each moves an equal share of the pixels.

    Returns:
        ``(B, steps + 1)`` float32 probabilities, from the whole fill to the whole image; of a deletion, the reverse.
    """
    pixels = maps[0].numel()
    shuffle = torch.randperm(pixels, generator=torch.Generator().manual_seed(0)).to(maps.device)
    order = shuffle[maps.flatten(1)[:, shuffle].argsort(dim=1, descending=True, stable=True)]
    count = torch.arange(pixels, device=maps.device).expand_as(order)
    rank = torch.empty_like(order).scatter_(1, order, count).view(len(maps), 1, *maps.shape[1:]).to(images.device)
    other = fills(images, fill)
    start, end = (other, images) if way == "insertion" else (images, other)
    probabilities = []
    for step in range(steps + 1):
        mixed = torch.where(rank < round(pixels * step / steps), end, start)
        probabilities.append(model(mixed).float().softmax(1).gather(1, target[:, None]))
    return torch.cat(probabilities, 1)


def insertion(
    model: Model, images: Tensor, maps: Tensor, target: Tensor, *, fill: Fill = "blur", steps: int = 16
) -> Tensor:
    """Area under the insertion curve, ``(B,)`` in [0, 1], by trapezoids. Higher is better. See ``curve``."""
    return torch.trapezoid(curve(model, images, maps, target, "insertion", fill, steps), dx=1 / steps)


def deletion(
    model: Model, images: Tensor, maps: Tensor, target: Tensor, *, fill: Fill = "zero", steps: int = 16
) -> Tensor:
    """Area under the deletion curve, ``(B,)`` in [0, 1], by trapezoids. Lower is better. See ``curve``."""
    return torch.trapezoid(curve(model, images, maps, target, "deletion", fill, steps), dx=1 / steps)


def blanked(images: Tensor, kept: Tensor, grid: Sequence[float], fill: Fill = "blur") -> Tensor:
    """``images (B, C, H, W)`` with the fill wherever a patch is not in ``kept (B, N)``; ``grid`` as of ``grid_of``."""
    row, column = (
        ((torch.arange(pixels, device=kept.device) + 0.5) * (count / pixels)).long()
        for pixels, count in zip(images.shape[-2:], grid, strict=True)
    )
    shown = kept.unflatten(1, tuple(map(math.ceil, grid)))[:, None, row[:, None], column]
    return torch.where(shown, images, fills(images, fill))


def best_patches(maps: Tensor, num_keep: Tensor, grid: Sequence[float]) -> Tensor:
    """The patches that a baseline would keep: the ``num_keep (B,)`` with the highest mean of ``maps (B, H, W)``.

    Returns:
        ``(B, N)`` bool. Tied patches have a random order, the same for every image.
    """
    rows, columns = map(math.ceil, grid)
    down, right = (round(side * (math.ceil(n) / n - 1)) for side, n in zip(maps.shape[1:], grid, strict=True))
    patches = F.adaptive_avg_pool2d(F.pad(maps[:, None], (0, right, 0, down)), (rows, columns)).flatten(1)
    shuffle = torch.randperm(patches.shape[1], generator=torch.Generator().manual_seed(0)).to(maps.device)
    kept = top_k(patches[:, shuffle], torch.ones_like(patches, dtype=torch.bool), num_keep)
    return kept[:, shuffle.argsort()]


@torch.no_grad()
def blanking(
    backbone: Model, images: Tensor, kept: Tensor, grid: Sequence[float], *, fill: Fill = "blur"
) -> tuple[Tensor, Tensor]:
    """How the dense prediction changes when the dropped patches are blank in the photo.

    With the reduced model's own ``kept``, this tests the map, which is also the decision: were the dropped patches
    redundant for the network that sees all of them? With ``best_patches`` of the same number, it tests a baseline.

    Args:
        backbone: the dense model; it sees every patch, blank or not.
        images: ``(B, C, H, W)``.
        kept: ``(B, N)`` bool.
        grid: rows and columns, of ``grid_of``.
        fill: see ``fills``. A grey patch carries information, too: a network that was never trained on one loses more
            to the inserted grey than to the removed content, for any choice of patches.

    Returns:
        ``(B,)`` float32, the loss of probability of the dense top-1 class, in [-1, 1], lower is better; and ``(B,)``
        bool, whether it is still top-1.
    """
    before = backbone(images).float().softmax(1)
    after = backbone(blanked(images, kept, grid, fill)).float().softmax(1)
    top1 = before.argmax(1, keepdim=True)
    return (before - after).gather(1, top1)[:, 0], after.argmax(1) == top1[:, 0]
