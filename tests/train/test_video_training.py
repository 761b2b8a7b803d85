"""Algorithm 1 on clips, by the command: the recipe for Kinetics with a small model and made videos."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from made import write_video

import iared2
from iared2.cli import main
from iared2.train import trainer

RECIPE = Path(__file__).parents[2] / "recipes" / "videomae_kinetics400.toml"
TINY = "{ img_size = [4, 32, 32], patch_size = [2, 8, 8], embed_dim = 48, depth = 3, num_heads = 3 }"


@pytest.fixture
def videos(tmp_path: Path) -> Path:
    """``train`` and ``val`` of two classes, each of short videos; one of them is broken."""
    for split, number in (("train", 3), ("val", 1)):
        for name in ("up", "down"):
            folder = tmp_path / "videos" / split / name
            folder.mkdir(parents=True)
            for i in range(number):
                write_video(folder / f"{i}.mp4", 12)
    broken = tmp_path / "videos" / "train" / "up" / "1.mp4"
    broken.write_bytes(broken.read_bytes()[:100])
    return tmp_path / "videos"


@pytest.mark.parametrize("name", ["timesformer_joint_base_patch16_224", "videomae_base_patch16_224"])
def test_a_run_on_videos_ends_with_a_model(
    name: str, videos: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("ACCELERATE_USE_CPU", "true")
    read, sizes = trainer.eval_batches, set()
    monkeypatch.setattr(trainer, "eval_batches", lambda *a, **k: sizes.add(k["batch_size"]) or read(*a, **k))
    torch.manual_seed(0)
    tubelet = 2 if name.startswith("videomae") else 1
    timm = TINY.replace("[2, 8, 8]", f"[{tubelet}, 8, 8]")
    size, patch = (4, 32, 32), (tubelet, 8, 8)
    start = iared2.from_timm(name, img_size=size, patch_size=patch, embed_dim=48, depth=3, num_heads=3, num_classes=2)
    start.save(tmp_path / "start.safetensors")
    settings = {
        "precision": "no",
        "compile": "false",
        "model.backbone": name,
        "model.timm": timm,
        "model.checkpoint": f"'{tmp_path / 'start.safetensors'}'",
        "data.workers": "0",
        "clips.span": "0.0",
        "clips.test_clips": "2",
        "policy_gradient.epochs": "1",
        "policy_gradient.batch_size": "2",
        "finetune.epochs": "1",
        "finetune.batch_size": "2",
        "finetune.lr": "1e-3",
    }
    given = [word for key, value in settings.items() for word in ("--set", f"{key}={value}")]
    assert main(["train", str(RECIPE), "--data", str(videos), "-o", str(tmp_path / "run"), *given]) == 0
    assert sizes == {trainer.EVAL_BATCH // (4 * 2)}, "two test clips of 4 frames"
    model = iared2.load(tmp_path / "run")
    assert model.class_names == ("down", "up")
    assert model.grid_size == (4 // tubelet, 4, 4)
    before, after = start.state_dict(), model.state_dict()
    assert not torch.equal(before["interpreters.0.query.weight"], after["interpreters.0.query.weight"])
    assert not torch.equal(before["backbone.head.weight"], after["backbone.head.weight"])
    assert torch.equal(before["backbone.patch_embed.proj.weight"], after["backbone.patch_embed.proj.weight"])
