from __future__ import annotations

import functools
import os
import re

import pytest
import safetensors.torch
import timm
import torch

import iared2
from iared2.cli import main
from iared2.errors import InputError
from iared2.model import file as saved
from iared2.pretrained.checkpoint import load_backbone_weights

SMALL = {"img_size": 16, "patch_size": 4, "embed_dim": 32, "depth": 3, "num_heads": 2, "num_classes": 5}


@pytest.fixture
def model():
    torch.manual_seed(0)
    model = iared2.from_timm("deit_tiny_patch16_224", **SMALL).eval()
    model.threshold = [0.5, 0.49, 0.51]
    model.class_names = tuple("abcde")
    model.backbone.pretrained_cfg = {**model.backbone.pretrained_cfg, "mean": (0.1, 0.2, 0.3)}
    return model


@pytest.fixture
def images():
    return torch.randn(2, 3, 16, 16, generator=torch.Generator().manual_seed(0))


def test_round_trip(model, images, tmp_path):
    path = tmp_path / "model.safetensors"
    model.save(path)
    for source in (path, str(path), tmp_path):
        twin = iared2.load(source)
        assert torch.equal(twin(images), model(images))
        assert twin.threshold == (0.5, 0.49, 0.51)
        assert twin.class_names == tuple("abcde")
        assert tuple(twin.pretrained_cfg["mean"]) == (0.1, 0.2, 0.3)
        assert twin.pretrained_cfg["input_size"] == (3, 16, 16)
        assert not twin.training
    assert [p.name for p in tmp_path.iterdir()] == ["model.safetensors"], "no temporary file is left"
    assert path.stat().st_mode & 0o444 == 0o444 & ~umask(), "others may read it as they may read any new file"


def test_round_trip_after_changes_and_from_a_module(images, tmp_path):
    backbone = timm.create_model("vit_tiny_patch16_224", **SMALL, qk_norm=True)
    if not hasattr(backbone, "_model_args"):
        pytest.skip("timm before 1.0.31 does not remember what a module was made with; save() refuses it, saying so")
    model = iared2.from_timm(backbone, groups=2).eval()
    for pool in ("token", "avg"):
        model.reset_classifier(3, pool)
        model.save(tmp_path / "m")
        assert torch.equal(iared2.load(tmp_path / "m")(images), model(images))


def test_save_refuses_what_load_could_not_rebuild(tmp_path):
    nameless = timm.models.VisionTransformer(**SMALL)
    with pytest.raises(InputError, match="no timm name"):
        iared2.from_timm(nameless).save(tmp_path / "m")
    heads = timm.create_model("vit_tiny_patch16_224", **SMALL)
    for block in heads.blocks:
        block.attn.num_heads, block.attn.head_dim = 4, 8
    with pytest.raises(InputError, match="is not timm's"):
        iared2.from_timm(heads).save(tmp_path / "m")
    odd = timm.create_model("vit_tiny_patch16_224", **SMALL)
    odd.blocks[0].mlp.act = torch.nn.ReLU()
    with pytest.raises(InputError, match="is not timm's"):
        iared2.from_timm(odd).save(tmp_path / "m")
    assert not list(tmp_path.iterdir())


def test_unwritable_path(model, tmp_path):
    with pytest.raises(InputError, match="cannot write"):
        model.save(tmp_path / "no" / "such" / "folder" / "m.safetensors")


def umask():
    os.umask(mask := os.umask(0))
    return mask


def edited(path, edit):
    with safetensors.safe_open(path, "pt") as file:
        tensors, metadata = {k: file.get_tensor(k) for k in file.keys()}, file.metadata()  # noqa: SIM118
    edit(tensors, metadata)
    safetensors.torch.save_file(tensors, path, metadata)


