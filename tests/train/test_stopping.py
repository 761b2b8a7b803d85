"""Runs that end early: by a signal, by a loss that is not finite, by SIGKILL in the middle of a write."""

from __future__ import annotations

import json
import os
import signal
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import load_file

import iared2.data.images
import iared2.train.state
import iared2.train.trainer
from iared2.cli import main
from iared2.train.log import RunLog
from iared2.train.policy_gradient import PolicyGradientStage
from iared2.train.state import load_state
from iared2.train.trainer import Trainer

RECIPE = """
seed = 3
[model]
backbone = "deit_tiny_patch16_224"
groups = 2
timm = { img_size = 16, patch_size = 4, embed_dim = 32, depth = 4, num_heads = 2, proj_drop_rate = 0.1 }
[data]
workers = 0
[policy]
keep = [0.75, 0.5]
[backbone]
epochs = 2
batch_size = 12
mixup = 0.2
ema_decay = 0.9
[policy_gradient]
epochs = 1.5
batch_size = 12
[finetune]
epochs = 1
batch_size = 12
optimizer = "lamb"
ema_decay = 0.9
"""


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """Three classes of noise: 24 images to train on, 6 to measure on."""
    root = tmp_path_factory.mktemp("images")
    generator = np.random.default_rng(0)
    for split, count in (("train", 8), ("val", 2)):
        for number, name in enumerate(("red", "green", "blue")):
            (root / split / name).mkdir(parents=True)
            for i in range(count):
                pixels = generator.integers(0, 120, (16, 16, 3))
                pixels[..., number] += 120
                Image.fromarray(pixels.astype(np.uint8)).save(root / split / name / f"{i}.png")
    return root


@pytest.fixture
def train(tmp_path, folder):
    """The command, on a folder of this test."""
    path = tmp_path / "recipe.toml"
    path.write_text(RECIPE)

    def run(output: str, *settings: str) -> int:
        more = [x for s in settings for x in ("--set", s)]
        return main(["train", str(path), "--data", str(folder), "-o", str(tmp_path / output), *more])

    return run


def records(output: Path) -> list[dict]:
    found = [json.loads(line) for line in (output / "metrics.jsonl").read_text().splitlines()]
    return [{k: v for k, v in record.items() if k != "images_per_second"} for record in found]


PLACES = [
    (iared2.data.images.Samples, "__getitem__", 0, signal.SIGTERM, "the first image of all"),
    (iared2.data.images.Samples, "__getitem__", 30, signal.SIGINT, "reading for the third step"),
    (iared2.train.trainer, "measure", 0, signal.SIGTERM, "evaluation after an epoch, of the average"),
    (iared2.train.trainer, "measure", 1, signal.SIGINT, "evaluation at the end of the stage"),
    (Trainer, "calibrate", 0, signal.SIGTERM, "before the first step of a stage"),
    (Trainer, "prepare", 0, signal.SIGINT, "start of a stage"),
    (PolicyGradientStage, "forward", 0, signal.SIGTERM, "in the middle of a step"),
    (RunLog, "step", 0, signal.SIGINT, "after a step"),
    (iared2.train.trainer, "make_optimizer", 0, signal.SIGINT, "start of a stage that was stopped before"),
    (iared2.train.state.State, "save", 1, signal.SIGTERM, "while a checkpoint is written"),
]  # fmt: skip


def test_the_lines_of_a_stage_have_its_epoch_and_share(train, capsys):
    """In a log file, where there is no progress bar until the end."""
    assert train("run", "finetune.epochs=0", "policy_gradient.epochs=1.5") == 0
    lines = [line.split(": top1")[0] for line in capsys.readouterr().err.splitlines() if " % of the stage" in line]
    stages = [("backbone", 2, (1, 2)), ("policy_gradient 1", 1.5, (1, 1.5)), ("policy_gradient 2", 1.5, (1, 1.5))]
    expected = []
    for stage, epochs, evaluated in stages:
        expected.append(f"{stage}: starts, epoch 0 of {epochs}, 0 % of the stage")
        expected += [f"{stage}, epoch {n} of {epochs}, {100 * n / epochs:.0f} % of the stage" for n in evaluated]
    assert [line for line in lines if "\u2501" not in line and "/" not in line] == expected


