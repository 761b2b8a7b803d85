"""PackedTokens: a ragged batch laid end to end.

Owns the layout of the rows and every move between the dense and the packed form. Knows nothing of attention, scores or
timm.

Shape letters, used in the whole package: B images, N patches an image, P prefix tokens (class, distillation,
registers), S = P + N, T packed tokens, C width, H heads, D groups, K classes.

Rows of one image are neighbours: its prefix tokens, then its living patches by ascending position. Images lie sorted by
length. So images of equal length form a *bucket*, a view ``(images, length, C)`` of the rows, not a copy: attention,
pooling and the interpreter work bucket by bucket with no padding and no gather.
"""

from __future__ import annotations

from collections.abc import Iterator
from copy import copy
from dataclasses import dataclass, replace
from functools import cached_property
from itertools import accumulate, groupby

import torch
from torch import Tensor


@dataclass(frozen=True)
class PackedTokens:
    """A batch of images with different numbers of living tokens.

    Attributes:
        x: ``(T, C)`` token features, T = sum of all lengths.
        token_ids: ``(T,)`` int64, where each row stood in the dense batch: ``image * S + position``, position in
            0…P−1 for prefix tokens and P…S−1 for patches.
        lengths: tokens of each image in packed order, prefix tokens included; ascending. On the host: it drives views.
        num_images: B.
        num_prefix_tokens: P.
        num_patches: N, of the whole image.
        alive: ``(B, N)`` bool, the patches that are here.
        keys: ``(B,)`` int64 keys of the images' random draws (keyed.py), or None for torch's generator.
        sizes: ``(T,)`` float32, of how many patches each row is the mean (merge.py), or None: of one.
    """

    x: Tensor
    token_ids: Tensor
    lengths: tuple[int, ...]
    num_images: int
    num_prefix_tokens: int
    num_patches: int
    alive: Tensor
    keys: Tensor | None = None
    sizes: Tensor | None = None

    @classmethod
    def from_dense(
        cls, x: Tensor, num_prefix_tokens: int, alive: Tensor | None = None, keys: Tensor | None = None
    ) -> PackedTokens:
        """Pack ``x (B, S, C)``; ``alive (B, N)`` bool leaves out the patches where it is False."""
        num_images, num_tokens, width = x.shape
        packed = cls(
            x=x.reshape(-1, width),
            token_ids=torch.arange(num_images * num_tokens, device=x.device),
            lengths=(num_tokens,) * num_images,
            num_images=num_images,
            num_prefix_tokens=num_prefix_tokens,
            num_patches=num_tokens - num_prefix_tokens,
            alive=torch.ones(num_images, num_tokens - num_prefix_tokens, dtype=torch.bool, device=x.device),
            keys=keys,
        )
        return packed if alive is None else packed.select(alive)

    @property
    def num_tokens(self) -> int:
        """S, the tokens of a whole image."""
        return self.num_prefix_tokens + self.num_patches

    # What follows from the layout is computed once: every block of a group asks for it.

    @cached_property
    def starts(self) -> list[int]:
        """First row of each image in packed order, and T at the end: B + 1 numbers."""
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
        """``(B,)`` int64, which image of the dense batch each packed image is."""
        return self.token_ids[self.first_rows] // self.num_tokens

    @cached_property
    def log_sizes(self) -> Tensor | None:
        """``(T,)`` float32, what attention adds to the logit of each row as a key."""
        return None if self.sizes is None else self.sizes.log()

    @cached_property
    def bucket_sizes(self) -> list[tuple[int, int]]:
        """``(length, images)`` of each bucket."""
        return [(length, len(list(images))) for length, images in groupby(self.lengths)]

    def with_x(self, x: Tensor, sizes: Tensor | None = None) -> PackedTokens:
        """The same rows with other features, and sizes; what the layout has been asked for is not computed anew."""
        other = copy(self)
        object.__setattr__(other, "x", x)
        if sizes is not None:
            object.__setattr__(other, "sizes", sizes)
            other.__dict__.pop("log_sizes", None)
        return other

    def buckets(self, rows: Tensor) -> Iterator[Tensor]:
        """Views ``(images, length, ...)`` of ``rows (T, ...)``, one for each bucket of images of equal length."""
        start = 0
        for length, images in self.bucket_sizes:
            stop = start + images * length
            yield rows[start:stop].unflatten(0, (images, length))
            start = stop

    def split(self, max_rows: int) -> Iterator[PackedTokens]:
        """The images in packed order as smaller batches, for running blocks: of ``max_rows`` rows, or of one image."""
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
        """``rows (T, ...)`` at their places in ``(B, S, ...)``; 0 where the token is gone."""
        if len(rows) == self.num_images * self.num_tokens:  # nothing is gone, and nothing was sorted
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
        """Keep the patches of ``keep`` and all prefix tokens; the other rows are gone.

        Args:
            keep: ``(B, N)`` bool, a subset of ``alive``. Or ``(k·B, N)``: k different selections of the same images,
                which come back as one batch of k·B images (image ``j·B + b`` is selection j of image b).

        Returns:
            The remaining rows, packed anew. Every image must have a token left.
        """
        num_images = keep.shape[0]
        # the one host-device synchronisation of a group
        lengths = (keep.sum(1) + self.num_prefix_tokens).tolist()
        if num_images == self.num_images and sum(lengths) == len(self.token_ids):
            return self  # nothing was dropped

        prefix = keep.new_ones(num_images, self.num_prefix_tokens)
        tokens = torch.cat([prefix, keep], 1)
        if num_images == 1:  # nothing to sort: a third of the operations, which is what a single image waits for
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
