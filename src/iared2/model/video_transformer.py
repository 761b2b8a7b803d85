"""Video backbones: timm's VisionTransformer with tubelets as patches.

Owns what distinguishes a clip from an image: tubelets, and their position in time. The models are registered with timm,
so a name works wherever the name of an image model does: `from_timm`, a recipe, ``iared2 bench``, ``iared2.load``.

Shapes: B clips of T frames; a patch is a tubelet of t frames × p × p pixels; N = T/t · rows · columns of them, numbered
by time, then row, then column.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from functools import partial
from typing import Any

import torch
from timm.data import IMAGENET_DEFAULT_MEAN, IMAGENET_DEFAULT_STD
from timm.layers import LayerNorm
from timm.models import build_model_with_cfg, generate_default_cfgs, register_model
from timm.models.vision_transformer import VisionTransformer
from torch import Tensor, nn

from ..errors import InputError


class TubeletEmbed(nn.Module):
    """Clips to patch tokens: one linear map per tubelet, like timm's ``PatchEmbed`` for images.

    Args:
        img_size: frames, height and width of a clip.
        patch_size: frames, height and width of a tubelet.
        in_chans: channels of a frame.
        embed_dim: C.
        bias: whether the map has one.
        dynamic_img_pad: timm's switch for images of other sizes; a clip has the size of the model.

    Raises:
        InputError: the sizes are not three numbers, or a clip is not divisible into tubelets.
    """

    strict_img_size = True

    def __init__(
        self,
        img_size: Sequence[int],
        patch_size: Sequence[int],
        in_chans: int = 3,
        embed_dim: int = 768,
        bias: bool = True,
        dynamic_img_pad: bool = False,
        device: Any = None,
        dtype: Any = None,
    ) -> None:
        super().__init__()
        self.img_size, self.patch_size = _three("img_size", img_size), _three("patch_size", patch_size)
        grid = []
        for name, size, patch in zip(("frames", "rows", "columns"), self.img_size, self.patch_size, strict=True):
            if size % patch:
                raise InputError(f"a clip of {size} {name} cannot be cut into patches of {patch}: give a multiple")
            grid.append(size // patch)
        if dynamic_img_pad:
            raise InputError("a video model has no dynamic_img_pad: its clips have one size")
        self.grid_size, self.num_patches = tuple(grid), math.prod(grid)
        self.proj = nn.Conv3d(
            in_chans, embed_dim, self.patch_size, stride=self.patch_size, bias=bias, device=device, dtype=dtype
        )

    def feat_ratio(self, as_scalar: bool = True) -> int | tuple[int, int]:
        """Spatial patch size in pixels, for timm."""
        return max(self.patch_size[1:]) if as_scalar else self.patch_size[1:]

    def forward(self, clips: Tensor) -> Tensor:
        """``(B, in_chans, T, height, width) -> (B, N, C)``, by time, row and column.

        Raises:
            InputError: the clips have another shape.
        """
        expected = (self.proj.in_channels, *self.img_size)
        if tuple(clips.shape[1:]) != expected:
            raise InputError(
                f"the model takes clips (B, {', '.join(map(str, expected))}): batch, channels, frames, height, width;"
                f" not {tuple(clips.shape)}"
            )
        return self.proj(clips).flatten(2).mT


class VideoTransformer(VisionTransformer):
    """A timm ``VisionTransformer`` for clips, with joint attention over all patches of all frames.

    TimeSformer has ``pos_embed (1, 1 + rows·columns, C)`` and ``time_embed (1, T/t, C)``, named as in its repository.
    Summed into one table, they would train as a different model, which could not be converted back. VideoMAE's
    embedding is fixed: a sinusoid of the patch number, stored as a buffer.

    Args:
        fixed_positions: VideoMAE's table, not TimeSformer's two.
        norm_eps: epsilon of every layer norm.
        fc_norm_eps: epsilon of the norm between pooling and classifier, if it differs.
        vit_kwargs: timm's. ``img_size`` and ``patch_size`` are frames, height and width.

    Raises:
        InputError: the sizes do not fit, or an argument requires tokens without a position.
    """

    pos_embed: Any

    def __init__(
        self,
        *,
        fixed_positions: bool = False,
        norm_eps: float = 1e-6,
        fc_norm_eps: float | None = None,
        **vit_kwargs: Any,
    ) -> None:
        super().__init__(embed_layer=TubeletEmbed, norm_layer=partial(LayerNorm, eps=norm_eps), **vit_kwargs)
        odd = self.num_reg_tokens or self.no_embed_class or self.dynamic_img_size or self.pos_embed is None
        if odd or (fixed_positions and self.has_class_token):
            raise InputError(
                "a video model embeds the position of every token, in clips of one size, and fixed positions are for"
                " one without a class token: leave reg_tokens, no_embed_class, dynamic_img_size and pos_embed out"
            )
        if fc_norm_eps is not None:
            self.fc_norm.eps = fc_norm_eps
        frames, rows, columns = self.patch_embed.grid_size
        table = self.pos_embed.detach()
        self.time_embed: nn.Parameter | None = None
        if fixed_positions:
            del self.pos_embed
            fixed = sinusoid(self.patch_embed.num_patches, self.embed_dim).to(table)
            self.register_buffer("pos_embed", fixed, persistent=False)
        else:
            self.pos_embed = nn.Parameter(table[:, : self.num_prefix_tokens + rows * columns].clone())
            self.time_embed = nn.Parameter(table.new_zeros(1, frames, self.embed_dim))

    def no_weight_decay(self) -> set[str]:
        """The embeddings, for timm's optimisers."""
        return {*super().no_weight_decay(), "time_embed"}

    def _pos_embed(self, x: Tensor) -> Tensor:
        """``(B, N, C) -> (B, P + N, C)``, prefix tokens first; a prefix token has a position, but no time."""
        if self.time_embed is None:
            return super()._pos_embed(x)
        prefix = self.num_prefix_tokens
        joint = (self.pos_embed[:, None, prefix:] + self.time_embed[:, :, None]).flatten(1, 2)  # (1, N, C)
        tokens = [x + joint]
        if self.cls_token is not None:
            tokens.insert(0, (self.cls_token + self.pos_embed[:, :prefix]).expand(x.shape[0], -1, -1))
        return self.pos_drop(torch.cat(tokens, 1))


