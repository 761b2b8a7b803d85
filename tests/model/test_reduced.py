from __future__ import annotations

import copy
import math

import numpy as np
import pytest
import timm
import torch
from oracle import masked_forward
from timm.models.eva import Eva
from timm.models.vision_transformer import Block, VisionTransformer

import iared2
from iared2.errors import InputError
from iared2.model.backbone import run_block
from iared2.model.decide import Decision, keep_all


def make(family, **kwargs):
    torch.manual_seed(0)
    name, timm_kwargs = family
    model = iared2.from_timm(name, **{**timm_kwargs, **kwargs}).eval()
    for (
        interpreter
    ) in model.interpreters:  # sharper than at birth, so that decisions are not all within rounding of 0.5
        interpreter.query.weight.data *= 8
        interpreter.key.weight.data *= 8
    return model


def images(batch=5):
    return torch.randn(batch, 3, 48, 32, generator=torch.Generator().manual_seed(1))


def ragged(keep_nothing_in: int = 2):
    """A decision that leaves every image another number of patches, and one image none."""

    def decide(scores, alive, group):
        draws = torch.rand(scores.shape, generator=torch.Generator().manual_seed(group))
        share = torch.linspace(0.2, 0.95, len(scores))[:, None]
        keep = alive & (draws < share)
        keep[keep_nothing_in] = False
        return keep

    return decide


def test_threshold_0_gives_the_backbones_own_logits(family):
    model = make(family)
    model.threshold = 0
    with torch.no_grad():
        torch.testing.assert_close(model(images()), model.backbone(images()), rtol=0, atol=1e-4)


def test_packed_equals_masked_oracle_and_each_image_alone(family):
    model, x = make(family), images()
    with torch.no_grad():
        out = model.trace(x, ragged())
        logits, scores, kept = masked_forward(model, x, ragged())
    assert torch.equal(out.kept, kept)
    assert len(set(kept[0].sum(1).tolist())) > 2, "the batch should be ragged"
    torch.testing.assert_close(out.scores, scores, rtol=0, atol=1e-5)
    atol = 1e-4 * max(1, logits.abs().max().item())
    torch.testing.assert_close(out.logits, logits, rtol=0, atol=atol)
    for b in range(len(x)):
        with torch.no_grad():
            alone = model.trace(x[b : b + 1], lambda scores, alive, group, b=b: kept[group, b : b + 1] & alive)
        assert torch.equal(alone.kept[:, 0], kept[:, b])
        torch.testing.assert_close(alone.logits[0], out.logits[b], rtol=0, atol=atol)
        assert alone.macs[0] == out.macs[b]


@pytest.mark.parametrize(
    ("name", "kwargs"),
    [
        ("vit_base_patch16_dinov3_qkvb", {}),  # biases of query and value beside the fused projection
        ("vit_huge_plus_patch16_dinov3", {}),  # SwiGLU
        ("eva_giant_patch14_clip_224", {}),  # no rotation
        ("eva02_enormous_patch14_clip_224", {}),  # post-norm
        ("eva02_large_patch14_clip_224", {"global_pool": "avgmax"}),
        ("vit_medium_patch16_rope_reg1_gap_256", {}),
        ("vit_small_patch16_rope_ape_224", {"dynamic_img_size": True, "rope_rotate_half": True}),
        ("vit_pwee_patch16_reg1_gap_256", {}),  # parallel, with a scale
        ("vit_base_patch16_lingbot", {}),
        ("aimv2_large_patch14_224", {}),
    ],
)
def test_more_of_timms_models(name, kwargs):
    if not timm.is_model(name):
        pytest.skip(f"this timm has no {name}")
    model = make((name, {"img_size": (48, 32), "patch_size": 8, "embed_dim": 48, "num_heads": 3, "depth": 3, **kwargs}))
    x = images()
    with torch.no_grad():
        for parameter in model.backbone.parameters():  # biases and layer scales at birth are zero or tiny
            parameter.add_(0.05 * torch.randn_like(parameter))
        torch.testing.assert_close(model.trace(x, keep_all).logits, model.backbone(x), rtol=0, atol=1e-4)
        out, (logits, _, kept) = model.trace(x, ragged()), masked_forward(model, x, ragged())
    assert torch.equal(out.kept, kept)
    torch.testing.assert_close(out.logits, logits, rtol=0, atol=1e-4)


