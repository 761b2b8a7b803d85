"""Merges each dropped patch into the most similar kept patch of its image.

The paper removes dropped patches (`PackedTokens.select`). Merging replaces the kept patch by the mean of all patches
merged into it, and attention counts a mean of m patches m times, as in token merging (Bolya et al., ICLR 2023). There,
a matching of all tokens selects the tokens to merge. Here, the policy selects them, and similarity only selects their
target. Heads that pool patches, and policy tokens that are a mean of patches, count each kept patch once.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from ..device import without_autocast
from .tokens import PackedTokens


def merge(packed: PackedTokens, keep: Tensor) -> PackedTokens:
    """`PackedTokens.select` that merges each dropped patch into a kept one. Differentiable in the features.

    Args:
        packed: the tokens.
        keep: ``(B, N)`` or ``(k·B, N)`` bool, as for `PackedTokens.select`. An image that keeps no patch loses all
            of them.
    """
    selected = packed.select(keep)
    if selected is packed:  # nothing was dropped
        return packed
    rows, rows_left, device = len(packed.x), len(selected.x), keep.device
    several, dense_rows = len(keep) // packed.num_images, packed.num_images * packed.num_tokens
    stays = F.pad(keep, (packed.num_prefix_tokens, 0), value=True).view(several, dense_rows)[:, packed.token_ids]

    # rows of `packed`, k times over -> rows of `selected`; one more row takes what has nowhere to go
    row_of = torch.full((several * dense_rows,), rows_left, device=device)
    row_of[selected.token_ids] = torch.arange(rows_left, device=device)
    place = packed.token_ids[most_alike(packed, stays)]  # (k, T)
    place = row_of[(place + dense_rows * torch.arange(several, device=device)[:, None]).flatten()]
    leaving = torch.nonzero_static(~stays.flatten(), size=several * rows - rows_left)[:, 0]
    place, leaving = place[leaving], leaving % rows

    dtype = torch.promote_types(packed.x.dtype, torch.float32)
    sizes = packed.x.new_ones(rows, dtype=dtype) if packed.sizes is None else packed.sizes
    own = sizes.new_ones(rows_left) if selected.sizes is None else selected.sizes
    total = F.pad(own, (0, 1)).index_add_(0, place, sizes[leaving])[:-1]
    x = F.pad(selected.x.to(dtype) * own[:, None], (0, 0, 0, 1))
    x = x.index_add_(0, place, packed.x[leaving].to(dtype) * sizes[leaving, None])[:-1] / total[:, None]
    return selected.with_x(x.to(packed.x.dtype), total)


def most_alike(packed: PackedTokens, stays: Tensor) -> Tensor:
    """For each dropped row, the kept patch of its image with the largest cosine similarity, in float32.

    Args:
        packed: the tokens; their features are compared without a norm layer before.
        stays: ``(k, T)`` bool, k selections of its rows.

    Returns:
        ``(k, T)`` int64 rows of ``packed``; undefined for rows that stay, and for images that keep no patch.
    """
    prefix, first, found = packed.num_prefix_tokens, 0, []
    # in half precision, training would merge differently from the deployed model
    with torch.no_grad(), without_autocast(packed.x.device):
        for x in packed.buckets(packed.x):  # (b, length, C)
            images, length = x.shape[:2]
            there = stays[:, first : first + images * length].view(-1, images, 1, length)[..., prefix:]
            best = torch.zeros(len(stays), images, length - prefix, dtype=torch.int64, device=x.device)
            if length > prefix:  # these images have patches
                x = F.normalize(x[:, prefix:].to(torch.promote_types(x.dtype, torch.float32)), dim=2)
                alike = x @ x.mT  # (b, n, n)
                best = torch.stack([alike.masked_fill(~t, -torch.inf).argmax(2) for t in there])  # (k, b, n)
            start = first + prefix + length * torch.arange(images, device=x.device)[:, None]
            found.append(F.pad(best + start, (prefix, 0), value=first).flatten(1))
            first += images * length
    return torch.cat(found, 1)
