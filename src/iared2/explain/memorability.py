"""Memorability maps: the paper compares with MemNet, whose weights are no longer available; ResMem is its successor.

ResMem (Needell & Bainbridge 2022; package `resmem`, 489 MB with its weights) is a separate network: it sees the photo,
not the model that is explained. It predicts one number, how likely people are to recognise the photo. With MemNet, a
map takes one prediction per region. Here, Grad-CAM computes all positions at once, in the last layer with positions of
each of ResMem's two branches. This takes one forward and one backward pass; occluding one of 7 × 7 regions at a time
would take fifty forward passes of 12 GMACs.
"""

from __future__ import annotations

import warnings
from functools import lru_cache
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from .forward import private_twin
from .gradients import optional, run_cam

SIDE = 227  # of ResMem's input


def memorability(photos: Tensor) -> Tensor:
    """The positions in a photo that make it memorable.

    Args:
        photos: ``(B, 3, H, W)`` RGB in [0, 1]. The whole photo is used: resized, never cropped.

    Returns:
        ``(B, H, W)`` in [0, 1].

    Raises:
        InputError: `resmem` or `grad-cam` is not installed.
    """
    cam = optional("pytorch_grad_cam", "memorability", "grad-cam").GradCAM
    network = private_twin(_resmem(photos.device))
    x = F.interpolate(photos.float(), (SIDE, SIDE), mode="bilinear", antialias=True).clamp(0, 1)
    score = torch.zeros(len(x), dtype=torch.int64)  # the only output
    maps = run_cam(cam, network, [network.features.layer4[-1], network.pool5], x, score)
    return F.interpolate(maps[:, None], photos.shape[-2:], mode="bicubic", antialias=True)[:, 0].clamp(0, 1)


@lru_cache(maxsize=1)
def _resmem(device: torch.device) -> Any:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # torchvision's, about an argument that resmem uses
        return optional("resmem", "memorability", "resmem").ResMem(pretrained=True).eval().to(device)
