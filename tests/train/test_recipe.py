"""A recipe that cannot be meant is one line before anything runs; a generator makes them from the shipped ones."""

from __future__ import annotations

import copy
import dataclasses
import json
import random
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from iared2.cli import main
from iared2.errors import InputError
from iared2.train.recipe import RANGES, Recipe, check, read_recipe

if sys.version_info >= (3, 11):
    import tomllib
else:
    import tomli as tomllib

RECIPES = sorted((Path(__file__).parents[2] / "recipes").glob("*.toml"))
TINY = {"img_size": 16, "patch_size": 4, "embed_dim": 32, "depth": 4, "num_heads": 2}


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Two classes of two images to train on and one to measure on."""
    root = tmp_path_factory.mktemp("images")
    for split, count in (("train", 2), ("val", 1)):
        for number, name in enumerate(("ant", "bee")):
            (root / split / name).mkdir(parents=True)
            for i in range(count):
                pixels = np.random.default_rng(10 * number + i).integers(0, 255, (16, 16, 3))
                Image.fromarray(pixels.astype(np.uint8)).save(root / split / name / f"{i}.png")
    return root


def toml(value: Any) -> str:
    """TOML text of what a recipe may hold, and of what it may not."""
    if isinstance(value, dict):
        return "{ " + ", ".join(f"{json.dumps(k)} = {toml(v)}" for k, v in value.items()) + " }"
    if isinstance(value, list):
        return f"[{', '.join(map(toml, value))}]"
    return (
        {True: "true", False: "false"}[value]
        if isinstance(value, bool)
        else json.dumps(value).lower()
        if not isinstance(value, (str, float))
        else str(value)
        if isinstance(value, float)
        else json.dumps(value)
    )


def write(tree: dict[str, Any], path: Path) -> Path:
    path.write_text("".join(f"{json.dumps(key)} = {toml(value)}\n" for key, value in tree.items()), encoding="utf-8")
    return path


def small(recipe: Path) -> dict[str, Any]:
    """A shipped recipe with a tiny model and no weights."""
    tree = tomllib.loads(recipe.read_text(encoding="utf-8"))
    tree["model"] = {**tree["model"], "timm": dict(TINY), "pretrained": False, "groups": 4}
    tree["data"] = {**tree.get("data", {}), "workers": 0, "classes": [], "holdout": 0.0, "eval_split": "validation"}
    tree["compile"] = False
    tree["precision"] = "no"
    for stage in ("backbone", "policy_gradient", "finetune"):
        tree[stage] = {**tree.get(stage, {}), "epochs": 1, "batch_size": 4}
        tree[stage].pop("accumulate", None)
    return tree


NUMBERS = [-1, 0, 1e30, float("inf"), float("-inf"), float("nan"), 10**9, 10**30, 2**63, -0.5, 1e-300]
OTHER = [
    *NUMBERS,
    True,
    "",
    "日本語",
    "a\nb",
    "\0",
    "\x1b[31m",
    "x" * 9999,
    [],
    [[[]]],
    [1, "a"],
    {},
    {"a": {"b": 1}},
]
TIMM = [
    ("depth", 10**9), ("depth", 0), ("depth", -3), ("depth", 2.5), ("embed_dim", 10**9), ("embed_dim", 0),
    ("embed_dim", 33), ("embed_dim", 60_000), ("num_heads", 0), ("num_heads", 3), ("patch_size", 0), ("patch_size", 5),
    ("patch_size", [4]), ("img_size", 0), ("img_size", [16, 16, 16]), ("img_size", "big"), ("img_size", 60_000),
    ("in_chans", 4), ("in_chans", 0), ("in_chans", "rgb"), ("mlp_ratio", float("nan")), ("mlp_ratio", 1e30),
    ("norm_layer", "nonsense"), ("act_layer", "nonsense"), ("global_pool", "nonsense"), ("no_such_argument", 1),
    ("drop_path_rate", 1.0), ("proj_drop_rate", 2.0), ("class_token", "maybe"), ("num_classes", 5), ("groups", 3),
    ("pretrained", True), ("block_fn", "x"), ("weight_init", "x"), ("pos_embed", "x"), ("reg_tokens", -1),
    ("pretrained_cfg", {"url": "x"}), ("backbone", "x"), ("mlp_ratio", {"a": 1}),
]  # fmt: skip


def malformed(number: int) -> tuple[dict[str, Any], str]:
    """The malformed recipe of this number, and what is wrong with it."""
    draw = random.Random(number)
    tree = small(RECIPES[number % len(RECIPES)])
    if number % 3 == 0:
        key, value = TIMM[(number // 3) % len(TIMM)]
        tree["model"]["timm"][key] = value
        return tree, f"model.timm.{key} = {value!r:.60}"
    node, path = tree, ""
    while True:
        key = draw.choice(sorted(node))
        path += f".{key}"
        if not (isinstance(node[key], dict) and node[key]) or draw.random() < 0.1:
            break
        node = node[key]
    kind = draw.choice(["value", "value", "value", "value", "key", "nested"])
    value = draw.choice(OTHER)
    if kind == "value":
        node[key] = value
    elif kind == "key":
        key = draw.choice(["日本語", "", "ephocs", "x" * 5000, "a.b"])
        node[key] = value
    else:
        node[key] = {key: copy.deepcopy(node[key])}
    return tree, f"{kind} {path} -> {key!r:.30} = {value!r:.60}"


@pytest.mark.parametrize("number", range(200))
def test_malformed_recipes_are_one_line_or_run(number, tmp_path, folder, capsys, monkeypatch):
    """Some changes are harmless; then the run must come as far as its first step."""

    class FirstStep(Exception):
        pass

    def step(*_):
        raise FirstStep

    monkeypatch.setattr("iared2.train.trainer.Trainer.step", step)
    tree, what = malformed(number)
    path = write(tree, tmp_path / "recipe.toml")
    try:
        status = main(["train", str(path), "--data", str(folder), "-o", str(tmp_path / "run")])
    except FirstStep:
        return
    error = capsys.readouterr().err
    lines = [line for line in error.splitlines() if not line.startswith("recipe: ")]  # of old names
    assert status == 1, what
    assert len(lines) == 1, (what, error)
    assert lines[0].startswith("error: "), (what, error)
    assert len(lines[0]) < 500, what
    assert not (tmp_path / "run" / "metrics.jsonl").exists(), what


def numbers(value: Any, key: str = "") -> set[str]:
    """The names of the settings that are numbers, or lists of them."""
    if dataclasses.is_dataclass(value):
        return set().union(*(numbers(getattr(value, f.name), f.name) for f in dataclasses.fields(value)))
    return {key} if isinstance(value, (int, float)) and not isinstance(value, bool) else set()


def test_every_number_has_a_range():
    assert numbers(Recipe()) <= RANGES.keys()
    assert {"keep", "mean", "std", "timm"} <= RANGES.keys()
    assert all(low < high for low, high in RANGES.values())


@pytest.mark.parametrize(
    "setting",
    [
        "finetune.lr=1e30", "finetune.lr=inf", "finetune.lr=nan", "finetune.lr=-1e-3", "finetune.weight_decay=nan",
        "policy.samples=100000000", "data.workers=100000", "backbone.batch_size=0", "backbone.batch_size=100000000",
        "model.groups=100000", "reward.tau=inf", "finetune.ema_decay=1.5", "finetune.layer_decay=nan",
        "policy_gradient.augment.min_scale=0", "model.std=[0.2, 0.2, 0.0]", "checkpoint_minutes=nan", "seed=2147483648",
        "model.timm.drop_path_rate=1.0", "model.timm.mlp_ratio=nan", "model.timm.depth=1000000000",
    ],
)  # fmt: skip
def test_numbers_that_cannot_be_meant(setting):
    with pytest.raises(InputError, match=r"^recipe: [\w.]+ = \S+ should be in \S+…\S+$") as error:
        check(read_recipe(RECIPES[0], [setting]))
    assert setting.split("=")[0] in str(error.value)


def test_old_names_go_on_working(tmp_path, capsys):
    path = tmp_path / "old.toml"
    path.write_text("finetune.accumulate = 2\nreward.graded = true\npolicy = { leave_one_out = true, samples = 2 }\n")
    recipe = read_recipe(path, ["backbone.accumulate=4"])
    assert (recipe.finetune.grad_accum_steps, recipe.backbone.grad_accum_steps) == (2, 4)
    assert recipe.reward.soft_reward
    assert recipe.policy.rloo
    assert capsys.readouterr().err.splitlines() == [
        "note: recipe: finetune.accumulate is now called grad_accum_steps",
        "note: recipe: reward.graded is now called soft_reward",
        "note: recipe: policy.leave_one_out is now called rloo",
        "note: recipe: backbone.accumulate is now called grad_accum_steps",
    ]
    with pytest.raises(InputError, match="accumulate is the old name of grad_accum_steps"):
        read_recipe(path, ["finetune.grad_accum_steps=3"])
