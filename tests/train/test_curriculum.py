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
from iared2.data.batches import model_transform, train_batches
from iared2.data.images import DataConfig, open_samples
from iared2.device import has_fast_bf16
from iared2.errors import InputError
from iared2.model import file as saved
from iared2.train.finetune import FinetuneStage
from iared2.train.log import RunLog
from iared2.train.policy_gradient import PolicyGradientStage
from iared2.train.recipe import Recipe, check, read_recipe
from iared2.train.state import load_state
from iared2.train.trainer import Trainer

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
grad_accum_steps = 2
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
    if not torch.accelerator.is_available():  # then nothing has to be said, not even to several processes
        environment.pop("ACCELERATE_USE_CPU")
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


@pytest.mark.parametrize("first", [True, False])
def test_file_names_do_not_control_the_terminal(tmp_path, capsys, first):
    log = RunLog(tmp_path, 0, main=first)
    log.warn("skipped \x1b[31m.png")
    log.close()
    assert "skipped \\x1b[31m.png\n" in capsys.readouterr().err


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


@pytest.mark.slow
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


@pytest.mark.slow
def test_two_processes_take_the_same_steps_as_one(tmp_path, folder, recipe):
    """Same global batch, so the same gradient; dropout and mixup are off, since their draws belong to a process."""
    off = ["backbone.mixup=0.0", "backbone.epochs=1", "model.timm.proj_drop_rate=0.0", "finetune.grad_accum_steps=1"]
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
        ("finetune.grad_accum_steps=9", "grad_accum_steps must be in 1…batch_size"),
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


def test_a_run_of_an_earlier_version_goes_on(tmp_path, finished, folder, recipe, capsys):
    """Its settings had other names, and its decision stood among the tensors."""
    output = tmp_path / "run"
    shutil.copytree(finished, output)
    tensors, config = saved.read(output / "state.safetensors")
    decision = config.pop("decision")
    tensors["decision/threshold"] = torch.tensor(decision["thresholds"])
    identity = config["identity"]
    for name in ("backbone", "policy_gradient", "finetune"):
        identity[name]["accumulate"] = identity[name].pop("grad_accum_steps")
    identity["reward"]["graded"] = identity["reward"].pop("soft_reward")
    identity["policy"]["leave_one_out"] = identity["policy"].pop("rloo")
    identity["policy"].pop("spread")  # a setting that it did not have, at its default
    saved.write(output / "state.safetensors", tensors, config)
    (output / "model.safetensors").unlink()
    assert main(command(recipe, folder, output)) == 0
    assert iared2.load(output).thresholds == iared2.load(finished).thresholds == tuple(decision["thresholds"])


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
        assert read_recipe(path).model.groups in (3, 4, 6)
        assert path.read_text().startswith("#"), "a recipe's header says cost, data and expected result"


# ---- budgets, baselines, canvases: in this process, a few steps ------------------------------------------------------

BUDGET = """
seed = 3
[model]
backbone = "deit_tiny_patch16_224"
groups = 4
timm = { img_size = 16, patch_size = 4, embed_dim = 32, depth = 4, num_heads = 2 }
[data]
workers = 0
resident = true
[reward]
label = "dense"
soft_reward = true
[policy]
keep = [1.0, 0.75, 0.75, 0.5]
samples = 2
rloo = true
temperature = 0.3
[backbone]
epochs = 1
batch_size = 12
optimizer = "muon"
patch_drop = 0.4
[policy_gradient]
epochs = 1
batch_size = 12
optimizer = "muon"
[finetune]
epochs = 1
batch_size = 12
optimizer = "muon"
distill = 0.5
ema_decay = 0.5
"""
KEEP = (1.0, 0.75, 0.75, 0.5)


class Killed(Exception):
    """In place of SIGKILL: nothing between here and the caller knows what to do with it."""


@pytest.fixture(scope="module")
def budget(tmp_path_factory):
    path = tmp_path_factory.mktemp("recipe") / "budget.toml"
    path.write_text(BUDGET)
    return path


def settings(*pairs: str) -> list[str]:
    return [x for pair in pairs for x in ("--set", pair)]


def stages(output: Path) -> list[str]:
    return [r["stage"] for r in records(output) if r["kind"] == "step"]


def timeless(output: Path) -> list[dict]:
    return [{k: v for k, v in r.items() if k != "images_per_second"} for r in records(output)]