@pytest.mark.parametrize(
    ("edit", "message"),
    [
        (lambda t, m: t.pop("interpreters.1.key.bias"), "lacks the tensor interpreters.1.key.bias"),
        (lambda t, m: t.update(extra=torch.zeros(1)), "has unexpected the tensor extra"),
        (
            lambda t, m: t.update({"backbone.norm.bias": torch.zeros(7)}),
            r"norm.bias has shape \(7,\), expected \(32,\)",
        ),
        (lambda t, m: m.pop("iared2"), "not one that iared2 saved"),
        (lambda t, m: m.update(iared2="{}"), "does not describe a model"),
        (lambda t, m: m.update(iared2=m["iared2"].replace("deit_tiny", "deit_tinny")), "does not describe a model"),
        (lambda t, m: m.update(iared2=m["iared2"].replace('"num_heads": 2', '"num_heads": 5')), "does not describe"),
        (lambda t, m: m.update(iared2=m["iared2"].replace("[0.5, 0.49", "[0.49")), "does not describe a model"),
        (lambda t, m: m.update(iared2=m["iared2"].replace('"a", ', "")), "4 class names for 5 classes"),
    ],
)
def test_damaged_checkpoints_are_one_clear_line(model, tmp_path, edit, message):
    path = tmp_path / "model.safetensors"
    model.save(path)
    edited(path, edit)
    with pytest.raises(InputError, match=message) as error:
        iared2.load(path)
    assert "\n" not in str(error.value)
    assert str(path) in str(error.value)


def test_files_that_are_no_checkpoint(tmp_path):
    with pytest.raises(InputError, match="there is no checkpoint"):
        iared2.load(tmp_path / "nowhere")
    for name in ("text.safetensors", "text.pth"):
        path = tmp_path / name
        path.write_text("this is not a checkpoint")
        with pytest.raises(InputError, match=name):
            iared2.load(path)
    torch.save({"a": functools.partial(print)}, tmp_path / "code.pth")  # code in a pickle is never run
    with pytest.raises(InputError, match=r"code\.pth"):
        iared2.load(tmp_path / "code.pth")


def authors_state_dict(model):
    """The layout of the authors' tool: blocks twice, interpreters fused to 3C."""
    tensors = dict(model.backbone.state_dict())
    for g, blocks in enumerate(model.groups):
        for b, n in enumerate(blocks):
            block = {k: v for k, v in tensors.items() if k.startswith(f"blocks.{n}.")}
            tensors |= {k.replace(f"blocks.{n}.", f"groups.{g}.block_list.{b}."): v for k, v in block.items()}
    for g, interpreter in enumerate(model.interpreters):
        for part in ("weight", "bias"):
            query, key = getattr(interpreter.query, part), getattr(interpreter.key, part)
            tensors[f"groups.{g}.agent.qk.{part}"] = torch.cat([query, key, torch.randn_like(key)]).detach()
    return tensors


def test_authors_layout(tmp_path):
    torch.manual_seed(0)
    model = iared2.from_timm(
        "deit_small_patch16_224", img_size=32, embed_dim=128, depth=6, num_heads=2, num_classes=9
    ).eval()
    tensors = authors_state_dict(model)
    torch.save(tensors, tmp_path / "ckpt.pth")
    images = torch.randn(2, 3, 32, 32)
    loaded = iared2.load(tmp_path / "ckpt.pth")
    a, b = loaded.trace(images), model.trace(images)
    assert torch.equal(a.logits, b.logits)
    assert torch.equal(a.scores, b.scores)

    torch.save({**tensors, "groups.1.block_list.0.norm1.bias": torch.ones(128)}, tmp_path / "odd.pth")
    with pytest.raises(InputError, match="contradicts itself"):
        iared2.load(tmp_path / "odd.pth")
    for name, tensor in (
        ("groups.1.agent.qk.bias", torch.zeros(())),
        ("groups.1.agent.qk.weight", torch.zeros(2, 128)),
        ("pos_embed", torch.zeros(3)),
        ("patch_embed.proj.weight", torch.zeros(3, 3, 3)),
        ("head.weight", torch.zeros(())),
        ("groups.foo", torch.zeros(1)),
    ):
        torch.save({**tensors, name: tensor}, tmp_path / "wrong.pth")
        with pytest.raises(InputError, match=name):
            iared2.load(tmp_path / "wrong.pth")
    tensors.pop("groups.2.agent.qk.bias")
    torch.save(tensors, tmp_path / "missing.pth")
    with pytest.raises(InputError, match=r"lacks the tensor interpreters.2"):
        iared2.load(tmp_path / "missing.pth")
    torch.save(model.backbone.state_dict(), tmp_path / "plain.pth")
    with pytest.raises(InputError, match="no interpreters"):
        iared2.load(tmp_path / "plain.pth")


