"""A timm name, or a timm model -> a reduced model with untrained interpreters."""

from __future__ import annotations

from typing import Any

from torch import nn

from ..errors import InputError
from ..model.reduced import ReducedVisionTransformer
from ..model.restore import build


def from_timm(
    backbone: str | nn.Module,
    *,
    groups: int = 3,
    pretrained: bool = False,
    interpreter: str = "sigmoid",
    dropped: str = "gone",
    **timm_kwargs: Any,
) -> ReducedVisionTransformer:
    """Build a reduced model from a timm vision transformer, with untrained interpreters.

    Args:
        backbone: a timm model name (``"deit_small_patch16_224"``), or a module, which is used unchanged.
        groups: D, the number of groups.
        pretrained: load timm's weights of that name.
        interpreter: "sigmoid" or "attention": see `ReducedVisionTransformer`.
        dropped: "gone" or "merged": see `ReducedVisionTransformer`.
        timm_kwargs: for ``timm.create_model`` (``img_size``, ``num_classes``, ``drop_path_rate`` …).

    Raises:
        InputError: unknown name, arguments that timm refuses, weights that are not available, or a model that is not
            supported (says why).
    """
    if isinstance(backbone, nn.Module):
        if pretrained or timm_kwargs:
            raise InputError("from_timm: pretrained and timm arguments go with a model name, not with a module")
        return ReducedVisionTransformer(backbone, groups, interpreter=interpreter, dropped=dropped)
    given: Any = {"groups": groups, "pretrained": pretrained, "interpreter": interpreter, "dropped": dropped}
    return build(ReducedVisionTransformer, backbone, **given, **timm_kwargs)
