"""Top-1, patches kept and MACs of a reduced model on labelled batches, in one pass."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any

import torch
from torch import Tensor

from . import keyed
from .data.batches import Batch
from .device import widest_float
from .model.decide import Decide
from .model.reduced import Output, ReducedVisionTransformer

RANDOM_EPOCH = 1 << 30  # keys of draws in evaluation, distinct from those of training


def measure(
    model: ReducedVisionTransformer,
    batches: Iterable[Batch],
    device: torch.device | str,
    decide: Decide | None = None,
    reduce: Callable[[Tensor, str], Tensor] = lambda total, how: total,
) -> dict[str, Any]:
    """One pass over held-out images.

    Args:
        model: in evaluation mode.
        batches: of ``batches.eval_batches``.
        device: where the model is.
        decide: the decision; by default ``model.decision``.
        reduce: a sum over processes, such as ``Accelerator.reduce``.

    Returns:
        ``top1`` in percent, ``keep_ratio`` a list of D shares after each group, ``gmacs`` mean 10⁹ MACs per image,
        ``images``, and ``skipped``, the number of files that could not be read.
    """
    total = torch.zeros(4 + model.num_groups, dtype=widest_float(device), device=device)
    for batch in batches:
        total[0] += len(batch.labels)
        total[1] += len(batch.skipped)
        if not len(batch.labels):  # none of its files could be read
            continue
        with torch.inference_mode():
            output = trace(model, batch.images.to(device), decide, view_keys(batch).to(device))
        total[2:] += counts(output, batch.labels.to(device))
    images, skipped, right, macs, *kept = reduce(total, "sum").tolist()
    return {
        "top1": round(100 * right / max(images, 1), 4),
        "keep_ratio": [round(k / max(images, 1), 4) for k in kept],
        "gmacs": macs / max(images, 1) / 1e9,
        "images": int(images),
        "skipped": int(skipped),
    }


def counts(output: Output, labels: Tensor) -> Tensor:
    """Sums over images: correct predictions, MACs, and the share of patches kept after each group, ``(2 + D,)``."""
    right = (output.logits.argmax(1) == labels).sum()
    wide = widest_float(labels.device)
    return torch.stack([x.to(wide) for x in (right, output.macs.sum(), *output.keep_ratio.sum(1))])


def view_keys(batch: Batch, seed: int = 0) -> Tensor:
    """``(B,)`` int64 keys of the draws for each image in evaluation; ``(B·V,)`` for several views of a video."""
    keys = [keyed.sample_keys(seed, RANDOM_EPOCH + view, batch.samples) for view in range(batch.views)]
    return torch.stack(keys, 1).flatten()


def trace(
    model: ReducedVisionTransformer, images: Tensor, decide: Decide | None = None, keys: Tensor | None = None
) -> Output:
    """``model.trace``, also for several views of a video, ``(B, V, 3, T, H, W)``.

    For several views, probabilities are averaged, MACs are summed, and patches are concatenated: the logits
    ``(B, K)`` are logarithms of the mean, scores and kept are ``(D, B, V·N)``, and unsure is whether any view was.
    """
    if images.ndim < 6:
        return model.trace(images, decide, keys)
    return by_video(model.trace(images.flatten(0, 1), decide, keys), images.shape[1])


def by_video(output: Output, views: int) -> Output:
    """Combine the output of ``B·V`` clips into that of B videos with V views each; see `trace`."""
    return Output(
        logits=output.logits.float().softmax(-1).unflatten(0, (-1, views)).mean(1).log(),
        scores=output.scores.unflatten(1, (-1, views)).flatten(2),
        kept=output.kept.unflatten(1, (-1, views)).flatten(2),
        macs=output.macs.unflatten(0, (-1, views)).sum(1),
        unsure=output.unsure.unflatten(0, (-1, views)).any(1),
    )
