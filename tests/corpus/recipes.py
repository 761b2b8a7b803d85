"""Recipes: every setting with values that cannot be meant, tables in the wrong places, and what is no TOML at all.

A run that begins to train is ended after its first step: accepted settings must leave finite weights.
"""

from __future__ import annotations

import copy
import dataclasses
import json
import math
import typing
from collections.abc import Callable, Iterator
from functools import partial
from typing import Any

from iared2.train.recipe import Recipe

from . import bytes as mutations
from .case import Case, Make, Place, fifo
from .checkpoints import authors_layout, name_of, saved

NAN, INF = float("nan"), float("inf")
BASE: dict[str, Any] = {
    "seed": 0,
    "model": {
        "backbone": "deit_tiny_patch16_224",
        "groups": 3,
        "timm": {"img_size": 32, "patch_size": 8, "embed_dim": 48, "depth": 3, "num_heads": 3},
    },
    "data": {"workers": 0, "holdout": 0.25},
    "backbone": {"epochs": 1, "batch_size": 2},
    "policy_gradient": {"epochs": 1, "batch_size": 2},
    "finetune": {"epochs": 1, "batch_size": 2},
}
VALUES: dict[type, list[Any]] = {
    float: [NAN, INF, -INF, 1e30, -1, -1e30, 1e-320, True, "0.5", [1.0], {}, 0],
    int: [-1, 10**6, 10**12, 10**30, 2.0, True, "1", NAN, [1], 0, -(2**63), {"a": 1}],
    str: ["", "x", "a\nb\x1b[31m", 1, [], "\0", "x" * 5000, "../../x", "[bold]", True],
    bool: ["true", 1, 0, [], NAN, {}],
    tuple: [[NAN], [], ["x"], [1e30] * 3, {}, "x", [[1]], [True] * 3, [0.5], [-1, -1, -1], [0, 0, 0], [0.5] * 1000],
    dict: [[], "x", 5, {"a": {"b": {}}}],
}


