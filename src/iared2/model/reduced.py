"""The method: [score, decide, drop, blocks] × groups (paper, section 3).

Owns the loop and the groups. Blocks, scores and decisions are defined in the neighbouring files.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from . import backbone as vit
from . import calibrate, file, macs, second_pass
from .block import attentions
from .decide import Decide, Decision, first_grid, on_grid
from .facade import Facade
from .hugging_face import HubModel
from .interpreter import MultiHeadInterpreter
from .merge import merge
from .second_pass import Output
from .tokens import PackedTokens


class ReducedVisionTransformer(Facade, HubModel):
    """A timm vision transformer that drops uninformative patches at the entrance of each group.

    ``model.backbone`` is the timm model, untouched: ``model.backbone.load_state_dict`` takes timm weights as they are.
    ``model.interpreters`` are ours. ``model.decision.whole()`` gives the backbone's own logits.

    Args:
        backbone: a timm ``VisionTransformer`` or ``Eva`` with standard blocks (`backbone.check_supported`).
        groups: D; the blocks are split into D groups. If D does not divide the depth, the first ones have one more.
        interpreter: "sigmoid", the paper's, or "attention": relative scores, which start as the attention of the class
            token in the following block (docs/method.md).
        dropped: "gone", the paper's: dropped patches are removed; or "merged": into kept ones (merge.py).

    Attributes:
        decision: a `Decision`, replaced as a whole; at first, patches stay that score above 0.5. Set it at any time:
            it trades accuracy against compute. A ``decide`` that is passed to a call takes its place.
        threshold, thresholds, num_keep, max_tokens, spread, confidence, scale: shorthands for parts of the decision.
            ``threshold`` resets ``num_keep``, and vice versa; both keep the rest.
        dropped: see above.
        engine: how blocks run: "auto" takes oneDNN's fused layers for inference on a CPU and the plain layers
            elsewhere; "plain", "onednn" (refuses where it cannot) or "compiled" (``torch.compile``, for a GPU).
        class_names: names of the K classes, or None.

    Raises:
        InputError: the backbone is not supported, or has fewer blocks than groups, or an argument is unknown.
    """

    def __init__(
        self,
        backbone: Any,
        groups: int = 3,
        interpreter: str = "sigmoid",
        dropped: str = "gone",
    ) -> None:
        super().__init__()
        vit.check_supported(backbone)
        self.backbone, self.groups = backbone, vit.split_blocks(len(backbone.blocks), groups)
        self.interpreter, self.dropped = interpreter, dropped
        self.decision = Decision()
        num_heads, like = attentions(backbone.blocks[0])[0].num_heads, next(backbone.blocks[0].parameters())
        self.interpreters = nn.ModuleList(
            MultiHeadInterpreter(backbone.embed_dim, num_heads, interpreter == "attention").to(like)
            for _ in range(groups)
        )
        self.start_interpreters()

    def start_interpreters(self) -> None:
        """Reset interpreters that start as the attention, after new weights were loaded into the backbone."""
        if self.interpreter == "attention":
            own: Any
            for own, group in zip(self.interpreters, self.groups, strict=True):
                own.start_as_attention(self.backbone.blocks[group.start])

    # torch.compile(model) would recompile for every mix of lengths; `compile` compiles only what lengths do not affect
    @torch.compiler.disable
    def forward(self, images: Tensor, decide: Decide | None = None) -> Tensor:
        """``(B, in_chans, height, width) -> logits (B, K)``, or pooled features with ``num_classes=0``.

        Args:
            images: normalised by ``pretrained_cfg``; clips are ``(B, in_chans, T, height, width)``.
            decide: the decision; by default ``model.decision``.
        """
        return second_pass.run(self, images, decide).logits(self)

    @torch.compiler.disable
    def trace(self, images: Tensor, decide: Decide | None = None, keys: Tensor | None = None) -> Output:
        """A forward pass that also returns scores, decisions and MACs; arguments: see `forward`, `embed`."""
        return second_pass.run(self, images, decide, keys).output(self)

    def embed(self, images: Tensor, keys: Tensor | None = None, decide: Decide | None = None) -> PackedTokens:
        """Images to the tokens of the first pass of a decision, none dropped; see `Decision.scale`.

        With ``keys (B,)``, random draws are a function of the image (keyed.py).
        """
        grid = vit.grid_of(self.backbone, images.shape[2:])
        first, backbone = first_grid(decide or self.decision, grid), self.backbone
        if first != grid:
            backbone, images = vit.smaller(backbone, images, first)
        return vit.embed_packed(backbone, images, keys)

    def reduce(
        self, packed: PackedTokens, groups: range | None = None, decide: Decide | None = None
    ) -> tuple[PackedTokens, list[Tensor], list[Tensor]]:
        """The loop, over all groups or some -> the remaining tokens, and of each group scores and kept ``(B, N)``."""
        scores, kept = [], []
        decide = on_grid(decide or self.decision, packed.grid_size)
        for group in groups if groups is not None else range(self.num_groups):
            with torch.no_grad():  # a decision is discrete: no gradient passes through it
                scores.append(self.score(packed, group))
                kept.append(self.decide(scores[-1], packed.alive, group, decide))
            packed = self.run_blocks(self.drop(packed, kept[-1]), group)
        return packed, scores, kept

    def score(self, packed: PackedTokens, group: int) -> Tensor:
        """``(B, N)`` informativeness of the patches at the entrance of ``group``, 0 where a patch was dropped."""
        return self.interpreters[group](packed, vit.has_class_token(self.backbone))

    def decide(self, scores: Tensor, alive: Tensor, group: int, decide: Decide) -> Tensor:
        """``(B, N)`` bool, the patches that stay, or ``(k·B, N)``: k decisions, if ``decide`` gives as many.

        If the head pools patches, an image that would lose all patches keeps the best-scored one alive.
        """
        keep = decide(scores, alive, group)
        scores, alive = (x.repeat(len(keep) // len(alive), 1) for x in (scores, alive))
        keep = keep & alive
        if not vit.pools_patches(self.backbone):
            return keep
        best = scores.masked_fill(~alive, -1).argmax(1, keepdim=True)
        return keep | (torch.zeros_like(keep).scatter_(1, best, True) & ~keep.any(1, keepdim=True))

    def drop(self, packed: PackedTokens, keep: Tensor) -> PackedTokens:
        """Remove the patches that are not in ``keep (B, N)``; or several selections, as `PackedTokens.select`."""
        return merge(packed, keep) if self.dropped == "merged" else packed.select(keep)

    def run_blocks(self, packed: PackedTokens, group: int) -> PackedTokens:
        """Run the MSA-FFN blocks of ``group`` on the remaining tokens."""
        return vit.run_blocks(self.backbone, self.groups[group], packed, self.engine, self.packed_weights)

    def forward_features(self, images: Tensor) -> Tensor:
        """``(B, S, C)`` normalised tokens at their positions, as in timm; rows of dropped patches are zero.

        The tokens of one image have one size: with ``scale`` below 1, there is one pass, of the images as they are.
        """
        own = self.decision
        passes = second_pass.run(self, images, own if own.scale == 1 else own.but(scale=1.0, confidence=0.0))
        return passes.last(lambda packed: packed.to_dense(self.backbone.norm(packed.x)))

    def head(self, packed: PackedTokens) -> Tensor:
        """``(B, K)`` logits from the remaining tokens, in the order of the images."""
        return vit.head(self.backbone, packed)

    def count_macs(self, num_kept: Tensor, num_patches: int | None = None) -> Tensor:
        """``num_kept (D, B)`` patches in each group -> ``(B,)`` int64 MACs, including the interpreters (`macs`)."""
        return macs.reduced_macs(self, num_kept, num_patches or self.num_patches)

    def calibrate(self, images: Tensor, **budget: Any) -> tuple[float, ...]:
        """Set and return the thresholds that meet one budget on ``images``.

        Args:
            images: ``(B, in_chans, height, width)``, a sample of what the model will see.
            budget: one of ``keep``, ``gmacs`` and ``latency_ms``, and ``shape``: see `calibrate.thresholds_for`.
        """
        self.threshold = calibrate.thresholds_for(self, images, **budget)
        return self.thresholds or ()

    def save(self, path: Path | str, half: bool = False, int8: bool = False) -> None:
        """Write weights and configuration to one file (`file.save`); ``iared2.load`` reads it."""
        file.save(self, path, half, int8)

    def save_policy(self, path: Path | str) -> None:
        """Write the interpreters alone (`file.save_policy`), for ``iared2.load(path, backbone)``."""
        file.save_policy(self, path)
