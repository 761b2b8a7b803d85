"""A model whose answer rests on two known patches and on nothing else, by construction.

The backbone is written by hand: the class token attends to patches 3 and 13 of a 4 × 4 grid, reads how bright they are,
and says class 1 if both are. The interpreter is *not* planted: the policy gradient has to find out what is needed.
"""

from __future__ import annotations

from functools import lru_cache

import torch
from torch import Tensor

import iared2
from iared2 import ReducedVisionTransformer, keyed
from iared2.train.policy_gradient import PolicyGradientStage
from iared2.train.reward import RewardConfig

PLANTED = [3, 13]  # not in the centre, and not neighbours
GRID, PATCH, WIDTH = 4, 4, 16
LIGHT, SIGN, OTHER, CLASS, ANSWER = range(0, 10, 2)  # channels; beside each its opposite: LayerNorm finds mean 0


def planted_images(n: int, seed: int = 0) -> tuple[Tensor, Tensor]:
    """Dim noise ``(n, 3, 16, 16)`` in which each planted patch is bright or not, both in half of the images; labels."""
    generator = torch.Generator().manual_seed(seed)
    patches = 0.5 * torch.randn(n, GRID**2, 3, PATCH, PATCH, generator=generator)
    bright = torch.tensor([[0, 0], [0, 1], [1, 0], [1, 1], [1, 1], [1, 1]])[torch.randint(6, (n,), generator=generator)]
    patches[:, PLANTED] += bright[:, :, None, None, None]
    images = patches.unflatten(1, (GRID, GRID)).permute(0, 3, 1, 4, 2, 5).reshape(n, 3, GRID * PATCH, GRID * PATCH)
    return images, bright.all(1).long()


def patch_means(maps: Tensor) -> Tensor:
    """``(B, 16, 16) -> (B, N)``."""
    return torch.nn.functional.avg_pool2d(maps[:, None], PATCH).flatten(1)


@lru_cache(maxsize=1)
def planted_model() -> ReducedVisionTransformer:
    """One group of two blocks, trained for about two seconds; in evaluation mode."""
    model = untrained_model()
    learn(PolicyGradientStage(model, [0], RewardConfig(tau=1.0)), 200, 128)
    return model.eval().requires_grad_(True)


def untrained_model(misled: bool = False) -> ReducedVisionTransformer:
    """One group of two blocks, its interpreter as it was born but for a sign: it scores the planted patches highest.

    ``misled``: lowest. Which sign that takes is up to the draws, and they to the versions of timm and torch.
    """
    torch.manual_seed(0)
    size = {"img_size": GRID * PATCH, "patch_size": PATCH, "embed_dim": WIDTH, "depth": 2, "num_heads": 1}
    model = iared2.from_timm("deit_tiny_patch16_224", groups=1, num_classes=2, **size)
    _plant(model.backbone)
    with torch.no_grad():
        scores = model.eval().trace(planted_images(64)[0]).scores[0].mean(0)
    model.train()
    if (scores[PLANTED].mean() > scores.mean()) == misled:
        for parameter in model.interpreters[0].query.parameters():
            parameter.data.neg_()
    return model


def learn(stage: PolicyGradientStage, steps: int, batch_size: int) -> list[dict[str, Tensor]]:
    """Train the interpreter of the one group; the metrics of every step."""
    stage.train()
    optimizer = torch.optim.Adam(stage.model.interpreters.parameters(), 5e-3)
    metrics = []
    for step in range(steps):
        images, labels = planted_images(batch_size, seed=step + 1)
        stage.progress = step / steps
        loss, found = stage(images, labels, keyed.sample_keys(0, step, torch.arange(batch_size)))
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        metrics.append(found)
    return metrics


@torch.no_grad()
def _plant(vit) -> None:
    def write(tensor: Tensor, channel: int, value: float | Tensor) -> None:
        tensor[..., channel], tensor[..., channel + 1] = value, -value

    for name, parameter in vit.named_parameters():
        if "norm" not in name:
            parameter.zero_()
    write(vit.patch_embed.proj.weight.flatten(1).T, LIGHT, 1 / (3 * PATCH**2))
    write(vit.cls_token, CLASS, 4.0)
    marked = torch.zeros(1 + GRID**2)
    marked[[1 + n for n in PLANTED]] = 4
    write(vit.pos_embed[0], SIGN, marked)
    marked[1:] = 4 - marked[1:]
    write(vit.pos_embed[0], OTHER, marked)
    attn = vit.blocks[1].attn  # the first block does nothing
    q, k, v = attn.qkv.weight.chunk(3)
    q[0, CLASS], k[0, SIGN], k[0, OTHER], v[0, LIGHT] = 2.5, 1, -1, 1
    write(attn.proj.weight.T[0], ANSWER, 8)
    vit.head.weight[1, ANSWER], vit.head.bias[1] = 10, -20  # one bright patch gives at most 1.8, two at least 2.2