def test_backbone_weights_of_other_classes_leave_the_head_fresh(model, tmp_path):
    other = timm.create_model("deit_tiny_patch16_224", **{**SMALL, "num_classes": 11})
    torch.save({"model": other.state_dict()}, tmp_path / "w.pth")
    head = model.backbone.head.weight.clone()
    load_backbone_weights(model.backbone, tmp_path / "w.pth")
    assert torch.equal(model.backbone.head.weight, head)
    assert torch.equal(model.backbone.blocks[0].attn.qkv.weight, other.blocks[0].attn.qkv.weight)
    headless = {k: v for k, v in other.state_dict().items() if not k.startswith("head")}
    torch.save(headless, tmp_path / "headless.pth")
    load_backbone_weights(model.backbone, tmp_path / "headless.pth")
    assert torch.equal(model.backbone.head.weight, head)


def test_the_backbone_of_a_model_of_ours(model, images, tmp_path):
    model.save(tmp_path / "model.safetensors")
    torch.manual_seed(1)
    other = timm.create_model("deit_tiny_patch16_224", **SMALL).eval()
    load_backbone_weights(other, tmp_path / "model.safetensors")
    model.threshold = 0.0
    torch.testing.assert_close(other(images), model(images))


@pytest.mark.parametrize(
    "name", ["deit_tiny_patch16_224", "deit_tiny_distilled_patch16_224", "vit_small_patch14_reg4_dinov2"]
)
def test_position_embeddings_of_another_grid_are_resampled(name, tmp_path):
    """As timm does it when a model of another size is made; the head, which is of other classes, stays fresh."""
    one, two = (timm.create_model(name, **{**SMALL, "img_size": size, "num_classes": k}).eval()
                for size, k in ((16, 5), ((24, 16), 3)))  # fmt: skip
    with torch.no_grad():
        one.pos_embed.normal_()
    torch.save(one.state_dict(), tmp_path / "w.pth")
    head = {n: p.clone() for n, p in two.state_dict().items() if n.startswith("head")}
    load_backbone_weights(two, tmp_path / "w.pth")
    assert two.pos_embed.shape == (1, two.pos_embed.shape[1], 32)
    assert all(torch.equal(two.state_dict()[n], p) for n, p in head.items())
    assert torch.equal(two.blocks[2].mlp.fc1.weight, one.blocks[2].mlp.fc1.weight)
    want = timm.models.vision_transformer.checkpoint_filter_fn(dict(one.state_dict()), two)["pos_embed"]
    assert torch.equal(two.pos_embed, want)
    prefix = two.pos_embed.shape[1] - 24
    assert torch.equal(two.pos_embed[:, :prefix], one.pos_embed[:, :prefix])
    assert iared2.from_timm(two)(torch.randn(1, 3, 24, 16)).shape == (1, 3)


def rename(tensors, *pairs):
    for old, new in pairs:
        tensors = {re.sub(old, new, name): tensor for name, tensor in tensors.items()}
    return tensors


