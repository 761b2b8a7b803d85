"""`iared2 bench` end to end on a tiny model: no time is judged, only what is made of it."""

from __future__ import annotations

import json

import numpy as np
import pytest
import torch
from PIL import Image

import iared2
from iared2.cli import main
from iared2.device import peak_memory
from iared2.evaluate.speed import inference as speed
from iared2.evaluate.speed import training as train


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory):
    torch.manual_seed(0)
    model = iared2.from_timm(
        "deit_tiny_patch16_224", img_size=32, patch_size=8, embed_dim=48, num_heads=3, depth=3, num_classes=2
    ).eval()
    model.calibrate(torch.randn(16, 3, 32, 32), keep=(0.8, 0.6, 0.4))
    path = tmp_path_factory.mktemp("bench") / "m.safetensors"
    model.save(path)
    return path


def printed(capsys):
    """The tables, and what `--json` without a file printed."""
    captured = capsys.readouterr()
    return captured.err, json.loads(captured.out)


def test_inference(checkpoint, tmp_path, capsys):
    args = [
        "bench",
        "-c",
        str(checkpoint),
        "--batch-size",
        "1",
        "4",
        "--seconds",
        "0",
        "--no-compile",
        "--keep",
        "0.8,0.6,0.3",
    ]
    assert main([*args, "--json", str(tmp_path / "b.json")]) == 0
    out, result = capsys.readouterr().out, json.loads((tmp_path / "b.json").read_text())
    assert "not a trained policy's" in result["title"]
    assert "efficiency" in out
    assert [s["rows"][0]["batch_size"] for s in result["speed"]] == [1, 4]
    for one in result["speed"]:
        rows = {row["name"]: row for row in one["rows"]}
        assert {speed.DENSE, speed.OURS, speed.WHOLE, speed.RANDOM, speed.TOP_K, speed.MASKED, speed.PADDED} == set(
            rows
        )
        dense, ours = rows[speed.DENSE], rows[speed.OURS]
        assert dense["efficiency"] == dense["speed_up"] == 1
        assert ours["speed_up"] == pytest.approx(dense["p50_ms"] / ours["p50_ms"])
        assert ours["efficiency"] == pytest.approx(ours["speed_up"] * ours["gmacs"] / dense["gmacs"])
        assert ours["gmacs"] < rows[speed.PADDED]["gmacs"] + 1e-9
        assert 0 < one["interpreters"] < 1
        assert all(row["p50_ms"] <= row["p95_ms"] and row["rounds"] >= speed.MIN_ROUNDS for row in one["rows"])
        assert all(row["peak_mb"] is None or 0 <= row["peak_mb"] < 100 for row in one["rows"])


def test_clips(capsys):
    args = ["bench", "timesformer_joint_small_patch16_224", "--frames", "2", "--img-size", "32", "48"]
    more = ["--batch-size", "2", "--seconds", "0", "--no-compile", "--keep", "0.6,0.4,0.2", "--json"]
    assert main([*args, *more]) == 0
    _, result = printed(capsys)
    rows = {row["name"]: row for row in result["speed"][0]["rows"]}
    patches, width = 2 * 2 * 3, 384
    dense = patches * 768 * width + 12 * ((patches + 1) * 12 * width**2 + 2 * (patches + 1) ** 2 * width) + 400 * width
    assert rows[speed.DENSE]["gmacs"] == dense / 1e9
    assert rows[speed.OURS]["gmacs"] < 0.6 * dense / 1e9


def test_clips_that_do_not_go_together(checkpoint, capsys):
    for model, more, message in (
        ("deit_tiny_patch16_224", ["--frames", "8"], "--frames goes with one of timesformer_joint_small"),
        ("timesformer_joint_small_patch16_224", ["--img-size", "32", "32"], "three numbers"),
        (str(checkpoint), ["--frames", "8"], "a checkpoint has its own size"),
        ("deit_tiny_patch16_224", ["-c", "box"], "give one of the two"),
        ("timesformer_joint_small_patch16_224", ["--frames", "2", "--data", "x"], "leave --data out"),
        ("timesformer_joint_small_patch16_224", ["--frames", "-2"], "--frames must be 1 or more"),
    ):
        assert main(["bench", model, "--batch-size", "1", "--seconds", "0", "--no-compile", *more]) == 1
        error = capsys.readouterr().err
        assert message in error
        assert "Traceback" not in error


def test_peak_memory_is_that_of_the_run():
    def run(megabytes):
        return torch.ones(megabytes * 250_000).sum()

    small, large = (peak_memory("cpu", run, megabytes) for megabytes in (40, 160))
    if small is None:
        pytest.skip("no /proc/self/clear_refs here")
    assert 35e6 < small < 60e6
    assert 150e6 < large < 180e6


