"""Raw attention and rollout against the masked oracle: dense tokens, whole matrices, nothing removed."""

from __future__ import annotations

import copy

import pytest
import torch
from oracle import masked_forward
from tiny import sharp_images, sharp_model
from torch import Tensor

from iared2 import ReducedVisionTransformer
from iared2.explain.attention_maps import raw_attention, rollout
from iared2.model.block import attentions
from iared2.model.decide import Decision, keep_all


def plain_attention(model: ReducedVisionTransformer, images: Tensor, dense: bool) -> tuple[list[Tensor], Tensor]:
    """Of each block ``(B, S, S)``, mean over heads, dead tokens attended to by nobody; and who lives at the end."""
    model, weights = copy.deepcopy(model), []
    for block in model.backbone.blocks:
        weights.append([])
        for attn in attentions(block):  # timm's plain attention drops its weights
            attn.fused_attn = False
            attn.attn_drop.register_forward_hook(lambda _, args, out, seen=weights[-1]: seen.append(out))
    with torch.no_grad():
        _, _, kept = masked_forward(model, images, keep_all if dense else Decision(model.thresholds))
    return [torch.cat(seen, 1).mean(1) for seen in weights], kept


def plain_queries(model: ReducedVisionTransformer, alive: Tensor) -> Tensor:
    """``(B, S)``: the class token, or every living patch alike."""
    patches = alive / alive.sum(1, keepdim=True).clamp_min(1)
    prefix = torch.zeros(len(alive), model.backbone.num_prefix_tokens)
    if model.backbone.cls_token is not None:
        prefix[:, 0] = 1
        patches = 0 * patches
    return torch.cat([prefix, patches], 1)


@pytest.fixture(params=[True, False], ids=["dense", "reduced"])
def case(request, family):
    """A model, whether to take its dense backbone, the model to ask, and images."""
    model = sharp_model(family)
    return model, request.param, model.backbone if request.param else model, sharp_images()


@torch.no_grad()
def test_raw_attention_of_any_block_equals_the_oracle(case):
    model, dense, asked, images = case
    attention, kept = plain_attention(model, images, dense)
    for block, weights in enumerate(attention):
        group = next(g for g, blocks in enumerate(model.groups) if block in blocks)
        alive = kept[group]
        expected = torch.einsum("bq,bqk->bk", plain_queries(model, alive), weights)[
            :, model.backbone.num_prefix_tokens :
        ]
        found = raw_attention(asked, images, block)
        torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-6)
        assert found.std() > 1e-3, "attention that does not vary would hide a difference"
        assert (found[~alive] == 0).all()
    if not dense:
        assert len(set(kept[1].sum(1).tolist())) > 1, "the batch should be ragged"


@torch.no_grad()
def test_rollout_equals_the_product_of_whole_matrices(case):
    model, dense, asked, images = case
    attention, kept = plain_attention(model, images, dense)
    product = torch.eye(attention[0].shape[-1])
    for weights in attention:
        product = (weights + torch.eye(weights.shape[-1])) / 2 @ product
    expected = torch.einsum("bq,bqk->bk", plain_queries(model, kept[-1]), product)[
        :, model.backbone.num_prefix_tokens :
    ]
    found = rollout(asked, images)
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-6)
    assert (found[~kept[0]] == 0).all()
    assert found.std() > 1e-3


@torch.no_grad()
def test_it_does_not_matter_whether_timm_fuses_attention(case):
    _, _, asked, images = case
    backbone = getattr(asked, "backbone", asked)
    found = []
    for fused in (True, False):
        for block in backbone.blocks:
            for attn in attentions(block):
                attn.fused_attn = fused
        found.append((raw_attention(asked, images, 1), rollout(asked, images)))
    torch.testing.assert_close(found[0], found[1], rtol=0, atol=0)
