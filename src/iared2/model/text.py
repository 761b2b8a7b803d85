"""Zero-shot classes: a head that compares the embedding of an image with text features (CLIP, SigLIP).

A text tower is not needed: its features are given as a matrix, one row per class. They are buffers, so no optimiser
changes them.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ..errors import InputError

MAX_VALUES = 1 << 26
"""Limit of classes × features."""


class TextClassifier(nn.Module):
    """``scale · cos(image, text) + bias`` for each class, in place of a timm model's ``head``.

    Args:
        proj: the head that it replaces, CLIP's projection into the space of the text features; an identity if the
            pooled features are in that space already.
        num_classes: K.
        features: C, the width of the text features.
    """

    def __init__(self, proj: nn.Module, num_classes: int, features: int) -> None:
        super().__init__()
        self.proj, self.text_features = proj, nn.Buffer(torch.zeros(num_classes, features))
        self.logit_scale, self.logit_bias = nn.Buffer(torch.ones(())), nn.Buffer(torch.zeros(()))

    def forward(self, x: Tensor) -> Tensor:
        """``(B, width)`` pooled features -> ``(B, K)`` logits."""
        cosine = F.linear(F.normalize(self.proj(x), dim=-1), self.text_features)
        return self.logit_scale * cosine + self.logit_bias

    def extra_repr(self) -> str:
        """The shape of the text features."""
        return f"text_features={tuple(self.text_features.shape)}"


def embedding_of(backbone: Any) -> tuple[nn.Module, int]:
    """The part of the head that ends in the embedding, and the ``num_classes`` that timm calls it: 0 for an identity.

    Raises:
        InputError: the head is of another kind.
    """
    head = backbone.head.proj if isinstance(backbone.head, TextClassifier) else backbone.head
    if hasattr(backbone, "head_dist") or not isinstance(head, nn.Linear | nn.Identity):
        raise InputError(f"text features need one linear head or none, and this model has a {type(head).__name__}")
    return head, head.out_features if isinstance(head, nn.Linear) else 0


def set_head(backbone: Any, num_classes: int) -> TextClassifier:
    """Give a timm model a head for so many text features, all zero yet.

    Raises:
        InputError: see `embedding_of`.
    """
    proj, width = embedding_of(backbone)
    like = next(backbone.blocks[0].parameters())
    backbone.head = TextClassifier(proj, num_classes, width or backbone.num_features).to(like).train(backbone.training)
    backbone.num_classes = num_classes
    return backbone.head


def without_text(tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    """The tensors of a backbone by the names that they had before `set_head`."""
    prefix = "head.proj."
    return {
        f"head.{name.removeprefix(prefix)}" if name.startswith(prefix) else name: tensor
        for name, tensor in tensors.items()
        if name not in ("head.text_features", "head.logit_scale", "head.logit_bias")
    }


def check_features(names: Sequence[str], matrix: Any, features: int, scale: float, bias: float) -> Tensor:
    """The rows of ``matrix``, normalised, float32 ``(K, features)``.

    Raises:
        InputError: names or numbers that are not what `Facade.set_text_features` asks for.
    """
    matrix = torch.as_tensor(matrix).detach()
    if matrix.ndim != 2 or matrix.shape[1] != features or not matrix.is_floating_point():
        raise InputError(
            f"text features of shape {tuple(matrix.shape)} and {matrix.dtype}: the embedding of an image has {features}"
            f" numbers, so give (classes, {features}) of floats"
        )
    if isinstance(names, str) or not all(isinstance(name, str) for name in names):
        raise InputError("names: give a list of the names of the classes")
    if not len(matrix) or len(names) != len(matrix):
        raise InputError(
            f"{len(names)} names for {len(matrix)} rows of text features: give one for each, and one at least"
        )
    if len(set(names)) != len(names):
        twice = next(name for name in names if list(names).count(name) > 1)
        raise InputError(f"two classes are called {twice!r:.100}: give every class its own name")
    if matrix.numel() > MAX_VALUES:
        raise InputError(f"{len(matrix):,} classes are too many: at most {MAX_VALUES // features:,} fit")
    matrix = matrix.float()
    if not (matrix.isfinite().all() and matrix.ne(0).any(1).all()):
        raise InputError("text features: a row is zero or not finite (NaN or infinite)")
    if not (0 < scale < math.inf and math.isfinite(bias)):
        raise InputError(f"scale={scale}, bias={bias}: give a scale above 0 and a bias, both finite")
    return F.normalize(matrix, dim=1)