OPENCLIP = [  # timm's names -> OpenCLIP's
    (r"^blocks\.", "transformer.resblocks."), (r"^patch_embed\.proj", "conv1"), (r"^pos_embed", "positional_embedding"),
    (r"^cls_token", "class_embedding"), (r"^norm_pre", "ln_pre"), (r"^norm\.", "ln_post."), (r"\.norm", ".ln_"),
    (r"attn\.qkv\.", "attn.in_proj_"), (r"attn\.proj", "attn.out_proj"), (r"fc1", "c_fc"), (r"fc2", "c_proj"),
    (r"^", "visual."),
]  # fmt: skip
DINOV3 = [(r"gamma_(\d)", r"ls\1.gamma"), (r"^reg_token", "storage_tokens")]


def as_openclip(tensors):
    tensors = {**tensors, "cls_token": tensors["cls_token"][0, 0], "pos_embed": tensors["pos_embed"][0]}
    tensors["proj"] = tensors.pop("head.weight").T
    del tensors["head.bias"]
    text = {"logit_scale": torch.ones(()), "transformer.resblocks.0.ln_1.weight": torch.ones(32)}
    return {**rename(tensors, *OPENCLIP), **text}


LAYOUTS = {
    "vit_base_patch16_clip_224": as_openclip,
    "vit_small_patch14_dinov2": lambda t: {**t, "mask_token": torch.zeros(1, 32)},
    "deit3_small_patch16_224": lambda t: {"model": rename(t, (r"ls(\d)\.gamma", r"gamma_\1"))},
    "vit_small_patch16_dinov3": lambda t: {**rename(t, *DINOV3), "mask_token": torch.zeros(1, 32),
                                           "rope_embed.periods": torch.ones(4)},
    "eva02_base_patch14_448": lambda t: {"module": rename(t, (r"attn\.norm", "attn.inner_attn_ln"),
                                                          (r"mlp\.norm", "mlp.ffn_ln"), (r"fc1_g", "w1"),
                                                          (r"fc1_x", "w2"), (r"mlp\.fc2", "mlp.w3"),
                                                          (r"([qv])_proj\.bias", r"\1_bias"))},
    "vit_pe_core_small_patch16_384": lambda t: t,
}  # fmt: skip
"""Names of timm, and what makes the layout of the original program out of timm's."""


@pytest.mark.parametrize("name", LAYOUTS)
def test_layouts_of_other_programs(name, tmp_path, capsys):
    """They were refused: 'it lacks the tensor blocks.0.attn.proj.bias and 40 more'."""
    one, two = (timm.create_model(name, **{**SMALL, "num_classes": 5}).eval() for _ in range(2))
    with torch.no_grad():
        for parameter in one.parameters():
            parameter.normal_(std=0.2)
        if name == "vit_base_patch16_clip_224":
            one.head.bias.zero_()  # there, it has none
    torch.save(LAYOUTS[name](one.state_dict()), tmp_path / "w.pth")
    load_backbone_weights(two, tmp_path / "w.pth")
    images = torch.randn(2, 3, 16, 16)
    torch.testing.assert_close(two(images), one(images))
    assert capsys.readouterr().out == ""


@pytest.mark.parametrize("name", ["vit_small_patch14_dinov2", "eva02_tiny_patch14_224"])
def test_patches_of_another_size_and_grey_images(name, tmp_path):
    """As timm does it when it loads its own weights; they were refused for their shapes."""
    one = timm.create_model(name, **{**SMALL, "patch_size": 8, "img_size": 32})
    two = timm.create_model(name, **{**SMALL, "in_chans": 1})
    torch.save(one.state_dict(), tmp_path / "w.pth")
    load_backbone_weights(two, tmp_path / "w.pth")
    weight = timm.layers.resample_patch_embed(one.patch_embed.proj.weight, [4, 4])
    torch.testing.assert_close(two.patch_embed.proj.weight, weight.sum(1, keepdim=True))


