"""What becomes of a dropped patch: nothing, or it joins the kept patch of its image that it is most like.

The paper's dropped patches are gone (`PackedTokens.select`). Joined, they leave their mean in the patch they join, and
attention counts that patch as often as it stands for a patch, as in token merging (Bolya et al., ICLR 2023). There a
matching of all tokens says which of them go; here the policy does, and only where they go follows from likeness.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from .tokens import PackedTokens


def merge(packed: PackedTokens, keep: Tensor) -> PackedTokens:
    """`PackedTokens.select`, but each patch that goes joins a patch that stays. Differentiable in the features.

    Args:
        packed: the tokens.
        keep: ``(B, N)`` or ``(k·B, N)`` bool, as for `PackedTokens.select`. Of an image that keeps no patch all are
            gone.
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

    sizes = packed.x.new_ones(rows, dtype=torch.float32) if packed.sizes is None else packed.sizes
    own = F.pad(sizes.new_ones(rows_left) if selected.sizes is None else selected.sizes, (0, 1))
    total = own.index_add(0, place, sizes[leaving])[:-1]
    x = F.pad(selected.x.float() * own[:-1, None], (0, 0, 0, 1))
    x = x.index_add(0, place, packed.x[leaving].float() * sizes[leaving, None])[:-1] / total[:, None]
    return selected.with_x(x.to(packed.x.dtype), total)


def most_alike(packed: PackedTokens, stays: Tensor) -> Tensor:
    """For each row that leaves, the patch of its image that stays and has the largest cosine with it.

    Args:
        packed: the tokens.
        stays: ``(k, T)`` bool, k selections of its rows.

    Returns:
        ``(k, T)`` int64 rows of ``packed``; what it says of rows that stay, and where no patch does, means nothing.
    """
    prefix, first, found = packed.num_prefix_tokens, 0, []
    with torch.no_grad():
        for x in packed.runs(packed.x):  # (b, length, C)
            images, length = x.shape[:2]
            x = F.normalize(x[:, prefix:].float(), dim=2)
            alike = x @ x.mT  # (b, n, n)
            there = stays[:, first : first + images * length].view(-1, images, 1, length)[..., prefix:]
            best = torch.stack([alike.masked_fill(~t, -torch.inf).argmax(2) for t in there])  # (k, b, n)
            start = first + prefix + length * torch.arange(images, device=x.device)[:, None]
            found.append(F.pad(best + start, (prefix, 0)).flatten(1))
            first += images * length
    return torch.cat(found, 1)