@pytest.mark.parametrize(
    ("name", "kwargs"),
    [
        ("vit_small_patch16_dinov3", {}),  # dynamic by default
        ("vit_base_patch16_rope_mixed_224", {"dynamic_img_size": True}),
        ("eva02_tiny_patch14_224", {"dynamic_img_size": True}),  # absolute positions are resampled as well
        ("deit_tiny_patch16_224", {"dynamic_img_size": True}),
    ],
)
def test_images_of_another_size_than_the_models(name, kwargs):
    model = make((name, {"img_size": 32, "patch_size": 8, "embed_dim": 48, "num_heads": 3, "depth": 3, **kwargs}))
    with torch.no_grad():
        out = model.trace(images(), keep_all)
        torch.testing.assert_close(out.logits, model.backbone(images()), rtol=0, atol=1e-4)
        assert out.kept.shape == (3, 5, 24)
        out, (logits, _, kept) = model.trace(images(), ragged()), masked_forward(model, images(), ragged())
    assert torch.equal(out.kept, kept)
    torch.testing.assert_close(out.logits, logits, rtol=0, atol=1e-4)
    # the cost is that of these images, not that of the model's own size
    same_size = make((name, {"img_size": (48, 32), "patch_size": 8, "embed_dim": 48, "num_heads": 3, "depth": 3}))
    assert torch.equal(out.macs, same_size.count_macs(kept.sum(-1)))


