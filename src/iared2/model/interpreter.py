"""The multi-head interpreter: tokens -> one score per patch (paper, section 3; method.md section 1).

It knows nothing of groups or thresholds. Deviation from the authors' code: they project every token to 3C values and
use two thirds of a query-key product against *one* query; here the query goes through the key matrix once
(``q·(W x + b) = (Wᵀ q)·x + b·q``), which gives the same number at H·C instead of 3·C² MACs per token.
"""

from __future__ import annotations

import math
from typing import Any

import torch
import torch.nn.functional as F
from timm.models.vision_transformer import Block
from torch import Tensor, nn

from ..device import without_autocast
from ..errors import InputError
from .tokens import PackedTokens


class MultiHeadInterpreter(nn.Module):
    """Scores how informative each patch is.

    Args:
        embed_dim: C.
        num_heads: H, must divide C.
        relative: score patches relative to each other, with a softmax instead of the sigmoid (not in the paper).
    """

    def __init__(self, embed_dim: int, num_heads: int, relative: bool = False) -> None:
        super().__init__()
        self.num_heads, self.relative = num_heads, relative
        self.query = nn.Linear(embed_dim, embed_dim)
        self.key = nn.Linear(embed_dim, embed_dim)
        for parameter in self.parameters():  # biases too: an untrained class token is nearly zero, so scores would tie
            nn.init.trunc_normal_(parameter, std=0.02)

    def start_as_attention(self, block: Any) -> None:
        """Copy the query and key of a block: with ``relative``, the scores are the attention of its class token.

        Args:
            block: a timm ``Block``; the weights of its first norm are folded into the copy. The scores are equal up to
                rounding, since the epsilon of that norm differs.

        Raises:
            InputError: the attention of the block is not a plain product of linear queries and keys.
        """
        if type(block) is not Block or not isinstance(block.norm1, nn.LayerNorm):
            raise InputError(
                f"an interpreter cannot start as the attention of a {type(block).__name__}: it needs timm's Block,"
                " which neither rotates queries and keys nor has parallel branches, with a LayerNorm before attention"
            )
        norm, attn = block.norm1, block.attn
        if not all(type(n) is nn.Identity for n in (attn.q_norm, attn.k_norm)):
            raise InputError("an interpreter cannot start as this attention: it normalises queries or keys")
        with torch.no_grad():
            weight = attn.qkv.weight[: 2 * attn.qkv.in_features].float()
            bias = weight.new_zeros(len(weight)) if attn.qkv.bias is None else attn.qkv.bias[: len(weight)].float()
            bias = bias + weight @ norm.bias.float()
            for layer, w, b in zip(
                (self.query, self.key), (weight * norm.weight.float()).chunk(2), bias.chunk(2), strict=True
            ):
                layer.weight.copy_(w)
                layer.bias.copy_(b)

    def forward(self, packed: PackedTokens, has_class_token: bool = True) -> Tensor:
        """Informativeness ``I = (1/H) Σ_h sigmoid(q^h · k_j^h / sqrt(C/H))`` of each patch; see `compare`.

        Args:
            packed: the tokens as they enter the group.
            has_class_token: the first prefix token is the policy token; else the mean of the patches alive is.

        Returns:
            ``(B, N)`` in (0, 1), 0 where the patch was dropped. Computed in float32 in any precision of the model
            (float64 for a float64 model), since scores close to 0.5 would tie in half precision.
        """
        with without_autocast(packed.x.device):
            width, prefix = packed.x.shape[1], packed.num_prefix_tokens
            x = packed.x.to(torch.promote_types(packed.x.dtype, torch.float32))
            if _is_padded(packed):
                return self.score_dense(packed.to_dense(x), prefix, has_class_token, packed.alive)
            x_hat = F.layer_norm(x, (width,), eps=1e-5)  # (T, C)
            if has_class_token:
                p_hat = x_hat.index_select(0, packed.first_rows)  # (B, C), packed order
            else:
                p_hat = F.layer_norm(
                    torch.cat([rows[:, prefix:].mean(1) for rows in packed.buckets(x)]), (width,), eps=1e-5
                )

            u, bias = self.directions(p_hat)
            scores, image = [], 0
            for rows in packed.buckets(x_hat):  # (b, n, C)
                images = slice(image, image := image + len(rows))
                found = self.compare(rows[:, prefix:], u[images], bias[images])
                scores.append(F.pad(found, (prefix, 0)).flatten())
            return packed.to_dense(scores[0] if len(scores) == 1 else torch.cat(scores))[:, prefix:]

    def score_dense(self, x: Tensor, prefix: int, has_class_token: bool = True, alive: Tensor | None = None) -> Tensor:
        """`forward` in one launch, for tokens that are not packed: also what is exported.

        Args:
            x: ``(B, S, C)`` float32, with ``prefix`` tokens that are no patches first.
            alive: ``(B, S − prefix)`` bool, if not all patches are; the score of the others is 0.
        """
        width, patches = x.shape[2], x[:, prefix:]
        normed = F.layer_norm(x, (width,), eps=1e-5)
        if has_class_token:
            p_hat = normed[:, 0]
        elif alive is None:
            p_hat = F.layer_norm(patches.mean(1), (width,), eps=1e-5)
        else:
            share = alive[..., None].to(x.dtype)
            p_hat = F.layer_norm((patches * share).sum(1) / share.sum(1).clamp(min=1), (width,), eps=1e-5)
        return self.compare(normed[:, prefix:], *self.directions(p_hat), alive)

    def directions(self, p_hat: Tensor) -> tuple[Tensor, Tensor]:
        """The query, multiplied by the key matrix: ``x̂ · u + bias`` is the query-key product of a patch in every head.

        Args:
            p_hat: ``(B, C)`` normalised policy tokens.

        Returns:
            ``u (B, C, H)`` and ``bias (B, 1, H)``.
        """
        dtype, heads = p_hat.dtype, self.num_heads
        q = F.linear(p_hat, self.query.weight.to(dtype), self.query.bias.to(dtype))
        q = q.unflatten(1, (heads, -1)).transpose(0, 1)  # (H, B, C/H)
        u = torch.bmm(q, self.key.weight.to(dtype).unflatten(0, (heads, -1)))  # (H, B, C)
        bias = torch.bmm(q, self.key.bias.to(dtype).view(heads, -1, 1))  # (H, B, 1)
        return u.permute(1, 2, 0), bias.permute(1, 2, 0)

    def compare(self, x_hat: Tensor, u: Tensor, bias: Tensor, alive: Tensor | None = None) -> Tensor:
        """``(b, n)`` scores of the n patches alive in b images.

        With ``relative`` they are ``r / (1 + r)`` of ``r = (n/H) Σ_h softmax_j(q^h · k_j^h / sqrt(C/H))``. A patch with
        an equal share of the attention has score 0.5. A shift of all logits has no effect, so one threshold keeps
        nearly the same number of patches of every image.

        Args:
            x_hat: ``(b, n, C)`` normalised patches.
            u, bias: of `directions`.
            alive: ``(b, n)`` bool, if not all of them are; the score of the others is 0.
        """
        scale = 1 / math.sqrt(x_hat.shape[2] // self.num_heads)
        logits = torch.baddbmm(bias, x_hat, u, beta=scale, alpha=scale)  # (b, n, H)
        if not self.relative:
            scores = logits.sigmoid().mean(-1)
        else:
            number: int | Tensor = x_hat.shape[1]
            if alive is not None:
                logits, number = logits.masked_fill(~alive[..., None], -torch.inf), alive.sum(1, keepdim=True)
            received = logits.softmax(1).mean(-1) * number
            scores = received / (1 + received)
        return scores if alive is None else scores.masked_fill(~alive, 0)  # NaN where no patch is alive


def _is_padded(packed: PackedTokens) -> bool:
    """On a GPU, launches for each of a hundred lengths would take as long as the blocks."""
    return packed.x.is_cuda and len(packed.bucket_sizes) > 1
