"""Tiny models that have something to show, and images for them.

At birth every map is flat within rounding, and to normalise it would show the rounding; trained models are sharp, and
so are these.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

import iared2
from iared2 import ReducedVisionTransformer

TINY = {"img_size": (48, 32), "patch_size": 8, "embed_dim": 48, "num_heads": 3, "num_classes": 7}
SMALL = {"img_size": 64, "patch_size": 16, "embed_dim": 48, "depth": 4, "num_heads": 3}


def sharp_model(family: tuple[str, dict], **kwargs: Any) -> ReducedVisionTransformer:
    """A tiny model of a family (conftest.py) whose attention, scores and logits tell patches apart."""
    torch.manual_seed(0)
    name, timm_kwargs = family
    model = iared2.from_timm(name, **{**timm_kwargs, **kwargs})
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if name.endswith(("attn.qkv.weight", "q_proj.weight", "k_proj.weight", "query.weight", "key.weight")):
                parameter *= 8
            elif name.endswith(("gamma", "gamma_1", "gamma_2")):  # layer scale, born so small that no block acts
                parameter.fill_(0.5)
            elif name.endswith(("_token", "head.weight", "head_dist.weight")):
                parameter.normal_(std=0.5)
    return model.eval()


def sharp_images(batch: int = 5, height: int = 48, width: int = 32) -> Tensor:
    """Normalised noise ``(B, 3, height, width)``, half of each image brighter, another half in every second one."""
    images = torch.randn(batch, 3, height, width, generator=torch.Generator().manual_seed(1))
    images[::2, :, : height // 2] += 1
    images[1::2, ..., width // 2 :] += 1
    return images
