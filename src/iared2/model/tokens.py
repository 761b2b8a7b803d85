"""PackedTokens: a ragged batch laid end to end.

Owns the layout of the rows and every conversion between the dense and the packed form. Does not depend on attention,
scores or timm.

Shape letters, used in the whole package: B images, N patches per image, P prefix tokens (class, distillation,
registers), S = P + N, T packed tokens, C width, H heads, D groups, K classes.

The rows of an image are contiguous: its prefix tokens, then its patches alive by ascending position. Images are sorted
by length, so images of equal length form a *bucket*, a view ``(images, length, C)`` of the rows, not a copy. Attention,
pooling and the interpreter work bucket by bucket without padding or gather.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from copy import copy
from dataclasses import dataclass, replace
from functools import cached_property
from itertools import accumulate, groupby

import torch
from torch import Tensor


@dataclass(frozen=True)
class PackedTokens:
    """A batch of images with different numbers of tokens.

    Attributes:
        x: ``(T, C)`` token features, T = sum of all lengths.
        token_ids: ``(T,)`` int64, the index of each row in the dense batch: ``image * S + position``, position in
            0…P−1 for prefix tokens and P…S−1 for patches.
        lengths: tokens of each image in packed order, including prefix tokens; ascending. On the host, for the views.
        num_images: B.
        num_prefix_tokens: P.
        grid_size: of the whole image: rows and columns of patches; of a clip, times, rows and columns.
        alive: ``(B, N)`` bool, the patches that are not dropped.
        keys: ``(B,)`` int64 keys of the images' random draws (keyed.py), or None for torch's generator.
        sizes: ``(T,)`` float32, the number of patches of which each row is the mean (merge.py), or None: one.
        rotary: ``(L or 1, S, H or 1, 2·head_dim)``, sine and cosine of the angles by which attention rotates queries
            and keys at each position of an image: in each of L blocks and H heads, or in all alike. None: no rotation.
    """

    x: Tensor
    token_ids: Tensor
    lengths: tuple[int, ...]
    num_images: int
    num_prefix_tokens: int
    grid_size: tuple[int, ...]
    alive: Tensor
    keys: Tensor | None = None
    sizes: Tensor | None = None
    rotary: Tensor | None = None

    @classmethod
    def from_dense(
        cls,
        x: Tensor,
        num_prefix_tokens: int,
        alive: Tensor | None = None,
        keys: Tensor | None = None,
        rotary: Tensor | None = None,
        grid_size: tuple[int, ...] | None = None,
    ) -> PackedTokens:
        """Pack ``x (B, S, C)``; ``alive (B, N)`` bool leaves out the patches where it is False.

        Without ``grid_size``, the patches are taken as one row.
        """
        num_images, num_tokens, width = x.shape
        packed = cls(
            x=x.reshape(-1, width),
            token_ids=torch.arange(num_images * num_tokens, device=x.device),
            lengths=(num_tokens,) * num_images,
            num_images=num_images,
            num_prefix_tokens=num_prefix_tokens,
            grid_size=grid_size or (num_tokens - num_prefix_tokens,),
            alive=torch.ones(num_images, num_tokens - num_prefix_tokens, dtype=torch.bool, device=x.device),
            keys=keys,
            rotary=rotary,
        )
        return packed if alive is None else packed.select(alive)

    @property
    def num_patches(self) -> int:
        """N, of the whole image."""
        return math.prod(self.grid_size)

    @property
    def num_tokens(self) -> int:
        """S, the tokens of a whole image."""
        return self.num_prefix_tokens + self.num_patches

    # Values that depend only on the layout are cached: every block of a group needs them.

    @cached_property
    def starts(self) -> list[int]:
        """First row of each image in packed order, followed by T: B + 1 numbers."""
        return [0, *accumulate(self.lengths)]

    @cached_property
    def cu_seqlens(self) -> Tensor:
        """``(B + 1,)`` int32 cumulative lengths on the tokens' device."""
        return torch.tensor(self.starts, dtype=torch.int32).to(self.x.device, non_blocking=True)

    @property
    def max_seqlen(self) -> int:
        return self.lengths[-1]

    @cached_property
    def first_rows(self) -> Tensor:
        """``(B,)`` int64, row of the first token of each image, in packed order."""
        return torch.tensor(self.starts[:-1]).to(self.x.device, non_blocking=True)

    @cached_property
    def image_ids(self) -> Tensor:
        """``(B,)`` int64, the index in the dense batch of each packed image."""
        return self.token_ids[self.first_rows] // self.num_tokens

    @cached_property
    def log_sizes(self) -> Tensor | None:
        """``(T,)`` float32, the bias that attention adds to the logit of each row as a key."""
        return None if self.sizes is None else self.sizes.log()

    @cached_property
    def positions(self) -> Tensor:
        """``(T,)`` int64, the position of each row in its image: 0…P−1 for prefix tokens, P…S−1 for patches."""
        return self.token_ids % self.num_tokens

    def rotary_rows(self, block: int) -> Tensor | None:
        """``(T, H or 1, 2·head_dim)``: ``rotary`` of each row in the block of this index."""
        if self.rotary is None or len(self.rotary) == 1:
            return self._rotary_rows
        return self.rotary[block][self.positions]

    @cached_property
    def _rotary_rows(self) -> Tensor | None:
        return None if self.rotary is None else self.rotary[0][self.positions]

    @cached_property
    def bucket_sizes(self) -> list[tuple[int, int]]:
        """``(length, images)`` of each bucket."""
        return [(length, len(list(images))) for length, images in groupby(self.lengths)]

    def with_x(self, x: Tensor, sizes: Tensor | None = None) -> PackedTokens:
        """The same rows with other features, and sizes; cached values of the layout are kept."""
        other = copy(self)
        object.__setattr__(other, "x", x)
        if sizes is not None:
            object.__setattr__(other, "sizes", sizes)
            other.__dict__.pop("log_sizes", None)
        return other

    def buckets(self, rows: Tensor) -> Iterator[Tensor]:
        """Views ``(images, length, ...)`` of ``rows (T, ...)``, one per bucket of images of equal length."""
        start = 0
        for length, images in self.bucket_sizes:
            stop = start + images * length
            yield rows[start:stop].unflatten(0, (images, length))
            start = stop

    def split(self, max_rows: int) -> Iterator[PackedTokens]:
        """Split the images, in packed order, into batches of ``max_rows`` rows or one image, for running blocks."""
        first = 0
        for image, stop in enumerate(self.starts[1:], 1):
            if image == len(self.lengths) or self.starts[image + 1] - self.starts[first] > max_rows:
                rows = slice(self.starts[first], stop)
                lengths = self.lengths[first:image]
                if len(lengths) == len(self.lengths):
                    yield self
                else:
                    sizes = None if self.sizes is None else self.sizes[rows]
                    yield replace(self, x=self.x[rows], token_ids=self.token_ids[rows], lengths=lengths, sizes=sizes)
                first = image

    def to_dense(self, rows: Tensor) -> Tensor:
        """``rows (T, ...)`` at their positions in ``(B, S, ...)``; 0 where the token was dropped."""
        if len(rows) == self.num_images * self.num_tokens:  # nothing was dropped, and nothing was sorted
            return rows.unflatten(0, (self.num_images, self.num_tokens))
        dense = rows.new_zeros(self.num_images * self.num_tokens, *rows.shape[1:])
        return dense.index_copy(0, self.token_ids, rows).unflatten(0, (self.num_images, self.num_tokens))

    def unsort(self, per_image: Tensor) -> Tensor:
        """``per_image (B, ...)`` from packed order into the order of the dense batch."""
        return torch.empty_like(per_image).index_copy(0, self.image_ids, per_image)

    def prefix(self) -> Tensor:
        """``(B, P, C)`` the prefix tokens, in the order of the dense batch."""
        rows = self.first_rows[:, None] + torch.arange(self.num_prefix_tokens, device=self.x.device)
        return self.unsort(self.x[rows])

    def select(self, keep: Tensor) -> PackedTokens:
        """Keep the patches of ``keep`` and all prefix tokens; remove the other rows.

        Args:
            keep: ``(B, N)`` bool, a subset of ``alive``. Or ``(k·B, N)``: k different selections of the same images,
                which are returned as one batch of k·B images (image ``j·B + b`` is selection j of image b).

        Returns:
            The remaining rows, repacked. Every image must have a token left.
        """
        num_images = keep.shape[0]
        # the one host-device synchronisation of a group
        lengths = (keep.sum(1) + self.num_prefix_tokens).tolist()
        if num_images == self.num_images and sum(lengths) == len(self.token_ids):
            return self  # nothing was dropped

        prefix = keep.new_ones(num_images, self.num_prefix_tokens)
        tokens = torch.cat([prefix, keep], 1)
        if num_images == 1:  # nothing to sort: a third of the operations, which matters for a single image
            rows = torch.nonzero_static(tokens[0, self.token_ids], size=lengths[0])[:, 0]
            token_ids = self.token_ids[rows]
        else:
            order = torch.tensor(sorted(range(num_images), key=lengths.__getitem__)).to(keep.device, non_blocking=True)
            image, position = torch.nonzero_static(tokens[order], size=sum(lengths)).unbind(1)
            image = order[image]
            token_ids = image * self.num_tokens + position
            row_of = torch.empty(self.num_images * self.num_tokens, dtype=torch.int64, device=keep.device)
            row_of[self.token_ids] = torch.arange(len(self.token_ids), device=keep.device)
            rows = row_of[(image % self.num_images) * self.num_tokens + position]
        return replace(
            self,
            x=self.x.index_select(0, rows),
            token_ids=token_ids,
            lengths=tuple(sorted(lengths)),
            num_images=num_images,
            alive=keep,
            keys=None if self.keys is None else self.keys.repeat(num_images // self.num_images),
            sizes=None if self.sizes is None else self.sizes[rows],
        )
