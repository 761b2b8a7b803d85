"""Grad-CAM and integrated gradients against the masked oracle, which is dense and differentiates by itself."""

from __future__ import annotations

import importlib
import threading

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from oracle import masked_forward
from timm.models.eva import EvaBlockPostNorm
from timm.models.vision_transformer import ResPostBlock
from tiny import sharp_images, sharp_model
from torch import Tensor

import iared2
from iared2 import InputError, ReducedVisionTransformer
from iared2.explain.gradients import KIN, STEPS, grad_cam, integrated_gradients, optional
from iared2.model.decide import Decision, keep_all

TARGET = torch.tensor([3, 0, 6, 1, 5])


def unit(maps: Tensor) -> Tensor:
    low, high = maps.amin((1, 2), keepdim=True), maps.amax((1, 2), keepdim=True)
    return (maps - low) / (high - low).clamp_min(1e-12)


def plain_cam(model: ReducedVisionTransformer, images: Tensor, decide, method: str, block: int) -> Tensor:
    """The formulas of the papers on dense activations (B, C, rows, columns); those of dead patches are 0."""
    seen, there = [], model.backbone.blocks[block]
    if type(there) in (ResPostBlock, EvaBlockPostNorm):  # no norm before attention
        hooks = [there.register_forward_pre_hook(lambda _, args: seen.append(args[0]))]
    else:
        norms = [part.norm for part in there.attns] if hasattr(there, "attns") else [getattr(there, "in_norm", None)]
        hooks = [(norm or there.norm1).register_forward_hook(lambda *args: seen.append(args[2])) for norm in norms]
    logits, _, kept = masked_forward(model, images, decide)
    for hook in hooks:
        hook.remove()
    group = next(g for g, blocks in enumerate(model.groups) if block in blocks)
    chosen = logits.gather(1, TARGET[:, None]).sum()
    cams = []
    for activations, gradient in zip(seen, torch.autograd.grad(chosen, seen), strict=True):
        a, g = (
            (x[:, model.backbone.num_prefix_tokens :] * kept[group][..., None]).mT.unflatten(2, model.grid_size)
            for x in (activations.detach(), gradient)
        )
        if method == "gradcam":
            cam = (g.mean((2, 3), keepdim=True) * a).sum(1)
        elif method == "gradcam++":
            alpha = g**2 / (2 * g**2 + a.sum((2, 3), keepdim=True) * g**3 + 1e-6)
            cam = ((torch.where(g != 0, alpha, 0) * g.relu()).sum((2, 3), keepdim=True) * a).sum(1)
        elif method == "hirescam":
            cam = (g * a).sum(1)
        else:
            cam = (g.relu() * a).sum(1)
        cams.append(F.interpolate(unit(cam.relu())[:, None], images.shape[-2:], mode="bilinear")[:, 0])
    return unit(sum(cams))


@pytest.mark.parametrize("dense", [True, False], ids=["dense", "reduced"])
def test_grad_cam_and_its_kin_equal_the_oracle(family, dense):
    model, images = sharp_model(family), sharp_images()
    decide = keep_all if dense else Decision(model.thresholds)
    blocks = (len(model.backbone.blocks) - 1, 2)
    for method, block in ((m, b) for m in KIN for b in blocks):
        found = grad_cam(model.backbone if dense else model, images, TARGET, method, block)
        expected = plain_cam(model, images, decide, method, block)
        torch.testing.assert_close(unit(found), expected, rtol=0, atol=1e-4)
        assert expected.std() > 0.05


@pytest.mark.parametrize("dense", [True, False], ids=["dense", "reduced"])
def test_integrated_gradients_equal_the_oracle(family, dense):
    model, images = sharp_model(family), sharp_images()
    with torch.no_grad():
        kept = model.trace(images, keep_all if dense else None).kept
    nodes, weights = np.polynomial.legendre.leggauss(STEPS)  # on (-1, 1)
    mean = torch.zeros_like(images)
    for node, weight in zip((nodes + 1) / 2, weights / 2, strict=True):
        x = (node * images).float().requires_grad_()
        logits, _, _ = masked_forward(model, x, lambda scores, alive, group: kept[group])
        mean += weight * torch.autograd.grad(logits.gather(1, TARGET[:, None]).sum(), x)[0]
    pixels = (mean * images).sum(1)
    expected = F.avg_pool2d(pixels[:, None], 8).flatten(1).clamp_min(0)
    found = integrated_gradients(model.backbone if dense else model, images, TARGET)
    torch.testing.assert_close(found, expected, rtol=1e-3, atol=1e-4 * expected.max().item())
    if not dense:
        assert (found[~kept[0]] == 0).all()


