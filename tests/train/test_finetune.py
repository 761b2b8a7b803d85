from __future__ import annotations

import copy

import pytest
import torch
from oracle import masked_forward

import iared2
from iared2 import keyed
from iared2.errors import InputError
from iared2.model.decide import by_share, keep_all
from iared2.train.finetune import FinetuneStage, decide_up_to

SMALL = {"img_size": (16, 24), "patch_size": 4, "embed_dim": 32, "depth": 6, "num_heads": 2, "num_classes": 3}


def make(**kwargs):
    torch.manual_seed(0)
    model = iared2.from_timm("deit_tiny_patch16_224", **SMALL, **kwargs).double()
    for interpreter in model.interpreters:
        interpreter.query.weight.data *= 10
        interpreter.key.weight.data *= 10
    return model


@pytest.fixture
def batch():
    generator = torch.Generator().manual_seed(0)
    images = torch.randn(6, 3, 16, 24, generator=generator, dtype=torch.float64)
    return images, torch.arange(6) % 3, keyed.sample_keys(0, 0, torch.arange(6))


@pytest.mark.parametrize("soft", [False, True])
def test_gradients_are_the_masked_oracles_and_only_where_the_stage_learns(batch, soft):
    model = make()
    images, labels, keys = batch
    targets = torch.nn.functional.one_hot(labels, 3).double() * 0.9 + 0.1 / 3 if soft else labels
    stage = FinetuneStage(model, 1).train()
    loss, metrics = stage(images, targets, keys)
    loss.backward()
    packed = {name: p.grad for name, p in model.named_parameters() if p.grad is not None}
    assert 0 < metrics["keep_ratio_greedy"] < 1

    model.requires_grad_(True)
    model.zero_grad(set_to_none=True)
    logits, _, kept = masked_forward(model.eval(), images, decide_up_to(model, 1))
    assert len(set(kept[1].sum(1).tolist())) > 1, "the batch should be ragged"
    torch.nn.functional.cross_entropy(logits, targets).backward()
    masked = {name: p.grad for name, p in model.named_parameters() if p.grad is not None}
    learns = {n for n in masked if n.startswith(("backbone.head", "backbone.norm"))}
    learns |= {n for n in masked if n.startswith(tuple(f"backbone.blocks.{i}." for i in (2, 3, 4, 5)))}
    assert packed.keys() == learns
    noise = 1e-7 * max(g.norm() for g in masked.values())
    for name in learns:
        assert (packed[name] - masked[name]).norm() <= 1e-8 * max(masked[name].norm(), noise), name


def test_embeddings_become_those_of_the_dense_model(batch):
    model = make()
    model.reset_classifier(0)
    with pytest.raises(InputError, match="give a teacher"):
        FinetuneStage(model, 1)
    teacher = copy.deepcopy(model.backbone).eval()
    images, labels, keys = batch
    whole = FinetuneStage(model, 1, teacher=teacher, decide=keep_all)
    loss, metrics = whole(images, labels, keys)
    assert loss.item() == pytest.approx(0, abs=1e-12)
    assert metrics["cosine"].item() == pytest.approx(1)

    stage = FinetuneStage(model, 1, teacher=teacher).train()
    loss, _ = stage(images, labels, keys)
    loss.backward()
    packed = {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}
    model.zero_grad(set_to_none=True)
    features, _, _ = masked_forward(model.eval(), images, decide_up_to(model, 1))
    cosines = torch.nn.functional.cosine_similarity(features, teacher(images))
    assert loss.item() == pytest.approx(1 - cosines.mean().item())
    (1 - cosines.mean()).backward()
    for name, gradient in packed.items():
        masked = dict(model.named_parameters())[name].grad
        assert (gradient - masked).norm() <= 1e-8 * masked.norm().clamp_min(1e-6), name

    optimizer = torch.optim.Adam([p for p in model.parameters() if p.requires_grad], lr=1e-3)
    stage.train()
    for _ in range(20):
        now, _ = stage(images, labels, keys)
        optimizer.zero_grad()
        now.backward()
        optimizer.step()
    assert now < 0.5 * loss


