"""Models of Hugging Face and of TimeSformer's repository against ours."""

from __future__ import annotations

import functools
import types

import pytest
import torch

import iared2
from iared2.errors import InputError

transformers = pytest.importorskip("transformers")

TINY = {
    "hidden_size": 48,
    "num_hidden_layers": 4,
    "num_attention_heads": 3,
    "intermediate_size": 100,
    "patch_size": 8,
    "num_labels": 7,
    "initializer_range": 0.2,  # so that logits are not all near 0
}


def timesformer(**kwargs):
    torch.manual_seed(0)
    config = {"num_frames": 4, "image_size": 32, "attention_type": "joint_space_time", **TINY, **kwargs}
    return sharp(transformers.TimesformerForVideoClassification(transformers.TimesformerConfig(**config)))


def videomae(**kwargs):
    torch.manual_seed(0)
    config = {"num_frames": 4, "image_size": 32, **TINY, **kwargs}
    return sharp(transformers.VideoMAEForVideoClassification(transformers.VideoMAEConfig(**config)))


def sharp(model):
    """Nothing is 0 or 1 as at birth: else a tensor that was left out would not be missed."""
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if name.endswith(("bias", "embeddings", "norm.weight")):
                parameter += 0.3 * torch.randn(parameter.shape, generator=generator)
    return model.eval()


def assert_equal(theirs, ours):
    ours.threshold = 0
    clips = torch.randn(2, *ours.pretrained_cfg["input_size"], generator=torch.Generator().manual_seed(1))
    with torch.no_grad():
        logits = theirs(clips.transpose(1, 2)).logits
        assert logits.std() > 0.1  # of 4 to 14 numbers
        torch.testing.assert_close(ours(clips), logits, rtol=0, atol=1e-4)
        torch.testing.assert_close(ours.backbone(clips), logits, rtol=0, atol=1e-4)


@pytest.mark.parametrize(
    "kwargs",
    [
        {},
        {"num_frames": 6},
        {"num_frames": 1},
        {"qkv_bias": False},
        {"layer_norm_eps": 1e-2, "num_labels": 2, "num_channels": 1},
    ],
    ids=str,
)
def test_timesformer_logits(kwargs):
    theirs = timesformer(**kwargs)
    assert_equal(theirs, iared2.from_timesformer(theirs))


@pytest.mark.parametrize(
    "kwargs",
    [
        {},
        {"num_frames": 6},
        {"image_size": [48, 32]},
        {"tubelet_size": 1},
        {"qv_bias": False},
        {"layer_norm_eps": 1e-2},
    ],
    ids=str,
)
def test_videomae_logits(kwargs):
    theirs = videomae(**kwargs)
    ours = iared2.from_videomae(theirs)
    assert_equal(theirs, ours)
    assert torch.equal(ours.backbone.pos_embed, theirs.videomae.embeddings.position_embeddings)


@pytest.mark.parametrize("bias", [True, False])
def test_videomae_before_transformers_5(bias):
    """The biases were parameters of the attention then, not of its layers, and the setting had another name."""

    class VideoMAEForVideoClassification(torch.nn.Module):
        def __init__(self, theirs):
            super().__init__()
            self.classifier, self.fc_norm, self.theirs = theirs.classifier, theirs.fc_norm, theirs
            self.config = types.SimpleNamespace(**theirs.config.to_dict(), num_labels=7, qkv_bias=bias)
            del self.config.qv_bias

        def state_dict(self):
            names = {".query.bias": ".q_bias", ".value.bias": ".v_bias"}
            state = self.theirs.state_dict()
            return {functools.reduce(lambda n, old: n.replace(old, names[old]), names, n): t for n, t in state.items()}

    theirs = videomae(qkv_bias=bias)
    old = VideoMAEForVideoClassification(theirs)
    assert any(name.endswith(".q_bias") for name in old.state_dict()) == bias
    assert_equal(theirs, iared2.from_videomae(old))


