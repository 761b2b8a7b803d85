"""Models in files: lying configurations, headers and tensors, arguments that reach out, pickles with code."""

from __future__ import annotations

import io
import json
import os
import pickle
import warnings
import zipfile
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import torch

import iared2

from . import bytes as mutations
from .case import Case, Make, Place, fifo

NAN, INF = float("nan"), float("inf")
ODD: list[Any] = [
    None, True, -1, 0, 2.5, 1e30, 10**12, -(10**12), "x", "", [], [None], {}, {"a": 1}, NAN, INF, -INF, [[1]],
    "9" * 5000,
    [NAN], ["a", 1], 10**400, "../outside/canary.pth", "a\nb", 3, [1, 2, 3], False, 1e-320,
]  # fmt: skip
CONFIG = [
    *[(key,) for key in ("architecture", "model_args", "groups", "interpreter", "dropped", "threshold", "num_keep")],
    *[(key,) for key in ("max_tokens", "class_names", "pretrained_cfg")],
    *[("model_args", key) for key in ("img_size", "patch_size", "embed_dim", "depth", "num_heads", "num_classes")],
    ("model_args", "global_pool"),
    *[("pretrained_cfg", key) for key in ("input_size", "mean", "std", "interpolation", "crop_pct")],
    *[("threshold", 0), ("class_names", 0), ("pretrained_cfg", "mean", 0), ("pretrained_cfg", "input_size", 1)],
]


def inputs() -> list[tuple[str, Make]]:
    """All of this kind."""
    made: list[tuple[str, Make]] = []
    for number, keys in enumerate(CONFIG):
        for shift in (0, 7, 15):
            odd = ODD[(5 * number + shift) % len(ODD)]
            made.append((f"config-{'.'.join(map(str, keys))}-odd", partial(config_value, keys, odd)))
        if isinstance(keys[-1], str):
            made.append((f"config-{'.'.join(map(str, keys))}-missing", partial(config_missing, keys)))
    made += [(f"bytes-{name}", partial(damaged, (name,))) for name in mutations.ALL]
    made += [(f"bytes-{name}-flipped", partial(damaged, (name, "flipped"))) for name in mutations.ALL]
    made += [(f"header-{name}", partial(of_bytes, make)) for name, make in HEADERS.items()]
    made += [(f"json-{number}", partial(config_text, text)) for number, text in enumerate(JSON)]
    made += [(f"tensor-{name}", partial(tensors, change)) for name, change in TENSORS.items()]
    made += [(f"args-{name_of(args)}", partial(arguments, args)) for args in ARGUMENTS]
    made += [(f"architecture-{number}", partial(architecture, name)) for number, name in enumerate(ARCHITECTURES)]
    made += [(f"decision-{number}", partial(decision, changes)) for number, changes in enumerate(DECISIONS)]
    made += [(f"pickle-{name}", partial(pickled, make)) for name, make in PICKLES.items()]
    made += [(f"authors-{name}", partial(authors, change)) for name, change in AUTHORS.items()]
    made += [(f"timesformer-{name}", partial(original, change)) for name, change in ORIGINAL.items()]
    made += [(f"backbone-{name}", partial(backbone, make)) for name, make in BACKBONES.items()]
    made += [(function.__name__.replace("_", "-"), function) for function in PLACES]
    return made


def name_of(args: dict[str, Any]) -> str:
    """Of arguments, for an id."""
    return "-".join("".join(c if c.isalnum() or c == "_" else "?" for c in key) for key in args)


def split(content: bytes) -> tuple[dict[str, Any], bytes]:
    """Header and data of a safetensors file."""
    size = int.from_bytes(content[:8], "little")
    return json.loads(content[8 : 8 + size]), content[8 + size :]


def join(header: Any, data: bytes = b"", size: int | None = None) -> bytes:
    """A safetensors file; ``size``: what it says of its header."""
    text = header if isinstance(header, bytes) else json.dumps(header).encode()
    return (len(text) if size is None else size).to_bytes(8, "little") + text + data


