"""`model.set_text_features`: zero-shot classes, which everything that knows classes knows."""

from __future__ import annotations

import copy
import json

import numpy as np
import pytest
import timm
import torch
import torch.nn.functional as F
from PIL import Image
from safetensors import safe_open
from safetensors.torch import save_file
from tiny import sharp_images, sharp_model
from torch.utils.flop_counter import FlopCounterMode

import iared2
from iared2 import InputError
from iared2.cli import main
from iared2.export.static import FixedCount
from iared2.model.decide import keep_all

SIZE = {"img_size": (48, 32), "patch_size": 8, "embed_dim": 48, "depth": 4, "num_heads": 3}
TOWERS = {
    "vit_base_patch32_clip_224": 20,  # class token, projected
    "vit_base_patch16_siglip_224": 0,  # attention pooling
    "vit_base_patch16_siglip_gap_224": 0,  # average
    "vit_base_patch16_rope_mixed_224": 10,  # Eva
}
NAMES = ["a cat", "a dog", "tea", "Größe 3", "b"]


def tower(name="vit_base_patch32_clip_224", num_classes=None, **kwargs):
    num_classes = TOWERS[name] if num_classes is None else num_classes
    return sharp_model((name, {**SIZE, "num_classes": num_classes, "groups": 2, **kwargs}))


def text(features, classes=5):
    return 3 * torch.randn(classes, features, generator=torch.Generator().manual_seed(2))


def with_text(name="vit_base_patch32_clip_224", **kwargs):
    model = tower(name)
    model.set_text_features(NAMES, text(TOWERS[name] or 48), **kwargs)
    return model


@pytest.mark.parametrize("name", TOWERS)
def test_logits_are_scaled_cosines_of_timms_own_features(name):
    model, x = tower(name), sharp_images()
    with torch.inference_mode():
        features, matrix = copy.deepcopy(model.backbone)(x), text(TOWERS[name] or 48)
        model.threshold = 0.0
        model.set_text_features(NAMES, matrix.numpy(), scale=30.0, bias=-7.0)
        image, word = (rows / (rows**2).sum(1, keepdim=True).sqrt() for rows in (features, matrix))
        expected = 30 * image @ word.T - 7
        assert expected.std(0).min() > 0.01
        torch.testing.assert_close(model(x), expected, rtol=0, atol=1e-4)
        torch.testing.assert_close(model.backbone(x), expected, rtol=0, atol=1e-4)
        model.threshold = float(model.trace(x).scores[0].quantile(0.5))  # dropped: as each image alone
        out = model.trace(x)
        assert 0.1 < out.kept.float().mean() < 0.9
        alone = torch.cat([model(one[None]) for one in x])
        torch.testing.assert_close(out.logits, alone, rtol=0, atol=1e-4)
        assert (out.logits - expected).abs().max() > 0.01
    assert (model.num_classes, model.class_names) == (5, tuple(NAMES))
    assert not model.get_classifier().training


def test_scale_and_dtype():
    model, x = with_text(), sharp_images()
    assert model.get_classifier().logit_scale == 100
    assert not [name for name, _ in model.named_parameters() if "text" in name or "logit" in name]
    half = with_text().to(torch.bfloat16)
    half.set_text_features(NAMES, text(20))
    assert half(x.bfloat16()).dtype == torch.bfloat16
    with torch.inference_mode():
        torch.testing.assert_close(half(x.bfloat16(), keep_all).float(), model(x, keep_all), rtol=0, atol=4)


def test_a_scale_beyond_halves_is_refused_when_it_is_written(tmp_path):
    model = with_text(scale=1e5)
    with pytest.raises(InputError, match="logit_scale' is not finite"):
        model.save(tmp_path / "m.safetensors", int8=True)
    assert not (tmp_path / "m.safetensors").exists()
    model.save(tmp_path / "m.safetensors")


def test_they_are_replaced_and_removed():
    model, x = with_text(), sharp_images()
    model.set_text_features(["one", "two"], text(20)[3:], scale=1.0)
    with torch.inference_mode():
        expected = with_text(scale=1.0)(x)[:, 3:]
        torch.testing.assert_close(model(x), expected, rtol=0, atol=1e-6)
    assert (model.num_classes, model.class_names) == (2, ("one", "two"))
    model.reset_classifier(0)
    assert model(x).shape == (5, 48)
    assert model.class_names is None


