"""The forward pass one block at a time, for a reduced model or a dense timm backbone.

A dense backbone is the case in which nothing is dropped. Handles tokens and blocks, not maps.
"""

from __future__ import annotations

import copy
from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor, nn

from ..model import backbone as vit
from ..model.decide import Decide, first_grid, on_grid
from ..model.reduced import ReducedVisionTransformer
from ..model.tokens import PackedTokens


def backbone_of(model: Any) -> Any:
    """The timm vision transformer in a reduced model, or the model itself.

    Raises:
        InputError: it is neither, or a transformer that packed execution would compute wrongly.
    """
    if isinstance(model, ReducedVisionTransformer):
        return model.backbone
    vit.check_supported(model)
    return model


def first_pass(model: Any, images: Tensor) -> tuple[Any, Tensor]:
    """A model whose only pass is the first one of ``model``, and the images that it takes; see `Decision.scale`.

    Where these are ``images`` themselves, or the model is dense, both are as given. Otherwise no gradient reaches the
    images or the positions: a map needs none, and a twin of the model copies only tensors that are leaves.
    """
    if not isinstance(model, ReducedVisionTransformer):
        return model, images
    grid = vit.grid_of(model.backbone, images.shape[2:])
    if (first := first_grid(model.decision, grid)) == grid:
        return model, images
    seen = copy.copy(model)  # shares the weights
    seen._modules = dict(model._modules)
    with torch.no_grad():
        seen.backbone, small = vit.smaller(model.backbone, images, first)
    seen.decision = model.decision.but(scale=1.0, confidence=0.0)
    return seen, small


def tokens_by_block(model: Any, images: Tensor, decide: Decide | None = None) -> Iterator[PackedTokens]:
    """The tokens that enter each block, in order, and finally the output of the last block: depth + 1 items.

    Computed lazily: if the caller stops early, later blocks do not run.

    Args:
        model: ``ReducedVisionTransformer`` or a supported timm one.
        images: ``(B, in_chans, H, W)``, normalised.
        decide: for a reduced model; ``model.decision`` if None.
    """
    backbone = backbone_of(model)
    if isinstance(model, ReducedVisionTransformer):
        packed, groups = model.embed(images, decide=decide), model.groups
    else:
        packed, groups = vit.embed_packed(backbone, images), [range(len(backbone.blocks))]
    for group, blocks in enumerate(groups):
        if isinstance(model, ReducedVisionTransformer):
            with torch.no_grad():
                scores = model.score(packed, group)
                chosen = on_grid(decide or model.decision, packed.grid_size)
                keep = model.decide(scores, packed.alive, group, chosen)
            packed = model.drop(packed, keep)
        for index in blocks:
            yield packed
            packed = vit.run_blocks(backbone, range(index, index + 1), packed)
    yield packed


def private_twin(model: Any) -> Any:
    """A copy of the network that shares the weights, in evaluation mode, without gradients for the weights.

    A method that hooks layers, changes their mode or calls ``backward`` uses the twin. The model is not changed, even
    while other threads use it.
    """
    shared: dict[int, Any] = {id(p): nn.Parameter(p.detach(), requires_grad=False) for p in model.parameters()}
    shared |= {id(buffer): buffer for buffer in model.buffers()}
    return copy.deepcopy(model, shared).eval()
