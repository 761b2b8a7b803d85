"""The fine-tuning stage of a group: cross entropy on the greedy decisions (Algorithm 1, lines 7–11).

A model without classes is distilled: its embeddings are to be those of the dense model.

Without a group, the same stage trains the dense backbone: from scratch, or with a new head on pretrained weights.
"""

from __future__ import annotations

from functools import cached_property
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ..device import widest_float
from ..errors import InputError
from ..model import backbone as vit
from ..model.decide import Decide, at_random, keep_all
from ..model.reduced import ReducedVisionTransformer
from ..model.tokens import PackedTokens


class Dense(NamedTuple):
    """What the dense model says: ``logits (B, K)`` or embeddings, and ``features (B, C)`` if they are needed."""

    logits: Tensor
    features: Tensor | None


class FinetuneStage(nn.Module):
    """Computes the loss and the metrics of one step on a batch.

    With ``group`` i, the blocks of groups i…D, the final norm and the head are trained. The interpreters, the embedding
    and the earlier blocks are frozen, since training them would change the input of interpreters that are already
    fixed. They run in evaluation mode and without a graph. Groups after ``last``, by default i, drop nothing more.
    With ``group=None``, the whole backbone is trained. Nothing is dropped except a random share ``patch_drop``, which
    falls to 0 at the end of the stage (as in Liu et al., PatchDropout, WACV 2023, where it is constant).

    Args:
        model: the stage freezes everything that it does not train.
        group: the first group that is trained, or None.
        last: the last group that drops patches; by default ``group``.
        patch_drop: see above.
        decide: the decision; by default ``model.decision``, read in every step.
        teacher: a dense backbone of the same architecture. A model without classes needs one: its loss is 1 − the
            cosine to the embedding of the teacher.
        distill: share of the target that is the probabilities of the teacher (Hinton et al. 2015).
        distill_features: weight of ``mean(‖f − f'‖² / ‖f'‖²)``, f and f' the pooled features of the model and of the
            teacher before the classifier. They say more per image than the answer (Romero et al., FitNets, ICLR 2015).
            Not read if the model has no classes.
        vectors_only: train biases, norms and layer scales alone, a 300th of a ViT-S (Ben Zaken et al., BitFit, ACL
            2022); the matrices stay.

    Raises:
        InputError: there is no teacher where one is needed, or it is of another architecture.
    """

    progress = 0.0
    """Progress of the stage, 0…1; the trainer sets it before every step."""

    def __init__(
        self,
        model: ReducedVisionTransformer,
        group: int | None,
        *,
        patch_drop: float = 0.0,
        decide: Decide | None = None,
        teacher: nn.Module | None = None,
        distill: float = 0.0,
        distill_features: float = 0.0,
        vectors_only: bool = False,
        last: int | None = None,
    ) -> None:
        super().__init__()
        if not model.num_classes and teacher is None:
            raise InputError("a model without classes learns the embeddings of a dense one: give a teacher")
        if (distill or distill_features) and teacher is None:
            raise InputError("distill and distill_features need a teacher")
        if teacher is not None and _shapes(teacher) != _shapes(model.backbone):
            raise InputError("the teacher is another kind of backbone than the model's")
        self.patch_drop, self.decide = patch_drop, decide
        self.teacher, self.distill, self.distill_features = teacher, distill, distill_features
        self.model, self.group = model, group
        self.first, self.last = group or 0, group if last is None else last
        backbone = model.backbone
        model.requires_grad_(False)
        if group is None:
            self.trainable = [backbone]
        else:
            head = (
                getattr(backbone, name, None)
                for name in ("norm", "fc_norm", "attn_pool", "head_drop", "head", "head_dist")
            )
            self.trainable = [*backbone.blocks[model.groups[group].start :], *(m for m in head if m is not None)]
        for module in self.trainable:
            for parameter in module.parameters():
                parameter.requires_grad_(parameter.ndim < 2 or not vectors_only)

    def train(self, mode: bool = True) -> FinetuneStage:
        """Training mode for the trained parts, evaluation mode for the frozen ones."""
        self.model.eval()
        for module in self.trainable:
            module.train(mode)
        return self

    def forward(self, images: Tensor, targets: Tensor, keys: Tensor) -> tuple[Tensor, dict[str, Tensor]]:
        """One step on a batch.

        Args:
            images: ``(B, in_chans, height, width)``.
            targets: ``(B, K)`` class probabilities (mixup, label smoothing) or ``(B,)`` int64 labels. Not read if the
                model has no classes.
            keys: ``(B,)`` int64, the images' keys: stochastic depth is a function of them.

        Returns:
            The loss, and the step's metrics (docs/metrics.md) as detached scalars.
        """
        model, decide = self.model, decide_up_to(self.model, self.last, self.decide)
        with torch.set_grad_enabled(self.group is None and torch.is_grad_enabled()):
            packed = model.embed(images, keys)
            if self.group is None and self.patch_drop:
                packed = packed.select(self._some(packed, keys))
            packed, _, _ = model.reduce(packed, range(self.first), decide)
        needs = self.distill or self.distill_features or not model.num_classes
        return self.step(packed, self.dense(images, packed) if needs else None, targets)

    def step(self, packed: PackedTokens, dense: Dense | None, targets: Tensor) -> tuple[Tensor, dict[str, Tensor]]:
        """The loss and the metrics from the tokens at the entrance of the first group that is trained.

        Args:
            packed: these tokens.
            dense: of `dense` on the same images; None if no loss needs it.
            targets: see `forward`.
        """
        model, decide = self.model, decide_up_to(self.model, self.last, self.decide)
        packed, _, kept = model.reduce(packed, range(self.first, model.num_groups), decide)
        loss, quality = (self._of_classes if model.num_classes else self._of_embeddings)(packed, dense, targets)
        kept_last = kept[-1].to(widest_float(packed.x.device)).mean()
        return loss, {"loss": loss.detach(), **quality, "keep_ratio_greedy": kept_last}

    @torch.no_grad()
    def dense(self, images: Tensor, packed: PackedTokens) -> Dense:
        """What the teacher says; ``packed`` are the tokens at the entrance of the first group that is trained."""
        teacher, start = self.teacher, self.model.groups[self.first].start
        is_smaller = packed.grid_size != vit.grid_of(teacher, images.shape[2:])
        if is_smaller or not self._starts_alike or len(packed.x) < packed.num_images * packed.num_tokens:
            start, packed = 0, vit.embed_packed(teacher, images)
        packed = vit.run_blocks(teacher, range(start, len(self.model.backbone.blocks)), packed)
        return Dense(_logits(teacher, packed), _features(teacher, packed) if self.distill_features else None)

    def _of_classes(
        self, packed: PackedTokens, dense: Dense | None, targets: Tensor
    ) -> tuple[Tensor, dict[str, Tensor]]:
        logits = _logits(self.model.backbone, packed)
        loss, metrics = F.cross_entropy(logits, targets), {}
        if dense and self.distill:
            loss = torch.lerp(loss, F.cross_entropy(logits, dense.logits.softmax(1)), self.distill)
        if dense and dense.features is not None:
            features = _features(self.model.backbone, packed)
            error = (features - dense.features).square().sum(1) / dense.features.square().sum(1)
            loss = loss + self.distill_features * error.mean()
            metrics["feature_error"] = error.mean().detach()
        labels = targets if targets.ndim == 1 else targets.argmax(1)
        return loss, {"top1": 100 * (logits.argmax(1) == labels).to(widest_float(logits.device)).mean(), **metrics}

    def _of_embeddings(self, packed: PackedTokens, dense: Dense | None, _: Tensor) -> tuple[Tensor, dict[str, Tensor]]:
        assert dense is not None
        cosine = F.cosine_similarity(_logits(self.model.backbone, packed), dense.logits, dim=1).mean()
        return 1 - cosine, {"cosine": cosine.detach()}

    @cached_property
    def _starts_alike(self) -> bool:
        """Whether all that is frozen is the teacher's: if nothing is dropped there, it need not run twice."""
        assert self.teacher is not None
        theirs = dict(self.teacher.named_parameters())
        ours = ((name, p) for name, p in self.model.backbone.named_parameters() if not p.requires_grad)
        return self.group is not None and all(torch.equal(p, theirs[name]) for name, p in ours)

    def _some(self, packed: PackedTokens, keys: Tensor) -> Tensor:
        num_keep = round(packed.num_patches * (1 - self.patch_drop * (1 - self.progress)))
        return at_random(keys.new_full((1, len(keys)), num_keep), keys)(packed.alive, packed.alive, 0)


def _logits(backbone: Any, packed: PackedTokens) -> Tensor:
    """In float32, since half precision is too coarse for a loss."""
    output = vit.head(backbone, packed)
    return output.to(torch.promote_types(output.dtype, torch.float32))


def _features(backbone: Any, packed: PackedTokens) -> Tensor:
    """What the classifier reads, without the dropout before it; in float32."""
    training = backbone.head_drop.training
    backbone.head_drop.eval()
    output = vit.head(backbone, packed, pre_logits=True)
    backbone.head_drop.train(training)
    return output.to(torch.promote_types(output.dtype, torch.float32))


def _shapes(backbone: nn.Module) -> dict[str, torch.Size]:
    return {name: parameter.shape for name, parameter in backbone.named_parameters()}


def decide_up_to(model: ReducedVisionTransformer, last: int | None, decide: Decide | None = None) -> Decide:
    """The model's decision, or another, up to group ``last``; later groups drop nothing. ``None``: no group does."""
    decide = decide or model.decision
    return lambda scores, alive, group: (keep_all if last is None or group > last else decide)(scores, alive, group)