@pytest.mark.parametrize("name", TOWERS)
@pytest.mark.parametrize("how", [{}, {"half": True}, {"int8": True}])
def test_a_file_has_them(name, how, tmp_path):
    model, x = with_text(name, scale=50.0, bias=2.0), sharp_images()
    model.save(tmp_path / "m.safetensors", **how)
    found = iared2.load(tmp_path / "m.safetensors")
    assert (found.class_names, found.num_classes) == (tuple(NAMES), 5)
    assert found.backbone.pretrained_cfg["num_classes"] == 5
    with torch.inference_mode():
        same = found(x, keep_all), model(x, keep_all)
        torch.testing.assert_close(*same, rtol=0, atol=2 if how else 0)
    found.save(tmp_path / "again.safetensors")


@pytest.mark.parametrize("name", ["vit_base_patch32_clip_224", "vit_base_patch16_siglip_224"])
def test_a_folder_has_them(name, tmp_path):
    model, x = with_text(name), sharp_images()
    model.save_pretrained(tmp_path)
    assert json.loads((tmp_path / "config.json").read_text())["pretrained_cfg"]["num_classes"] == 5
    for given in ({}, {"num_classes": 5}):
        found = timm.create_model(f"local-dir:{tmp_path}", pretrained=True, **given).eval()
        assert torch.equal(found(x), model(x))
        assert found.class_names == tuple(NAMES)
    for other in (0, 7, 20):  # as in timm, a new head
        found = timm.create_model(f"local-dir:{tmp_path}", pretrained=True, num_classes=other).eval()
        assert (found.num_classes, found.class_names) == (other, None)
        model.threshold = found.threshold = 0.0
        features = found.forward_head(found.forward_features(x), pre_logits=True)
        expected = model.forward_head(model.forward_features(x), pre_logits=True)
        torch.testing.assert_close(features, expected, rtol=0, atol=1e-6)


def test_transformers_reads_them(tmp_path):
    auto = pytest.importorskip("transformers").AutoModelForImageClassification
    model, x = with_text(), sharp_images()
    model.save_pretrained(tmp_path)
    found = auto.from_pretrained(tmp_path, trust_remote_code=True)
    assert torch.equal(found(x).logits, model(x))
    assert found.config.id2label[3] == "Größe 3"


@pytest.mark.parametrize("name", ["vit_base_patch32_clip_224", "vit_base_patch16_siglip_224"])
def test_a_policy_knows_no_text(name, tmp_path):
    model, x = with_text(name), sharp_images()
    model.save_policy(tmp_path / "policy.safetensors")
    model.save(tmp_path / "model.safetensors")
    plain = tower(name)
    expected = plain(x)
    for backbone in (plain.backbone, tmp_path / "model.safetensors"):
        found = iared2.load(tmp_path / "policy.safetensors", backbone)
        assert found.class_names is None
        torch.testing.assert_close(found(x), expected, rtol=0, atol=1e-6)
    found = iared2.load(tmp_path / "policy.safetensors", model.backbone)
    assert torch.equal(found(x), model(x))


@pytest.mark.parametrize(
    ("change", "tensors", "words"),
    [
        ({"text_classes": 4}, {}, "5 class names for 4 classes"),
        ({"text_classes": 4, "class_names": None}, {}, "head.text_features has shape"),
        ({"text_classes": None, "class_names": None}, {}, "lacks the tensor backbone.head.bias"),
        ({"text_classes": 1 << 23, "class_names": None}, {}, "too large"),
        ({"text_classes": 1 << 25, "class_names": None}, {}, "text_classes should not be"),
        ({"text_classes": "5"}, {}, "text_classes should not be"),
        ({}, {"text_features": torch.full((5, 20), torch.nan)}, "not finite"),
        ({}, {"text_features": torch.ones(5, 21)}, "has shape"),
        ({}, {"logit_scale": torch.ones(2)}, "has shape"),
        ({}, {"logit_bias": torch.tensor(torch.inf)}, "not finite"),
    ],
)
def test_a_file_is_not_trusted(change, tensors, words, tmp_path):
    path = tmp_path / "m.safetensors"
    with_text().save(path)
    with safe_open(path, "pt") as file:
        config = json.loads(file.metadata()["iared2"]) | change
        found = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
    found |= {f"backbone.head.{name}": tensor for name, tensor in tensors.items()}
    save_file(found, path, {"iared2": json.dumps(config)})
    with pytest.raises(InputError, match=words):
        iared2.load(path)


