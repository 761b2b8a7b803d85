"""Every shipped recipe runs: its stages, a few steps each, with a model cut down by settings and images of noise.

And the ImageNet recipe by `torchrun`, as on eight GPUs or several machines, from WebDataset shards.
"""

from __future__ import annotations

import json
import math
import os
import socket
import subprocess
import sys
from collections import Counter
from dataclasses import replace
from pathlib import Path

import pytest
import timm
import torch
from accelerate.state import AcceleratorState
from pictures import jpeg, samples_of, write_shard
from safetensors.torch import load_file

import iared2
from iared2.cli import main
from iared2.data.images import open_samples
from iared2.train.recipe import Recipe, read_recipe

RECIPES = sorted(p for p in (Path(__file__).parents[2] / "recipes").glob("*.toml") if "kinetics" not in p.stem)
IMAGENET = [path for path in RECIPES if path.stem.endswith("_imagenet") and path.stem.startswith("deit")]
STAGES = ("backbone", "policy_gradient", "finetune")
TINY = {"img_size": 16, "patch_size": 4, "embed_dim": 32, "depth": 6, "num_heads": 2}
STEPS = 2


@pytest.fixture(autouse=True)
def one_cpu(monkeypatch: pytest.MonkeyPatch, tmp_path: Path):
    """Whatever the machine has; a precision that an earlier run has set is forgotten."""
    monkeypatch.setenv("ACCELERATE_USE_CPU", "true")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    AcceleratorState._reset_state(reset_partial_state=True)
    yield
    AcceleratorState._reset_state(reset_partial_state=True)