def test_real_images_and_the_own_policy(checkpoint, tmp_path, capsys):
    for name in ("a", "b"):
        (tmp_path / "data" / name).mkdir(parents=True)
        for i in range(3):
            pixels = np.random.default_rng(i).integers(0, 255, (40, 40, 3), np.uint8)
            Image.fromarray(pixels).save(tmp_path / "data" / name / f"{i}.png")
    args = ["bench", "-c", str(checkpoint), "--data", str(tmp_path / "data"), "--seconds", "0", "--no-compile"]
    assert main([*args, "--batch-size", "4", "--json"]) == 0
    _, result = printed(capsys)
    assert "drawn" not in result["title"]
    model = iared2.load(checkpoint)
    model.confidence = 1.0
    model.save(tmp_path / "twice.safetensors")
    args[args.index("-c") + 1] = str(tmp_path / "twice.safetensors")
    assert main([*args, "--batch-size", "4", "--json"]) == 0
    _, twice = printed(capsys)
    once, twice = ({row["name"]: row["gmacs"] for row in found["speed"][0]["rows"]} for found in (result, twice))
    assert twice["ours"] == twice["random, same counts"] > once["ours"]
    assert once.keys() - twice.keys() == {"masked", "padded to the longest"}  # which have one pass
    assert main([*args, "--batch-size", "40"]) == 1
    assert "fewer than 40 images" in capsys.readouterr().err


def test_training(checkpoint, capsys):
    args = ["bench", "-c", str(checkpoint), "--train", "--batch-size", "4", "--seconds", "0", "--json"]
    assert main([*args, "--keep", "0.5", "0.5", "0.5"]) == 0
    _, result = printed(capsys)
    (row,) = result["training"]
    assert row["policy_over_forward"] == pytest.approx(row["policy_step_ms"] / row["dense_forward_ms"])
    assert 0.5 < row["macs_ratio"] < 0.6


def test_the_timed_stages_keep_the_stated_share(checkpoint):
    """The ratio of MACs that a step is compared with is that of the step."""
    from iared2.train.finetune import FinetuneStage
    from iared2.train.policy_gradient import PolicyGradientStage
    from iared2.train.reward import RewardConfig

    model, x = iared2.load(checkpoint), torch.randn(8, 3, 32, 32)
    labels, keys = torch.zeros(8, dtype=torch.int64), torch.arange(8)
    _, metrics = FinetuneStage(train._keeping(model, 0.5), 0).train()(x, labels, keys)
    assert metrics["keep_ratio_greedy"] == 0.5
    loss, metrics = PolicyGradientStage(train._keeping(model, 0.5), [0], RewardConfig()).train()(x, labels, keys)
    assert metrics["keep_ratio_greedy"] == 0.5
    assert metrics["keep_ratio_sampled"] == pytest.approx(0.5, abs=0.05)
    assert loss.requires_grad


@pytest.mark.parametrize(
    ("more", "message"),
    [
        (["--keep", "0.5", "0.6", "0.4"], "give 3 shares"),
        (["--batch-size", "0"], "must be 1 or more"),
        (["--threads", "-1"], "must be 1 or more"),
        (["--keep-std", "nan"], "--keep-std is a number"),
        (["--rivals", "openvino", "tensorrt"], "--rivals tensorrt: give openvino or onnxruntime"),
        (["--rivals", "openvino", "--train"], "leave --train or --rivals out"),
        (["--train", "--keep", "5"], "group 1 keeps"),
        (["--train", "--data", "x"], "leave --data out"),
        (["--device", "cuda:9"], "device cuda:9"),
        (["--img-size", "64", "64"], "a checkpoint has its own size"),
        (["--json", "/no/such/folder/x.json"], "in a folder that is there"),
        (["--data", "/no/such/folder"], "/no/such/folder"),
    ],
)
def test_bad_arguments_are_one_line(checkpoint, capsys, more, message):
    assert main(["bench", "-c", str(checkpoint), "--batch-size", "1", "--seconds", "0", "--no-compile", *more]) == 1
    error = capsys.readouterr().err
    assert message in error
    assert "Traceback" not in error


def test_nothing_that_is_read_is_replaced(checkpoint, capsys):
    before = checkpoint.read_bytes()
    assert main(["bench", "-c", str(checkpoint), "--seconds", "0", "--no-compile", "--json", str(checkpoint)]) == 1
    assert "is read, and a result would replace it" in capsys.readouterr().err
    assert checkpoint.read_bytes() == before


def test_an_unknown_model_is_one_line(capsys):
    assert main(["bench", "deit_smal_patch16_224"]) == 1
    assert "no model 'deit_smal_patch16_224'" in capsys.readouterr().err


def test_merging_costs_its_cosines_and_is_not_compared_with_who_does_not_merge(checkpoint, capsys):
    args = ["bench", "-c", str(checkpoint), "--batch-size", "2", "--seconds", "0", "--no-compile", "--json"]
    gmacs = []
    for more in ([], ["--merge"]):
        assert main([*args, "--keep", "0.5,0.5,0.5", "--keep-std", "0", *more]) == 0
        _, result = printed(capsys)
        rows = {row["name"]: row for row in result["speed"][0]["rows"]}
        gmacs.append(rows[speed.OURS]["gmacs"])
        assert (speed.MASKED in rows) == (speed.PADDED in rows) == (not more)
    model = iared2.load(checkpoint)
    patches, width = model.backbone.patch_embed.num_patches, model.backbone.embed_dim
    assert gmacs[1] - gmacs[0] == pytest.approx(patches**2 * width / 1e9)