def test_files_of_before_have_none(tmp_path):
    path = tmp_path / "m.safetensors"
    tower().save(path)
    with safe_open(path, "pt") as file:
        config = json.loads(file.metadata()["iared2"])
        found = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
    assert config.pop("text_classes") is None
    save_file(found, path, {"iared2": json.dumps(config)})
    assert iared2.load(path).num_classes == 20


@pytest.mark.parametrize("name", ["vit_base_patch32_clip_224", "vit_base_patch16_siglip_224"])
def test_macs(name):
    model, x = with_text(name), sharp_images()
    with FlopCounterMode(display=False) as counter, torch.no_grad():
        features = model.forward_features(x)
    before = model.dense_macs
    with FlopCounterMode(display=False) as head, torch.no_grad():
        model.get_classifier()(features[:, 0])
    model.reset_classifier(0)
    assert before - model.dense_macs == head.get_total_flops() / 2 / len(x)
    assert counter.get_total_flops() > 0


def test_what_knows_classes_knows_these(tmp_path):
    rng = np.random.default_rng(0)
    photos = [Image.fromarray(rng.integers(0, 255, (50, 40, 3), dtype=np.uint8)) for _ in range(40)]
    model = with_text()
    result = iared2.Predictor(model)(photos[0])
    assert {name for name, _ in result.top5} == set(NAMES)
    heat = iared2.heatmap(model, sharp_images(2), "gradcam", torch.tensor([0, 4]))
    assert heat.shape == (2, 48, 32)
    faster = iared2.accelerate(model, photos, macs=0.8)
    assert faster.report.classes
    assert faster.class_names == tuple(NAMES)
    faster.save(tmp_path / "m.safetensors")
    assert iared2.load(tmp_path / "m.safetensors").class_names == tuple(NAMES)
    exported = FixedCount(model, (12, 6))
    program = torch.export.export(exported, (sharp_images(2),), strict=True).module()
    model.num_keep = 12, 6
    torch.testing.assert_close(program(sharp_images(2))[0], model(sharp_images(2)), rtol=0, atol=1e-3)
    assert exported.about["class_names"] == tuple(NAMES)


def test_evaluate_finds_the_classes_by_their_names(tmp_path):
    model = with_text()
    with torch.inference_mode():
        label = model.backbone(torch.zeros(1, 3, 48, 32)).argmax().item()  # CLIP's mean colour
    model.save(tmp_path / "m.safetensors")
    grey = Image.new("RGB", (32, 48), tuple(round(255 * mean) for mean in model.pretrained_cfg["mean"]))
    for i, name in enumerate(NAMES):  # in another order than by the alphabet
        (tmp_path / "photos" / name).mkdir(parents=True)
        for copy_number in range(3 if i == label else 1):
            grey.save(tmp_path / "photos" / name / f"{copy_number}.png")
    run = ["evaluate", str(tmp_path / "photos"), "-c", str(tmp_path / "m.safetensors"), "--workers", "0"]
    assert main([*run, "--json", str(tmp_path / "found.json")]) == 0
    found = {v["name"]: v["top1"] for v in json.loads((tmp_path / "found.json").read_text())["variants"]}
    assert found["dense backbone"] == pytest.approx(100 * 3 / 7)


