"""What surrounds the method: settings that can be seen and set, and a timm model where people rely on it.

Knows the backbone and the decision as values; does not know the loop (reduced.py builds on this).
"""

from __future__ import annotations

import math
import operator
from collections.abc import Sequence
from numbers import Integral
from typing import Any

import torch
from torch import Tensor, nn

from ..errors import InputError
from . import backbone as vit
from . import macs, onednn, text
from .decide import DEFAULT_THRESHOLD, Decision
from .tokens import PackedTokens

MAX_SIDE = 4096
"""Pixels, of `Facade.set_input_size`."""


class OneOf:
    """An attribute that takes one of some words and refuses all else with an `InputError`."""

    def __init__(self, *words: str) -> None:
        self.words = words

    def __set_name__(self, owner: type, name: str) -> None:
        self.name = name

    def __get__(self, model: Any, owner: type | None = None) -> Any:
        return self if model is None else vars(model)[self.name]

    def __set__(self, model: Any, word: str) -> None:
        if word not in self.words:
            raise InputError(f"{self.name}={word!r} should be one of {', '.join(self.words)}")
        vars(model)[self.name] = word


class Facade(nn.Module):
    """The part of a `ReducedVisionTransformer` that is not the method."""

    dropped = OneOf("gone", "merged")
    engine = OneOf("auto", "plain", "onednn", "compiled")
    interpreter = OneOf("sigmoid", "attention")
    backbone: Any
    groups: list[range]

    def __init__(self) -> None:
        super().__init__()
        self.engine = "auto"
        self.packed_weights = onednn.PackedWeights()
        self.class_names: tuple[str, ...] | None = None
        self.report: Any = None  # of `iared2.accelerate`
        self.model_args: dict[str, Any] = {}  # what the backbone was built with, for save()

    # ---- the decision, and shorthands for its parts ---------------------------------------------------------------

    @property
    def decision(self) -> Decision:
        """See the class."""
        return self._decision

    @decision.setter
    def decision(self, decision: Decision) -> None:
        if not isinstance(decision, Decision):
            raise InputError(f"decision={decision!r:.100}: give a Decision; numbers go to threshold or num_keep")
        if decision.confidence and not self.num_classes:
            raise InputError(f"confidence={decision.confidence:g} is of probabilities, and this model has no classes")
        if decision.scale < 1 and self.is_video:
            raise InputError(f"scale={decision.scale:g} makes photos smaller, and this model takes clips: set scale=1")
        self._decision = decision.for_model(self.grid_size, self.num_groups)

    @property
    def threshold(self) -> float | tuple[float, ...] | None:
        """One number if it is the same in all groups, else one per group; None where counts decide."""
        thresholds = self.thresholds
        return thresholds[0] if thresholds and len(set(thresholds)) == 1 else thresholds

    @threshold.setter
    def threshold(self, threshold: float | Sequence[float] | Tensor | None) -> None:
        if threshold is not None:
            self.decision = self.decision.at(threshold)
        elif self.num_keep is None:
            raise InputError("threshold=None: give a number, or one per group; or set num_keep")

    @property
    def thresholds(self) -> tuple[float, ...] | None:
        """D numbers; None where counts decide."""
        return self.decision.thresholds

    @property
    def num_keep(self) -> tuple[int, ...] | None:
        """D numbers; None where thresholds decide. Setting None in place of counts sets the threshold 0.5."""
        return self.decision.num_keep

    @num_keep.setter
    def num_keep(self, num_keep: int | Sequence[int] | Tensor | None) -> None:
        if num_keep is not None:
            self.decision = self.decision.but(thresholds=None, num_keep=num_keep)
        elif self.num_keep is not None:
            self.decision = self.decision.at(DEFAULT_THRESHOLD)

    @property
    def max_tokens(self) -> int | None:
        """At most so many patches of an image leave each group; None: no limit."""
        return self.decision.max_tokens

    @max_tokens.setter
    def max_tokens(self, max_tokens: int | None) -> None:
        self.decision = self.decision.but(max_tokens=max_tokens)

    @property
    def spread(self) -> float:
        """How far the threshold depends on the position of a patch; 0, as in the paper: not at all."""
        return self.decision.spread

    @spread.setter
    def spread(self, spread: float) -> None:
        self.decision = self.decision.but(spread=spread)

    @property
    def confidence(self) -> float:
        """Images whose answer is less sure take a second pass with every patch; 0, as in the paper: none does."""
        return self.decision.confidence

    @confidence.setter
    def confidence(self, confidence: float) -> None:
        self.decision = self.decision.but(confidence=confidence)

    @property
    def scale(self) -> float:
        """The part of the rows and columns of patches that the first pass has; 1, as in the paper: all of them."""
        return self.decision.scale

    @scale.setter
    def scale(self, scale: float) -> None:
        self.decision = self.decision.but(scale=scale)

    # ---- the engine -----------------------------------------------------------------------------------------------

    def compile(self, *args: Any, **kwargs: Any) -> None:
        """Set ``engine = "compiled"``: the blocks compiled once, for any number of tokens; for a GPU.

        Takes no arguments: what ``torch.compile(model)`` would compile depends on the numbers of tokens, and would be
        compiled anew for each.

        Raises:
            TypeError: arguments were given.
        """
        if args or kwargs:
            raise TypeError("ReducedVisionTransformer.compile() takes no arguments")
        self.engine = "compiled"

    def pack_weights(self) -> None:
        """Lay the weights out once for inference on a CPU (`onednn.PackedWeights`); does nothing elsewhere."""
        self.packed_weights.pack(self.backbone.blocks)

    def extra_repr(self) -> str:
        """What ``repr`` says beside the modules."""
        parts = {"decision": self.decision, "groups": self.num_groups}
        parts |= {name: getattr(self, name) for name in ("interpreter", "dropped", "engine")}
        return ", ".join(f"{name}={value!r}" for name, value in parts.items())

    # ---- a timm model where people rely on it -----------------------------------------------------------------------

    def forward_head(self, x: Tensor, pre_logits: bool = False) -> Tensor:
        """Pool and classify the ``(B, S, C)`` of ``forward_features``; all-zero rows count as dropped patches."""
        prefix = self.backbone.num_prefix_tokens
        alive = x[:, prefix:].ne(0).any(-1)
        return vit.pool_head(self.backbone, PackedTokens.from_dense(x, prefix, alive), pre_logits)

    def reset_classifier(self, num_classes: int, global_pool: str | None = None) -> None:
        """A new head, as in timm; ``num_classes=0`` returns pooled features.

        Class names are forgotten, and ``confidence``, which was one of other probabilities, with ``scale``, which needs
        it.
        """
        if global_pool == "":
            raise InputError("global_pool='' returns every token, but the reduced model does not have them all")
        self.decision = self.decision.but(confidence=0.0, scale=1.0)
        self.backbone.reset_classifier(num_classes, global_pool)
        self.class_names = None

    def set_text_features(self, names: Sequence[str], matrix: Any, scale: float = 100.0, bias: float = 0.0) -> None:
        """Zero-shot classes of a CLIP or SigLIP tower: logits are ``scale · cos(image, text) + bias``.

        The head is replaced by a `text.TextClassifier`, which keeps the projection of CLIP (a linear head). Everything
        that knows classes knows these: `Predictor`, files, `accelerate`, export. Calling it again replaces them, and
        `reset_classifier` removes them. ``confidence``, one of other probabilities, is set to 0, and ``scale``, which
        needs it, to 1.

        Args:
            names: of the K classes, all different.
            matrix: ``(K, C)`` of floats, the text features of each class, of any length but 0; a tensor or an array. C
                is the number of outputs of the head (512 for ``vit_base_patch32_clip_224``), or without one, of the
                pooled features.
            scale: of the logits, above 0: ``logit_scale.exp()`` of the model from which the features are.
            bias: SigLIP's ``logit_bias``. No probabilities of a softmax depend on it.

        Raises:
            InputError: the model has another kind of head, or a shape, number or name is wrong.
        """
        _, width = text.embedding_of(self.backbone)
        matrix = text.check_features(names, matrix, width or self.num_features, scale, bias)
        head = text.set_head(self.backbone, len(matrix))
        for buffer, value in ((head.text_features, matrix), (head.logit_scale, scale), (head.logit_bias, bias)):
            buffer.copy_(torch.as_tensor(value))
        self.decision, self.class_names = self.decision.but(confidence=0.0, scale=1.0), tuple(names)

    def get_classifier(self) -> nn.Module:
        """The backbone's head."""
        return self.backbone.get_classifier()

    def no_weight_decay(self) -> set[str]:
        """Names of the parameters without weight decay, for timm's optimisers."""
        return {f"backbone.{name}" for name in self.backbone.no_weight_decay()}

    def group_matcher(self, coarse: bool = False) -> dict[str, Any]:
        """timm's patterns of layers, for a learning rate per layer. Interpreters count as the last layer, as a head."""

        def ours(pattern: str) -> str:
            return rf"^backbone\.(?:{pattern.replace('^', '')})"

        found = self.backbone.group_matcher(coarse)
        return {
            layer: ours(given) if isinstance(given, str) else [(ours(pattern), order) for pattern, order in given]
            for layer, given in found.items()
        }

    def set_grad_checkpointing(self, enable: bool = True) -> None:
        """Trade compute for memory in training: recompute each block's activations in the backward pass."""
        self.backbone.set_grad_checkpointing(enable)

    @property
    def is_video(self) -> bool:
        return len(self.grid_size) > 2

    @property
    def num_groups(self) -> int:
        return len(self.groups)

    @property
    def num_classes(self) -> int:
        return self.backbone.num_classes

    @property
    def num_features(self) -> int:
        return self.backbone.num_features

    @property
    def num_patches(self) -> int:
        """N of the backbone's own grid."""
        return math.prod(self.grid_size)

    @property
    def grid_size(self) -> tuple[int, ...]:
        """Rows and columns of patches; of clips, times, rows and columns. Patches are numbered in that order."""
        return vit.grid_of(self.backbone, self.backbone.patch_embed.img_size)

    def set_input_size(self, img_size: int | Sequence[int]) -> None:
        """Take images of another height and width from now on, as timm's method of this name; positions are resampled.

        Scores, thresholds and spread hold for any size; ``num_keep`` and ``max_tokens`` remain numbers of patches.

        Args:
            img_size: pixels of the side, or height and width.

        Raises:
            InputError: the size does not suit the patches, or the model is one of clips.
        """
        if self.is_video:
            raise InputError("the size of clips is fixed when their model is made")
        try:
            numbers: Any = [img_size] if isinstance(img_size, Integral) else img_size
            size = [operator.index(n) for n in numbers]
        except TypeError:  # a fraction, or no number
            size = []
        size, patch = size * 2 if len(size) == 1 else size, self.backbone.patch_embed.patch_size
        if len(size) != 2 or any(not 0 < n <= MAX_SIDE or n % p for n, p in zip(size, patch, strict=True)):
            raise InputError(
                f"images of {img_size} pixels: give one side, or height and width, in multiples of the patch,"
                f" {patch[0]}x{patch[1]}, up to {MAX_SIDE}"
            )
        self.backbone.set_input_size(img_size=tuple(size))
        self.decision = self.decision  # on the new grid

    @property
    def pretrained_cfg(self) -> dict[str, Any]:
        """timm's dictionary (mean, std, interpolation, …), with the input size that this backbone really has."""
        cfg = dict(getattr(self.backbone, "pretrained_cfg", None) or {})
        cfg["input_size"] = (self.backbone.patch_embed.proj.in_channels, *self.backbone.patch_embed.img_size)
        return cfg

    default_cfg = pretrained_cfg
    """timm's older name of it."""

    @property
    def dense_macs(self) -> int:
        """MACs of the timm backbone alone: every patch kept, no interpreter."""
        return macs.dense_macs(self.backbone, self.num_patches)