@pytest.mark.parametrize(("make", "convert"), [(timesformer, "from_timesformer"), (videomae, "from_videomae")])
def test_nothing_is_lost(make, convert, tmp_path):
    theirs = make(id2label={i: f"action {i}" for i in range(7)})
    ours = getattr(iared2, convert)(theirs, groups=2, drop_path_rate=0.1)
    assert not ours.training
    assert ours.num_groups == 2
    assert ours.class_names == tuple(f"action {i}" for i in range(7))
    own = {tensor.numpy().tobytes() for tensor in ours.backbone.state_dict().values()}
    qkv = [name for name in ours.backbone.state_dict() if ".qkv." in name]
    for name, tensor in theirs.state_dict().items():
        if not any(part in name for part in (".query.", ".key.", ".value.")):
            assert tensor.numpy().tobytes() in own, name
    assert len(qkv) == 2 * 4
    ours.save(tmp_path / "m.safetensors")
    twin = iared2.load(tmp_path / "m.safetensors")
    assert twin.class_names == ours.class_names
    assert_equal(theirs, twin)


def test_names_and_colours():
    ours = iared2.from_timesformer(timesformer())
    assert ours.class_names is None, "LABEL_0 is no name"
    assert ours.pretrained_cfg["mean"] == (0.45,) * 3
    assert ours.pretrained_cfg["std"] == (0.225,) * 3
    assert ours.pretrained_cfg["input_size"] == (3, 4, 32, 32)
    assert iared2.from_videomae(videomae()).pretrained_cfg["mean"] == (0.485, 0.456, 0.406)


def original_layout(theirs):
    """The repository's names for the same tensors (vit.py of facebookresearch/TimeSformer), as it saves them."""
    names = {
        "timesformer.embeddings.cls_token": "cls_token",
        "timesformer.embeddings.position_embeddings": "pos_embed",
        "timesformer.embeddings.time_embeddings": "time_embed",
        "timesformer.embeddings.patch_embeddings.projection": "patch_embed.proj",
        "timesformer.layernorm": "norm",
        "classifier": "head",
    }
    parts = {
        "layernorm_before": "norm1",
        "attention.attention.qkv": "attn.qkv",
        "attention.output.dense": "attn.proj",
        "layernorm_after": "norm2",
        "intermediate.dense": "mlp.fc1",
        "output.dense": "mlp.fc2",
    }
    for i in range(4):
        names |= {f"timesformer.encoder.layer.{i}.{theirs}": f"blocks.{i}.{own}" for theirs, own in parts.items()}
    state = {}
    for name, tensor in theirs.state_dict().items():
        stem, _, kind = name.rpartition(".")
        state["model." + (names[name] if name in names else f"{names[stem]}.{kind}")] = tensor
    return {"epoch": 15, "model_state": state, "optimizer_state": {"state": {}}, "cfg": "TRAIN: ..."}


def test_original_checkpoint(tmp_path):
    theirs = timesformer(intermediate_size=192)
    path = tmp_path / "TimeSformer_jointST.pyth"
    torch.save(original_layout(theirs), path)
    for source in (path, str(path)):
        ours = iared2.from_timesformer(source, num_heads=3, groups=2)
        assert ours.grid_size == (4, 4, 4)
        assert_equal(theirs, ours)
    prefixed = {f"module.{name}": tensor for name, tensor in original_layout(theirs)["model_state"].items()}
    torch.save(prefixed, path)
    assert_equal(theirs, iared2.from_timesformer(path, num_heads=3))