def inputs() -> list[tuple[str, Make]]:
    """All of this kind."""
    made: list[tuple[str, Make]] = [("valid", partial(tree_of, lambda tree: None))]
    for number, (name, kind) in enumerate(settings(Recipe)):
        values = VALUES[kind]
        for shift in range(3 if kind in (float, int) else 2):
            value = values[(number + shift * (1 + len(values) // 3)) % len(values)]
            made.append((f"{name}-odd", partial(setting, name, value, shift == 1)))
    made += [(f"pair-{number}", partial(tree_of, change)) for number, change in enumerate(PAIRS)]
    made += [(f"text-{number}", partial(text, content)) for number, content in enumerate(TEXTS)]
    made += [(f"bytes-{name}", partial(damaged, (name,))) for name in mutations.ALL]
    made += [(f"bytes-{name}-flipped", partial(damaged, (name, "flipped"))) for name in mutations.ALL]
    made += [(f"set-{number}", partial(option, given)) for number, given in enumerate(OPTIONS)]
    made += [(f"timm-{name_of(args)}", partial(timm_arguments, args)) for args in TIMM]
    made += [(f"backbone-{number}", partial(backbone, name)) for number, name in enumerate(BACKBONES)]
    made += [(f"resume-{name}", partial(resumed, make)) for name, make in RESUMED.items()]
    made += [(function.__name__.replace("_", "-"), function) for function in PLACES]
    return made


def settings(cls: type, where: str = "") -> Iterator[tuple[str, type]]:
    """Name and kind of each setting of a recipe."""
    hints = typing.get_type_hints(cls)
    for field in dataclasses.fields(cls):
        hint = hints[field.name]
        name = f"{where}{field.name}"
        if dataclasses.is_dataclass(hint):
            yield from settings(typing.cast(type, hint), f"{name}.")
        else:
            kind = typing.get_origin(hint) or hint
            yield name, kind if kind in VALUES else str


def dump(tree: dict[str, Any]) -> str:
    """As TOML; all below the first level is written inline."""
    plain = {key: value for key, value in tree.items() if not isinstance(value, dict)}
    lines = [f"{_key(key)} = {_value(value)}" for key, value in plain.items()]
    for key, value in tree.items():
        if isinstance(value, dict):
            lines += [f"[{_key(key)}]", *(f"{_key(k)} = {_value(v)}" for k, v in value.items())]
    return "\n".join(lines) + "\n"


def _key(key: str) -> str:
    return key if key.isidentifier() and key.isascii() else json.dumps(key)


def _value(value: Any) -> str:
    if isinstance(value, dict):
        return "{" + ", ".join(f"{_key(k)} = {_value(v)}" for k, v in value.items()) + "}"
    if isinstance(value, (list, tuple)):
        return "[" + ", ".join(map(_value, value)) + "]"
    if isinstance(value, str):
        return json.dumps(value)
    if isinstance(value, bool):
        return str(value).lower()
    if isinstance(value, float) and math.isfinite(value):
        return repr(value) if "e" not in repr(value) or "." in repr(value) else repr(value).replace("e", ".0e")
    return str(value)


def put(tree: dict[str, Any], name: str, value: Any) -> dict[str, Any]:
    """``tree`` with ``section.key`` set."""
    *sections, key = name.split(".")
    node = tree
    for section in sections:
        node = node.setdefault(section, {})
    node[key] = value
    return tree


def tree_of(change: Callable[[dict[str, Any]], Any], place: Place) -> Case:
    """The base, changed."""
    tree = copy.deepcopy(BASE)
    change(tree)
    return place.train(place.file("recipe.toml", dump(tree)))


def setting(name: str, value: Any, by_option: bool, place: Place) -> Case:
    """One setting with this value, in the file or by ``--set``; the run begins with the stage that it is about."""
    tree = copy.deepcopy(BASE)
    if name.startswith(("policy", "reward", "finetune")):
        put(put(tree, "backbone.epochs", 0), "model.checkpoint", str(place.bases.model))
        if name.startswith("finetune"):
            put(tree, "policy_gradient.epochs", 0)
    if by_option:
        recipe = place.file("recipe.toml", dump(tree))
        return place.train(recipe, "--set", f"{name}={_value(value)}".replace("\0", ""))
    path = place.file("recipe.toml", dump(put(tree, name, value)))
    case = place.train(path)
    if name == "data.path":  # --data would win
        return Case(case.root, ("train", str(path), "-o", str(place.out)))
    return case


def _puts(**values: Any) -> Callable[[dict[str, Any]], Any]:
    def change(tree: dict[str, Any]) -> None:
        for name, value in values.items():
            put(tree, name.replace("__", "."), value)

    return change


PAIRS: list[Callable[[dict[str, Any]], Any]] = [
    _puts(policy__keep=[1.0, 0.7, NAN]), _puts(policy__keep=[0.9, 0.8, 1e-300]), _puts(policy__keep=[0.9, 0.8, 0.7],
    policy__equal_counts=True),
    _puts(policy__keep=[1e-9] * 3, policy__equal_counts=True), _puts(policy__decisions="gumbel"),
    _puts(policy__decisions="random", policy__keep=[1.0] * 3),
    _puts(policy__decisions="gumbel", policy__keep=[0.9, 0.8, 0.7], policy__gumbel_weight=INF),
    _puts(policy__samples=10**9, policy__leave_one_out=True),
    _puts(model__mean=[NAN] * 3, model__std=[1.0] * 3), _puts(model__mean=[0.5] * 3, model__std=[0.0] * 3),
    _puts(model__mean=[0.5] * 3, model__std=[-1.0] * 3),
    _puts(model__mean=[0.5], model__std=[0.5]), _puts(model__mean=[0.5] * 7, model__std=[0.5] * 7),
    _puts(model__mean=[1e30] * 3, model__std=[1e-30] * 3),
    _puts(model__groups=0), _puts(model__groups=4), _puts(model__groups=-3), _puts(model__interpreter="x"),
    _puts(model__dropped="x"),
    _puts(backbone__mixup=NAN), _puts(backbone__mixup=-1.0), _puts(backbone__mixup=1e30, backbone__cutmix=1e30),
    _puts(backbone__mixup=0.8, backbone__batch_size=3),
    _puts(backbone__optimizer="x"), _puts(backbone__optimizer="lookahead_"), _puts(backbone__optimizer="adopt"),
    _puts(backbone__optimizer="sgd", backbone__lr=1e30),
    _puts(backbone__layer_decay=0.0), _puts(backbone__layer_decay=-1.0), _puts(backbone__layer_decay=NAN),
    _puts(backbone__ema_decay=2.0),
    _puts(backbone__warmup_epochs=1e30), _puts(backbone__warmup_epochs=-5.0), _puts(backbone__epochs=1e-300),
    _puts(backbone__epochs=1e300),
    _puts(backbone__patch_drop=0.999999), _puts(backbone__augment__auto_augment="x"),
    _puts(backbone__augment__auto_augment="rand-m9-n9999"),
    _puts(backbone__augment__auto_augment="rand-mX"), _puts(backbone__augment__min_scale=0.0),
    _puts(backbone__augment__min_scale=5.0),
    _puts(backbone__augment__random_erasing=7.0), _puts(backbone__augment__color_jitter=-1.0),
    _puts(backbone__augment__hflip=2.0),
    _puts(data__resident=True, data__workers=0), _puts(data__resident=True, backbone__augment__auto_augment="x"),
    _puts(data__clutter=32),
    _puts(data__clutter=-32), _puts(data__clutter=10**6), _puts(data__holdout=0.999), _puts(data__holdout=1.0),
    _puts(data__classes=["cat", "cat"]),
    _puts(data__classes=["cat"]), _puts(data__classes=["a\nb\x1b[31m", "x"]), _puts(data__eval_split="a\nb"),
    _puts(data__train_split=""),
    _puts(precision="bf16", backbone__batch_size=1), _puts(precision="fp16"), _puts(eval_epochs=-1),
    _puts(checkpoint_minutes=NAN), _puts(checkpoint_minutes=-1.0),
    _puts(model="x"), _puts(data=[]), _puts(seed={"a": 1}), _puts(backbone__augment=5), _puts(model__timm=[1]),
    _puts(__class__=1),
    _puts(model__deeper__deeper__deeper=1), lambda tree: tree.clear(), lambda tree: tree.pop("model"),
    lambda tree: tree.pop("backbone"),
    lambda tree: tree.update({"a\nb\x1b[31m": 1}), lambda tree: tree["model"].update({"a\nb": 1}),
    lambda tree: tree.update({"x" * 5000: 1}),
    lambda tree: tree.update({"": 1}), lambda tree: tree.update({str(i): i for i in range(3000)}),
    _puts(finetune__distill=NAN), _puts(reward__tau=1e30),
    _puts(policy__temperature=1e-300), _puts(backbone__clip_grad=-1.0), _puts(backbone__clip_grad=NAN),
    _puts(backbone__label_smoothing=5.0),
    _puts(backbone__accumulate=2, backbone__batch_size=2), _puts(backbone__batch_size=10**9),
    _puts(reward__label="dense", reward__graded=True),
]  # fmt: skip
TEXTS: list[bytes] = [
    b"", b"\xff\xfe", b"\xef\xbb\xbfseed = 0", "seed = 0".encode("utf-16"), b"seed", b"seed = ", b"seed = 0\nseed = 0",
    b"[model]\n[model]", b"seed = 0\0",
    b"seed = " + b"9" * 5000, b"seed = 1e99999", b"seed = 0x" + b"f" * 5000, b"x = " + b"[" * 100000,
    b"x = " + b"[" * 300 + b"]" * 300,
    b"x = " + b"{a=" * 5000, b".".join([b"a"] * 5000) + b" = 1", b"[" + b".".join([b"a"] * 5000) + b"]",
    b"seed = 2020-01-01", b"seed = 12:00:00", b"seed = 2020-13-45T99:99:99",
    b'x = "\\ud800"', b'x = "\\U00110000"', b'x = """' + b"a" * 10**6 + b'"""', b"#" * 10**6, b"\r", b"seed = 0\x1b",
    b"'\x1b[31m' = 1", b'"a\\nb" = 1',
    b"[[model]]", b"[[model]]\n[[model]]", b"[model.timm.x]", b"<html>", b"{}", b"---\nseed: 0", b"seed = nan",
    b"seed = +inf", b"seed = 0_0", b"[]", b"[a.]", b"= 1",
    b"backbone.epochs.x = 1", b"[model]\ntimm = {a = 1, a = 2}", b"model.timm.a.b = 1\n[model.timm]",
]  # fmt: skip
OPTIONS = [
    "", "=", "=1", "x", "seed", "seed=", "seed=[", "seed=\n", "seed=1\nx=2", "model..x=1", ".=1", "model.=1",
    "model.timm.x.y=1", "seed.x=1", "model=1",
    "model.backbone.x=1", "a\nb\x1b[31m=1", "seed=\x1b[31m", "seed=" + "9" * 5000, "x=" + "[" * 100000,
    ".".join("a" * 5000) + "=1", "finetune.epoch=2",
    "seed==1", "seed = 1 # x", "model.timm={", "data.path=''", "seed=2020-01-01", "\udcff=1", "seed=\udcff",
    "model.timm={a=1}", "backbone.augment.x=1",
]  # fmt: skip


def text(content: bytes, place: Place) -> Case:
    return place.train(place.file("recipe.toml", content))


def damaged(names: tuple[str, ...], place: Place) -> Case:
    content = mutations.composed(names, dump(BASE).encode(), place.rng)
    return place.train(place.file("recipe.toml", content.replace(b"pretrained", b"")))


def option(given: str, place: Place) -> Case:
    return place.train(place.file("recipe.toml", dump(BASE)), f"--set={given}")


TIMM: list[dict[str, Any]] = [
    {"pretrained": True}, {"num_classes": 5}, {"groups": 5}, {"checkpoint_path": "CANARY"},
    {"pretrained_cfg": {"url": "https://example.com"}},
    {"pretrained_cfg_overlay": {"file": "CANARY"}}, {"cache_dir": "OUTSIDE"}, {"features_only": True},
    {"scriptable": True},
    {"norm_layer": "os.system"}, {"embed_dim": 10**7}, {"depth": 10**6}, {"depth": 0}, {"img_size": 10**6},
    {"img_size": 0}, {"img_size": NAN},
    {"patch_size": 0}, {"num_heads": 0}, {"in_chans": 1}, {"in_chans": 10**7}, {"mlp_ratio": NAN}, {"mlp_ratio": INF},
    {"drop_path_rate": NAN},
    {"drop_path_rate": 2.0}, {"drop_rate": -1.0}, {"reg_tokens": 10**9}, {"global_pool": "x"}, {"class_token": False},
    {"x": 1}, {"": 1},
    {"dynamic_img_size": True}, {"init_values": NAN}, {"img_size": [32, 32, 32]}, {"device": "cuda"},
    {"dtype": "float16"}, {"backbone": "x"}, {"dropped": "x"},
]  # fmt: skip


def timm_arguments(args: dict[str, Any], place: Place) -> Case:
    tree = copy.deepcopy(BASE)
    tree["model"]["timm"] |= args
    content = dump(tree).replace("CANARY", str(place.canary)).replace("OUTSIDE", str(place.outside))
    return place.train(place.file("recipe.toml", content))


BACKBONES = [
    "hf-hub:owner/name", "local-dir:OUTSIDE", "https://example.com/x", "../../x", "resnet18", "", "\n\x1b[31m",
    "x" * 10000, "*", "[", "vit_giant_patch14_224",
    "swin_tiny_patch4_window7_224", "deit_tiny_patch16_224.evil", "timesformer_joint_base_patch16_224",
]  # fmt: skip


def backbone(name: str, place: Place) -> Case:
    tree = put(copy.deepcopy(BASE), "model.backbone", name.replace("OUTSIDE", str(place.outside)))
    return place.train(place.file("recipe.toml", dump(tree)))


def _state(config: Any) -> bytes:
    from safetensors.torch import save

    return save({}, {"iared2": json.dumps(config)})


RESUMED: dict[str, Callable[[Place], tuple[str, bytes]]] = {
    "state-text": lambda p: ("state.safetensors", b"text and more text"),
    "state-empty": lambda p: ("state.safetensors", b""),
    "state-model": lambda p: ("state.safetensors", p.bases.model.read_bytes()),
    "state-list": lambda p: ("state.safetensors", _state([])),
    "state-null": lambda p: ("state.safetensors", _state(None)),
    "state-position-list": lambda p: ("state.safetensors", _state({"position": [], "identity": {}})),
    "state-position-odd": lambda p: (
        "state.safetensors",
        _state({"position": {"stage": -1, "step": NAN}, "identity": {}}),
    ),
    "state-identity-list": lambda p: ("state.safetensors", _state({"position": {}, "identity": []})),
    "state-identity-null": lambda p: ("state.safetensors", _state({"position": {}, "identity": None})),
    "metrics-text": lambda p: ("metrics.jsonl", b"text\n"),
    "metrics-list": lambda p: ("metrics.jsonl", b"[]\n5\nnull\n"),
    "metrics-odd": lambda p: ("metrics.jsonl", b'{"total_steps": "x"}\n'),
    "metrics-bytes": lambda p: ("metrics.jsonl", b"\xff\xfe\n"),
    "metrics-deep": lambda p: ("metrics.jsonl", b"[" * 100000 + b"\n"),
}


def resumed(make: Callable[[Place], tuple[str, bytes]], place: Place) -> Case:
    """An output folder that holds what no run of ours wrote."""
    name, content = make(place)
    place.out.mkdir()
    (place.out / name).write_bytes(content)
    return place.train(place.file("recipe.toml", dump(BASE)))


def missing(place: Place) -> Case:
    return place.train("in/a\nb\x1b[31m.toml")


def nul_in_the_name(place: Place) -> Case:
    return place.train("in/a\0b.toml")


def too_long_a_name(place: Place) -> Case:
    return place.train("x" * 5000)


def a_directory(place: Place) -> Case:
    return place.train(place.inside)


def pipe(place: Place) -> Case:
    return place.train(fifo(place, "recipe.toml"))


def link_circle(place: Place) -> Case:
    path = place.inside / "recipe.toml"
    path.symlink_to(path)
    return place.train(path)


def zeros_for_ever(place: Place) -> Case:
    path = place.inside / "recipe.toml"
    path.symlink_to("/dev/zero")
    return place.train(path)


def output_is_a_file(place: Place) -> Case:
    case = place.train(place.file("recipe.toml", dump(BASE)))
    return Case(case.root, tuple(str(place.file("file", "x")) if a == str(place.out) else a for a in case.argv))


def output_is_a_link_circle(place: Place) -> Case:
    path = place.inside / "loop"
    path.symlink_to(path)
    case = place.train(place.file("recipe.toml", dump(BASE)))
    return Case(case.root, tuple(str(path) if a == str(place.out) else a for a in case.argv))


def output_with_nul(place: Place) -> Case:
    case = place.train(place.file("recipe.toml", dump(BASE)))
    return Case(case.root, tuple("in/a\0b" if a == str(place.out) else a for a in case.argv))


def data_with_newline(place: Place) -> Case:
    return place.train(place.file("recipe.toml", dump(BASE)), data="in/a\nb\x1b[31m")


def weights_are_a_directory(place: Place) -> Case:
    return place.train(place.file("recipe.toml", dump(BASE)), f"--set=model.checkpoint='{place.inside}'")


def weights_are_a_pipe(place: Place) -> Case:
    return place.train(place.file("recipe.toml", dump(BASE)), f"--set=model.checkpoint='{fifo(place, 'x.pth')}'")


def weights_of_the_authors(place: Place) -> Case:
    path = place.file("ckpt.pth", saved(authors_layout(place)))
    return place.train(place.file("recipe.toml", dump(BASE)), f"--set=model.checkpoint='{path}'")


PLACES: list[Make] = [
    missing, nul_in_the_name, too_long_a_name, a_directory, pipe, link_circle, zeros_for_ever, output_is_a_file,
    output_is_a_link_circle, output_with_nul,
    data_with_newline, weights_are_a_directory, weights_are_a_pipe, weights_of_the_authors,
]  # fmt: skip
