"""Random augmentation of images and targets in training: timm's, and torchvision's for clips."""

from __future__ import annotations

from dataclasses import dataclass

from timm.data import Mixup, create_transform
from timm.data.mixup import mixup_target
from torch import Tensor
from torchvision.transforms import Compose, Grayscale

from ..data.batches import Transform, clip_length
from ..data.device_dataset import BatchAugment
from ..data.videos import train_transform
from ..errors import InputError
from ..model.reduced import ReducedVisionTransformer


@dataclass(frozen=True)
class AugmentConfig:
    """Augmentation of the training images, with timm.data.create_transform; the same for all frames of a clip."""

    min_scale: float = 0.08
    """Smallest share of the area in a random crop."""
    hflip: float = 0.5
    """Probability of a horizontal flip."""
    color_jitter: float = 0.3
    """Strength of brightness, contrast and saturation changes; 0: none."""
    auto_augment: str = ""
    """timm's policy string, such as "rand-m9-mstd0.5-inc1"; empty: none."""
    random_erasing: float = 0.0
    """Probability of erasing a random box."""

    def on_device(self, model: ReducedVisionTransformer) -> BatchAugment:
        """The same augmentation for whole batches of resident images.

        Raises:
            InputError: ``auto_augment`` is set, which works on single images.
        """
        if self.auto_augment:
            raise InputError(
                f"recipe: auto_augment = {self.auto_augment!r} changes images one by one; set data.resident = false"
            )
        cfg = model.pretrained_cfg
        return BatchAugment(self.min_scale, self.hflip, self.color_jitter, self.random_erasing, cfg["mean"], cfg["std"])

    def transform(self, model: ReducedVisionTransformer) -> Transform:
        """The training transform for the model's input.

        Raises:
            InputError: timm does not know the policy, or a value is out of its range.
        """
        cfg = model.pretrained_cfg
        if clip_length(cfg):
            if self.auto_augment or self.random_erasing:
                raise InputError("recipe: auto_augment and random_erasing are not for clips; leave them out")
            return train_transform(cfg, self.min_scale, self.hflip, self.color_jitter)
        try:
            primary, secondary, final = create_transform(
                cfg["input_size"],
                separate=True,
                is_training=True,
                scale=(self.min_scale, 1.0),
                hflip=self.hflip,
                color_jitter=self.color_jitter or None,
                auto_augment=self.auto_augment or None,
                re_prob=self.random_erasing,
                interpolation="bicubic",
                mean=cfg["mean"],
                std=cfg["std"],
            )
        except (AssertionError, ValueError, KeyError, TypeError, IndexError, OverflowError) as error:
            raise InputError(f"recipe: timm does not take the augmentation {self}: {error}") from None
        colours = [] if len(cfg["mean"]) == 3 else [Grayscale()]
        return Compose([primary, secondary, *colours, final])


class TargetMaker:
    """Mixup, CutMix and label smoothing: images and labels -> images and class probabilities ``(B, K)``."""

    def __init__(self, label_smoothing: float, mixup: float, cutmix: float, num_classes: int) -> None:
        self.smoothing, self.num_classes = label_smoothing, num_classes
        self.mixup = Mixup(mixup, cutmix, label_smoothing=label_smoothing, num_classes=num_classes)
        self.mixes = mixup > 0 or cutmix > 0

    def __call__(self, images: Tensor, labels: Tensor) -> tuple[Tensor, Tensor]:
        if self.mixes:
            return self.mixup(images, labels)
        return images, mixup_target(labels, self.num_classes, smoothing=self.smoothing)
