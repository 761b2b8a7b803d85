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
from ..model.decide import Decide, on_grid
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


def tokens_by_block(model: Any, images: Tensor, decide: Decide | None = None) -> Iterator[PackedTokens]:
    """The tokens that enter each block, in order, and finally the output of the last block: depth + 1 items.

    Computed lazily: if the caller stops early, later blocks do not run.

    Args:
        model: ``ReducedVisionTransformer`` or a supported timm one.
        images: ``(B, in_chans, H, W)``, normalised.
        decide: for a reduced model; ``model.decision`` if None.
    """
    backbone = backbone_of(model)
    packed = vit.embed_packed(backbone, images)
    groups = model.groups if isinstance(model, ReducedVisionTransformer) else [range(len(backbone.blocks))]
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
