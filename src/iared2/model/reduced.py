"""The method: [score, decide, drop, blocks] × groups (paper, section 3).

Owns the loop and the groups; what a block, a score or a decision is stands in the neighbouring files.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from ..errors import InputError
from . import backbone as vit
from . import file as saved
from . import macs, onednn
from .calibrate import thresholds_for
from .config import config_of
from .decide import Decide, at_most, by_count, by_threshold
from .interpreter import MultiHeadInterpreter
from .merge import merge
from .tokens import PackedTokens

INTERPRETERS = "sigmoid", "attention"
DROPPED = "gone", "merged"


@dataclass(frozen=True)
class Output:
    """What one forward pass found.

    Attributes:
        logits: ``(B, K)``.
        scores: ``(D, B, N)`` float32 informativeness in (0, 1); 0 where the patch was already gone.
        kept: ``(D, B, N)`` bool, the patches on which the blocks of each group ran.
        macs: ``(B,)`` int64 multiply-adds of each image, interpreters included.
    """

    logits: Tensor
    scores: Tensor
    kept: Tensor
    macs: Tensor

    @property
    def keep_ratio(self) -> Tensor:
        """``(D, B)`` share of an image's patches alive after each group, 0…1."""
        return self.kept.float().mean(-1)


class ReducedVisionTransformer(nn.Module):
    """A timm vision transformer that drops uninformative patches on its way.

    ``model.backbone`` is the timm model, untouched: ``model.backbone.load_state_dict`` takes timm weights as they are.
    ``model.interpreters`` are ours. Threshold 0 gives the backbone's own logits.

    Args:
        backbone: a timm ``VisionTransformer`` with standard blocks.
        groups: D; the depth is cut into D groups, the first ones a block longer where it does not divide.
        threshold: see ``threshold`` below.
        interpreter: "sigmoid", the paper's, or "attention": relative scores, which start as what the class token
            attends to in the block that follows (docs/method.md).
        dropped: what becomes of dropped patches: "gone", the paper's, or "merged" into kept ones (merge.py).

    Attributes:
        threshold: a patch stays if its score is above it. One number, or one for each group; ``t <= 0`` keeps every
            patch, ``t >= 1`` none. Set it at any time: it trades accuracy against compute.
        num_keep: D numbers, or None: every image keeps so many patches, its best-scored ones, in place of those above a
            threshold. To set ``threshold`` makes it None.
        max_tokens: at most so many patches of an image, the best-scored ones, leave each group; None for no limit.
            Bounds the worst case, which ``threshold`` does not. A ``decide`` that is passed in is not limited.
        class_names: names of the K classes, or None.

    Raises:
        InputError: the backbone is not supported, or has fewer blocks than groups.
    """

    def __init__(
        self,
        backbone: Any,
        groups: int = 3,
        threshold: float | Sequence[float] = 0.5,
        interpreter: str = "sigmoid",
        dropped: str = "gone",
    ) -> None:
        super().__init__()
        vit.check_supported(backbone)
        depth = len(backbone.blocks)
        if not 1 <= groups <= depth:
            raise InputError(f"groups={groups} does not fit a backbone of {depth} blocks: give 1 to {depth}")
        if backbone.embed_dim % backbone.blocks[0].attn.num_heads:
            raise InputError(f"width {backbone.embed_dim} is not divisible by the number of heads")
        for name, value, known in (("interpreter", interpreter, INTERPRETERS), ("dropped", dropped, DROPPED)):
            if value not in known:
                raise InputError(f"{name}={value!r} should be one of {', '.join(known)}")
        self.backbone: Any = backbone
        self.interpreter, self.dropped = interpreter, dropped
        self.num_keep: Sequence[int] | None
        self.threshold = threshold
        self.max_tokens: int | None = None
        self.compiled = False
        self.class_names: tuple[str, ...] | None = None
        self.model_args: dict[str, Any] = {}  # what the backbone was built with, for save()

        size, rest = divmod(depth, groups)
        bounds = [g * size + min(g, rest) for g in range(groups + 1)]
        self.groups = [range(a, b) for a, b in pairwise(bounds)]
        num_heads = self.backbone.blocks[0].attn.num_heads
        weight = self.backbone.blocks[0].attn.qkv.weight
        self.interpreters = nn.ModuleList(
            MultiHeadInterpreter(self.backbone.embed_dim, num_heads, interpreter == "attention").to(weight)
            for _ in range(groups)
        )
        self.start_interpreters()

    def start_interpreters(self) -> None:
        """Untrained interpreters anew, if they start as the attention: after the backbone has got other weights."""
        if self.interpreter == "attention":
            own: Any
            for own, group in zip(self.interpreters, self.groups, strict=True):
                own.start_as_attention(self.backbone.blocks[group.start])

    # ---- the method ---------------------------------------------------------------------------------------------

    # torch.compile(model) would compile anew for every mix of lengths; model.compile() compiles what they do not touch
    @torch.compiler.disable
    def forward(self, images: Tensor, decide: Decide | None = None) -> Tensor:
        """``(B, in_chans, height, width) -> logits (B, K)``, or pooled features with ``num_classes=0``.

        Args:
            images: normalised as ``pretrained_cfg`` says.
            decide: the decision; by default ``model.threshold`` and ``model.max_tokens``.
        """
        packed, _, _ = self.reduce(self.embed(images), decide=decide)
        return self.head(packed)

    @torch.compiler.disable
    def trace(self, images: Tensor, decide: Decide | None = None) -> Output:
        """A forward pass that also returns what was decided, and what it cost.

        Args:
            images: ``(B, in_chans, height, width)``, normalised as ``pretrained_cfg`` says.
            decide: the decision; by default ``model.threshold`` and ``model.max_tokens``.
        """
        packed, scores, kept = self.reduce(self.embed(images), decide=decide)
        all_kept = torch.stack(kept)
        return Output(
            self.head(packed), torch.stack(scores), all_kept, self.count_macs(all_kept.sum(-1), all_kept.shape[-1])
        )

    def embed(self, images: Tensor, keys: Tensor | None = None) -> PackedTokens:
        """Images to tokens, none dropped. ``keys (B,)`` make the random draws of training repeatable (keyed.py)."""
        return PackedTokens.from_dense(vit.embed(self.backbone, images), self.backbone.num_prefix_tokens, keys=keys)

    def reduce(
        self, packed: PackedTokens, groups: range | None = None, decide: Decide | None = None
    ) -> tuple[PackedTokens, list[Tensor], list[Tensor]]:
        """Run some groups: score, decide, drop, blocks.

        Returns:
            The surviving tokens, and for each group run its scores ``(B, N)`` and the patches it kept ``(B, N)``.
        """
        decide = decide or self.policy()
        scores, kept = [], []
        for group in range(self.num_groups) if groups is None else groups:
            packed, score, keep = self.enter(packed, group, decide)
            packed = self.run_blocks(packed, group)
            scores.append(score)
            kept.append(keep)
        return packed, scores, kept

    def enter(self, packed: PackedTokens, group: int, decide: Decide) -> tuple[PackedTokens, Tensor, Tensor]:
        """Score, decide, drop: the tokens on which the blocks of ``group`` run, scores and kept patches ``(B, N)``."""
        with torch.no_grad():  # a decision is discrete: no gradient passes through it
            scores, alive = self.score(packed, group), packed.alive
            keep = self.keep_one(decide(scores, alive, group) & alive, scores, alive)
        return self.drop(packed, keep), scores, keep

    def policy(self, thresholds: Sequence[float] | None = None) -> Decide:
        """The decision that is deployed, or other thresholds in its place; at most ``max_tokens``."""
        count = thresholds is None and self.num_keep
        return at_most(self.max_tokens, by_count(count) if count else by_threshold(thresholds or self.thresholds))

    def score(self, packed: PackedTokens, group: int) -> Tensor:
        """``(B, N)`` informativeness of the living patches at the entrance of ``group``, 0 where a patch is gone."""
        return self.interpreters[group](packed, self.backbone.has_class_token)

    def keep_one(self, keep: Tensor, scores: Tensor, alive: Tensor) -> Tensor:
        """If the head pools patches, an image that would lose all keeps its best-scored living one."""
        if not vit.pools_patches(self.backbone):
            return keep
        best = scores.masked_fill(~alive, -1).argmax(1, keepdim=True)
        return keep | (torch.zeros_like(keep).scatter_(1, best, True) & ~keep.any(1, keepdim=True))

    def drop(self, packed: PackedTokens, keep: Tensor) -> PackedTokens:
        """Without the patches that ``keep (B, N)`` leaves out; or several selections, as `PackedTokens.select`."""
        return merge(packed, keep) if self.dropped == "merged" else packed.select(keep)

    def run_blocks(self, packed: PackedTokens, group: int) -> PackedTokens:
        """The MSA-FFN blocks of ``group`` on the tokens that are there."""
        return vit.run_blocks(self.backbone, self.groups[group], packed, self.compiled)

    def head(self, packed: PackedTokens) -> Tensor:
        """``(B, K)`` logits of the surviving tokens, in the order of the images."""
        return vit.head(self.backbone, packed)

    # ---- what it costs, and what it may cost ----------------------------------------------------------------------

    def count_macs(self, num_kept: Tensor, num_patches: int | None = None) -> Tensor:
        """Multiply-adds from patch counts alone.

        Args:
            num_kept: ``(D, B)`` integers, patches on which each group's blocks ran.
            num_patches: N at the entrance; by default the backbone's own grid.

        Returns:
            ``(B,)`` int64, interpreters included.
        """
        return macs.reduced_macs(self, num_kept, num_patches or self.backbone.patch_embed.num_patches)

    @property
    def dense_macs(self) -> int:
        """Multiply-adds of the timm backbone alone: every patch kept, no interpreter."""
        return macs.dense_macs(self.backbone)

    def calibrate(
        self,
        images: Tensor,
        *,
        keep: float | Sequence[float] | None = None,
        gmacs: float | None = None,
        latency_ms: float | None = None,
    ) -> list[float]:
        """Set ``threshold`` so that one budget is met on ``images (B, in_chans, height, width)``, and return it.

        The budgets, and when an `InputError` is raised: see `iared2.model.calibrate.thresholds_for`.
        """
        self.threshold = thresholds_for(self, images, keep=keep, gmacs=gmacs, latency_ms=latency_ms)
        return self.threshold

    def compile(self, *args: Any, **kwargs: Any) -> None:
        """Compile the blocks by ``torch.compile``: once for all blocks and any number of tokens.

        For inference and training on a GPU; on a CPU what `pack_weights` prepares is faster. Takes no arguments: what
        ``torch.compile(model)`` would compile depends on the numbers of tokens, and would be compiled anew for each.

        Raises:
            TypeError: arguments were given.
        """
        if args or kwargs:
            raise TypeError("ReducedVisionTransformer.compile() takes no arguments")
        self.compiled = True

    def pack_weights(self) -> None:
        """Prepare for inference on a CPU: lay the weights out once (`onednn.pack_weights`). Does nothing elsewhere."""
        onednn.pack_weights(self.backbone.blocks)

    # ---- a timm model where people rely on it -------------------------------------------------------------------

    def forward_features(self, images: Tensor) -> Tensor:
        """``(B, S, C)`` normalised tokens at their places, like timm's; rows of dropped patches are zero."""
        packed, _, _ = self.reduce(self.embed(images))
        return packed.to_dense(self.backbone.norm(packed.x))

    def forward_head(self, x: Tensor, pre_logits: bool = False) -> Tensor:
        """Pool and classify the ``(B, S, C)`` of ``forward_features``; all-zero rows count as dropped patches."""
        prefix = self.backbone.num_prefix_tokens
        alive = x[:, prefix:].ne(0).any(-1)
        return vit.pool_head(self.backbone, PackedTokens.from_dense(x, prefix, alive), pre_logits)

    def reset_classifier(self, num_classes: int, global_pool: str | None = None) -> None:
        """A new head, as in timm; ``num_classes=0`` returns pooled features. Class names are forgotten."""
        if global_pool == "":
            raise InputError("global_pool='' returns every token, but the reduced model does not have them all")
        self.backbone.reset_classifier(num_classes, global_pool)
        self.class_names = None

    def get_classifier(self) -> nn.Module:
        """The backbone's head."""
        return self.backbone.get_classifier()

    def set_grad_checkpointing(self, enable: bool = True) -> None:
        """Trade compute for memory in training: recompute each block's activations in the backward pass."""
        self.backbone.set_grad_checkpointing(enable)

    @property
    def threshold(self) -> float | Sequence[float]:
        """See the class."""
        return self._threshold

    @threshold.setter
    def threshold(self, threshold: float | Sequence[float]) -> None:
        """Ends ``num_keep``."""
        self._threshold, self.num_keep = threshold, None

    @property
    def thresholds(self) -> list[float]:
        """``threshold`` as one number for each of the D groups.

        Raises:
            ValueError: it is not a number, or not as many as there are groups.
        """
        values = torch.as_tensor(self.threshold, dtype=torch.float64).flatten().tolist()
        if len(values) not in (1, self.num_groups) or any(t != t for t in values):
            raise ValueError(f"model.threshold is {self.threshold}: give one number, or {self.num_groups}, one a group")
        return values * (self.num_groups // len(values))

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
    def grid_size(self) -> tuple[int, ...]:
        """Rows and columns of patches; of clips, times, rows and columns. Patches are numbered in that order."""
        return tuple(self.backbone.patch_embed.grid_size)

    @property
    def pretrained_cfg(self) -> dict[str, Any]:
        """timm's dictionary (mean, std, interpolation, …), with the input size that this backbone really has."""
        cfg = dict(getattr(self.backbone, "pretrained_cfg", None) or {})
        cfg["input_size"] = (self.backbone.patch_embed.proj.in_channels, *self.backbone.patch_embed.img_size)
        return cfg

    # ---- saving -------------------------------------------------------------------------------------------------

    def save(self, path: Path | str, half: bool = False) -> None:
        """Write weights and configuration to one file, atomically; ``iared2.load`` reads it.

        Args:
            path: of the file.
            half: in float16, half the size. Loaded, they are float32 again, rounded: measure the file, not the model.

        Raises:
            InputError: the file cannot be written, or the backbone cannot be rebuilt from its timm name.
        """
        tensors = self.state_dict()
        if half:
            tensors = {name: t.half() if t.is_floating_point() else t for name, t in tensors.items()}
        saved.write(path, tensors, config_of(self))
