"""Files that are no good: each ends in one line that names the file, and takes neither memory nor time.

Every case is a function that spoils a good file; the fuzzed ones are drawn with a seed.
"""

from __future__ import annotations

import functools
import io
import json
import math
import os
import pickle
import random
import socket
import struct
import zipfile

import pytest
import safetensors.torch
import timm
import torch

import iared2
from iared2.cli import main
from iared2.errors import InputError
from iared2.model import file as saved
from iared2.pretrained.checkpoint import load_backbone_weights

SMALL = {"img_size": 16, "patch_size": 4, "embed_dim": 64, "depth": 3, "num_heads": 1, "num_classes": 5}


@pytest.fixture(scope="module")
def ours(tmp_path_factory):
    """Tensors and configuration of a file of ours."""
    model = iared2.from_timm("deit_tiny_patch16_224", **SMALL)
    model.class_names = tuple("abcde")
    path = tmp_path_factory.mktemp("good") / "m.safetensors"
    model.save(path)
    return saved.read(path)


@pytest.fixture(scope="module")
def authors(ours):
    """Tensors in the layout of the authors' tool: blocks twice, interpreters fused to 3C."""
    backbone = {n.removeprefix("backbone."): t for n, t in ours[0].items() if n.startswith("backbone.")}
    twins = {f"groups.{n[7]}.block_list.0{n[8:]}": t for n, t in backbone.items() if n.startswith("blocks.")}
    agents = {
        f"groups.{g}.agent.qk.{kind}": torch.cat([ours[0][f"interpreters.{g}.{part}.{kind}"] for part in
                                                  ("query", "key", "key")])
        for g in range(3) for kind in ("weight", "bias")
    }  # fmt: skip
    return {**backbone, **twins, **agents}


def complaint(read, path):
    """The one line that reading a file ends in."""
    with pytest.raises(InputError) as caught:
        read(path)
    line = str(caught.value)
    assert "\n" not in line
    assert str(path) in line
    assert len(line) < len(str(path)) + 400
    return line


def test_the_good_ones_are_good(ours, authors, tmp_path):
    saved.write(tmp_path / "a", *ours)
    torch.save(authors, tmp_path / "b")
    iared2.load(tmp_path / "a")
    iared2.load(tmp_path / "b")


QKV = "backbone.blocks.1.attn.qkv.weight"
HUGE = 10**9


def config(**changes):
    return lambda tensors, config: config.update(changes)


def arguments(**changes):
    return lambda tensors, config: config["model_args"].update(changes)


def preprocessing(**changes):
    return lambda tensors, config: config["pretrained_cfg"].update(changes)


def weight(change):
    return lambda tensors, config: tensors.update({QKV: change(tensors[QKV].clone())})


def filled(number):
    def fill(tensor):
        tensor.view(-1)[7] = number
        return tensor

    return weight(fill)


