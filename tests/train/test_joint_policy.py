"""All groups in one stage, and rewards that ask the dense model."""

from __future__ import annotations

import copy
from dataclasses import replace

import pytest
import torch
from policy_steps import LABEL, stage_of

import iared2
from iared2 import InputError, keyed
from iared2.model.decide import sample
from iared2.train.curriculum import stages_of
from iared2.train.policy_gradient import PolicyConfig, PolicyGradientStage
from iared2.train.recipe import read_recipe
from iared2.train.reward import RewardConfig, overlap, reward


@pytest.fixture
def three_groups():
    """A model of three groups, its dense teacher, four images and their keys."""
    torch.manual_seed(0)
    model = iared2.from_timm(
        "deit_tiny_patch16_224", img_size=16, patch_size=4, embed_dim=32, depth=3, num_heads=2, num_classes=3
    ).eval()
    with torch.no_grad():
        for name, p in model.named_parameters():
            if name.endswith(("query.weight", "key.weight", "pos_embed", "cls_token", "head.weight")):
                p.normal_(std=0.5)
    teacher = copy.deepcopy(model.backbone).eval()
    return model, teacher, torch.randn(4, 3, 16, 16), keyed.sample_keys(0, 0, torch.arange(4))


JOINT = PolicyConfig(keep=(0.75, 0.5, 0.25), joint=True, samples=2, rloo=True, equal_counts=True)


def test_a_joint_step_divides_the_batch_over_the_groups(three_groups):
    model, teacher, images, keys = three_groups
    labels = torch.zeros(4, dtype=torch.int64)
    config = RewardConfig(label="dense", divergence=1.0)
    stage = PolicyGradientStage(model, [0, 2], config, JOINT, teacher).train()
    loss, metrics = stage(images, labels, keys)
    loss.backward()
    parts = [stage.of_group(g, images[i::2], labels[i::2], keys[i::2]) for i, g in enumerate([0, 2])]
    assert loss.item() == pytest.approx(sum(part.item() for part, _ in parts) / 2, rel=1e-5)
    assert metrics["reward"].item() == pytest.approx(sum(found["reward"].item() for _, found in parts) / 2)
    moved = [any(p.grad is not None and p.grad.any() for p in own.parameters()) for own in model.interpreters]
    assert moved == [True, False, True]
    with pytest.raises(iared2.InputError, match="larger batch_size"):
        stage(images[:1], labels[:1], keys[:1])


def test_in_a_joint_step_the_other_groups_decide_as_they_are_deployed(three_groups):
    model, _, images, keys = three_groups
    stage = PolicyGradientStage(model, [0, 1, 2], RewardConfig(), JOINT).train()
    counts = {}
    decide = model.decide

    def spy(scores, alive, group, decision):
        keep = decide(scores, alive, group, decision)
        counts[group] = keep.sum(1).tolist()
        return keep

    model.decide = spy
    stage.of_group(1, images, torch.zeros(4, dtype=torch.int64), keys)
    assert counts[0] == [12] * 4
    assert len(counts[1]) == 8  # two draws of each image
    assert len(set(counts[1])) > 1
    assert counts[2] == [4] * 8


def test_the_divergence_from_the_dense_model_is_subtracted_from_the_reward(three_groups):
    model, teacher, images, keys = three_groups
    labels = torch.zeros(4, dtype=torch.int64)
    rewards = []
    for weight in (0.0, 1.0, 3.0):
        config = RewardConfig(label="dense", divergence=weight)
        stage = PolicyGradientStage(model, [2], config, replace(JOINT, joint=False), teacher).train()
        rewards.append(stage(images, labels, keys)[1]["reward"].item())
    assert rewards[0] - rewards[1] > 1e-5
    assert rewards[0] - rewards[2] == pytest.approx(3 * (rewards[0] - rewards[1]), rel=1e-4)