def test_another_input_size(family, tmp_path):
    model, x = make(family), torch.randn(2, 3, 64, 48, generator=torch.Generator().manual_seed(2))
    model.spread, patch = 1.0, model.backbone.patch_embed.patch_size[0]
    model.set_input_size([64, 48])
    assert model.grid_size == (64 // patch, 48 // patch)
    assert model.num_patches == math.prod(model.grid_size)
    assert model.pretrained_cfg["input_size"] == (3, 64, 48)
    with torch.no_grad():
        model.threshold = 0
        torch.testing.assert_close(model(x), model.backbone(x), rtol=0, atol=1e-4)
        model.threshold = 0.5
        model.save(tmp_path / "model.safetensors")
        assert torch.equal(iared2.load(tmp_path / "model.safetensors")(x), model(x))
    assert model.dense_macs == make((family[0], {**family[1], "img_size": (64, 48)})).dense_macs


@pytest.mark.parametrize("size", [0, -16, 50, (48, 33), (48, 48, 48), (), 1 << 20, 32.0, (32.0, 32), "32"])
def test_a_size_that_no_model_has(size):
    model = make(("deit_tiny_patch16_224", {"img_size": 32, "embed_dim": 48, "num_heads": 3, "depth": 3}))
    with pytest.raises(InputError, match="give one side, or height and width, in multiples of the patch, 16x16"):
        model.set_input_size(size)
    assert model.grid_size == (2, 2)
    model.set_input_size(np.int64(64))
    assert model.grid_size == (4, 4)
    model.set_input_size(np.array([32, 48]))
    assert model.grid_size == (2, 3)


def test_the_largest_is_described():
    with torch.device("meta"):
        model = iared2.from_timm("vit_7b_patch16_dinov3", img_size=224, groups=4)
    # published: 6.7e9 parameters; two MACs per weight and token are one FLOP pair
    assert model.dense_macs == pytest.approx(201 * 6.7e9, rel=0.02)


def test_threshold_decides_the_same_packed_masked_and_alone(family):
    model, x = make(family), images()
    with torch.no_grad():
        ranked = model.trace(x).scores[0].flatten().sort().values
        model.threshold = [float(ranked[59:61].mean()), 0.5, 0.5]  # not a score itself, lest rounding decides
        out = model.trace(x)
        logits, scores, kept = masked_forward(model, x, Decision(model.threshold))
    thresholds = torch.tensor(model.threshold)[:, None, None]
    unclear = (scores - thresholds).abs() < 1e-5
    assert (out.kept == kept)[~unclear].all()
    assert 0 < out.kept[0].float().mean() < 1
    if torch.equal(out.kept, kept):
        torch.testing.assert_close(out.logits, logits, rtol=0, atol=1e-4 * max(1, logits.abs().max().item()))
    assert ((out.scores > 0) == torch.cat([torch.ones_like(kept[:1]), out.kept[:-1]])).all()


def test_gradients_equal_the_oracles(family):
    model, x = make(family).double(), images().double()
    target = torch.arange(5) % 7

    def gradients(logits):
        model.zero_grad()
        torch.nn.functional.cross_entropy(logits, target).backward()
        return {n: p.grad.clone() for n, p in model.backbone.named_parameters() if p.grad is not None}

    packed = gradients(model.trace(x, ragged()).logits)
    masked = gradients(masked_forward(model, x, ragged())[0])
    assert packed.keys() == masked.keys()
    assert "patch_embed.proj.weight" in packed
    noise = 1e-7 * max(g.norm() for g in masked.values())  # a key's bias has gradient 0 by the symmetry of softmax
    for name, g in masked.items():
        assert (g - packed[name]).norm() <= 1e-8 * max(g.norm(), noise), name


def test_threshold_1_keeps_nothing_or_the_best_patch():
    token = make(("deit_tiny_patch16_224", {"img_size": 32, "patch_size": 8, "embed_dim": 48, "num_heads": 3}))
    pooled = make(
        (
            "vit_small_patch16_224",
            {"img_size": 32, "patch_size": 8, "embed_dim": 48, "num_heads": 3, "global_pool": "avg"},
        )
    )
    x = torch.randn(3, 3, 32, 32)
    with torch.no_grad():
        for model, left in ((token, 0), (pooled, 1)):
            model.threshold = 1
            out = model.trace(x)
            assert (out.kept.sum(-1) == left).all()
            assert out.logits.isfinite().all()
    best = out.scores[0].argmax(-1)
    assert out.kept[0].gather(1, best[:, None]).all()


class OwnBlock(Block):
    """It may do anything in its forward pass."""


def test_groups_of_uneven_depth_and_refusals():
    model = make(("vit_tiny_patch16_224", {"depth": 8, "img_size": 32, "embed_dim": 48, "num_heads": 3}), groups=3)
    assert [len(g) for g in model.groups] == [3, 3, 2]
    small = {"img_size": 32, "embed_dim": 48, "depth": 2, "num_heads": 3}
    odd = VisionTransformer(**small)
    odd.blocks[1].attn = torch.nn.Identity()
    for module, why in (
        (timm.create_model("resnet18"), "ResNet is not supported: it is not a timm VisionTransformer or Eva"),
        (timm.create_model("swin_tiny_patch4_window7_224"), "not a timm VisionTransformer or Eva"),
        (VisionTransformer(block_fn=OwnBlock, **small), "block 0 is a OwnBlock"),
        (odd, "attention of block 1 is a Identity"),
        (Eva(patch_drop_rate=0.5, **small), "patch_drop_rate"),
        (Eva(global_pool="", **small), "global_pool"),
        (VisionTransformer(patch_drop_rate=0.5, **small), "patch_drop_rate"),
        (VisionTransformer(global_pool="", **small), "global_pool"),
    ):
        with pytest.raises(iared2.InputError, match=why):
            iared2.from_timm(module, groups=2)
    with pytest.raises(iared2.InputError, match="groups=9"):
        iared2.from_timm("vit_tiny_patch16_224", groups=9, depth=6)
    with pytest.raises(iared2.InputError, match="no model"):
        iared2.from_timm("deit_smal_patch16_224")
    with pytest.raises(iared2.InputError, match=r"timm cannot build deit_tiny_patch16_224 with .*colour"):
        iared2.from_timm("deit_tiny_patch16_224", colour=3)


def test_a_decision_cannot_bring_patches_back():
    model = make(
        ("vit_tiny_patch16_224", {"depth": 3, "img_size": 32, "embed_dim": 48, "num_heads": 3, "patch_size": 8})
    )
    fresh = lambda scores, alive, group: torch.arange(16).expand(2, 16) % (group + 2) == 0  # noqa: E731
    with torch.no_grad():
        kept = model.trace(torch.randn(2, 3, 32, 32), fresh).kept
    assert not (kept[1:] & ~kept[:-1]).any()


def test_fresh_interpreters_give_distinct_scores(family):
    torch.manual_seed(0)
    name, kwargs = family
    with torch.no_grad():
        scores = iared2.from_timm(name, **kwargs).eval().trace(images(), lambda s, alive, g: alive).scores
    assert ((scores > 0) & (scores < 1)).all()
    # a tie by rounding is possible (float32 has some 10,000 values in such a range), a constant score is not
    assert min(len(row.unique()) for row in scores.flatten(0, 1)) >= 0.9 * scores.shape[-1]


@pytest.mark.filterwarnings("ignore:Mismatch dtype between input and weight")  # RMS norm under autocast, torch's own
def test_behaves_like_a_timm_model(family, tmp_path):
    model, x = make(family), images()
    with torch.no_grad():
        logits = model(x)
        torch.testing.assert_close(model.forward_head(model.forward_features(x)), logits, rtol=0, atol=1e-5)
        torch.testing.assert_close(copy.deepcopy(model)(x), logits)
        twin = iared2.from_timm(family[0], **family[1]).eval()
        twin.load_state_dict(model.state_dict())
        torch.testing.assert_close(twin(x), logits)
        timm_model = timm.create_model(family[0], **family[1])
        model.backbone.load_state_dict(timm_model.state_dict())  # timm's weights, no renaming
        half = copy.deepcopy(model).bfloat16()
        assert half(x.bfloat16()).isfinite().all()
        assert half.trace(x.bfloat16()).scores.dtype == torch.float32
        with torch.autocast("cpu", torch.bfloat16):
            assert model.trace(x).scores.dtype == torch.float32
    model.reset_classifier(4)
    assert model(x).shape == (5, 4)
    assert model.num_classes == 4
    model.reset_classifier(0)
    assert model(x).shape == (5, model.num_features)
    assert model.pretrained_cfg["input_size"] == (3, 48, 32)


@pytest.mark.parametrize("name", ["deit_tiny_patch16_224", "vit_base_patch16_rope_mixed_224"])
def test_grad_checkpointing_changes_no_gradient(name):
    model = make((name, {"img_size": (48, 32), "patch_size": 8, "embed_dim": 48, "depth": 3, "num_heads": 3}))
    grads, first = [], "blocks.0.attn.qkv.weight"
    learned = [first, *(n for n, _ in model.backbone.named_parameters() if n == "rope.freqs")]
    for enable in (False, True):
        model.set_grad_checkpointing(enable)
        model.zero_grad()
        model.trace(images(), ragged()).logits.square().sum().backward()
        grads.append([model.backbone.get_parameter(n).grad.clone() for n in learned])
    torch.testing.assert_close(grads[0], grads[1])


@pytest.mark.parametrize("name", ["vit_small_patch16_dinov3", "vit_base_patch16_rope_mixed_224"])
def test_several_selections_of_the_same_images_rotate_alike(name):
    """As the policy gradient draws them: image j·B + b is selection j of image b."""
    model = make((name, {"img_size": (48, 32), "patch_size": 8, "embed_dim": 48, "depth": 3, "num_heads": 3}))
    keep = torch.rand(4, 5, 24, generator=torch.Generator().manual_seed(3)) > 0.4
    with torch.no_grad():
        packed = model.embed(images())
        many = model.head(model.run_blocks(packed.select(keep.flatten(0, 1)), 1))
        each = [model.head(model.run_blocks(packed.select(one), 1)) for one in keep]
    torch.testing.assert_close(many, torch.cat(each), rtol=0, atol=1e-6)


def test_a_rotary_block_is_no_start_for_an_interpreter():
    with pytest.raises(iared2.InputError, match="cannot start as the attention of a EvaBlock"):
        iared2.from_timm("vit_small_patch16_dinov3", interpreter="attention", depth=3, embed_dim=48, num_heads=3)


def test_parallel_branches_draw_stochastic_depth_each_for_itself():
    model = make(
        ("vit_base_patch16_18x2_224", {"img_size": 32, "patch_size": 8, "embed_dim": 48, "depth": 3, "num_heads": 3}),
        drop_path_rate=0.5,
    ).train()
    packed, seen = model.embed(torch.randn(64, 3, 32, 32), keys=torch.arange(64) * 7919), []
    block = model.backbone.blocks[2]
    for layers in ([part.attn.proj for part in block.attns], [part.mlp.fc2 for part in block.ffns]):
        for layer in layers:  # branch i adds 2 ** i to every channel of an image that it does not leave out
            torch.nn.init.zeros_(layer.weight)
            torch.nn.init.constant_(layer.bias, 2.0 ** len(seen))
            seen.append(layer)
    for part in (*block.attns, *block.ffns):
        part.ls.gamma.data.fill_(0.5)  # the factor 1 / keep_prob is 2
    with torch.no_grad():
        added = (run_block(block, packed.x, packed, 2) - packed.x).unflatten(0, (64, -1))[:, 0, 0]
    assert added.round().sub(added).abs().max() < 1e-4
    drawn = torch.stack([added.round().int() >> i & 1 for i in range(4)])
    assert len({tuple(row.tolist()) for row in drawn}) == 4
    assert (drawn.float().mean(1) - 0.5).abs().max() < 0.25


def test_stochastic_depth_drops_whole_images():
    model = make(
        ("deit_tiny_patch16_224", {"img_size": (48, 32), "patch_size": 8, "embed_dim": 48, "depth": 3, "num_heads": 3}),
        drop_path_rate=0.5,
    )
    packed = model.embed(images(16), keys=torch.arange(16) * 7919).select(
        ragged()(torch.rand(16, 24), torch.ones(16, 24) > 0, 0)
    )
    model.train()
    from iared2.model.backbone import drop_path_scale

    def scaled():
        return packed.to_dense(drop_path_scale(model.backbone.blocks[2].drop_path1, packed, 4, packed.x))

    out = scaled()
    alive = packed.to_dense(torch.ones(len(packed.x)))
    for image, here in zip(out[..., 0], alive, strict=True):
        values = image[here > 0].unique()
        assert len(values) == 1
        assert values[0] == 0 or values[0] == pytest.approx(1 / (1 - 0.5), rel=1e-4)
    dropped = (out[:, 0, 0] == 0).sum()
    assert 2 < dropped < 14
    again = scaled()
    assert torch.equal(out, again), "the draw is a function of the key"
