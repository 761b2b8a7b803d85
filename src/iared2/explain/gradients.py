"""Explanations that need a backward pass: Grad-CAM and its kin (package `grad-cam`), integrated gradients (`captum`).

On a reduced model the decisions are discrete and are held as the photo itself makes them; gradients flow through the
patches that survive, and one that is gone has 0 from there on. Everything runs on a private twin of the model, whose
weights, gradients, modes and hooks stay its own.
"""

from __future__ import annotations

import importlib
from typing import Any

import torch
from torch import Tensor, nn

from ..errors import InputError
from ..model import backbone as vit
from ..model.decide import Decide
from ..model.reduced import ReducedVisionTransformer
from .forward import backbone_of, private_twin, tokens_by_block

KIN = {"gradcam": "GradCAM", "gradcam++": "GradCAMPlusPlus", "hirescam": "HiResCAM", "layercam": "LayerCAM"}
"""Methods, and their classes in the package: those that stay finite on activations of both signs."""
STEPS = 32
"""Of the integral: the sum of the attributions is then within a few percent of the difference that it explains."""
BATCH = 16
"""Images at a time, when there are many steps."""


def optional(module: str, extra: str, package: str) -> Any:
    """A module of an optional package.

    Raises:
        InputError: it is not installed; says how to.
    """
    try:
        return importlib.import_module(module)
    except ModuleNotFoundError as error:
        raise InputError(f"this needs the package {package} ({error.name}): pip install 'iared2[{extra}]'") from None


def grad_cam(model: Any, images: Tensor, target: Tensor | None, method: str = "gradcam", block: int = -1) -> Tensor:
    """Grad-CAM (Selvaraju et al. 2017) of the tokens as the attention of a block sees them: after its ``norm1``.

    That is the package's advice for vision transformers: behind the last attention the class token reads patches no
    more, and their gradient is 0.

    Args:
        model: reduced or dense.
        images: ``(B, in_chans, H, W)``, normalised.
        target: ``(B,)`` classes, or None for the top-1.
        method: of ``KIN``.
        block: which one's input, from 0; −1 the last.

    Returns:
        ``(B, H, W)`` in [0, 1], as the package draws it (bilinear).
    """
    package = optional("pytorch_grad_cam", "explain", "grad-cam")
    twin = private_twin(model)
    network = _Classifier(twin, block % len(backbone_of(twin).blocks))
    layer = backbone_of(twin).blocks[block].norm1
    rows, columns = backbone_of(twin).patch_embed.dynamic_feat_size(images.shape[-2:])

    def grid(x: Tensor) -> Tensor:  # (T, C) -> (B, C, rows, columns), 0 where the patch is gone
        packed = network.entering
        dense = packed.to_dense(x.float())[:, packed.num_prefix_tokens :]
        return dense.mT.unflatten(2, (rows, columns))

    return run_cam(getattr(package, KIN[method]), network, [layer], images, target, grid)


def run_cam(
    cam: Any, network: nn.Module, layers: list[nn.Module], images: Tensor, target: Tensor | None, reshape: Any = None
) -> Tensor:
    """A class of the package at work on a private ``network``: ``(B, H, W)`` in [0, 1]."""
    targets_of = optional("pytorch_grad_cam.utils.model_targets", "explain", "grad-cam").ClassifierOutputTarget
    targets = None if target is None else [targets_of(label) for label in target.tolist()]
    with torch.inference_mode(False), torch.enable_grad(), cam(network, layers, reshape) as at_work:
        maps = at_work(images.clone().requires_grad_(), targets)
    return torch.from_numpy(maps).to(images.device)


class _Classifier(nn.Module):
    """images -> logits, with gradients from the input of one block on; remembers the rows that enter it."""

    def __init__(self, model: Any, block: int) -> None:
        super().__init__()
        self.model, self.block = model, block

    def forward(self, images: Tensor) -> Tensor:
        for index, packed in enumerate(tokens_by_block(self.model, images.detach())):
            if index == self.block:
                packed.x.requires_grad_()  # nothing before it does, so the graph begins here
                self.entering = packed
        return vit.head(backbone_of(self.model), packed).float()  # the package takes logits to numpy


def integrated_gradients(model: Any, images: Tensor, target: Tensor | None) -> Tensor:
    """Integrated gradients (Sundararajan et al. 2017) from the mean colour, 0 in a normalised image, to the image.

    Summed with their sign over the channels and pixels of each patch, and what speaks against the class cut off. The
    patch is what the model keeps or drops, and signed pixels that add up tell more of it than their sizes, which are
    mostly noise.

    Args:
        model: reduced or dense.
        images: ``(B, in_chans, H, W)``, normalised.
        target: ``(B,)`` classes, or None for the top-1.

    Returns:
        ``(B, N)``, 0 or more.
    """
    attr = optional("captum.attr", "explain", "captum")
    twin = private_twin(model)
    with torch.inference_mode(False):
        images = images.clone()
        decide: Decide | None = None
        with torch.no_grad():
            if isinstance(twin, ReducedVisionTransformer):
                output = twin.trace(images)
                decide, logits = _held(output.kept), output.logits
            else:
                logits = _logits(twin, images, None)
        method = attr.IntegratedGradients(lambda x: _logits(twin, x, decide))
        pixels = method.attribute(
            images,
            target=logits.argmax(1) if target is None else target,
            n_steps=STEPS,
            internal_batch_size=max(BATCH, len(images)),
        )
    patch = backbone_of(twin).patch_embed.patch_size
    return nn.functional.avg_pool2d(pixels.float().sum(1, keepdim=True), patch, ceil_mode=True).flatten(1).clamp_min(0)


def _logits(model: Any, images: Tensor, decide: Decide | None) -> Tensor:
    *_, last = tokens_by_block(model, images, decide)
    return vit.head(backbone_of(model), last)


def _held(kept: Tensor) -> Decide:
    """The decisions ``kept (D, B, N)`` again, for any number of turns of the same B images."""
    return lambda scores, alive, group: kept[group].repeat(len(scores) // kept.shape[1], 1)