def test_without_a_baseline_there_is_no_greedy_pass(enumerated):
    model, image, _, _ = enumerated
    seen = []
    head = model.head
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(model, "head", lambda packed: seen.append(packed.num_images) or head(packed))
        for rloo in (True, False):
            stage = stage_of(model, PolicyConfig(samples=3, rloo=rloo))
            keys = keyed.sample_keys(1, 0, torch.arange(4))
            _, metrics = stage(image.expand(4, -1, -1, -1), torch.full((4,), LABEL), keys)
            assert any(name.endswith("greedy") for name in metrics) is not rloo
    assert seen == [12, 16]
    model.requires_grad_(True)


@pytest.mark.parametrize(
    ("reward", "needed"), [("", False), ("label = 'dense'", True), ("divergence = 1.0", True), ("tau = 1.0", False)]
)
def test_the_dense_model_runs_only_for_rewards_that_need_it(three_groups, reward, needed, tmp_path):
    """Fine-tuning may need it all the same."""
    model, teacher, _, _ = three_groups
    (tmp_path / "recipe.toml").write_text(f"[reward]\n{reward}\n[finetune]\ndistill = 0.5\n")
    stages = stages_of(read_recipe(tmp_path / "recipe.toml"), model, teacher)
    steps = {stage.section: stage.step() for stage in stages}
    assert (steps["policy_gradient"].teacher is teacher) == needed
    assert steps["finetune"].teacher is teacher


def test_without_classes_the_reward_is_the_cosine_with_the_dense_embedding():
    torch.manual_seed(0)
    model = iared2.from_timm(
        "deit_tiny_patch16_224", img_size=16, patch_size=4, embed_dim=32, depth=3, num_heads=2, num_classes=0
    ).eval()
    images, keys = torch.randn(6, 3, 16, 16), keyed.sample_keys(0, 0, torch.arange(6))
    policy = PolicyConfig(keep=(0.5, 0.5, 0.25), joint=True, samples=2, rloo=True)
    config = RewardConfig(label="dense", divergence=0.5)
    with pytest.raises(InputError, match=r"reward\.label"):
        PolicyGradientStage(model, [0, 2], config, policy)
    stage = PolicyGradientStage(model, [0, 2], config, policy, model.backbone)
    labels = torch.zeros(6, dtype=torch.int64)
    loss, metrics = stage(images, labels, keys)
    loss.backward()
    assert any(parameter.grad.abs().sum() > 0 for parameter in model.interpreters[0].parameters())

    # the same by hand, for the draws of the last group alone
    _, last = stage.of_group(2, images, labels, keys)
    with torch.no_grad():
        packed, _, _ = model.reduce(model.embed(images), range(2), stage.greedy)
        scores = model.score(packed, 2)
        probability, _ = stage.probability(scores, packed.alive, 2)
        u = sample(probability, packed.alive, keys, 2, 2)
        ends, _, (keep,) = model.reduce(packed, range(2, 3), lambda scores, alive, group: u)
        cosine = torch.cosine_similarity(model.head(ends), model.backbone(images).repeat(2, 1)).double().clamp(0, 1)
    expected = reward(keep.sum(1), 16, cosine, config) - 0.5 * (1 - cosine)
    assert last["reward"].item() == pytest.approx(expected.mean().item(), abs=1e-5)
    assert last["top1_sampled"].item() == pytest.approx(100 * cosine.mean().item(), abs=1e-4)
    assert metrics["reward"].isfinite()

    # neighbours in place of the cosine
    _, found = PolicyGradientStage(model, [2], config, policy, model.backbone, neighbours=2)(images, labels, keys)
    with torch.no_grad():
        shared = overlap(model.backbone(images), model.head(ends), 2)
    assert 0 < shared.mean() < 1
    assert found["top1_sampled"].item() == pytest.approx(100 * shared.mean().item(), abs=1e-4)
    expected = reward(keep.sum(1), 16, shared, config) - 0.5 * (1 - cosine)
    assert found["reward"].item() == pytest.approx(expected.mean().item(), abs=1e-5)
    model.reset_classifier(3)
    with pytest.raises(InputError, match="neighbours is for models without classes"):
        PolicyGradientStage(model, [2], config, policy, model.backbone, neighbours=2)