@pytest.mark.parametrize(
    "more",
    [(), ("model.dropped='merged'", "policy.equal_counts=true"), ("policy.spread=0.5",)],
    ids=["", "merged", "spread"],
)
def test_a_run_with_a_budget_resumes_exactly_and_meets_it(tmp_path, folder, budget, monkeypatch, more):
    whole, broken = tmp_path / "whole", tmp_path / "broken"
    assert main(command(budget, folder, whole, *settings(*more))) == 0
    names = ["backbone", "policy_gradient 2", "finetune 2", "policy_gradient 4", "finetune 4"]
    assert stages(whole) == [name for name in names for _ in range(2)], "groups that keep all they get have no stages"

    log_step, stop = RunLog.step, 0

    def step(self, stage, epoch, number, total_steps, metrics):
        log_step(self, stage, epoch, number, total_steps, metrics)
        if total_steps == stop:
            raise Killed

    monkeypatch.setattr(RunLog, "step", step)
    for stop in (2, 4, 6, 7, 10, 0):  # the step is done and logged, but not saved: it has to be done again
        arguments = command(budget, folder, broken, *settings("checkpoint_minutes=0", *more))
        if stop:
            with pytest.raises(Killed):
                main(arguments)
            assert not (broken / "model.safetensors").exists()
        else:
            assert main(arguments) == 0
    one, two = (load_file(o / "model.safetensors") for o in (whole, broken))
    assert all(torch.equal(two[name], tensor) for name, tensor in one.items())
    assert timeless(whole) == timeless(broken)
    model = iared2.load(whole)
    assert iared2.load(broken).threshold == model.threshold
    equal_counts = "policy.equal_counts=true" in more
    assert equal_counts or model.thresholds[0] == 0
    assert model.num_keep == ((16, 12, 12, 8) if equal_counts else None)
    assert model.spread == (0.5 if "policy.spread=0.5" in more else 0)

    # the images on which the thresholds were found, the long way round
    samples = open_samples(DataConfig(str(folder), workers=0), "train")
    (batch,) = train_batches(samples, model_transform(model.pretrained_cfg), seed=0, epoch=0, batch_size=24)
    with torch.no_grad():
        found = model.trace(batch.images).keep_ratio.mean(1)
    torch.testing.assert_close(found, torch.tensor(KEEP), rtol=0, atol=2 / (24 * 16))


def test_what_is_calibrated_before_each_stage(tmp_path, folder, budget, monkeypatch):
    """Before a policy stage the groups before it, before a fine-tuning stage its own as well, at the end all."""
    seen = []
    calibrate = Trainer.calibrate
    monkeypatch.setattr(Trainer, "calibrate", lambda run, keep: (seen.append(keep), calibrate(run, keep)))
    teachers, train = [], PolicyGradientStage.train
    monkeypatch.setattr(
        PolicyGradientStage, "train", lambda stage, mode=True: teachers.append(stage) or train(stage, mode)
    )
    assert main(command(budget, folder, tmp_path / "run", *settings("data.resident=false"))) == 0
    last = (1.0, 0.75, 0.75)
    assert seen == [(1.0,) * 4, (*last, 0.75), (*last, 0.75), KEEP, KEEP]
    first, second = dict.fromkeys(teachers)
    assert first.teacher is second.teacher
    assert not any(p.requires_grad for p in first.teacher.parameters())
    steps = [r for r in records(tmp_path / "run") if r["kind"] == "step" and r["stage"] == "policy_gradient 4"]
    assert all(r["keep_ratio_sampled"] == pytest.approx(0.5, abs=0.15) for r in steps)
    dense = load_state(tmp_path / "run" / "state.safetensors").parts["teacher"]
    moved = (dense["blocks.3.mlp.fc1.weight"] - load_file(tmp_path / "run" / "model.safetensors")[
        "backbone.blocks.3.mlp.fc1.weight"]).abs().max()  # fmt: skip
    assert moved > 0
    assert all(torch.equal(tensor, first.teacher.state_dict()[name].cpu()) for name, tensor in dense.items())


@pytest.mark.parametrize("decisions", ["random", "attention", "centre", "spread", "gumbel"])
def test_baselines_run_the_same_stages(tmp_path, folder, budget, decisions):
    output = tmp_path / "run"
    more = settings(f"policy.decisions={decisions}", "reward.label='true'", "finetune.distill=0.0")
    assert main(command(budget, folder, output, *more)) == 0
    learns = decisions == "gumbel"
    names = ["backbone", "policy_gradient 2", "finetune 2", "policy_gradient 4", "finetune 4"]
    assert stages(output) == [n for n in names if learns or "policy" not in n for _ in range(2)]
    assert (output / "state.safetensors").exists()
    assert (output / "model.safetensors").exists() == learns
    ratios = [r["keep_ratio_greedy"] for r in records(output) if r["kind"] == "step" and "finetune" in r["stage"]]
    if learns:
        assert len(iared2.load(output).threshold) == 4
    else:
        assert ratios == pytest.approx([0.75, 0.75, 0.5, 0.5])
        assert main(command(budget, folder, output, *more)) == 0, "a run that is done is done again at once"
        assert len(stages(output)) == 6