def photo(place: Place, checkpoint: Path | str) -> Case:
    """A good photo and this checkpoint."""
    return place.interpret(place.file("photo.png", place.bases.image("PNG")), checkpoint)


def ours(place: Place, content: bytes) -> Case:
    return photo(place, place.file("model.safetensors", content))


def with_config(place: Place, change: Callable[[Any], Any]) -> Case:
    header, data = split(place.bases.model.read_bytes())
    config = json.loads(header["__metadata__"]["iared2"])
    config = change(config) or config
    header["__metadata__"]["iared2"] = config if isinstance(config, str) else json.dumps(config)
    return ours(place, join(header, data))


def config_value(keys: tuple[Any, ...], odd: Any, place: Place) -> Case:
    def change(config: Any) -> None:
        for key in keys[:-1]:
            config = config[key]
        config[keys[-1]] = odd

    return with_config(place, change)


def config_missing(keys: tuple[Any, ...], place: Place) -> Case:
    def change(config: Any) -> None:
        for key in keys[:-1]:
            config = config[key]
        del config[keys[-1]]

    return with_config(place, change)


def config_text(text: str, place: Place) -> Case:
    return with_config(place, lambda _: text)


def arguments(args: dict[str, Any], place: Place) -> Case:
    text = json.dumps(args).replace("CANARY", str(place.canary)).replace("OUTSIDE", str(place.outside))
    return with_config(place, lambda config: config["model_args"].update(json.loads(text)))


def architecture(name: str, place: Place) -> Case:
    def change(config: Any) -> None:
        config["architecture"] = name.replace("OUTSIDE", str(place.outside))
        if place.rng.random() < 0.5:
            config["model_args"] = {}

    return with_config(place, change)


def decision(changes: dict[str, Any], place: Place) -> Case:
    return with_config(place, lambda config: config.update(changes))


def damaged(names: tuple[str, ...], place: Place) -> Case:
    return ours(place, mutations.composed(names, place.bases.model.read_bytes(), place.rng))


def of_bytes(make: Callable[[Any, bytes], bytes], place: Place) -> Case:
    return ours(place, make(*split(place.bases.model.read_bytes())))


JSON = [
    "", "null", "1", "[]", "{}", '"x"', "NaN", "[" * 100000, '{"a":' * 50000, "{'a': 1}", "1" * 5000,
        '{"architecture": 1}', "\ud83d",
]  # fmt: skip
FIRST = "backbone.cls_token"


def _offsets(begin: int, end: int) -> Callable[[Any, bytes], bytes]:
    return lambda header, data: join({**header, FIRST: {**header[FIRST], "data_offsets": [begin, end]}}, data)


def _field(**fields: Any) -> Callable[[Any, bytes], bytes]:
    return lambda header, data: join({**header, FIRST: {**header[FIRST], **fields}}, data)