@pytest.mark.parametrize(
    ("names", "matrix", "how", "words"),
    [
        (NAMES, torch.ones(5, 19), {}, r"\(5, 19\).*has 20 numbers"),
        (NAMES, torch.ones(20), {}, "has 20 numbers"),
        (NAMES, torch.ones(5, 20, dtype=torch.int64), {}, "of floats"),
        (NAMES[:4], torch.ones(5, 20), {}, "4 names for 5 rows"),
        ([], torch.ones(0, 20), {}, "0 names for 0 rows"),
        ("abcde", torch.ones(5, 20), {}, "list of the names"),
        ([*NAMES[:4], 3], torch.ones(5, 20), {}, "list of the names"),
        ([*NAMES[:4], "tea"], torch.ones(5, 20), {}, "'tea'"),
        (NAMES, torch.ones(5, 20).index_fill_(0, torch.tensor(2), torch.nan), {}, "not finite"),
        (NAMES, torch.ones(5, 20).index_fill_(0, torch.tensor(2), 0), {}, "zero"),
        (NAMES, torch.ones(5, 20), {"scale": 0.0}, "scale=0.0"),
        (NAMES, torch.ones(5, 20), {"scale": float("nan")}, "scale=nan"),
        (NAMES, torch.ones(5, 20), {"bias": float("inf")}, "bias=inf"),
        (range(1 << 22), torch.ones(1, 20).expand(1 << 22, 20), {}, "too many"),
    ],
)
def test_refused(names, matrix, how, words):
    model = tower()
    names = [str(name) for name in names] if isinstance(names, range) else names
    with pytest.raises(InputError, match=words):
        model.set_text_features(names, matrix, **how)
    assert (model.num_classes, model.class_names) == (20, None)


def test_other_heads_are_refused():
    distilled = tower("deit_tiny_distilled_patch16_224", 3)
    with pytest.raises(InputError, match="one linear head"):
        distilled.set_text_features(["a"], torch.ones(1, 3))
    assert F.cosine_similarity(distilled(sharp_images()), distilled(sharp_images())).min() > 0.99


def test_clip_of_transformers_says_the_same():
    transformers = pytest.importorskip("transformers")
    torch.manual_seed(0)
    small = {"hidden_size": 48, "intermediate_size": 192, "num_hidden_layers": 2, "num_attention_heads": 3}
    ids = {"vocab_size": 30, "eos_token_id": 29, "bos_token_id": 28}
    config = transformers.CLIPConfig(
        vision_config={**small, "image_size": 32, "patch_size": 8}, text_config={**small, **ids}, projection_dim=20
    )
    clip = transformers.CLIPModel(config).eval()
    with torch.no_grad():
        for parameter in clip.parameters():
            parameter += 0.2 * torch.randn_like(parameter)
        clip.logit_scale.fill_(3.0)
    args = {"img_size": 32, "patch_size": 8, "embed_dim": 48, "depth": 2, "num_heads": 3, "num_classes": 20}
    model = iared2.from_timm("vit_base_patch32_clip_quickgelu_224", groups=2, **args).eval()
    model.backbone.load_state_dict(timm_names(clip))
    tokens = torch.randint(0, 28, (4, 6)).index_fill_(1, torch.tensor([5]), 29)
    x = torch.randn(3, 3, 32, 32)
    with torch.inference_mode():
        expected = clip(input_ids=tokens, pixel_values=x)
        model.set_text_features(["a", "b", "c", "d"], expected.text_embeds, scale=clip.logit_scale.exp().item())
        torch.testing.assert_close(model(x, keep_all), expected.logits_per_image, rtol=0, atol=1e-4)
    assert expected.logits_per_image.std() > 0.1


def timm_names(clip):
    """The vision tower of a CLIPModel by timm's names."""
    vision, found = clip.vision_model, {}
    found["cls_token"] = vision.embeddings.class_embedding[None, None]
    found["pos_embed"] = vision.embeddings.position_embedding.weight[None]
    found["patch_embed.proj.weight"] = vision.embeddings.patch_embedding.weight
    pairs = {"norm_pre": vision.pre_layrnorm, "norm": vision.post_layernorm}
    for i, layer in enumerate(vision.encoder.layers):
        pairs |= {f"blocks.{i}.norm1": layer.layer_norm1, f"blocks.{i}.norm2": layer.layer_norm2}
        pairs |= {f"blocks.{i}.mlp.fc1": layer.mlp.fc1, f"blocks.{i}.mlp.fc2": layer.mlp.fc2}
        pairs[f"blocks.{i}.attn.proj"] = (attn := layer.self_attn).out_proj
        for part in ("weight", "bias"):
            qkv = [getattr(linear, part) for linear in (attn.q_proj, attn.k_proj, attn.v_proj)]
            found[f"blocks.{i}.attn.qkv.{part}"] = torch.cat(qkv)
    for name, module in pairs.items():
        found |= {f"{name}.weight": module.weight, f"{name}.bias": module.bias}
    return found | {"head.weight": clip.visual_projection.weight, "head.bias": torch.zeros(20)}