def test_canvases(tmp_path, folder, budget):
    output = tmp_path / "run"
    size = settings("data.clutter=32", "model.timm.img_size=32", "model.timm.patch_size=8", "data.resident=false")
    assert main(command(budget, folder, output, *size, *settings("policy_gradient.epochs=0"))) == 0
    assert stages(output) == ["backbone"] * 2 + ["finetune 2"] * 2 + ["finetune 4"] * 2
    assert all(np.isfinite(r["loss"]) for r in records(output) if r["kind"] == "step")
    assert any(r["kind"] == "evaluation" and r["images"] == 6 for r in records(output))
    assert iared2.load(output).grid_size == (4, 4)


@pytest.mark.parametrize(
    ("pairs", "message"),
    [
        (["policy.decisions=greedy"], "policy.decisions = 'greedy' should be one of learned, gumbel, random"),
        (["reward.label=soft"], "reward.label = 'soft' should be one of true, dense"),
        (["policy.keep=[0.5, 0.5]"], "policy.keep = [0.5, 0.5] should be 4 shares in (0, 1] that do not rise"),
        (["policy.keep=[0.5, 0.5, 0.6, 0.5]"], "that do not rise"),
        (["policy.keep=[1.1, 0.5, 0.5, 0.5]"], "policy.keep = 1.1 should be in 1e-06…1"),
        (["policy.keep=[0.5, 0.5, 0.5, 0.0]"], "policy.keep = 0.0 should be in 1e-06…1"),
        (["policy.decisions=gumbel", "policy.keep=[]"], "policy.decisions = 'gumbel' needs policy.keep, 4 shares"),
        (["policy.decisions=centre", "policy.keep=[]"], "policy.decisions = 'centre' needs policy.keep, 4 shares"),
        (["policy.equal_counts=true", "policy.keep=[]"], "policy.equal_counts needs policy.keep, 4 shares"),
        (["policy.decisions=gumbel", "model.dropped=merged"], 'model.dropped = "gone"'),
        (["policy.samples=0", "policy.rloo=false"], "policy.samples = 0 should be in 1…1000"),
        (["policy.samples=1"], "policy.samples = 1 should be at least 2 for policy.rloo"),
        (["policy.temperature=0"], "policy.temperature = 0.0 should be in 0.001…1"),
        (["policy.temperature=1.5"], "policy.temperature = 1.5 should be in 0.001…1"),
        (["policy.spread=-1"], "policy.spread = -1.0 should be in 0…10"),
        (["finetune.distill=1.5"], "finetune.distill = 1.5 should be in 0…1"),
        (["backbone.patch_drop=1"], "backbone.patch_drop = 1.0 should be in 0…0.99"),
        (["finetune.augment.min_scale=1.5"], "finetune.augment.min_scale = 1.5 should be in 0.0001…1"),
    ],
)
def test_policies_that_cannot_be_meant(budget, pairs, message):
    with pytest.raises(InputError) as error:
        check(read_recipe(budget, pairs))
    assert message in str(error.value)
    assert "\n" not in str(error.value)
    check(read_recipe(budget))


@pytest.mark.parametrize(
    ("pairs", "message"),
    [
        (["data.clutter=32", "data.resident=false"], "data.clutter = 32 is the side of the canvas; set img_size to it"),
        (["policy.decisions=gumbel", "model.timm.global_pool=avg"], "needs a head that reads the class token alone"),
        (["finetune.augment.auto_augment=rand-m9"], "set data.resident = false"),
        (
            ["policy.joint=true", "policy_gradient.batch_size=10", "policy_gradient.grad_accum_steps=4"],  # 3, 3, 3, 1
            "over 2 groups; set a larger policy_gradient.batch_size",
        ),
    ],
)
def test_policies_that_do_not_fit_the_model(tmp_path, folder, budget, capsys, pairs, message):
    assert main(command(budget, folder, tmp_path / "run", *settings(*pairs))) == 1
    assert message in capsys.readouterr().err
    assert not (tmp_path / "run").exists()