@pytest.mark.slow
def test_a_signal_anywhere_leaves_a_checkpoint_from_which_the_run_goes_on_exactly(tmp_path, train, capsys, monkeypatch):
    assert train("whole") == 0
    handlers = signal.getsignal(signal.SIGINT), signal.getsignal(signal.SIGTERM)
    for owner, name, skip, number, what in PLACES:
        before = getattr(owner, name)
        left = [skip]

        def kill(*args, before=before, number=number, left=left, **kwargs):
            left[0] -= 1
            if left[0] == -1:
                os.kill(os.getpid(), number)
            return before(*args, **kwargs)

        with monkeypatch.context() as patch:
            patch.setattr(owner, name, kill)
            capsys.readouterr()
            assert train("broken") == 128 + number, what
        last = capsys.readouterr().err.splitlines()[-1]
        assert left[0] < 0, what
        assert last.startswith("stopped at "), (what, last)
        assert last.endswith("the same command resumes the run")
        step = int(last.split("step ")[1].split(";")[0])
        assert load_state(tmp_path / "broken" / "state.safetensors").position.step == step, what
        assert not (tmp_path / "broken" / "model.safetensors").exists()
        assert (signal.getsignal(signal.SIGINT), signal.getsignal(signal.SIGTERM)) == handlers
    assert train("broken") == 0
    whole, broken = (load_file(tmp_path / o / "model.safetensors") for o in ("whole", "broken"))
    assert all(torch.equal(broken[name], tensor) for name, tensor in whole.items())
    assert records(tmp_path / "broken") == records(tmp_path / "whole")


def test_a_signal_before_the_first_step_is_one_line(tmp_path, train, capsys, monkeypatch):
    monkeypatch.setattr("iared2.train.curriculum.open_data", lambda recipe: os.kill(os.getpid(), signal.SIGTERM))
    assert train("run") == 143
    assert capsys.readouterr().err.splitlines() == ["stopped; the same command resumes the run"]
    assert not (tmp_path / "run").exists()


def test_a_loss_that_is_not_finite_ends_the_run_and_keeps_the_last_checkpoint(tmp_path, train, capsys, monkeypatch):
    forward = PolicyGradientStage.forward

    def broken(stage, *batch):
        loss, metrics = forward(stage, *batch)
        metrics = {**metrics, "entropy": torch.tensor(float("nan"))}  # a metric alone is only a gap in the log
        lost = {**metrics, "loss": torch.tensor(float("nan"))}
        return (loss * float("nan"), lost) if stage.progress else (loss, metrics)

    monkeypatch.setattr(PolicyGradientStage, "forward", broken)
    assert train("run", "checkpoint_minutes=0") == 1
    error = capsys.readouterr().err.splitlines()[-1]
    assert error.startswith("error: policy_gradient 1, step 2: the loss or its gradient is not finite")
    assert "policy_gradient.lr" in error
    state = load_state(tmp_path / "run" / "state.safetensors")
    assert (state.position.stage, state.position.step) == (1, 1)
    assert all(t.isfinite().all() for part in state.parts.values() for t in part.values())
    assert not (tmp_path / "run" / "model.safetensors").exists()
    text = (tmp_path / "run" / "metrics.jsonl").read_text()
    assert "NaN" not in text
    assert [r["entropy"] for r in records(tmp_path / "run") if r.get("stage") == "policy_gradient 1"] == [None]


@pytest.mark.parametrize(
    ("setting", "message"),
    [
        ("finetune.optimizer=nonsense", "finetune.optimizer = 'nonsense' cannot be used: "),
        ("finetune.optimizer=adahessian", "finetune.optimizer = 'adahessian' cannot be used"),
    ],
)
def test_an_optimiser_of_the_last_stage_is_refused_before_the_first(tmp_path, train, capsys, setting, message):
    assert train("run", setting) == 1
    assert message in capsys.readouterr().err.splitlines()[-1]
    assert not (tmp_path / "run").exists()


def test_what_a_killed_run_left_half_written_is_mended(tmp_path, train, capsys):
    """The last line of the log, and files that were to replace others; what is not ours stays."""
    output = tmp_path / "run"
    assert train("run", "finetune.epochs=0") == 0
    before = records(output)
    with (output / "metrics.jsonl").open("a") as file:
        file.write('{"kind": "step", "total_st\n')
    ours = [output / ".state.safetensors.4711.tmp", output / ".model.safetensors.4711.tmp"]
    other = [output / "notes.tmp", output / "state.safetensors.tmp", tmp_path / ".state.safetensors.1.tmp"]
    for path in [*ours, *other]:
        path.touch()
    assert train("run", "finetune.epochs=0") == 0
    assert f"metrics.jsonl: line {len(before) + 1} is broken and is dropped" in capsys.readouterr().err
    assert records(output) == before
    assert [path.exists() for path in [*ours, *other]] == [False, False, True, True, True]