def test_what_is_frozen_is_in_evaluation_mode():
    model = make(drop_rate=0.1, drop_path_rate=0.5, proj_drop_rate=0.1)
    FinetuneStage(model, 1).train()
    training = {name for name, module in model.named_modules() if module.training and name}
    assert "backbone.head_drop" in training
    assert "backbone.blocks.2" in training
    assert not any(name.startswith(("backbone.blocks.1", "backbone.patch_embed", "interp")) for name in training)
    assert "backbone" not in training
    FinetuneStage(model, None).train()
    assert model.backbone.training


def test_groups_after_the_stages_own_drop_nothing(batch):
    model = make()
    with torch.no_grad():
        out = model.eval().trace(batch[0], decide_up_to(model, 0))
    assert out.kept[0].float().mean() < 1
    assert torch.equal(out.kept[0], out.kept[1])
    assert torch.equal(out.kept[0], out.kept[2])
    assert model.trace(batch[0], decide_up_to(model, None)).kept.all()


def test_stochastic_depth_is_keyed_by_the_image(batch):
    """The same images in another order: the same loss, whatever torch's generator does."""
    model = make(drop_path_rate=0.5)
    stage = FinetuneStage(model, None).train()
    images, labels, keys = batch
    order = torch.tensor([3, 1, 5, 0, 2, 4])
    losses = [stage(images, labels, keys)[0], stage(images[order], labels[order], keys[order])[0]]
    assert losses[0].item() == pytest.approx(losses[1].item(), rel=1e-6)
    assert stage(images, labels, keys + 1)[0].item() != pytest.approx(losses[0].item(), rel=1e-4)


@pytest.mark.parametrize(("progress", "kept"), [(0.0, 12), (0.5, 18), (0.9, 23), (1.0, 24)])
def test_fewer_and_fewer_patches_are_left_out_at_random(batch, progress, kept):
    images, labels, keys = batch
    stage = FinetuneStage(make(), None, patch_drop=0.5).train()
    stage.progress = progress
    lengths = set()
    run_blocks = stage.model.run_blocks

    def spy(packed, group):
        lengths.update(packed.lengths)
        return run_blocks(packed, group)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(stage.model, "run_blocks", spy)
        loss, metrics = stage(images, labels, keys)
    assert lengths == {1 + kept}
    assert metrics["keep_ratio_greedy"] == pytest.approx(kept / 24)
    order = torch.tensor([3, 1, 5, 0, 2, 4])
    assert stage(images[order], labels[order], keys[order])[0].item() == pytest.approx(loss.item(), rel=1e-9)
    assert (stage(images, labels, keys + 1)[0].item() == pytest.approx(loss.item(), rel=1e-9)) == (kept == 24)


def test_a_teacher_that_says_what_the_model_says_teaches_nothing(batch):
    images, labels, keys = batch
    model = make()
    teacher = copy.deepcopy(model.backbone).eval()
    head = model.backbone.head.weight
    stage = FinetuneStage(model, None, teacher=teacher, distill=1.0).train()
    loss, _ = stage(images, labels, keys)
    with torch.no_grad():
        entropy = torch.distributions.Categorical(logits=teacher(images)).entropy().mean()
    assert loss.item() == pytest.approx(entropy.item(), rel=1e-9)
    (soft,) = torch.autograd.grad(loss, head)
    assert soft.abs().max() < 1e-12

    with torch.no_grad():
        teacher.head.bias += torch.tensor([3.0, 0.0, -3.0])
    losses = []
    for distill in (0.0, 0.25, 1.0):
        stage.distill = distill
        losses.append(stage(images, labels, keys)[0].item())
    assert losses[1] == pytest.approx(0.75 * losses[0] + 0.25 * losses[2], rel=1e-9)
    assert losses[2] > entropy + 0.1
    assert all(p.grad is None for p in teacher.parameters())


