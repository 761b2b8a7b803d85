"""Algorithm 1 end to end on tiny data: stages, resuming after SIGKILL, one process = two, a new head, bad recipes."""

from __future__ import annotations

import json
import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import load_file

import iared2
from iared2.cli import main
from iared2.errors import InputError
from iared2.train.recipe import Recipe, read_recipe

RECIPE = """
seed = 3
eval_epochs = 1
[model]
backbone = "deit_tiny_patch16_224"
groups = 2
[model.timm]
img_size = 16
patch_size = 4
embed_dim = 32
depth = 4
num_heads = 2
drop_path_rate = 0.2
proj_drop_rate = 0.1
[data]
workers = 0
[backbone]
epochs = 2
batch_size = 8
mixup = 0.2
ema_decay = 0.9
[policy_gradient]
epochs = 1
batch_size = 8
[finetune]
epochs = 1
batch_size = 8
accumulate = 2
clip_grad = 1.0
layer_decay = 0.8
"""


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """A folder of three classes: 24 training and 6 validation images of coloured noise."""
    root = tmp_path_factory.mktemp("images")
    generator = np.random.default_rng(0)
    for split, count in (("train", 8), ("val", 2)):
        for number, name in enumerate(("red", "green", "blue")):
            (root / split / name).mkdir(parents=True)
            for i in range(count):
                pixels = generator.integers(0, 120, (20, 24, 3))
                pixels[..., number] += 120
                Image.fromarray(pixels.astype(np.uint8)).save(root / split / name / f"{i}.png")
    return root


@pytest.fixture(scope="module")
def recipe(tmp_path_factory):
    path = tmp_path_factory.mktemp("recipe") / "tiny.toml"
    path.write_text(RECIPE)
    return path


def command(recipe: Path, folder: Path, output: Path, *more: str) -> list[str]:
    return ["train", str(recipe), "--data", str(folder), "-o", str(output), *more]


def run(*arguments: str, processes: int = 1) -> subprocess.Popen:
    launcher = [sys.executable, "-m", "iared2.cli"]
    if processes > 1:
        launcher = [sys.executable, "-m", "torch.distributed.run", f"--nproc-per-node={processes}"]
        launcher += ["--standalone", "-m", "iared2.cli"]
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "ACCELERATE_USE_CPU": "true"}
    return subprocess.Popen([*launcher, *arguments], env=environment, stderr=subprocess.DEVNULL)


@pytest.fixture(scope="module")
def finished(tmp_path_factory, folder, recipe):
    """A run that nobody disturbed."""
    output = tmp_path_factory.mktemp("finished") / "run"
    process = run(*command(recipe, folder, output))
    assert process.wait(300) == 0
    return output


def records(output: Path) -> list[dict]:
    return [json.loads(line) for line in (output / "metrics.jsonl").read_text().splitlines()]


def test_a_run_has_all_stages_and_its_model_loads(finished):
    steps = [r for r in records(finished) if r["kind"] == "step"]
    stages = list(dict.fromkeys(r["stage"] for r in steps))
    assert stages == ["backbone", "policy_gradient 1", "finetune 1", "policy_gradient 2", "finetune 2"]
    assert [sum(r["stage"] == s for r in steps) for s in stages] == [6, 3, 3, 3, 3]
    policy = next(r for r in steps if r["stage"] == "policy_gradient 1")
    assert policy.keys() >= {
        "reward", "reward_greedy", "keep_ratio_sampled", "keep_ratio_greedy", "top1_sampled", "top1_greedy",
        "loss", "entropy", "images_per_second", "lr",
    }  # fmt: skip
    assert any(r["kind"] == "evaluation" and r["images"] == 6 for r in records(finished))
    model = iared2.load(finished)
    assert model.class_names == ("blue", "green", "red")
    assert model(torch.zeros(1, 3, 16, 16)).shape == (1, 3)
    assert list((finished / "tensorboard").iterdir())


def test_killed_anywhere_it_ends_with_the_same_weights(tmp_path, folder, recipe, finished):
    """SIGKILL in the middle of several stages, then go on: the weights agree bit for bit."""
    output = tmp_path / "run"
    for kill_after in (2, 5, 10):  # optimiser steps
        process = run(*command(recipe, folder, output, "--set", "checkpoint_minutes=0"))
        deadline = time.monotonic() + 300
        while time.monotonic() < deadline and process.poll() is None:
            if (output / "metrics.jsonl").exists() and len(
                [line for line in (output / "metrics.jsonl").read_text().splitlines() if '"step"' in line]
            ) >= kill_after:
                process.send_signal(signal.SIGKILL)
                break
            time.sleep(0.002)
        assert process.wait() == -signal.SIGKILL
        assert not (output / "model.safetensors").exists()
    process = run(*command(recipe, folder, output))
    assert process.wait(300) == 0

    disturbed, undisturbed = (load_file(o / "model.safetensors") for o in (output, finished))
    for name, tensor in undisturbed.items():
        assert torch.equal(tensor, disturbed[name]), name
    timeless = [{k: v for k, v in r.items() if k != "images_per_second"} for r in records(finished)]
    assert [{k: v for k, v in r.items() if k != "images_per_second"} for r in records(output)] == timeless