@pytest.fixture(scope="module")
def backbone(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """In place of timm's weights: those of a tiny DeiT with a head of 1,000 classes."""
    path = tmp_path_factory.mktemp("weights") / "backbone.pth"
    torch.manual_seed(0)
    torch.save(timm.create_model("deit_tiny_patch16_224", num_classes=1000, **TINY).state_dict(), path)
    return path


def write_images(root: Path, classes: tuple[str, ...] = ("ant", "bee", "cat", "dog"), each: int = 3) -> Path:
    """Folders train/ and test/: the latter stands for every name of a split to evaluate on."""
    for split, count in (("train", each), ("test", 1)):
        for c, name in enumerate(classes):
            (root / split / name).mkdir(parents=True)
            for i in range(count):
                (root / split / name / f"{i}.jpg").write_bytes(jpeg(1000 * c + i + 100 * len(split), 20))
    return root


def cut_down(recipe: Recipe, backbone: Path, batch_size: int) -> list[str]:
    """``--set`` arguments that leave the recipe as it is but for its size: one epoch a stage, a tiny model."""
    settings = [f"model.timm.{name}={value}" for name, value in TINY.items()] + ["data.workers=0"]
    for stage in STAGES:
        if getattr(recipe, stage).epochs:
            settings += [f"{stage}.epochs=1", f"{stage}.batch_size={batch_size}"]
    if recipe.model.checkpoint and recipe.backbone.epochs:  # of another architecture
        settings.append('model.checkpoint=""')
    elif recipe.model.pretrained or not recipe.backbone.epochs:
        settings += ["model.pretrained=false", f"model.checkpoint={json.dumps(str(backbone))}"]
    if recipe.compile:  # takes minutes on a CPU; tests/model/test_compile.py does it
        settings.append("compile=false")
    return [word for setting in settings for word in ("--set", setting)]


@pytest.mark.parametrize("path", RECIPES, ids=lambda path: path.stem)
def test_it_runs(path: Path, tmp_path: Path, backbone: Path):
    recipe = read_recipe(path)
    classes = recipe.data.classes or ("ant", "bee", "cat", "dog")
    each = 1 if recipe.data.classes else 3
    images = write_images(tmp_path / "images", classes, each)
    batch_size = len(classes) * each // STEPS
    if recipe.model.checkpoint:
        backbone = tmp_path / "backbone.pth"
        torch.save(timm.create_model(recipe.model.backbone, **TINY).state_dict(), backbone)
    output = tmp_path / "run"
    arguments = cut_down(recipe, backbone, batch_size)
    assert main(["train", str(path), "--data", str(images), "-o", str(output), *arguments]) == 0

    records = [json.loads(line) for line in (output / "metrics.jsonl").read_text().splitlines()]
    steps = [r for r in records if r["kind"] == "step"]
    stages = Counter(r["stage"] for r in steps)
    number = "" if recipe.policy.joint else f" {recipe.model.groups}"
    last = [f"{stage}{number}" for stage in STAGES[1:] if getattr(recipe, stage).epochs]
    assert stages.keys() >= {*last, *["backbone"] * bool(recipe.backbone.epochs)}
    samples = open_samples(replace(recipe.data, path=str(images)), "train")  # without the holdout
    assert set(stages.values()) == {len(samples) // batch_size}
    assert all(math.isfinite(r["loss"]) and math.isfinite(r["grad_norm"]) for r in steps)
    model = iared2.load(output)
    assert model.class_names == (recipe.data.classes or classes)
    assert model(torch.zeros(1, 3, 16, 16)).shape == (1, len(classes))
    frozen = not recipe.backbone.epochs and not recipe.finetune.epochs
    assert (output / "policy.safetensors").exists() == frozen


@pytest.mark.parametrize("path", IMAGENET, ids=lambda path: path.stem)
def test_imagenet_recipes_are_the_published_schedule(path: Path):
    recipe = read_recipe(path)
    assert (recipe.model.groups, recipe.policy_gradient.epochs, recipe.finetune.epochs) == (3, 10, 20)
    assert recipe.backbone.epochs == 0
    assert timm.get_pretrained_cfg(recipe.model.backbone).hf_hub_id == f"timm/{recipe.model.backbone}"
    assert recipe.policy_gradient.batch_size == recipe.finetune.batch_size
    header = path.read_text().split("\n\n")[0]
    assert f"{recipe.finetune.batch_size} × 8 = {8 * recipe.finetune.batch_size:,}" in header


# The recipe of DeiT-S on many processes, in float32; at these rates a wrong gradient moves weights by 2e-4, while the
# order of sums, which Adam magnifies, moves them by less than 1e-5.
SMALL = next(path for path in IMAGENET if "small" in path.stem)
SETTINGS = ("--set", "precision=no", "--set", "policy_gradient.lr=2e-4", "--set", "finetune.lr=2e-4")


def command(data: Path, output: Path, backbone: Path, batch_size: int) -> list[str]:
    sizes = cut_down(read_recipe(SMALL), backbone, batch_size)
    return ["train", str(SMALL), "--data", str(data), "-o", str(output), *sizes, *SETTINGS]


@pytest.fixture(scope="module")
def images(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_images(tmp_path_factory.mktemp("images"))


@pytest.fixture(scope="module")
def shards(images: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The same images in the same order, in the layout of timm/imagenet-1k-wds."""
    root = tmp_path_factory.mktemp("shards")
    train, test = (sorted((images / split).glob("*/*.jpg")) for split in ("train", "test"))
    contents = {"train-0000": (train[:5], 0), "train-0001": (train[5:], 5), "validation-00": (test, 0)}
    for name, (files, first) in contents.items():
        each = 1 if files is test else 3
        labels = [(first + i) // each for i in range(len(files))]
        write_shard(root / f"imagenet1k-{name}.tar", samples_of(labels, [file.read_bytes() for file in files]))
    (root / "classes.json").write_text('["ant", "bee", "cat", "dog"]')
    return root


@pytest.fixture(scope="module")
def alone(images: Path, backbone: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, torch.Tensor]:
    """What one process makes of the folder of images."""
    output = tmp_path_factory.mktemp("alone")
    AcceleratorState._reset_state(reset_partial_state=True)  # comes before the fixture that does it for each test
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("ACCELERATE_USE_CPU", "true")
        assert main(command(images, output, backbone, 6)) == 0
    weights, before = load_file(output / "model.safetensors"), torch.load(backbone)
    assert (weights["backbone.blocks.2.mlp.fc1.weight"] - before["blocks.2.mlp.fc1.weight"]).abs().max() > 3e-4
    return weights


def test_shards_are_the_same_as_a_folder(shards: Path, backbone: Path, tmp_path: Path, alone: dict[str, torch.Tensor]):
    assert main(command(shards, tmp_path / "run", backbone, 6)) == 0
    weights = load_file(tmp_path / "run" / "model.safetensors")
    assert all(torch.equal(weights[name], tensor) for name, tensor in alone.items())


@pytest.mark.slow
@pytest.mark.parametrize("machines", [1, 2])
def test_two_processes_of_torchrun_are_the_same_as_one(
    machines: int, shards: Path, backbone: Path, tmp_path: Path, alone: dict[str, torch.Tensor]
):
    """On one machine, and as on two machines that share a folder."""
    torchrun = [sys.executable, "-m", "torch.distributed.run"]  # what the script is; it need not be on the path
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    launches = [["--standalone", "--nproc-per-node", "2"]]
    if machines == 2:
        place = ["--nnodes", "2", "--nproc-per-node", "1", "--master-addr", "127.0.0.1", "--master-port", str(port)]
        launches = [[*place, "--node-rank", str(rank)] for rank in range(2)]
    rest = ["-m", "iared2.cli", *command(shards, tmp_path / "run", backbone, 3)]
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    if not torch.accelerator.is_available():
        environment.pop("ACCELERATE_USE_CPU")  # torchrun alone is enough
    running = [
        subprocess.Popen([*torchrun, *launch, *rest], env=environment, stderr=subprocess.DEVNULL) for launch in launches
    ]
    try:
        assert [process.wait(300) for process in running] == [0] * machines
    finally:
        for process in running:
            process.terminate()
    weights = load_file(tmp_path / "run" / "model.safetensors")
    for name, tensor in alone.items():
        torch.testing.assert_close(weights[name], tensor, rtol=0, atol=1e-5, msg=lambda m, n=name: f"{n}: {m}")