def test_the_features_of_the_dense_model_are_a_target(batch):
    images, labels, keys = batch
    model = make()
    with pytest.raises(InputError, match="need a teacher"):
        FinetuneStage(model, 1, distill_features=1.0)
    teacher = copy.deepcopy(model.backbone).eval()
    model.backbone.head_drop.p = 0.5
    whole = FinetuneStage(model, 1, teacher=teacher, distill_features=1.0, decide=keep_all).train()
    _, metrics = whole(images, labels, keys)
    assert metrics["feature_error"].item() == pytest.approx(0, abs=1e-12), "dropout is not in the features"
    assert model.backbone.head_drop.training
    model.backbone.head_drop.p = 0.0
    for depth in (5, 7):
        other = iared2.from_timm("deit_tiny_patch16_224", **{**SMALL, "depth": depth}).double().backbone
        with pytest.raises(InputError, match="another kind of backbone"):
            FinetuneStage(model, 1, teacher=other, distill=1.0)

    losses = [
        FinetuneStage(model, 1, teacher=teacher, distill_features=weight).train()(images, labels, keys)[0]
        for weight in (0.0, 2.0)
    ]
    seen = []
    hook = model.backbone.head.register_forward_pre_hook(lambda _, args: seen.append(args[0]))
    masked_forward(model.eval(), images, decide_up_to(model, 1))
    hook.remove()
    with torch.no_grad():
        wanted = teacher.forward_head(teacher.forward_features(images), pre_logits=True)
    error = ((torch.cat(seen) - wanted).square().sum(1) / wanted.square().sum(1)).mean()
    assert error > 1e-3
    assert (losses[1] - losses[0]).item() == pytest.approx(2 * error.item(), rel=1e-9)
    (gradient,) = torch.autograd.grad(losses[1] - losses[0], model.backbone.norm.weight)
    (expected,) = torch.autograd.grad(2 * error, model.backbone.norm.weight)
    torch.testing.assert_close(gradient, expected)


@pytest.mark.parametrize("shared", [True, False])
def test_the_dense_model_does_not_run_again_what_is_frozen(batch, shared):
    """Where nothing is dropped and nothing learns, the tokens are the same; elsewhere it sees the images."""
    images, labels, keys = batch
    model = make()
    model.threshold = (0.0 if shared else 0.5, 0.5, 0.5)
    teacher = copy.deepcopy(model.backbone).eval()
    seen = []
    teacher.patch_embed.register_forward_pre_hook(lambda *_: seen.append("patches"))
    loss, _ = FinetuneStage(model, 1, teacher=teacher, distill=1.0).train()(images, labels, keys)
    assert len(seen) == (not shared)
    with torch.no_grad():
        soft = teacher(images).softmax(1)
        logits = model.eval()(images, decide_up_to(model, 1))
    assert loss.item() == pytest.approx(torch.nn.functional.cross_entropy(logits, soft).item(), rel=1e-9)
    with torch.no_grad():
        teacher.blocks[0].mlp.fc1.bias += 0.1
    seen.clear()
    FinetuneStage(model, 1, teacher=teacher, distill=1.0).train()(images, labels, keys)
    assert seen == ["patches"], "another start"


def test_another_decision_takes_the_place_of_the_models_own(batch):
    images, labels, keys = batch
    shares = (0.75, 0.5, 0.25)
    for group, kept in ((0, 18), (1, 12)):
        model = make()
        _, metrics = FinetuneStage(model, group, decide=by_share(shares)).train()(images, labels, keys)
        assert metrics["keep_ratio_greedy"] == pytest.approx(kept / 24)
        out = model.eval().trace(images, decide_up_to(model, group, by_share(shares)))
        assert out.kept.sum(-1).eq(kept).all(1).tolist() == [g >= group for g in range(3)]


def test_vectors_learn_and_matrices_stay(batch):
    model = make()
    stage = FinetuneStage(model, 1, vectors_only=True).train()
    stage(*batch)[0].backward()
    learned = {name for name, parameter in model.named_parameters() if parameter.grad is not None}
    assert all(dict(model.named_parameters())[name].ndim == 1 for name in learned)
    assert {"backbone.blocks.2.norm1.weight", "backbone.blocks.5.mlp.fc2.bias", "backbone.head.bias"} <= learned
    assert not any(name.startswith(("backbone.blocks.1.", "interpreters.")) for name in learned)