@pytest.mark.parametrize("explain", [grad_cam, integrated_gradients])
def test_the_class_of_no_target_is_the_top_1(explain):
    model, images = (
        sharp_model(("deit_tiny_patch16_224", {"img_size": 32, "patch_size": 8, "depth": 3})),
        sharp_images(4, 32),
    )
    top1 = model(images).argmax(1)
    torch.testing.assert_close(explain(model, images, None), explain(model, images, top1))
    assert not torch.allclose(explain(model, images, top1), explain(model, images, (top1 + 1) % 1000))


@pytest.mark.parametrize("explain", [grad_cam, integrated_gradients])
def test_the_model_stays_as_it_is(explain):
    model = sharp_model(("deit_tiny_patch16_224", {"img_size": 32, "patch_size": 8, "depth": 3})).train()
    images = sharp_images(2, 32)
    model(images).sum().backward()
    before = {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}
    explain(model, images, None)
    assert all(module.training for module in model.modules())
    assert all(parameter.requires_grad for parameter in model.parameters())
    assert not any(m._forward_hooks or m._forward_pre_hooks for m in model.modules())
    assert before
    for name, gradient in before.items():
        assert torch.equal(model.get_parameter(name).grad, gradient)
    with torch.inference_mode():  # the caller has turned gradients off
        assert explain(model.eval(), images.clone(), None).max() > 0


def test_threads_do_not_see_each_others_hooks():
    model = sharp_model(("deit_tiny_patch16_224", {"img_size": 32, "patch_size": 8, "depth": 3}))
    batches = [sharp_images(n, 32) + n for n in (1, 2, 3, 4)]
    alone = [grad_cam(model, images, None) for images in batches]
    together: list[list[Tensor]] = [[] for _ in batches]

    def work(index: int) -> None:
        together[index] += [grad_cam(model, batches[index], None) for _ in range(5)]

    threads = [threading.Thread(target=work, args=(i,)) for i in range(len(batches))]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    for maps, expected in zip(together, alone, strict=True):
        assert len(maps) == 5
        for found in maps:
            torch.testing.assert_close(found, expected, rtol=0, atol=1e-5)


def test_a_missing_package_is_one_line_that_says_what_to_install(monkeypatch):
    monkeypatch.setattr(importlib, "import_module", _raise)
    with pytest.raises(InputError, match=r"needs the package captum.*pip install '.\[explain\]'"):
        optional("captum.attr", "explain", "captum")


def _raise(name: str):
    raise ModuleNotFoundError(f"No module named {name!r}", name=name)


def test_the_package_itself_on_timms_own_model_says_the_same():
    """What a user of `grad-cam` would write for the dense model, hooks on the user's model and all."""
    from pytorch_grad_cam import GradCAM
    from pytorch_grad_cam.utils.model_targets import ClassifierOutputTarget

    model, images = (
        sharp_model(("deit_tiny_patch16_224", {"img_size": 32, "patch_size": 8, "depth": 3})),
        sharp_images(3, 32),
    )
    vit = model.backbone

    def grid(x: Tensor) -> Tensor:
        return x[:, 1:].mT.reshape(len(x), -1, 4, 4)

    with GradCAM(vit, [vit.blocks[-1].norm1], reshape_transform=grid) as cam:
        expected = cam(images, [ClassifierOutputTarget(label) for label in (0, 4, 7)])
    found = iared2.heatmap(vit, images, "gradcam", torch.tensor([0, 4, 7]))
    assert np.abs(found.numpy() - expected).max() <= 1e-5
