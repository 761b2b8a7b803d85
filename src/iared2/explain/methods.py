"""One call for every heat map: our method and baselines, for a reduced model or a dense backbone.

A method gives one value per patch. All maps are then computed in the same way: scaled to [0, 1] and resized, so that
they differ by method and not by rendering. (Only Grad-CAM's package and the centre prior render their own maps.)
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any, Literal

import torch
from timm.data import resolve_data_config
from torch import Tensor
from torch.nn import functional as F

from .. import keyed
from ..errors import InputError
from ..model.decide import keep_all, on_grid
from ..model.reduced import ReducedVisionTransformer
from .attention_maps import raw_attention, rollout
from .forward import backbone_of, first_pass, private_twin
from .gradients import grad_cam, integrated_gradients
from .heatmap import default_group, grid_of, lowest_kept, score_map, upsample
from .memorability import memorability
from .names import EVERY, KIN

SITE_RANDOM_MAP = 0  # its keys are of images' contents, and no other draw has such keys
Group = int | Literal["all"] | None


def heatmap(
    model: Any,
    images: Tensor,
    method: str = "interpreter",
    target: Tensor | None = None,
    *,
    group: Group = None,
    block: int | None = None,
    seed: int = 0,
) -> Tensor:
    """A heat map of what the model looks at, with one of the methods of names.py.

    - ``interpreter``: ours, see ``interpreter_map``. The forward pass ends at the group whose scores are used.
    - ``attention``: of the class token, see ``attention_maps.raw_attention``.
    - ``rollout``: see ``attention_maps.rollout``.
    - ``gradcam`` and its variants ``gradcam++``, ``hirescam``, ``layercam``: see ``gradients.grad_cam``.
    - ``integrated-gradients``: see ``gradients.integrated_gradients``.
    - ``memorability``: of the photo, independent of the model, see ``memorability.memorability``.
    - ``random``: a uniform draw per patch, keyed by the seed and the pixels of the image.
    - ``center``: a Gaussian around the centre, σ = a quarter of each side, since photographers centre the object.

    Args:
        model: a ``ReducedVisionTransformer``, or a dense timm vision transformer (which has no interpreter).
        images: ``(B, 3, H, W)``, normalised by the model's ``pretrained_cfg``.
        method: as above.
        target: ``(B,)`` int64, the classes that gradients explain; the model's own top-1 if None.
        group: of ``interpreter``, from 0, or "all". None: see ``heatmap.default_group``.
        block: of ``attention``, from 0 (None: the second); or the block whose input Grad-CAM uses (None: the last).
        seed: of ``random``.

    Returns:
        ``(B, H, W)`` float32 in [0, 1] on the images' device, without gradient. Each map is normalised separately to a
        minimum of 0 and a maximum of 1 before it is resized; a constant map is zeros.

    Raises:
        InputError: an unknown method, group, block or class, images of another shape, or a missing package.
    """
    backbone = _check(model, images, method, target)
    if method == "center":
        return _center(images)
    if method == "memorability":
        return _unit(memorability(_photos(model, images)))
    seen, small = first_pass(model, images)
    if seen is not model and method != "interpreter":  # which knows its own grid
        maps = heatmap(seen, small, method, target, group=group, block=block, seed=seed)
        return F.interpolate(maps[:, None], images.shape[-2:], mode="bicubic", antialias=True)[:, 0].clamp(0, 1)
    height, width = images.shape[-2:]
    grid = rows, columns = backbone.patch_embed.dynamic_feat_size((height, width))
    size = tuple(count * side for count, side in zip(grid, backbone.patch_embed.patch_size, strict=True))
    images = F.pad(images, (0, size[1] - width, 0, size[0] - height))  # as the model would; the maps are cropped
    if model.training:
        model = private_twin(model)
    if target is not None:
        target = target.to(images.device)
    depth = len(backbone.blocks)
    block = _index("block", block, depth, default=1 if method == "attention" else depth - 1)
    with torch.no_grad():
        if method == "interpreter":
            maps = _interpret(model, images, group)
        elif method in KIN:
            maps = _unit(grad_cam(model, images, target, method, block))
        else:
            patches = {
                "attention": lambda: raw_attention(model, images, block),
                "rollout": lambda: rollout(model, images),
                "integrated-gradients": lambda: integrated_gradients(model, images, target),
                "random": lambda: _random(images, rows * columns, seed),
            }[method]()
            maps = upsample(_unit(patches), grid, size, low=0)
        return maps[..., :height, :width]


def interpreter_map(
    model: ReducedVisionTransformer,
    scores: Tensor | Sequence[Tensor],
    kept: Tensor | Sequence[Tensor],
    size: tuple[int, int],
    group: Group = None,
) -> Tensor:
    """Our heat map from the scores of an existing forward pass, so only the rendering takes time.

    One group: its scores, clamped below and normalised as in the authors' tool (``heatmap.score_map``). A patch that
    was dropped before has the minimum; with ``model.spread``, what is around it counts.

    All groups: the number of groups that kept a patch, plus its score in the last one that scored it. A group has no
    scores for patches dropped earlier, so no single group ranks all patches. The sum does: a patch that was dropped
    later ranks above all that were dropped earlier, and the score ranks patches of the same group. Scores of different
    groups are never compared, since each group has its own threshold.

    Args:
        model: the model of the scores; its patch size and decision are read.
        scores: ``Output.scores (D, B, N)``, or only those of the first groups if these include ``group``.
        kept: ``Output.kept (D, B, N)``, of the same groups.
        size: height and width of the images.
        group: from 0, or "all". None: see ``heatmap.default_group``.

    Returns:
        ``(B, height, width)`` float32 in [0, 1].
    """
    grid = grid_of(model, size)
    if math.prod(map(math.ceil, grid)) != scores[0].shape[-1]:  # they are of the images as they are
        grid = grid_of(model, size, keep_all)
    if group != "all":
        group = _index("group", group, len(scores), default_group(len(scores)))
        own = model.thresholds
        thresholds = lowest_kept(scores[group], kept[group]).tolist() if own is None else [own[group]]
        return score_map(scores[group].float(), grid, size, thresholds, model.spread)
    every = torch.stack(list(scores))
    depth = every.gt(0).sum(0) - 1  # a score is 0 if and only if the patch was dropped before
    last = every.gather(0, depth.clamp_min(0)[None])[0]
    return upsample(_unit(depth + last), grid, size, low=0)


def _interpret(model: Any, images: Tensor, group: Group) -> Tensor:
    if not isinstance(model, ReducedVisionTransformer):
        raise InputError("a dense backbone has no interpreter: give a reduced model, or take another method")
    groups = model.num_groups
    last = groups - 1 if group == "all" else _index("group", group, groups, default_group(groups))
    packed, scores, kept = model.reduce(model.embed(images), range(last))
    score = model.score(packed, last)  # the blocks behind it are not needed
    keep = model.decide(score, packed.alive, last, on_grid(model.decision, packed.grid_size))
    return interpreter_map(model, [*scores, score], [*kept, keep], (images.shape[-2], images.shape[-1]), group)


def _random(images: Tensor, num_patches: int, seed: int) -> Tensor:
    """``(B, N)``. An image has the same map in any batch, since its key is computed from its pixels."""
    content = images.float().flatten(1).view(torch.int32).sum(1, dtype=torch.int64)
    return keyed.uniform(keyed.sample_keys(seed, 0, content), SITE_RANDOM_MAP, num_patches)


def _center(images: Tensor) -> Tensor:
    x = [(torch.arange(side, device=images.device) + 0.5) * 4 / side - 2 for side in images.shape[-2:]]  # in σ
    down, right = (torch.exp(-(x_side**2) / 2) for x_side in x)
    return _unit((down[:, None] * right).expand(len(images), -1, -1))


def _photos(model: Any, images: Tensor) -> Tensor:
    """Images before normalisation, in [0, 1]."""
    cfg = resolve_data_config(pretrained_cfg=getattr(model, "pretrained_cfg", None) or {})
    mean, std = (images.new_tensor(cfg[key])[:, None, None] for key in ("mean", "std"))
    return (images * std + mean).clamp(0, 1)


def _unit(maps: Tensor) -> Tensor:
    """Scale ``(B, ...)`` to [0, 1] per item; an item that is constant up to rounding is zeros."""
    flat = maps.float().flatten(1)
    low, high = flat.amin(1, keepdim=True), flat.amax(1, keepdim=True)
    told_apart = high - low > 1e-6 * torch.maximum(low.abs(), high.abs())
    return torch.where(told_apart, (flat - low) / (high - low), 0).reshape(maps.shape)


def _index(what: str, value: Any, count: int, default: int) -> int:
    """An index from 0 to ``count`` − 1; the default if None, or the last if the default is too large."""
    if value is None:
        return min(default, count - 1)
    if not isinstance(value, int) or not 0 <= value < count:
        raise InputError(f"there is no {what} {value}: give a number from 0 to {count - 1}")
    return value


def _check(model: Any, images: Tensor, method: str, target: Tensor | None) -> Any:
    """The backbone, if the arguments are consistent."""
    if method not in EVERY:
        raise InputError(f"there is no method {method!r}: take one of {', '.join(EVERY)}")
    backbone = backbone_of(model)
    embed = backbone.patch_embed
    if len(embed.patch_size) > 2:
        raise InputError("heat maps are of images, and this model takes clips: see the scores of model.trace(clips)")
    height, width = embed.img_size if embed.strict_img_size else images.shape[-2:]
    expected = (embed.proj.in_channels, height, width)
    if images.ndim != 4 or not len(images) or tuple(images.shape[1:]) != expected or not images.is_floating_point():
        shape = ", ".join(map(str, expected if embed.strict_img_size else (expected[0], "H", "W")))
        raise InputError(f"images: the model takes (B, {shape}) of floats, not {tuple(images.shape)} {images.dtype}")
    if method in (*KIN, "integrated-gradients"):
        if not backbone.num_classes:
            raise InputError(f"{method} asks why a class was chosen, and this model has no classes")
        last = backbone.num_classes - 1
        if target is not None and (target.shape != images.shape[:1] or target.min() < 0 or target.max() > last):
            raise InputError(f"target: give one class for each of the {len(images)} images, from 0 to {last}")
    return backbone
