"""Clips run through the image code: what is true of images (tests/model) is true of them."""

from __future__ import annotations

import pytest
import torch
from oracle import masked_forward
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

import iared2
from iared2.model.decide import Decision, keep_all

TINY = {"embed_dim": 48, "num_heads": 3, "depth": 4, "num_classes": 7}
VIDEO = {
    "timesformer_joint_base_patch16_224": {**TINY, "img_size": (4, 48, 32), "patch_size": (1, 8, 8)},
    "videomae_base_patch16_224": {**TINY, "img_size": (6, 48, 32), "patch_size": (2, 8, 8)},
}


@pytest.fixture(params=VIDEO)
def model(request):
    torch.manual_seed(0)
    model = iared2.from_timm(request.param, **VIDEO[request.param]).eval()
    with torch.no_grad():
        for interpreter in model.interpreters:  # sharper than at birth
            interpreter.query.weight *= 8
            interpreter.key.weight *= 8
        if model.backbone.time_embed is not None:
            model.backbone.time_embed.normal_(std=0.2)
    return model


def clips_for(model, batch=4):
    size = model.pretrained_cfg["input_size"]
    return torch.randn(batch, *size, generator=torch.Generator().manual_seed(1))


def ragged(scores, alive, group):
    draws = torch.rand(scores.shape, generator=torch.Generator().manual_seed(group))
    keep = alive & (draws < torch.linspace(0.2, 0.95, len(scores))[:, None])
    keep[1] = False
    return keep


def test_patch_ids_run_time_row_column(model):
    frames, rows, columns = model.grid_size
    size = model.pretrained_cfg["input_size"]
    assert size[1:] == model.backbone.patch_embed.img_size
    t, p, _ = model.backbone.patch_embed.patch_size
    embed = model.backbone.patch_embed
    plain = embed(torch.zeros(1, *size))
    for time, row, column in ((0, 0, 1), (0, 1, 0), (1, 0, 0), (frames - 1, rows - 1, columns - 1)):
        clip = torch.zeros(1, *size)
        clip[:, :, time * t : (time + 1) * t, row * p : (row + 1) * p, column * p : (column + 1) * p] = 1
        changed = (embed(clip) - plain).abs().sum(-1)[0].nonzero().flatten().tolist()
        assert changed == [(time * rows + row) * columns + column]


def test_position_and_time_are_added_and_the_class_token_has_no_time():
    name = "timesformer_joint_base_patch16_224"
    vit = iared2.from_timm(name, **VIDEO[name]).backbone
    with torch.no_grad():
        vit.time_embed.normal_()
        x = vit._pos_embed(torch.zeros(2, vit.patch_embed.num_patches, 48))
    assert vit.pos_embed.shape == (1, 1 + 6 * 4, 48)
    assert vit.time_embed.shape == (1, 4, 48)
    torch.testing.assert_close(x[0, 0], vit.cls_token[0, 0] + vit.pos_embed[0, 0])
    for time, row, column in ((0, 0, 0), (2, 3, 1), (3, 5, 3)):
        token = x[1, 1 + (time * 6 + row) * 4 + column]
        torch.testing.assert_close(token, vit.pos_embed[0, 1 + row * 4 + column] + vit.time_embed[0, time])


def test_fixed_positions_are_never_trained_or_saved():
    name = "videomae_base_patch16_224"
    vit = iared2.from_timm(name, **VIDEO[name]).backbone
    assert "pos_embed" not in dict(vit.named_parameters())
    assert "pos_embed" not in vit.state_dict()
    assert {"pos_embed", "time_embed"} <= vit.no_weight_decay()


def test_packed_equals_masked_oracle_and_each_clip_alone(model):
    x = clips_for(model)
    with torch.no_grad():
        out = model.trace(x, ragged)
        logits, scores, kept = masked_forward(model, x, ragged)
        assert torch.equal(out.kept, kept)
        assert len(set(kept[0].sum(1).tolist())) > 2, "the batch should be ragged"
        torch.testing.assert_close(out.scores, scores, rtol=0, atol=1e-5)
        torch.testing.assert_close(out.logits, logits, rtol=0, atol=1e-4)
        for b in range(len(x)):
            alone = model.trace(x[b : b + 1], lambda scores, alive, group, b=b: kept[group, b : b + 1])
            torch.testing.assert_close(alone.logits[0], out.logits[b], rtol=0, atol=1e-4)
            assert alone.macs[0] == out.macs[b]


def test_threshold_decides_the_same_packed_and_masked(model):
    x = clips_for(model)
    with torch.no_grad():
        model.threshold = [float(model.trace(x, keep_all).scores[0].quantile(0.5)), 0, 0]
        out = model.trace(x)
        logits, scores, kept = masked_forward(model, x, Decision(model.thresholds))
    assert 0.3 < out.kept[0].float().mean() < 0.7
    unclear = (scores[0] - model.threshold[0]).abs() < 1e-5
    assert (out.kept == kept)[0][~unclear].all()
    if torch.equal(out.kept, kept):
        torch.testing.assert_close(out.logits, logits, rtol=0, atol=1e-4)


