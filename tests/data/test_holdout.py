"""`iared2 evaluate` finds the images again that training held out, and says which ones it uses."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from pictures import jpeg, write_folder

import iared2
from iared2.cli import main
from iared2.data.images import DataConfig, open_samples
from iared2.model import file

RECIPE = """
[model]
backbone = "deit_tiny_patch16_224"
groups = 1
timm = { img_size = 8, patch_size = 4, embed_dim = 8, depth = 1, num_heads = 1 }
[data]
workers = 0
holdout = 0.4
[backbone]
epochs = 1
batch_size = 4
[policy_gradient]
epochs = 0
[finetune]
epochs = 0
"""


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Two classes of 20 photos without splits."""
    return write_folder(tmp_path_factory.mktemp("photos"), each=20)


@pytest.fixture(scope="module")
def run(folder: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A model that was trained on the folder."""
    path = tmp_path_factory.mktemp("run")
    (path / "recipe.toml").write_text(RECIPE)
    assert main(["train", str(path / "recipe.toml"), "--data", str(folder), "-o", str(path)]) == 0
    return path


def evaluated(capsys: pytest.CaptureFixture, *arguments: object) -> tuple[int, str]:
    """The number of images, and what was said about them."""
    assert main(["evaluate", "-c", *map(str, arguments), "--workers", "0", "--json"]) == 0
    captured = capsys.readouterr()
    return json.loads(captured.out)["images"], captured.err


def test_the_part_that_was_put_aside(run: Path, folder: Path, capsys: pytest.CaptureFixture) -> None:
    config = DataConfig(str(folder), holdout=0.4)
    held, trained = (len(open_samples(config, split)) for split in ("holdout", "train"))
    assert held + trained == 40
    images, said = evaluated(capsys, run, folder, "--budget", "1")
    assert images == held
    assert "using the 40% that training held out; --all uses all" in said
    assert f"calibrated on {trained} of training images" in said
    images, said = evaluated(capsys, run, folder, "--all", "--budget", "1")
    assert images == 40
    assert "warning: if the model was trained on this data, it has seen most of it" in said
    assert f"calibrated on {trained} of training images" in said


def test_a_split_to_evaluate_on_is_taken_as_it_is(
    run: Path, folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture
) -> None:
    (tmp_path / "train").symlink_to(folder)
    images, said = evaluated(capsys, run, tmp_path)
    assert 0 < images < 40
    assert "held out" in said
    write_folder(tmp_path / "val", each=3)
    images, said = evaluated(capsys, run, tmp_path)
    assert images == 6
    assert "aside" not in said
    assert "warning" not in said


def test_what_was_put_aside_stays_so(run: Path, tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    """In a copy elsewhere that has grown, nothing that was trained on is scored."""
    root = write_folder(tmp_path / "copy", each=20)
    before = evaluated(capsys, run, root)[0]
    trained = open_samples(DataConfig(str(root), holdout=0.4), "train")
    names = {trained.name(i) for i in range(len(trained))}
    for i in range(20, 60):
        (root / "cat" / f"{i}.jpg").write_bytes(jpeg(500 + i))
    held = open_samples(DataConfig(str(root), holdout=0.4), "holdout")
    assert len(held) > before
    assert names.isdisjoint(held.name(i) for i in range(len(held)))
    assert evaluated(capsys, run, root)[0] == len(held)


def test_files_that_do_not_say_take_all(run: Path, folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    model = iared2.load(run)
    assert model.pretrained_cfg["holdout"] == 0.4
    del model.backbone.pretrained_cfg["holdout"]
    model.save(tmp_path / "old.safetensors")
    images, said = evaluated(capsys, tmp_path / "old.safetensors", folder)
    assert images == 40
    assert "aside" not in said


@pytest.mark.parametrize("share", ["half", 1, -0.5, [0.1]])
def test_a_share_that_makes_no_sense(
    run: Path, folder: Path, tmp_path: Path, share: object, capsys: pytest.CaptureFixture
) -> None:
    tensors, config = file.read(run / "model.safetensors")
    config["pretrained_cfg"]["holdout"] = share
    file.write(tmp_path / "odd.safetensors", tensors, config)
    assert main(["evaluate", "-c", str(tmp_path / "odd.safetensors"), str(folder)]) == 1
    error = capsys.readouterr().err
    assert "holdout" in error
    assert error.count("\n") == 1