def sinusoid(positions: int, width: int) -> Tensor:
    """VideoMAE's ``(1, positions, width)``: alternating sine and cosine, computed in float64 as in the original."""
    exponent = torch.arange(width, dtype=torch.float64).div(2, rounding_mode="floor") * 2 / width
    angles = torch.arange(positions, dtype=torch.float64)[:, None] / 10000**exponent
    return torch.where(torch.arange(width) % 2 == 0, angles.sin(), angles.cos()).float()[None]


def _three(name: str, sizes: Any) -> tuple[int, int, int]:
    if isinstance(sizes, Sequence) and len(sizes) == 3 and all(isinstance(n, int) and n > 0 for n in sizes):
        return sizes[0], sizes[1], sizes[2]
    raise InputError(f"{name} of a video model is three numbers, frames, height and width; not {sizes!r}")


def _cfg(mean: Sequence[float], std: Sequence[float]) -> dict[str, Any]:
    return {"num_classes": 400, "mean": mean, "std": std, "interpolation": "bilinear", "crop_pct": 1.0}


_TIMESFORMER = _cfg((0.45,) * 3, (0.225,) * 3)
default_cfgs = generate_default_cfgs(
    {
        "timesformer_joint_small_patch16_224": _TIMESFORMER,
        "timesformer_joint_base_patch16_224": _TIMESFORMER,
        "videomae_base_patch16_224": _cfg(IMAGENET_DEFAULT_MEAN, IMAGENET_DEFAULT_STD),
    }
)


def _create(name: str, pretrained: bool, kwargs: dict[str, Any]) -> VideoTransformer:
    base = {"img_size": (8, 224, 224), "patch_size": (1, 16, 16), "embed_dim": 768, "depth": 12, "num_heads": 12}
    kwargs = {**base, **kwargs}
    # bound, not passed: timm holds any img_size that it sees to height and width
    return build_model_with_cfg(partial(VideoTransformer, img_size=kwargs.pop("img_size")), name, pretrained, **kwargs)


@register_model
def timesformer_joint_base_patch16_224(pretrained: bool = False, **kwargs: Any) -> VideoTransformer:
    """JointST TimeSformer of ViT-B: 8 frames, 1,568 patches (arXiv:2102.05095)."""
    return _create("timesformer_joint_base_patch16_224", pretrained, kwargs)


@register_model
def timesformer_joint_small_patch16_224(pretrained: bool = False, **kwargs: Any) -> VideoTransformer:
    """The same, with the width of DeiT-S."""
    return _create("timesformer_joint_small_patch16_224", pretrained, {"embed_dim": 384, "num_heads": 6, **kwargs})


@register_model
def videomae_base_patch16_224(pretrained: bool = False, **kwargs: Any) -> VideoTransformer:
    """VideoMAE of ViT-B: 16 frames in tubelets of two, no class token, average pooling (arXiv:2203.12602)."""
    base = {"img_size": (16, 224, 224), "patch_size": (2, 16, 16), "class_token": False, "global_pool": "avg"}
    return _create("videomae_base_patch16_224", pretrained, {**base, "fixed_positions": True, **kwargs})
