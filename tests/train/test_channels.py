"""Models of grey images are trained on colour photos made grey; what photos do not have is refused."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

import iared2
from iared2.cli import main
from iared2.data.batches import model_transform

RECIPE = """
[model]
backbone = "deit_tiny_patch16_224"
groups = 2
timm = { img_size = 16, patch_size = 4, embed_dim = 32, depth = 2, num_heads = 2 }
[data]
workers = 0
[backbone]
epochs = 1
batch_size = 4
[policy_gradient]
epochs = 0
[finetune]
epochs = 1
batch_size = 4
"""


@pytest.fixture
def train(tmp_path: Path):
    for split in ("train", "val"):
        for number, name in enumerate(("ant", "bee")):
            (tmp_path / "images" / split / name).mkdir(parents=True)
            for i in range(2):
                pixels = np.random.default_rng(10 * number + i).integers(0, 255, (20, 24, 3)).astype(np.uint8)
                Image.fromarray(pixels).save(tmp_path / "images" / split / name / f"{i}.png")
    recipe = tmp_path / "recipe.toml"
    recipe.write_text(RECIPE)

    def run(*settings: str) -> int:
        more = [x for s in settings for x in ("--set", s)]
        return main(["train", str(recipe), "--data", str(tmp_path / "images"), "-o", str(tmp_path / "run"), *more])

    return run


@pytest.mark.parametrize("resident", ["true", "false"])
@pytest.mark.parametrize("own", [(), ("model.mean=[0.3]", "model.std=[0.2]")], ids=["", "own"])
def test_one_channel_is_grey(tmp_path, train, resident, own):
    assert train("model.timm.in_chans=1", f"data.resident={resident}", *own) == 0
    model = iared2.load(tmp_path / "run")
    mean, std = model.pretrained_cfg["mean"], model.pretrained_cfg["std"]
    assert (list(mean), list(std)) == (([0.3], [0.2]) if own else ([pytest.approx(0.449, abs=1e-3)], [0.226]))
    image = model_transform(model.pretrained_cfg)(Image.new("RGB", (30, 40), (255, 0, 0)))
    assert image.shape == (1, 16, 16)
    torch.testing.assert_close(image, ((torch.full((1, 16, 16), 0.299) - mean[0]) / std[0]), atol=0.02, rtol=0)
    assert model(image[None]).shape == (1, 2)


@pytest.mark.parametrize("channels", [2, 4])
def test_other_channels_are_one_line(tmp_path, train, capsys, channels):
    assert train(f"model.timm.in_chans={channels}") == 1
    error = capsys.readouterr().err
    assert error == f"error: recipe: model.timm.in_chans = {channels}, but photos have 3 channels, or 1 as grey\n"
    assert not (tmp_path / "run").exists()