HEADERS: dict[str, Callable[[Any, bytes], bytes]] = {
    "size-zero": lambda header, data: join(header, data, 0),
    "size-huge": lambda header, data: join(header, data, 2**63),
    "size-max": lambda header, data: join(header, data, 2**64 - 1),
    "size-beyond": lambda header, data: join(header, data, 90_000_000),
    "size-short": lambda header, data: join(header, data, 10),
    "only-size": lambda header, data: bytes(8),
    "few-bytes": lambda header, data: b"\1\2\3",
    "empty": lambda header, data: b"",
    **{f"is-{name}": partial(lambda text, *_: join(text), text) for name, text in {
        "list": b"[]", "null": b"null", "number": b"1", "text": b'"x"', "nothing": b"{}", "latin": b'{"\xff": 1}',
        "deep": b"[" * 100000, "open": b"{", "spaces": b" " * 100,
    }.items()},
    "metadata-list": lambda header, data: join({**header, "__metadata__": []}, data),
    "metadata-number": lambda header, data: join({**header, "__metadata__": {"iared2": 1}}, data),
    "metadata-none": lambda header, data: join({k: v for k, v in header.items() if k != "__metadata__"}, data),
    "no-configuration": lambda header, data: join({**header, "__metadata__": {"format": "pt"}}, data),
    "no-tensors": lambda header, data: join({"__metadata__": header["__metadata__"]}),
    "no-data": lambda header, data: join(header),
    "offsets-beyond": _offsets(0, 2**50),
    "offsets-negative": _offsets(-8, 184),
    "offsets-reversed": _offsets(192, 0),
    "offsets-overlap": _offsets(4, 196),
    "shape-huge": _field(shape=[2**40, 2**40]),
    "shape-negative": _field(shape=[-1, 1, 48]),
    "shape-float": _field(shape=[1.0, 1, 48]),
    "shape-text": _field(shape="1"),
    "shape-zero": _field(shape=[0, 1, 48]),
    "dtype-unknown": _field(dtype="F7"),
    "dtype-none": _field(dtype=None),
    "dtype-half": _field(dtype="F16"),
    "dtype-integer": _field(dtype="I32"),
    "dtype-bool": _field(dtype="BOOL"),
    "name-newline": lambda header, data: join({("a\nb\x1b" if k == FIRST else k): v for k, v in header.items()}, data),
    "name-long": lambda header, data: join({("x" * 99999 if k == FIRST else k): v for k, v in header.items()}, data),
}  # fmt: skip