@pytest.mark.parametrize(
    ("edit", "message"),
    [
        (
            lambda s: s.update({"model.blocks.0.temporal_attn.qkv.weight": torch.zeros(1)}),
            "divided space-time attention",
        ),
        (lambda s: s.pop("model.time_embed"), "time_embed is missing"),
        (lambda s: s.pop("model.norm.bias"), r"lacks the tensor norm\.bias"),
        (lambda s: s.pop("model.patch_embed.proj.weight"), r"patch_embed\.proj\.weight is missing"),
        (lambda s: s.update({"model.head.bias": torch.zeros(3)}), r"head\.bias has shape"),
    ],
)
def test_damaged_original_checkpoints_are_one_line(tmp_path, edit, message):
    contents = original_layout(timesformer(intermediate_size=192))
    edit(contents["model_state"])
    torch.save(contents, tmp_path / "c.pyth")
    with pytest.raises(InputError, match=message) as error:
        iared2.from_timesformer(tmp_path / "c.pyth", num_heads=3)
    assert str(tmp_path / "c.pyth") in str(error.value)
    assert "\n" not in str(error.value)


def test_fresh():
    ours = iared2.from_timesformer(
        frames=2, size=(32, 16), patch_size=8, embed_dim=48, depth=3, num_heads=3, num_classes=5, groups=3
    )
    assert ours.grid_size == (2, 4, 2)
    assert ours(torch.zeros(1, 3, 2, 32, 16)).shape == (1, 5)
    with torch.device("meta"):
        ours = iared2.from_timesformer()
    assert ours.pretrained_cfg["input_size"] == (3, 8, 224, 224)
    assert (ours.num_classes, len(ours.backbone.blocks), ours.num_features) == (400, 12, 768)


def test_sizes_come_from_the_model():
    assert iared2.from_timesformer(timesformer(image_size=[48, 32])).grid_size == (4, 6, 4)  # theirs cannot run it
    theirs = timesformer()
    assert iared2.from_timesformer(theirs, frames=4, size=32).grid_size == (4, 4, 4)
    for asked in ({"frames": 8}, {"size": 64}):
        with pytest.raises(InputError, match="takes clips of 4 frames of 32 × 32 pixels"):
            iared2.from_timesformer(theirs, **asked)


@pytest.mark.parametrize(
    ("convert", "message"),
    [
        (lambda: iared2.from_timesformer(timesformer(attention_type="divided_space_time")), "divided_space_time"),
        (lambda: iared2.from_timesformer(timesformer(attention_type="space_only")), "space_only"),
        (lambda: iared2.from_timesformer(videomae()), "takes a model of transformers' timesformer"),
        (lambda: iared2.from_timesformer(timesformer().timesformer), "with a classifier"),
        (lambda: iared2.from_timesformer("/no/such/file.pyth"), "there is no checkpoint"),
        (lambda: iared2.from_timesformer(timesformer(hidden_act="relu")), "relu"),
        (lambda: iared2.from_timesformer(timesformer(), groups=9), "groups=9"),
        (lambda: iared2.from_timesformer(timesformer(), embed_dim=96), "has shape"),
        (lambda: iared2.from_videomae(timesformer()), "takes a model of transformers' videomae"),
        (lambda: iared2.from_videomae(None), "not a NoneType"),
        (lambda: iared2.from_videomae(videomae(use_mean_pooling=False)), "use_mean_pooling=False"),
        (lambda: iared2.from_videomae(videomae(num_frames=5)), "5 frames cannot be cut"),
    ],
)
def test_wrong_models_are_one_line(convert, message):
    with pytest.raises(InputError, match=message) as error:
        convert()
    assert "\n" not in str(error.value)


@pytest.mark.parametrize("make", [timesformer, videomae])
def test_interpreters_that_start_as_the_attention_take_it_from_the_weights(make):
    convert = {timesformer: iared2.from_timesformer, videomae: iared2.from_videomae}[make]
    model = convert(make(), groups=2, interpreter="attention")
    block = model.backbone.blocks[2]
    with torch.no_grad():
        query = block.attn.qkv.weight[:48] * block.norm1.weight
        torch.testing.assert_close(model.interpreters[1].query.weight, query, rtol=1e-5, atol=1e-6)