def test_multiply_adds_equal_torchs_counter(model):
    x, frozen = clips_for(model), model.requires_grad_(False)

    def count(run):
        with FlopCounterMode(display=False) as counter, sdpa_kernel(SDPBackend.MATH), torch.no_grad():
            run()
        return counter.get_total_flops() / 2

    assert count(lambda: frozen.backbone(x)) == len(x) * model.dense_macs
    model.threshold = 0
    whole = model.trace(x).macs
    assert count(lambda: frozen(x)) == whole.sum()
    model.threshold = float(model.trace(x).scores[0].quantile(0.5))
    reduced = model.trace(x).macs
    assert reduced.sum() < 0.9 * whole.sum()
    assert count(lambda: frozen(x)) == reduced.sum()


def test_gradients_reach_both_tables():
    name = "timesformer_joint_base_patch16_224"
    model = iared2.from_timm(name, **VIDEO[name])
    model.trace(clips_for(model), ragged).logits.square().sum().backward()
    for parameter in (model.backbone.pos_embed, model.backbone.time_embed, model.backbone.patch_embed.proj.weight):
        assert parameter.grad.norm() > 0


def test_round_trip(model, tmp_path):
    model.threshold = [0.5, 0.49, 0.51]
    model.class_names = tuple("abcdefg")
    model.save(tmp_path / "m.safetensors")
    twin, x = iared2.load(tmp_path / "m.safetensors"), clips_for(model)
    assert torch.equal(twin(x), model(x))
    assert twin.class_names == model.class_names
    for name in ("input_size", "mean", "std", "interpolation"):
        assert tuple(twin.pretrained_cfg[name]) == tuple(model.pretrained_cfg[name])
    model.reset_classifier(3)
    model.save(tmp_path / "m.safetensors")
    assert torch.equal(iared2.load(tmp_path / "m.safetensors")(x), model(x))


def test_wrong_clips_are_one_line(model):
    right = clips_for(model)
    for clips in (right[:, :, 0], right[:, :, 1:], right[:, :1], right[..., 1:], right.transpose(1, 2)):
        with pytest.raises(iared2.InputError, match=r"the model takes clips \(B, 3, \d, 48, 32\)") as error:
            model(clips)
        assert "\n" not in str(error.value)
    with pytest.raises(iared2.InputError, match="takes clips"):
        iared2.heatmap(model, right)


@pytest.mark.parametrize(
    ("name", "change", "message"),
    [
        ("videomae_base_patch16_224", {"img_size": (5, 48, 32)}, "5 frames cannot be cut into patches of 2"),
        ("videomae_base_patch16_224", {"img_size": (6, 44, 32)}, "44 rows"),
        ("timesformer_joint_base_patch16_224", {"img_size": (48, 32)}, "three numbers"),
        ("timesformer_joint_base_patch16_224", {"img_size": 48}, "three numbers"),
        ("timesformer_joint_base_patch16_224", {"img_size": (0, 48, 32)}, "three numbers"),
        ("timesformer_joint_base_patch16_224", {"patch_size": 8}, "three numbers"),
        ("timesformer_joint_base_patch16_224", {"reg_tokens": 4}, "leave reg_tokens"),
        ("timesformer_joint_base_patch16_224", {"pos_embed": "none"}, "leave reg_tokens"),
        ("timesformer_joint_base_patch16_224", {"dynamic_img_pad": True}, "no dynamic_img_pad"),
        ("videomae_base_patch16_224", {"class_token": True}, "without a class token"),
    ],
)
def test_wrong_arguments_are_one_line(name, change, message):
    with pytest.raises(iared2.InputError, match=message) as error:
        iared2.from_timm(name, **{**VIDEO[name], **change})
    assert "\n" not in str(error.value)


def test_joint_timesformer_costs_what_its_patches_say():
    with torch.device("meta"):
        model = iared2.from_timm("timesformer_joint_base_patch16_224")
    assert model.grid_size == (8, 14, 14)
    assert model.num_classes == 400
    assert model.dense_macs / 1e9 == pytest.approx(179.6, abs=0.1)


def test_a_clip_for_a_model_of_images_is_refused() -> None:
    model = iared2.from_timm("deit_tiny_patch16_224", img_size=32, patch_size=16, embed_dim=48, depth=3, num_heads=3)
    with pytest.raises(iared2.InputError, match=r"takes images \(B, channels, height, width\), not \(1, 3, 4"):
        model(torch.zeros(1, 3, 4, 32, 32))
