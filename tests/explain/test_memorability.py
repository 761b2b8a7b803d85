"""The memorability of real photos, by the real ResMem, where it is installed; and one line where it is not."""

from __future__ import annotations

import importlib
import importlib.util

import pytest
import skimage.data
import torch
from tiny import sharp_model
from torch import Tensor
from torch.nn.functional import interpolate

from iared2 import InputError, heatmap
from iared2.explain.memorability import _resmem, memorability

SMALL = "deit_tiny_patch16_224", {"img_size": (96, 64), "patch_size": 16, "depth": 2, "embed_dim": 48, "num_heads": 3}
needs_resmem = pytest.mark.skipif(
    importlib.util.find_spec("resmem") is None, reason="memorability: pip install '.[memorability]' (489 MB)"
)


def photos() -> Tensor:
    """``(2, 3, 96, 64)`` in [0, 1]: a portrait and a cat."""
    found = [torch.tensor(p).permute(2, 0, 1)[None] / 255 for p in (skimage.data.astronaut(), skimage.data.chelsea())]
    return torch.cat([interpolate(p, (96, 64), mode="bilinear", antialias=True) for p in found])


@needs_resmem
def test_a_face_is_remembered_and_the_model_does_not_matter():
    model = sharp_model(SMALL, groups=2)
    cfg = model.pretrained_cfg
    mean, std = (torch.tensor(cfg[key])[:, None, None] for key in ("mean", "std"))
    maps = heatmap(model, (photos() - mean) / std, "memorability")
    assert maps.shape == (2, 96, 64)
    assert maps.amin((1, 2)).tolist() == [0, 0]
    assert maps.amax((1, 2)).tolist() == [1, 1]
    torch.testing.assert_close(maps, heatmap(model.backbone, (photos() - mean) / std, "memorability"))

    direct = memorability(photos())  # of the photo as it was before the model's normalisation
    assert (maps - direct).abs().max() < 0.02
    single = heatmap(model, (photos()[1:] - mean) / std, "memorability")
    torch.testing.assert_close(single[0], maps[1], rtol=0, atol=1e-5)
    head = maps[0, 6:48, 16:44].mean()  # of the astronaut
    assert head > 1.3 * maps[0].mean()


def test_without_the_package_it_is_one_line(monkeypatch):
    real = importlib.import_module

    def import_module(name: str, *package: str):
        if name == "resmem":
            raise ModuleNotFoundError(f"No module named {name!r}", name=name)
        return real(name, *package)

    _resmem.cache_clear()
    monkeypatch.setattr(importlib, "import_module", import_module)
    with pytest.raises(InputError, match=r"^this needs the package resmem \(resmem\): run pip install '.\[memorab"):
        memorability(torch.rand(1, 3, 8, 8))