OURS = {
    "missing tensor": (lambda t, c: t.pop(QKV), f"lacks the tensor {QKV}"),
    "extra tensor": (lambda t, c: t.update(extra=torch.ones(1)), "has unexpected the tensor extra"),
    "extra tensor of a long name": (
        lambda t, c: t.update({"x" * 5000: torch.ones(1)}),
        "has unexpected the tensor xxx",
    ),
    "transposed": (weight(lambda t: t.mT.contiguous()), f"{QKV} has shape"),
    "nan": (filled(math.nan), f"{QKV}' is not finite"),
    "inf": (filled(math.inf), f"{QKV}' is not finite"),
    "integers": (weight(lambda t: t.int()), f"{QKV} has numbers of torch.int32"),
    "booleans": (weight(lambda t: t.bool()), f"{QKV} has numbers of torch.bool"),
    "complex": (weight(lambda t: t.to(torch.complex64)), f"{QKV}' is empty or no tensor"),
    "8 bits": (weight(lambda t: t.to(torch.float8_e4m3fn)), f"{QKV}' is not finite"),
    "empty": (weight(lambda t: t[:0]), f"{QKV}' is empty or no"),
    "depth": (arguments(depth=HUGE), "model_args.depth should not be 1000000000"),
    "depth in bounds": (arguments(depth=10**7), "10000000 blocks are more than"),
    "width": (arguments(embed_dim=HUGE), "model_args.embed_dim"),
    "width in bounds": (arguments(embed_dim=10**6), "has shape"),
    "classes": (arguments(num_classes=10**7), "5 class names for 10000000 classes"),
    "registers": (arguments(reg_tokens=10**7), "lacks the tensor backbone.reg_token"),
    "image": (arguments(img_size=[10**6, 10**6]), "too large"),
    "image without positions": (
        lambda t, c: c["model_args"].update(pos_embed="none", img_size=10**6) or t.pop("backbone.pos_embed"),
        "too large",
    ),
    "no patch size": (arguments(patch_size=0), "does not describe a model"),
    "unknown norm": (arguments(norm_layer="nonsense"), "does not describe a model"),
    "class by name": (arguments(block_fn="os.system"), "model_args.block_fn"),
    "unknown argument": (arguments(nonsense=1), "model_args.nonsense"),
    "fixed positions": (arguments(fixed_positions=True), "does not describe a model"),
    "hub": (config(architecture="hf_hub:timm/deit_tiny_patch16_224"), "timm has no model"),
    "hub with a dash": (config(architecture="hf-hub:timm/deit_tiny_patch16_224"), "timm has no model"),
    "folder": (config(architecture="local-dir:/tmp/deit_tiny_patch16_224"), "timm has no model"),
    "path": (config(architecture="deit_tiny_patch16_224./../x"), "timm has no model"),
    "tag": (config(architecture="deit_tiny_patch16_224.nonsense"), "does not describe a model"),
    "another kind": (config(architecture="resnet18"), "not a plain vision transformer"),
    "another transformer": (config(architecture="swin_tiny_patch4_window7_224"), "not a plain vision transformer"),
    "no name": (config(architecture=None), "architecture should not be None"),
    "groups": (config(groups=0), "numbers for 0 groups"),
    "many groups": (config(groups=HUGE), "groups should not be"),
    "interpreter": (config(interpreter="nonsense"), "interpreter='nonsense'"),
    "counts": (config(num_keep=[5, 4]), "num_keep has 2 numbers for 3 groups"),
    "negative counts": (config(num_keep=[5, 4, -3]), "num_keep should not be"),
    "thresholds": (config(threshold=[0.5, 0.5]), "threshold has 2 numbers for 3 groups"),
    "nan threshold": (config(threshold=math.nan), "threshold should not be nan"),
    "infinite threshold": (config(threshold=[0.5, 0.5, math.inf]), "threshold should not be"),
    "number for a name": (config(class_names=[1, 2, 3, 4, 5]), "class_names should not be"),
    "names": (config(class_names=["a"]), "1 class names for 5 classes"),
    "text for names": (config(class_names="abcde"), "class_names should not be"),
    "unknown entry": (config(nonsense=1), "nonsense should not be 1"),
    "url": (preprocessing(url="http://localhost/w.pth"), "pretrained_cfg.url"),
    "mean": (preprocessing(mean=["a", "b", "c"]), "pretrained_cfg.mean"),
    "nan mean": (preprocessing(mean=[0.5, math.nan, 0.5]), "pretrained_cfg.mean"),
    "two means": (preprocessing(mean=[0.5, 0.5]), "one number per channel, std above 0"),
    "no deviation": (preprocessing(std=[1.0, 0.0, 1.0]), "std above 0"),
    "interpolation": (preprocessing(interpolation="nonsense"), "pretrained_cfg.interpolation"),
    "crop": (preprocessing(crop_pct="1"), "pretrained_cfg.crop_pct"),
    "no arguments": (lambda t, c: c.pop("model_args"), "model_args is missing"),
}


@pytest.mark.parametrize("name", OURS)
def test_our_format(ours, tmp_path, name):
    tensors, described = dict(ours[0]), json.loads(json.dumps(ours[1]))
    spoil, message = OURS[name]
    spoil(tensors, described)
    saved.write(tmp_path / "m.safetensors", tensors, described)
    assert message in complaint(iared2.load, tmp_path / "m.safetensors")


@pytest.mark.parametrize("text", ["", "null", "[]", '"a"', "5", "NaN", "{", "[" * 10**5, "1" * 5000, "{}"])
def test_the_configuration_is_no_object(ours, tmp_path, text):
    safetensors.torch.save_file(ours[0], tmp_path / "m", {"iared2": text})
    complaint(iared2.load, tmp_path / "m")