def tensors(change: Callable[[torch.Tensor], torch.Tensor | None], place: Place) -> Case:
    """A well-formed file with some tensors changed."""
    from safetensors import safe_open
    from safetensors.torch import save_file

    with safe_open(place.bases.model, "pt") as file:
        metadata, found = file.metadata(), {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
    for name in place.rng.sample(sorted(found), 1) if place.rng.random() < 0.5 else list(found):
        changed = change(found.pop(name))
        if changed is not None:
            found[name] = changed.contiguous()
    path = place.inside / "model.safetensors"
    save_file(found, path, metadata)
    return photo(place, path)


TENSORS: dict[str, Callable[[torch.Tensor], torch.Tensor | None]] = {
    "nan": lambda t: t * NAN,
    "inf": lambda t: t + INF,
    "one-nan": lambda t: t.flatten().index_fill(0, torch.tensor([0]), NAN).view(t.shape),
    "huge": lambda t: t * 1e38,
    "tiny": lambda t: t * 1e-44,
    "zero": torch.zeros_like,
    "double": lambda t: t.double() * 1e300,
    "half": lambda t: t.half(),
    "bfloat": lambda t: t.bfloat16(),
    "float8": lambda t: t.to(torch.float8_e4m3fn),
    "integer": lambda t: (t * 100).to(torch.int64),
    "byte": lambda t: (t * 100).to(torch.uint8),
    "bool": lambda t: t > 0,
    "complex": lambda t: t + 1j,
    "missing": lambda t: None,
    "flat": lambda t: t.flatten(),
    "transposed": lambda t: t.mT if t.ndim > 1 else t[:-1],
    "empty": lambda t: t[:0],
    "longer": lambda t: torch.cat([t, t]),
    "scalar": lambda t: t.flatten()[0],
}
ARGUMENTS: list[dict[str, Any]] = [
    {"pretrained": True}, {"checkpoint_path": "CANARY"}, {"pretrained_cfg": {"url": "https://example.com/x.pth"}},
    {"pretrained_cfg": {"file": "CANARY"}, "pretrained": True}, {"pretrained_cfg_overlay": {"file": "CANARY"}},
    {"pretrained_cfg_overlay": {"hf_hub_id": "owner/name"}, "pretrained": True}, {"pretrained_cfg": "x"},
    {"pretrained_cfg": 5},
    {"cache_dir": "OUTSIDE"}, {"pretrained_strict": False}, {"scriptable": True}, {"exportable": True},
    {"no_jit": True},
    {"features_only": True}, {"features_only": True, "out_indices": [99]}, {"norm_layer": "os.system"},
    {"act_layer": "eval"},
    {"block_fn": "x"}, {"mlp_layer": "x"}, {"attn_layer": "x"}, {"embed_layer": "x"}, {"weight_init": "jax"},
    {"weight_init": "x"},
    {"dynamic_img_size": True}, {"dynamic_img_pad": True}, {"patch_drop_rate": 0.5}, {"patch_drop_rate": 7},
    {"drop_path_rate": NAN}, {"drop_rate": 2}, {"class_token": False}, {"reg_tokens": 10**9}, {"reg_tokens": -5},
    {"embed_dim": 10**7}, {"embed_dim": 30000}, {"depth": 10**6}, {"num_classes": 10**9}, {"num_classes": 0},
    {"img_size": 10**6},
    {"img_size": [32, 32, 32]}, {"patch_size": 0}, {"patch_size": -8}, {"patch_size": [8, 4]}, {"num_heads": 0},
    {"num_heads": 5},
    {"in_chans": 10**7}, {"in_chans": 0}, {"in_chans": 1}, {"mlp_ratio": 1e9}, {"mlp_ratio": NAN}, {"mlp_ratio": -1},
    {"init_values": NAN}, {"pos_embed": "none"}, {"no_embed_class": True}, {"fc_norm": True}, {"pre_norm": True},
    {"qkv_bias": "x"}, {"device": "cuda"}, {"device": "meta"}, {"dtype": "float16"}, {"model_name": "x"}, {"self": 1},
    {"kwargs": {"a": 1}}, {"model": "x"}, {"variant": "x"}, {"groups": 7}, {"backbone": "x"}, {"interpreter": "x"},
    {"": 1}, {"a\nb": 1},
    {"__class__": "x"}, {"use_naflex": True}, {"pretrained_filter_fn": "x"}, {"pretrained_custom_load": True},
    {"default_cfg": {}},
]  # fmt: skip
ARCHITECTURES = [
    "hf-hub:owner/name", "hf_hub:owner/name", "timm/deit_tiny_patch16_224", "local-dir:OUTSIDE", "local_dir:OUTSIDE",
    "https://example.com/x", "../../x", "resnet18", "vit_giant_patch14_224", "vit_gigantic_patch14_224",
    "eva_giant_patch14_560",
    "", "\n", "x" * 10000, "deit_tiny_patch16_224.evil", "deit_tiny_patch16_224.", "\x1b[31mx",
    "naflexvit_base_patch16_gap",
    "swin_tiny_patch4_window7_224", "vit_base_patch16_224.augreg_in1k", "timesformer_joint_base_patch16_224", "[[[*",
    "deit*",
    "videomae_base_patch16_224", "samvit_base_patch16", "mobilenetv3_small_050",
]  # fmt: skip
DECISIONS: list[dict[str, Any]] = [
    {"groups": 10**6}, {"groups": 4}, {"threshold": [0.5]}, {"threshold": [0.5] * 10**5}, {"threshold": 2.0},
    {"threshold": -5},
    {"threshold": [True, 0.5, 0.5]}, {"num_keep": [0, 0, 0]}, {"num_keep": [-1, -1, -1]}, {"num_keep": [99, 99, 99]},
    {"num_keep": [1, 2, 3]}, {"num_keep": [1.5, 1, 1]}, {"num_keep": [10**30] * 3}, {"num_keep": [True] * 3},
    {"num_keep": [NAN] * 3}, {"num_keep": ["1"] * 3}, {"max_tokens": 0}, {"max_tokens": -1}, {"max_tokens": 1},
    {"max_tokens": 10**30}, {"max_tokens": NAN}, {"max_tokens": 1.5}, {"class_names": ["a\nb", "\x1b[31mc"]},
    {"class_names": ["x" * 10**6, "y"]}, {"class_names": ["a"] * 10**5}, {"class_names": [1, 2]}, {"class_names": "ab"},
    {"class_names": {"a": 1, "b": 2}}, {"class_names": ["\ud800", "b"]}, {"class_names": ["[bold]a", "[/]"]},
    {"class_names": [["a"], "b"]},
    {"pretrained_cfg": {"input_size": [3, 10**6, 10**6]}}, {"pretrained_cfg": {"input_size": [3, 4, 32, 32]}},
    {"pretrained_cfg": {"input_size": [1, 32, 32]}}, {"pretrained_cfg": {"input_size": [3, 0, 0]}},
    {"pretrained_cfg": {"input_size": [3, 48, 48]}}, {"pretrained_cfg": {"std": [0, 0, 0]}},
    {"pretrained_cfg": {"std": [1e-320] * 3}},
    {"pretrained_cfg": {"mean": [1e39] * 3}}, {"pretrained_cfg": {"mean": [0.5]}},
    {"pretrained_cfg": {"mean": [0.5] * 5}},
    {"pretrained_cfg": {"interpolation": "random"}}, {"pretrained_cfg": {"crop_pct": 0}},
    {"pretrained_cfg": {"architecture": ["x"]}},
    {"pretrained_cfg": {"url": "https://example.com", "file": "x"}}, {"pretrained_cfg": {"first_conv": 5,
    "classifier": 5}},
    {"pretrained_cfg": {"label_names": ["a"], "num_classes": 10**9}}, {"interpreter": "attention"},
    {"dropped": "merged"},
]  # fmt: skip


class Evil:
    """Makes a folder when it is unpickled."""

    def __init__(self, marker: Path) -> None:
        self.marker = marker

    def __reduce__(self) -> tuple[Any, ...]:
        return os.mkdir, (str(self.marker),)


def saved(value: Any, **options: Any) -> bytes:
    """By ``torch.save``."""
    buffer = io.BytesIO()
    torch.save(value, buffer, **options)
    return buffer.getvalue()


def evil(place: Place) -> Evil:
    return Evil(place.outside / "code-was-run")


def pickled(make: Callable[[Place], tuple[str, bytes]], place: Place) -> Case:
    return photo(place, place.file(*make(place)))


def _zip(name: str, content: bytes) -> bytes:
    buffer = io.BytesIO()
    with zipfile.ZipFile(buffer, "w", zipfile.ZIP_DEFLATED) as archive:
        archive.writestr(name, content)
        archive.writestr("archive/version", b"3\n")
    return buffer.getvalue()


QK = "groups.0.agent.qk.weight"
PICKLES: dict[str, Callable[[Place], tuple[str, bytes]]] = {
    "code": lambda p: ("ckpt.pth", saved(evil(p))),
    "code-old-format": lambda p: ("ckpt.pth", saved(evil(p), _use_new_zipfile_serialization=False)),
    "code-as-tensor": lambda p: ("ckpt.pt", saved({QK: evil(p)})),
    "code-as-key": lambda p: ("ckpt.bin", saved({"state_dict": {QK: torch.zeros(3), "x": [evil(p)]}})),
    "code-plain": lambda p: ("ckpt.pth", pickle.dumps(evil(p))),
    "code-plain-0": lambda p: ("ckpt.pth", pickle.dumps(evil(p), protocol=0)),
    "code-plain-5": lambda p: ("ckpt.bin", pickle.dumps(evil(p), protocol=5)),
    "code-as-safetensors": lambda p: ("model.safetensors", pickle.dumps(evil(p))),
    "code-upper-case": lambda p: ("ckpt.PTH", pickle.dumps(evil(p))),
    "code-no-suffix": lambda p: ("ckpt", pickle.dumps(evil(p))),
    "code-pkl": lambda p: ("ckpt.pkl", pickle.dumps(evil(p))),
    "code-numpy": lambda p: ("ckpt.npy",
        b"\x93NUMPY\1\0v\0{'descr': '|O', 'fortran_order': False, 'shape': (1,), }".ljust(128) + pickle.dumps(evil(p))),
    "code-in-zip": lambda p: ("ckpt.pth", _zip("archive/data.pkl", pickle.dumps(evil(p)))),
    "whole-module": lambda p: ("ckpt.pth", saved(torch.nn.Linear(2, 2))),
    "script": lambda p: ("ckpt.pt", _script()),
    "zip-bomb": lambda p: ("ckpt.pth", _zip("archive/data.pkl", bytes(400 << 20))),
    "zip-of-text": lambda p: ("ckpt.pth", _zip("a.txt", b"text")),
    "zip-path": lambda p: ("ckpt.pth", _zip("../outside/code-was-run", b"text")),
    "tar": lambda p: ("ckpt.pth", b"storages".ljust(257, b"\0") + b"ustar  \0" + bytes(900)),
    "text": lambda p: ("ckpt.pth", b"version https://git-lfs.github.com/spec/v1\noid sha256:0\nsize 9\n"),
    "empty": lambda p: ("ckpt.pth", b""),
    "deep": lambda p: ("ckpt.pth", b"\x80\4" + b"(" * 10000 + b"."),
    "huge-number": lambda p: ("ckpt.pth", b"\x80\4\x8b\xff\xff\xff\x7f."),
    "huge-text": lambda p: ("ckpt.pth", b"\x80\4\x8d" + b"\xff" * 7 + b"\0."),
    "html": lambda p: ("ckpt.bin", b"<html>404</html>"),
    **{f"is-{name}": partial(lambda value, p: ("ckpt.pth", saved(value)), value) for name, value in {
        "none": None, "list": [torch.zeros(2)], "text": "x", "tensor": torch.zeros(2), "number": 5, "empty": {},
        "number-keys": {1: torch.zeros(2)}, "odd-values": {QK: "x", "head.weight": None}, "model-none": {"model": None},
        "state-list": {"state_dict": [1]}, "nested": {"model": {"model": {"state_dict": {}}}},
            "mixed-keys": {QK: torch.zeros(2), 5: 1, None: 2},
    }.items()},
}  # fmt: skip


def _script() -> bytes:
    buffer = io.BytesIO()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        torch.jit.save(torch.jit.script(torch.nn.Linear(2, 2)), buffer)
    return buffer.getvalue()


def authors_layout(place: Place) -> dict[str, Any]:
    """The tensors of the authors' tool, small."""
    model = iared2.load(place.bases.model)
    found = dict(model.backbone.state_dict())
    width = model.backbone.embed_dim
    for group in range(model.num_groups):
        found[f"groups.{group}.agent.qk.weight"] = torch.zeros(3 * width, width)
        found[f"groups.{group}.agent.qk.bias"] = torch.zeros(3 * width)
        twins = {n: t for n, t in found.items() if n.startswith(f"blocks.{group}.")}
        found |= {f"groups.{group}.block_list.0.{n.split('.', 2)[2]}": t for n, t in twins.items()}
    return found


def _set(name: str, change: Callable[[Any], Any]) -> Callable[[dict[str, Any]], Any]:
    def apply(found: dict[str, Any]) -> None:
        found[name] = change(found.get(name))

    return apply


def _expanded(*shape: int) -> Callable[[Any], torch.Tensor]:
    return lambda _: torch.zeros(1).expand(*shape)


AUTHORS: dict[str, Callable[[dict[str, Any]], Any]] = {
    "valid": lambda found: None,
    "nan": _set("head.weight", lambda t: t * NAN),
    "all-nan": lambda found: found.update({name: t * NAN for name, t in found.items()}),
    "complex": lambda found: found.update({name: t + 1j for name, t in found.items()}),
    "integer": lambda found: found.update({name: (9 * t).long() for name, t in found.items()}),
    "none": _set("head.weight", lambda t: None),
    "text": _set("pos_embed", lambda t: "x"),
    "list": _set("patch_embed.proj.weight", lambda t: t.tolist()),
    "sparse": _set("head.weight", lambda t: t.to_sparse()),
    "meta": _set("head.weight", lambda t: t.to("meta")),
    "quantised": _set("head.weight", lambda t: torch.quantize_per_tensor(t, 0.1, 0, torch.qint8)),
    "expanded-head": _set("head.weight", _expanded(10**9, 48)),
    "expanded-positions": _set("pos_embed", _expanded(1, 10**8 + 1, 48)),
    "expanded-patches": _set("patch_embed.proj.weight", _expanded(10**6, 3, 8, 8)),
    "expanded-interpreter": _set(QK, _expanded(10**9, 48)),
    "expanded-width": _set("patch_embed.proj.weight", _expanded(48, 3, 10**5, 10**5)),
    "no-width": _set("patch_embed.proj.weight", lambda t: t[:0]),
    "no-patch": _set("patch_embed.proj.weight", lambda t: t[..., :0, :0]),
    "no-positions": _set("pos_embed", lambda t: t[:, :0]),
    "scalar": _set("pos_embed", lambda t: torch.tensor(1.0)),
    "group-far": _set("groups.999999999.agent.qk.weight", lambda _: torch.zeros(144, 48)),
    "group-digits": _set(f"groups.{'9' * 5000}.agent.qk.weight", lambda _: torch.zeros(144, 48)),
    "block-far": _set("blocks.999999999.norm1.weight", lambda _: torch.zeros(48)),
    "block-list-far": _set("groups.99.block_list.99.norm1.weight", lambda _: torch.zeros(48)),
    "many-blocks": lambda found: found.update({f"blocks.{i}.norm1.weight": torch.zeros(48) for i in range(3000)}),
    "name-newline": _set("a\nb\x1b[31m", lambda _: torch.zeros(2)),
    "dots": _set("blocks.", lambda _: torch.zeros(2)),
    "block-no-dot": _set("blocks", lambda _: torch.zeros(2)),
    "twins-differ": _set("groups.0.block_list.0.norm1.weight", lambda t: t + 1),
    "parameter": _set("head.weight", torch.nn.Parameter),
}


def authors(change: Callable[[dict[str, Any]], Any], place: Place) -> Case:
    found = authors_layout(place)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # quantised tensors are old-fashioned
        change(found)
    return photo(place, place.file("ckpt.pth", saved(found)))


ORIGINAL: dict[str, Callable[[dict[str, Any]], Any]] = {
    "none": lambda found: found.clear(),
    "state-number": lambda found: found.update({"model_state": 5}),
    "state-list": lambda found: found.update({"model_state": [5]}),
    "number-keys": lambda found: found.update({"model_state": {1: 2}}),
    "time-text": lambda found: found.update({"time_embed": "x"}),
    "time-huge": lambda found: found.update({"time_embed": torch.zeros(1).expand(1, 10**9, 48)}),
    "divided": lambda found: found.update({"blocks.0.temporal_x": torch.zeros(2)}),
    "nan": lambda found: found.update({"time_embed": torch.full((1, 4, 48), NAN)}),
}


def original(change: Callable[[dict[str, Any]], Any], place: Place) -> Case:
    model = iared2.load(place.bases.video_model)
    found = dict(model.backbone.state_dict())
    found["patch_embed.proj.weight"] = found["patch_embed.proj.weight"].squeeze(2)
    change(found)
    path = place.file("model.pyth", saved(found))
    return place.python(f"iared2.from_timesformer({str(path)!r}, num_heads=3)")


BACKBONES: dict[str, Callable[[Place], tuple[str, bytes]]] = {
    "valid": lambda p: ("model.pth", saved(iared2.load(p.bases.model).backbone.state_dict())),
    "code": lambda p: ("model.pth", saved(evil(p))),
    "code-plain": lambda p: ("model.pth", pickle.dumps({"head.weight": evil(p)})),
    "positions-odd": lambda p: ("model.pth", saved({"pos_embed": torch.zeros(1, 10, 7)})),
    "positions-huge": lambda p: ("model.pth", saved({"pos_embed": torch.zeros(1).expand(1, 10**8 + 1, 48)})),
    "positions-integer": lambda p: ("model.pth", saved({"pos_embed": torch.zeros(1, 10, 48).long()})),
    "number-keys": lambda p: ("model.pth", saved({1: torch.zeros(2)})),
    "values": lambda p: ("model.pth", saved({"backbone.x": 5, "pos_embed": "x"})),
    "list": lambda p: ("model.pth", saved([1, 2])),
    "nan": lambda p: ("model.pth", saved({n: t * NAN for n,
        t in iared2.load(p.bases.model).backbone.state_dict().items()})),
    "complex": lambda p: ("model.pth", saved({n: t + 1j for n,
        t in iared2.load(p.bases.model).backbone.state_dict().items()})),
    "safetensors-text": lambda p: ("model.safetensors", b"text and more text"),
    "npz": lambda p: ("model.npz", _zip("a.npy", b"x")),
    "truncated": lambda p: ("model.safetensors", p.bases.model.read_bytes()[:-500]),
}  # fmt: skip
RECIPE = """
seed = 0
[model]
backbone = "deit_tiny_patch16_224"
groups = 3
timm = {img_size = 32, patch_size = 8, embed_dim = 48, depth = 3, num_heads = 3}
[data]
workers = 0
holdout = 0.25
[policy_gradient]
epochs = 1
batch_size = 2
[finetune]
epochs = 1
batch_size = 2
"""


def backbone(make: Callable[[Place], tuple[str, bytes]], place: Place) -> Case:
    """Foreign weights that a recipe names."""
    path = place.file(*make(place))
    return place.train(place.file("recipe.toml", RECIPE), "--set", f"model.checkpoint='{path}'")


def a_directory(place: Place) -> Case:
    (place.inside / "model.safetensors").mkdir()
    return photo(place, place.inside / "model.safetensors")


def empty_run(place: Place) -> Case:
    (place.inside / "run").mkdir()
    return photo(place, place.inside / "run")


def pipe(place: Place) -> Case:
    return photo(place, fifo(place, "model.safetensors"))


def pipe_pth(place: Place) -> Case:
    return photo(place, fifo(place, "ckpt.pth"))


def link_circle(place: Place) -> Case:
    path = place.inside / "model.safetensors"
    path.symlink_to(path)
    return photo(place, path)


def missing_with_escape(place: Place) -> Case:
    return photo(place, "in/a\nb\x1b[31m.safetensors")


def nul_in_the_name(place: Place) -> Case:
    return photo(place, "in/a\0b.safetensors")


def too_long_a_name(place: Place) -> Case:
    return photo(place, "x" * 5000)


def a_url(place: Place) -> Case:
    return photo(place, "https://example.com/model.safetensors")


def a_photo(place: Place) -> Case:
    return photo(place, place.file("model.safetensors", place.bases.image("JPEG")))


def video_model(place: Place) -> Case:
    return photo(place, place.bases.video_model)


def newline_in_a_good_name(place: Place) -> Case:
    return photo(place, place.file("a\nb.safetensors", place.bases.model.read_bytes()))


PLACES: list[Make] = [
    a_directory, empty_run, pipe, pipe_pth, link_circle, missing_with_escape, nul_in_the_name, too_long_a_name, a_url,
    a_photo, video_model, newline_in_a_good_name,
]  # fmt: skip