def test_a_frozen_backbone_stays_bit_identical_and_labels_are_not_read(tmp_path, folder, monkeypatch):
    """The policy alone and the backbone are the model again."""
    torch.manual_seed(5)
    start = tmp_path / "start.safetensors"
    timm_kwargs = {"img_size": 16, "patch_size": 4, "embed_dim": 32, "depth": 4, "num_heads": 2, "num_classes": 3}
    dense = iared2.from_timm("deit_tiny_patch16_224", groups=2, **timm_kwargs)
    dense.save(start)
    recipe = tmp_path / "frozen.toml"
    recipe.write_text(
        RECIPE.replace("epochs = 2", "epochs = 0").replace("epochs = 1\nbatch_size = 8\ngrad", "epochs = 0\ngrad")
        + "[reward]\nlabel = 'dense'\ndivergence = 1.0\n"
        + "[policy]\njoint = true\nkeep = [0.75, 0.5]\nspread = 1.0\nsamples = 2\nrloo = true\n"
    )
    found = {}
    forward = PolicyGradientStage.forward
    for name in ("one", "again"):
        if name == "again":  # other labels
            monkeypatch.setattr(
                PolicyGradientStage, "forward", lambda self, x, y, keys: forward(self, x, (y + 1) % 3, keys)
            )
        arguments = ["--data", str(folder), "-o", str(tmp_path / name), "--set", f"model.checkpoint='{start}'"]
        assert main(["train", str(recipe), *arguments]) == 0
        found[name] = load_file(tmp_path / name / "model.safetensors")
    moved = 0.0
    for name, tensor in dense.state_dict().items():
        if name.startswith("backbone."):
            assert torch.equal(found["one"][name], tensor)
        else:
            moved = max(moved, (found["one"][name] - tensor).abs().max().item())
        assert torch.equal(found["one"][name], found["again"][name])
    assert moved > 1e-3
    whole = iared2.load(tmp_path / "one")
    alone = iared2.load(tmp_path / "one" / "policy.safetensors", start)
    images = torch.randn(2, 3, 16, 16)
    assert torch.equal(whole(images), alone(images))
    assert whole.decision == alone.decision
    whole.threshold = 0.0
    torch.testing.assert_close(whole(images), dense.eval().backbone(images))
    log = [json.loads(line) for line in (tmp_path / "one" / "metrics.jsonl").read_text().splitlines()]
    assert {r["stage"] for r in log if "stage" in r} == {"policy_gradient"}
    (evaluation,) = [r for r in log if "top1" in r and r["kind"] != "step"]
    assert evaluation["keep_ratio"] == pytest.approx([0.75, 0.5], abs=0.1)  # calibrated before it is evaluated


def test_baselines_of_all_groups_are_fine_tuned_in_one_stage(tmp_path, folder, capsys):
    """As the joint policy is, which they are compared with."""
    recipe = tmp_path / "recipe.toml"
    recipe.write_text(RECIPE + "[policy]\njoint = true\nkeep = [0.75, 0.5]\ndecisions = 'spread'\n")
    assert main(["train", str(recipe), "--data", str(folder), "-o", str(tmp_path / "run")]) == 0
    log = [json.loads(line) for line in (tmp_path / "run" / "metrics.jsonl").read_text().splitlines()]
    assert list(dict.fromkeys(r["stage"] for r in log if r["kind"] == "step")) == ["backbone", "finetune"]
    assert log[-1]["keep_ratio"] == [0.75, 0.5]
    arguments = ["--set", "policy.decisions='gumbel'", "-o", str(tmp_path / "other")]
    assert main(["train", str(recipe), "--data", str(folder), *arguments]) == 1
    assert "policy.joint does not go with" in capsys.readouterr().err


@pytest.mark.parametrize("fast", [True, False])
def test_bf16_is_replaced_where_it_is_slow(tmp_path, folder, recipe, monkeypatch, capsys, fast):
    monkeypatch.setattr("iared2.train.curriculum.has_fast_bf16", lambda device: fast)
    used = []
    forward = FinetuneStage.forward

    def spy(self, *arguments):
        used.append(torch.is_autocast_enabled("cuda" if torch.accelerator.is_available() else "cpu"))
        return forward(self, *arguments)

    monkeypatch.setattr(FinetuneStage, "forward", spy)
    short = ["--set", 'precision="bf16"', "--set", "policy_gradient.epochs=0", "--set", "finetune.epochs=0"]
    assert main(command(recipe, folder, tmp_path / "run", *short)) == 0
    assert set(used) == {fast}
    assert ("float32 is used" in "".join(capsys.readouterr())) == (not fast)


@pytest.mark.parametrize(
    ("machine", "capability", "fast"),
    [
        ("x86_64", "AVX512", True),
        ("x86_64", "AVX2", False),
        ("AMD64", "DEFAULT", False),
        ("aarch64", "DEFAULT", True),
    ],
)
def test_which_processors_have_bf16(monkeypatch, machine, capability, fast):
    monkeypatch.setattr("platform.machine", lambda: machine)
    monkeypatch.setattr("torch.backends.cpu.get_cpu_capability", lambda: capability)
    assert has_fast_bf16("cpu") == fast
    assert has_fast_bf16("cuda")