def test_patches_beyond_all_bounds_are_one_line(tmp_path):
    """To resize them would take memory by the square of their size."""
    backbone = timm.create_model("deit_tiny_patch16_224", **SMALL)
    tensors = {**backbone.state_dict(), "patch_embed.proj.weight": torch.zeros(32, 3, 200, 1)}
    torch.save(tensors, tmp_path / "w.pth")
    with pytest.raises(InputError, match=r"patch_embed.proj.weight has shape \(32, 3, 200, 1\)"):
        load_backbone_weights(backbone, tmp_path / "w.pth")


def test_position_embeddings_that_cannot_be_resampled_are_one_clear_line(tmp_path):
    oblong = timm.create_model("deit_tiny_patch16_224", **{**SMALL, "img_size": (24, 16)})
    torch.save(oblong.state_dict(), tmp_path / "w.pth")
    with pytest.raises(InputError, match=r"pos_embed has shape \(1, 25, 32\), expected \(1, 17, 32\)"):
        load_backbone_weights(timm.create_model("deit_tiny_patch16_224", **SMALL), tmp_path / "w.pth")


def test_model_in_the_box_loads():
    model = iared2.load()
    assert len(model.class_names) == model.num_classes
    size = model.pretrained_cfg["input_size"]
    out = model.trace(torch.randn(2, *size))
    assert out.logits.isfinite().all()
    assert out.unsure.all()  # of noise; each pass may cost all that a dense one does, and the interpreters
    assert (out.macs <= model.dense_macs * (1 + model.scale**2) * 1.01).all()


@pytest.mark.parametrize("kind", [{}, {"half": True}, {"int8": True}])
def test_loading_draws_no_weights_and_holds_no_file(model, tmp_path, kind):
    """A file that has every weight is not preceded by random ones, which took most of the time of loading."""
    model.save(tmp_path / "m", **kind)
    before = torch.get_rng_state()
    loaded = iared2.load(tmp_path / "m")
    assert torch.equal(torch.get_rng_state(), before)
    assert {p.dtype for p in loaded.parameters()} == {torch.float32}
    assert all(p.requires_grad and p.is_leaf for p in loaded.parameters())
    weights = {name: tensor.clone() for name, tensor in loaded.state_dict().items()}
    with open(tmp_path / "m", "r+b") as file:
        file.seek(-2000, 2)
        file.write(b"\7" * 2000)
    assert all(torch.equal(tensor, weights[name]) for name, tensor in loaded.state_dict().items())


@pytest.mark.parametrize("name", ["m.pth", "m.bin", "m", "box", "m.safetensors.bak"])
def test_any_name_will_do(model, images, tmp_path, name):
    model.save(tmp_path / name)
    assert torch.equal(iared2.load(tmp_path / name)(images), model(images))


