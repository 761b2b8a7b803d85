"""Images to tokens in a graph: those of the images as they are, or of smaller ones (`Decision.scale`)."""

from __future__ import annotations

import copy
from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ..model import backbone as vit
from ..model.reduced import ReducedVisionTransformer


class Embed(nn.Module):
    """The embedding of images of the model's size, at a grid of patches.

    A runtime may resize by other rules than torch, or not at all. Resizing is linear, by rows and by columns, so here
    it is two products with constants.

    Args:
        model: in float32 on the CPU.
        grid_size: rows and columns; the model's own, or smaller ones.
    """

    down: Tensor
    across: Tensor

    def __init__(self, model: ReducedVisionTransformer, grid_size: Sequence[int]) -> None:
        super().__init__()
        self.backbone, self.is_smaller = copy.copy(model.backbone), tuple(grid_size) != model.grid_size
        if self.is_smaller:
            images = torch.zeros(1, *model.pretrained_cfg["input_size"])
            self.backbone, small = vit.smaller(model.backbone, images, grid_size)
            for name, before, after in zip(("down", "across"), images.shape[2:], small.shape[2:], strict=True):
                unit = torch.eye(before)[None, None]
                self.register_buffer(name, F.interpolate(unit, (after, before), mode="bicubic", antialias=True)[0, 0])

        # a module that has two names in a graph would lose its class
        self.backbone._modules = {name: m for name, m in self.backbone._modules.items() if name != "blocks"}

    def forward(self, images: Tensor) -> tuple[Tensor, Tensor | None]:
        """See `model.backbone.embed`."""
        if self.is_smaller:
            images = self.down @ images @ self.across.mT
        return vit.embed(self.backbone, images)