@pytest.mark.parametrize("seed", range(40))
def test_any_value_in_any_place(ours, tmp_path, seed):
    """Either it is refused, or the model runs."""
    draw = random.Random(seed)
    described = json.loads(json.dumps(ours[1]))
    pool = [
        None,
        True,
        -1,
        0,
        2,
        10**9,
        10**400,
        1e30,
        math.nan,
        "",
        "x",
        [],
        [[]],
        [1, "a"],
        {},
        {"a": [1]},
        [10**9] * 2,
    ]
    names = [*described, *(("pretrained_cfg", n) for n in saved.PRETRAINED_CFG)]
    names += [("model_args", n) for n in (*saved.architectural(described["architecture"]), *saved.LOADER)]
    for place in draw.sample(names, 2):
        *way, last = [place] if isinstance(place, str) else place
        inner = functools.reduce(dict.get, way, described)
        if isinstance(inner, dict):
            inner[last] = draw.choice(pool)
    saved.write(tmp_path / "m", ours[0], described)
    try:
        model = iared2.load(tmp_path / "m")
    except InputError:
        complaint(iared2.load, tmp_path / "m")
    else:
        assert model(torch.zeros(1, *model.pretrained_cfg["input_size"])).shape == (1, 5)


def test_nothing_in_a_file_opens_files_or_connections(ours, tmp_path, monkeypatch):
    """timm's loader is not reached by what a file says; today's files may name where weights once came from."""

    def reached(*_, **__):
        raise AssertionError("a file made the program look elsewhere")

    monkeypatch.setattr(socket.socket, "connect", reached)
    monkeypatch.setattr(timm.models._factory, "load_checkpoint", reached)
    monkeypatch.setattr(timm.models._builder, "load_pretrained", reached)
    cfg = {"url": "http://localhost:1/w.pth", "file": "/etc/passwd", "hf_hub_id": "timm/x", "custom_load": True}
    described = json.loads(json.dumps(ours[1]))
    described["model_args"] |= {
        **{"checkpoint_path": "/etc/passwd", "pretrained": True, "pretrained_cfg": cfg, "pretrained_cfg_overlay": cfg},
        **{"cache_dir": str(tmp_path / "cache"), "device": "cuda:77", "dtype": "nonsense"},
    }
    saved.write(tmp_path / "m", ours[0], described)
    model = iared2.load(tmp_path / "m")
    assert model.pretrained_cfg.get("file") is None
    x = torch.randn(2, 3, 16, 16)
    saved.write(tmp_path / "good", *ours)
    assert torch.equal(model(x), iared2.load(tmp_path / "good")(x))


def changed(**changes):
    return lambda tensors: {**tensors, **{name.replace("__", "."): tensor for name, tensor in changes.items()}}


def expanded(tensors):
    """Shapes that agree with each other, of numbers that are repeated by a stride of 0."""
    width = 10**5
    one = torch.ones(1)
    return {**tensors, "patch_embed.proj.weight": one.expand(width, 3, 4, 4), "pos_embed": one.expand(1, 17, width)}