def test_box_is_the_model_in_the_box_and_no_file(model, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    model.save("box")
    boxed = iared2.load("box")
    assert boxed.class_names == iared2.load().class_names
    assert iared2.load("./box").class_names == tuple("abcde")
    assert main(["export", "m.pt2", "--num-keep", *["9"] * (boxed.num_groups + 1)]) == 1
    assert f"give {boxed.num_groups} numbers" in capsys.readouterr().err, "as many as the one in the box has groups"


def test_weights_of_a_checkpoint_are_saved_and_not_where_they_lay(images, tmp_path):
    torch.save(timm.create_model("deit_tiny_patch16_224", **SMALL).state_dict(), tmp_path / "w.pth")
    loader = {"checkpoint_path": str(tmp_path / "w.pth"), "cache_dir": str(tmp_path), "scriptable": False}
    model = iared2.from_timm("deit_tiny_patch16_224", **SMALL, **loader).eval()
    model.save(tmp_path / "m")
    (tmp_path / "w.pth").unlink()
    assert torch.equal(iared2.load(tmp_path / "m")(images), model(images))
    assert str(tmp_path).encode() not in (tmp_path / "m").read_bytes()


ARGUMENTS = {
    "rectangle": {"img_size": (24, 16), "drop_path_rate": 0.1, "drop_rate": 0.1, "pos_drop_rate": 0.1},
    "one number": {"img_size": 24, "patch_size": (8, 4), "mlp_ratio": 2.5},
    "grey": {"in_chans": 1, "qk_norm": True, "init_values": 1e-5, "qkv_bias": False, "proj_bias": False},
    "registers": {"reg_tokens": 4, "no_embed_class": True, "dynamic_img_size": True, "weight_init": "jax"},
    "pooled": {"class_token": False, "global_pool": "avg", "fc_norm": False, "final_norm": True},
    "names of layers": {"act_layer": "silu", "norm_layer": "rmsnorm", "embed_norm_layer": "layernorm"},
    "no classes": {"num_classes": 0, "fc_norm": None, "pre_norm": True, "scale_mlp_norm": True},
    "loader": {"pretrained_cfg": {"mean": [0.1, 0.2, 0.3], "std": [1.0, 2.0, 3.0]}, "dtype": torch.float32},
}


@pytest.mark.parametrize("name", ARGUMENTS)
def test_whatever_timm_takes_comes_back(tmp_path, name):
    model = iared2.from_timm("vit_tiny_patch16_224", **{**SMALL, **ARGUMENTS[name]}).eval()
    model.save(tmp_path / "m")
    twin, x = iared2.load(tmp_path / "m"), torch.randn(2, *model.pretrained_cfg["input_size"])
    assert torch.equal(twin(x), model(x))
    assert str(twin) == str(model)
    assert list(twin.pretrained_cfg["mean"]) == list(model.pretrained_cfg["mean"])


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda m: m.backbone.norm.bias.data.fill_(float("nan")), "backbone.norm.bias' is not finite"),
        (lambda m: setattr(m, "class_names", ("a",)), "1 class names for 5 classes"),
        (lambda m: m.backbone.pretrained_cfg.update(mean=torch.ones(3)), "pretrained_cfg.mean"),
        (lambda m: m.model_args.update(norm_layer=torch.nn.LayerNorm), "norm_layer"),
    ],
)
def test_what_could_not_be_loaded_is_not_saved(model, tmp_path, change, message):
    model.save(tmp_path / "m")
    before = (tmp_path / "m").read_bytes()
    change(model)
    with pytest.raises(InputError, match=message) as error:
        model.save(tmp_path / "m")
    assert "\n" not in str(error.value)
    assert (tmp_path / "m").read_bytes() == before


@pytest.mark.parametrize(
    ("wrong", "message"),
    [
        ({"rope_type": "base"}, "its rotary embedding is a RotaryEmbedding"),
        ({"rope_type": "nonsense"}, "Unknown RoPE type"),
        ({"rope_temperature": "hot"}, "model_args.rope_temperature should not be 'hot'"),
        ({"num_kv_heads": [2]}, "does not describe a model"),
        ({"swiglu_mlp": True, "swiglu_align_to": 1 << 24}, "does not fit"),
        ({"patch_drop_rate": 0.5}, "patch_drop_rate"),
        ({"norm_layer": "rmsnorm"}, "model_args.norm_layer should not be"),
        ({"img_size": [1 << 20, 1 << 20], "dynamic_img_size": False}, "too large|does not describe"),
        ({"reg_tokens": 4}, "model_args.reg_tokens should not be 4"),  # an argument of the other class
    ],
    ids=lambda value: str(value)[:40],
)
def test_a_file_of_a_rotary_model_is_not_trusted(tmp_path, wrong, message):
    name = "vit_small_patch16_dinov3"
    iared2.from_timm(name, **SMALL).save(tmp_path / "m")
    tensors, config = saved.read(tmp_path / "m")
    assert iared2.load(tmp_path / "m").backbone.rope is not None
    config["model_args"] |= wrong
    saved.write(tmp_path / "m", tensors, config)
    with pytest.raises(InputError, match=message) as error:
        iared2.load(tmp_path / "m")
    assert "\n" not in str(error.value)