def test_two_processes_take_the_same_steps_as_one(tmp_path, folder, recipe):
    """Same global batch, so the same gradient; dropout and mixup are off, since their draws belong to a process."""
    off = ["backbone.mixup=0.0", "backbone.epochs=1", "model.timm.proj_drop_rate=0.0", "finetune.accumulate=1"]
    settings = [x for s in off for x in ("--set", s)]
    sizes = [
        [x for s in ("backbone", "policy_gradient", "finetune") for x in ("--set", f"{s}.batch_size={b}")]
        for b in (8, 4)
    ]
    single = run(*command(recipe, folder, tmp_path / "1", *settings, *sizes[0]))
    assert single.wait(300) == 0
    double = run(*command(recipe, folder, tmp_path / "2", *settings, *sizes[1]), processes=2)
    assert double.wait(300) == 0
    one, two = records(tmp_path / "1"), records(tmp_path / "2")
    assert len(one) == len(two)
    for a, b in zip(one, two, strict=True):
        assert a["stage"] == b["stage"]
        for name in ("loss", "reward", "keep_ratio_sampled", "grad_norm", "top1"):
            assert a.get(name) == pytest.approx(b.get(name), abs=2e-4), (a["stage"], name)
    weights, others = (load_file(tmp_path / n / "model.safetensors") for n in "12")
    for name, tensor in weights.items():
        torch.testing.assert_close(others[name], tensor, rtol=0, atol=5e-4)


def test_a_new_head_on_existing_weights(tmp_path, folder, recipe, finished):
    weights = tmp_path / "backbone.pth"
    backbone = iared2.load(finished).backbone
    torch.save(
        {"state_dict": {**backbone.state_dict(), "head.weight": torch.zeros(9, 32), "head.bias": torch.zeros(9)}},
        weights,
    )
    settings = [f"model.checkpoint='{weights}'", "backbone.epochs=1", "policy_gradient.epochs=0", "finetune.epochs=0"]
    more = [x for s in settings for x in ("--set", s)]
    assert main(command(recipe, folder, tmp_path / "run", *more)) == 0
    assert iared2.load(tmp_path / "run").num_classes == 3


@pytest.mark.parametrize(
    ("setting", "message"),
    [
        ("finetune.epoch=1", "unknown setting 'finetune.epoch'; did you mean 'epochs'?"),
        ("finetune.epochs=many", "finetune.epochs = 'many' should be of type float"),
        ("finetune", "expected section.key=value"),
        ("backbone.batch_size=4000", "set a smaller batch_size"),
        ("model.backbone=resnet18", "not a timm VisionTransformer"),
        ("backbone.epochs=0", "needs a trained backbone"),
        ("finetune.accumulate=9", "accumulate must be in 1…batch_size"),
        ("backbone.batch_size=7", "even batch_size"),
        ("precision=fp8", "precision"),
        ("seed=-1", "seed"),
        ("model.mean=[0.5, 0.5, 0.5]", "model.mean and model.std go together"),
        ("finetune.augment.auto_augment=nonsense", "timm does not take the augmentation"),
        ("model.checkpoint=nowhere.pth", "there is no checkpoint nowhere.pth"),
    ],
)
def test_bad_settings_are_one_clear_line(tmp_path, folder, recipe, capsys, setting, message):
    status = main(command(recipe, folder, tmp_path / "run", "--set", "model.timm={}", "--set", setting))
    error = capsys.readouterr().err.strip()
    assert status == 1
    assert message in error
    assert len([line for line in error.splitlines() if line.startswith("error:")]) == 1
    assert not (tmp_path / "run" / "model.safetensors").exists()


def test_other_images_are_another_run(tmp_path, finished, folder, recipe, capsys):
    other = tmp_path / "folder"
    shutil.copytree(folder, other)
    (other / "train" / "red" / "0.png").unlink()
    assert main(command(recipe, other, finished)) == 1
    assert "other number of images" in capsys.readouterr().err


def test_another_recipe_does_not_overwrite_a_run(finished, folder, recipe, capsys):
    before = (finished / "model.safetensors").read_bytes()
    assert main(command(recipe, folder, finished, "--set", "seed=4")) == 1
    assert "run of another recipe" in capsys.readouterr().err
    assert (finished / "model.safetensors").read_bytes() == before


def test_defaults_are_the_published_schedule(tmp_path):
    path = tmp_path / "empty.toml"
    path.write_text("")
    recipe = read_recipe(path)
    assert recipe == Recipe()
    assert recipe.model.groups * (recipe.policy_gradient.epochs + recipe.finetune.epochs) == 90
    path.write_text("a = ")
    with pytest.raises(InputError, match="not valid TOML"):
        read_recipe(path)


def test_every_shipped_recipe_can_be_read():
    recipes = sorted((Path(__file__).parents[2] / "recipes").glob("*.toml"))
    assert recipes
    for path in recipes:
        assert read_recipe(path).model.groups == 3
        assert path.read_text().startswith("#"), "a recipe's header says cost, data and expected result"