AUTHORS = {
    "nested": (lambda t: {"state_dict": {"model": t}}, "'model' is empty or no tensor of real numbers (dict)"),
    "unknown wrapper": (lambda t: {"epoch": 3, "weights": t}, "'epoch' is empty or no tensor of real numbers (int)"),
    "list": (lambda t: [*t.values()], "holds a list"),
    "one tensor": (lambda t: torch.ones(3), "holds a Tensor"),
    "number": (lambda t: 5, "holds a int"),
    "number for a model": (lambda t: {"model": 5}, "holds a int"),
    "nothing": (lambda t: {}, "holds a dict"),
    "nothing in it": (lambda t: {"state_dict": {}}, "holds a dict"),
    "keys that are no names": (lambda t: {**t, 5: torch.ones(1)}, "not tensors by their names"),
    "keys of bytes": (lambda t: {n.encode(): v for n, v in t.items()}, "not tensors by their names"),
    "list for a tensor": (changed(norm__bias=[0.0] * 64), "'norm.bias' is empty or no tensor of real numbers (list)"),
    "none": (changed(norm__bias=None), "'norm.bias' is empty or no tensor of real numbers (NoneType)"),
    "sparse": (lambda t: {**t, "norm.bias": t["norm.bias"].to_sparse()}, "'norm.bias' is empty or no tensor"),
    "meta": (changed(norm__bias=torch.ones(64, device="meta")), "'norm.bias' is empty or no tensor"),
    "complex": (changed(norm__bias=torch.ones(64, dtype=torch.complex64)), "'norm.bias' is empty or no tensor"),
    "integers": (changed(norm__bias=torch.ones(64, dtype=torch.int64)), "norm.bias has numbers of torch.int64"),
    "nan": (changed(norm__bias=torch.full((64,), math.nan)), "'norm.bias' is not finite"),
    "zero-size": (changed(patch_embed__proj__weight=torch.ones(0, 3, 4, 4)), "is empty or no"),
    "expanded": (expanded, "promises more numbers than it holds"),
    "expanded beyond all": (changed(norm__bias=torch.ones(1).expand(10**15)), "promises more numbers than it holds"),
    "wide": (changed(patch_embed__proj__weight=torch.ones(6400, 3, 1, 1)), "shape"),
    "no class token": (changed(pos_embed=torch.ones(1, 1, 64)), "does not describe a model"),
    "flat": (changed(pos_embed=torch.ones(17)), "pos_embed is missing or not of 3 dimensions"),
    "odd patches": (changed(pos_embed=torch.ones(1, 14, 64)), "shape"),
    "many groups": (changed(groups__9999__agent__qk__weight=torch.ones(192, 64)), "contradicts itself"),
    "too many": (changed(**{f"groups.{'9' * 5000}.agent.qk.weight": torch.ones(192, 64)}), "unexpected"),
    "deep": (
        lambda t: (
            {n: v for n, v in t.items() if "list" not in n} | {f"blocks.{i}.x": t["cls_token"] for i in range(1001)}
        ),
        "1001 blocks are more than",
    ),
    "contradiction": (changed(groups__1__block_list__0__norm1__bias=torch.ones(64)), "contradicts itself"),
    "no twin": (changed(groups__1__block_list__7__norm1__bias=torch.ones(64)), "contradicts itself"),
    "agent of two thirds": (changed(groups__1__agent__qk__weight=torch.ones(128, 64)), "expected 192 rows"),
    "no interpreters": (lambda t: {n: v for n, v in t.items() if "agent" not in n}, "no interpreters"),
    "code": (lambda t: {**t, "x": functools.partial(print)}, "cannot be read as weights alone"),
}


@pytest.mark.parametrize("name", AUTHORS)
@pytest.mark.filterwarnings("ignore:.*sparse")
def test_the_authors_layout(authors, tmp_path, name):
    spoil, message = AUTHORS[name]
    torch.save(spoil(authors), tmp_path / "ckpt.pth")
    assert message in complaint(iared2.load, tmp_path / "ckpt.pth")


@pytest.mark.parametrize(
    "name", ["sparse", "complex", "integers", "nan", "expanded beyond all", "list", "none", "code"]
)
@pytest.mark.parametrize("read", ["backbone", "timesformer"])
def test_foreign_weights(authors, tmp_path, name, read):
    torch.save(AUTHORS[name][0](authors), tmp_path / "w.pth")
    backbone = timm.create_model("deit_tiny_patch16_224", **SMALL)
    before = {n: t.clone() for n, t in backbone.state_dict().items()}
    complaint(iared2.from_timesformer if read == "timesformer" else
              functools.partial(load_backbone_weights, backbone), tmp_path / "w.pth")  # fmt: skip
    assert all(torch.equal(t, before[n]) for n, t in backbone.state_dict().items())


@pytest.mark.filterwarnings("ignore::UserWarning")
def test_quantised_weights(authors, tmp_path):
    quantised = torch.quantize_per_tensor(authors["norm.bias"], 0.1, 0, torch.qint8)
    torch.save({**authors, "norm.bias": quantised}, tmp_path / "q.pth")
    assert "'norm.bias' is empty or no tensor" in complaint(iared2.load, tmp_path / "q.pth")


def zipped(names, method=zipfile.ZIP_STORED):
    file = io.BytesIO()
    with zipfile.ZipFile(file, "w", method) as archive:
        for name, content in names.items():
            archive.writestr(name, content)
    return file.getvalue()


def header(text, data=b""):
    return struct.pack("<Q", len(text)) + text + data


