"""Explanations that need a backward pass: Grad-CAM and variants (package `grad-cam`), integrated gradients (`captum`).

In a reduced model, the decisions are discrete and fixed to those of the photo itself. Gradients flow through the kept
patches; a dropped patch has 0 from there on. Everything runs on a private twin of the model, so the gradients, modes
and hooks of the model do not change.
"""

from __future__ import annotations

import importlib
from typing import Any

import torch
from torch import Tensor, nn

from ..errors import missing
from ..model import backbone as vit
from ..model.block import NOTHING, parts
from ..model.decide import Decide
from ..model.reduced import ReducedVisionTransformer
from .forward import backbone_of, private_twin, tokens_by_block
from .names import KIN

STEPS = 32
"""Steps of the integral: the sum of attributions is then within a few percent of the difference it explains."""
BATCH = 16
"""Images per batch, since there are many steps."""


def optional(module: str, extra: str, package: str) -> Any:
    """A module of an optional package.

    Raises:
        InputError: it is not installed; says how to install it.
    """
    try:
        return importlib.import_module(module)
    except ModuleNotFoundError as error:
        raise missing("this", f"{package} ({error.name})", extra) from None


def grad_cam(model: Any, images: Tensor, target: Tensor | None, method: str = "gradcam", block: int = -1) -> Tensor:
    """Grad-CAM (Selvaraju et al. 2017) on the input of the attention of a block: after its first norm.

    The package recommends this for vision transformers: after the last attention, the class token does not depend on
    patches, so their gradient is 0. In a post-norm block: on the tokens that enter; with several attentions: the mean.

    Args:
        model: reduced or dense.
        images: ``(B, in_chans, H, W)``, normalised.
        target: ``(B,)`` classes, or None for the top-1.
        method: of ``KIN``.
        block: the block whose input is used, from 0; −1 for the last.

    Returns:
        ``(B, H, W)`` in [0, 1], as the package renders it (bilinear).
    """
    package = optional("pytorch_grad_cam", "explain", "grad-cam")
    twin = private_twin(model)
    network = _Classifier(twin, block % len(backbone_of(twin).blocks))
    attns = parts(backbone_of(twin).blocks[block]).attns
    # the package takes the mean over several layers
    layers = [network.entrance if branch.before is NOTHING else branch.before for branch in attns]
    rows, columns = backbone_of(twin).patch_embed.dynamic_feat_size(images.shape[-2:])

    def grid(x: Tensor) -> Tensor:  # (T, C) -> (B, C, rows, columns), 0 where the patch was dropped
        packed = network.entering
        dense = packed.to_dense(x.float())[:, packed.num_prefix_tokens :]
        return dense.mT.unflatten(2, (rows, columns))

    return run_cam(getattr(package, KIN[method]), network, layers, images, target, grid)


def run_cam(
    cam: Any, network: nn.Module, layers: list[nn.Module], images: Tensor, target: Tensor | None, reshape: Any = None
) -> Tensor:
    """Run a class of the package on a private ``network``: ``(B, H, W)`` in [0, 1]."""
    targets_of = optional("pytorch_grad_cam.utils.model_targets", "explain", "grad-cam").ClassifierOutputTarget
    targets = None if target is None else [targets_of(label) for label in target.tolist()]
    with torch.inference_mode(False), torch.enable_grad(), cam(network, layers, reshape) as at_work:
        maps = at_work(images.clone().requires_grad_(), targets)
    return torch.from_numpy(maps).to(images.device)


class _Classifier(nn.Module):
    """images -> logits, with gradients from the input of one block on; stores the rows that enter it."""

    def __init__(self, model: Any, block: int) -> None:
        super().__init__()
        self.model, self.block, self.entrance = model, block, nn.Identity()

    def forward(self, images: Tensor) -> Tensor:
        for index, packed in enumerate(tokens_by_block(self.model, images.detach())):
            if index == self.block:
                packed.x.requires_grad_()  # nothing before it does, so the graph begins here
                self.entering = packed
                self.entrance(packed.x)
        return vit.head(backbone_of(self.model), packed).float()  # the package takes logits to numpy


def integrated_gradients(model: Any, images: Tensor, target: Tensor | None) -> Tensor:
    """Integrated gradients (Sundararajan et al. 2017) from the mean colour, 0 in a normalised image, to the image.

    They are summed with sign over the channels and pixels of each patch, and negative sums, which speak against the
    class, are set to 0. The model keeps or drops whole patches, and a signed sum describes a patch better than absolute
    values, which are mostly noise.

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
    """Repeat the decisions ``kept (D, B, N)``, for any number of repetitions of the same B images."""
    return lambda scores, alive, group: kept[group].repeat(len(scores) // kept.shape[1], 1)