TENSOR = b'{"a":{"dtype":"F32","shape":[%d],"data_offsets":[0,%d]}}'
RAW = {
    "empty": b"",
    "one byte": b"\x80",
    "text": b"this is not a checkpoint\n" * 9,
    "eight letters and a brace": b"12345678{}",
    "a page": b"<!DOCTYPE html><html>404</html>",
    "a pointer": b"version https://git-lfs.github.com/spec/v1\noid sha256:0\nsize 5\n",
    "zeros": bytes(4096),
    "a pickle": pickle.dumps({"a": [1, 2]}),
    "a pickle of code": pickle.dumps(functools.partial(os.system, "touch hacked")),
    "a pickle that does not end": pickle.dumps({"a": "b" * 100})[:50],
    "a zip": zipped({"a.txt": b"hello"}),
    "a compressed zip": zipped({"archive/data.pkl": bytes(10**6)}, zipfile.ZIP_DEFLATED),
    "an archive of torch without tensors": zipped({"a/data.pkl": pickle.dumps({}), "a/version": b"3\n"}),
    "no header": header(b""),
    "a huge header": struct.pack("<Q", 2**62) + b"{}",
    "a header of 90 MB that is not there": struct.pack("<Q", 90 * 2**20) + b"{}",
    "terabytes": header(TENSOR % (10**12, 4 * 10**12)),
    "beyond 64 bits": header(TENSOR % (2**64, 2**66)),
    "a negative size": header(TENSOR % (-5, -20)),
    "less than the header says": header(TENSOR % (100, 400), bytes(100)),
    "more than the header says": header(TENSOR % (1, 4), bytes(100)),
    "another kind of number": header(b'{"a":{"dtype":"X9","shape":[1],"data_offsets":[0,4]}}', bytes(4)),
    "nested without end": header(b'{"a":' * 10**5),
    "tensors of another program": header(TENSOR % (1, 4), bytes(4)),
}


@pytest.mark.parametrize("name", RAW)
@pytest.mark.parametrize("suffix", ["pth", "safetensors"])
def test_no_checkpoint_at_all(tmp_path, monkeypatch, name, suffix):
    monkeypatch.chdir(tmp_path)
    path = tmp_path / f"m.{suffix}"
    path.write_bytes(RAW[name])
    complaint(iared2.load, path)
    backbone = timm.create_model("deit_tiny_patch16_224", **SMALL)
    complaint(functools.partial(load_backbone_weights, backbone), path)
    assert os.listdir(tmp_path) == [path.name]


@pytest.mark.parametrize("kind", ["ours", "authors", "legacy"])
@pytest.mark.parametrize("seed", range(8))
def test_damage_on_the_way(ours, authors, tmp_path, kind, seed):
    """Cut short, or with some bytes changed: refused, or a weight is another number."""
    draw, path = random.Random(seed), tmp_path / "m"
    if kind == "ours":
        saved.write(path, *ours)
    else:
        torch.save(authors, path, _use_new_zipfile_serialization=kind == "authors")
    content = bytearray(path.read_bytes())
    if seed % 2:
        del content[draw.randrange(len(content)) :]
    else:
        for _ in range(20):
            content[draw.randrange(min(len(content), 5000))] = draw.randrange(256)
    path.write_bytes(content)
    try:
        iared2.load(path)
    except InputError:
        complaint(iared2.load, path)


def test_places_that_are_no_files(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    os.mkfifo("pipe")
    os.symlink("nowhere", "dangling")
    os.symlink("round", "round")
    os.mkdir("folder")
    for place in ("pipe", "dangling", "round", "folder", "no/such/file", "pipe/x", "x" * 300, "", "/dev/zero"):
        with pytest.raises(InputError, match=r"no checkpoint|cannot be read"):
            iared2.load(place)
        with pytest.raises(InputError, match=r"no checkpoint|cannot be read"):
            load_backbone_weights(timm.create_model("deit_tiny_patch16_224", **SMALL), place)


def test_one_line_on_the_command_line(tmp_path, capsys):
    (tmp_path / "m.pth").write_bytes(RAW["a pickle of code"])
    for command in (
        ["export", "x.onnx", "--adaptive"],
        ["evaluate", "nowhere"],
        ["interpret", "-p", "x.jpg", "--json"],
    ):
        assert main([*command, "-c", str(tmp_path / "m.pth")]) == 1
        error = capsys.readouterr().err
        assert error.startswith("error: ")
        assert error.count("\n") == 1


@pytest.mark.parametrize(
    "wrong",
    [
        {"patch_size": 0},
        {"norm_layer": "nonsense"},
        {"act_layer": "nonsense"},
        {"nonsense": 1},
        {"depth": "3"},
        {"mlp_ratio": 1e300},
        {"num_heads": 0},
        {"checkpoint_path": "/no/such/file"},
        {"img_size": (4, 4, 4)},
    ],
    ids=str,
)
def test_arguments_that_timm_refuses(wrong):
    with pytest.raises(InputError, match="timm cannot build deit_tiny_patch16_224") as caught:
        iared2.from_timm("deit_tiny_patch16_224", **{**SMALL, **wrong})
    assert "\n" not in str(caught.value)
