"""The engine: graphs of the network's parts, and between them what decides and lays out tokens.

The graphs (stages.py) embed a batch, run the blocks of one group, and classify. The first groups may be one graph with
the embedding, if the model was exported where they drop nothing. In between, `Engine` decides which patches stay,
merges dropped ones if the model does, sorts the images by length, and lays the remaining tokens end to end. Images of
different lengths share a call: linear layers see no padding, only attention does. Images go to several calls where
padding would cost more.
"""

from __future__ import annotations

import math
import threading
from collections.abc import Callable, Sequence
from dataclasses import replace
from functools import partial
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np

from ..errors import InputError
from .archive import Manifest, read
from .backends import BACKENDS, Stage, loader
from .layout import SHORTEST, Place, split, top_k
from .merge import merge
from .values import Decide, Decided, Output

HIDDEN = -1e9
"""The bias of padding in attention; its softmax is 0."""
EPS = 1e-6  # scores that have rounded to 0 or 1 have no logit


class Engine:
    """An exported model that takes batches of images of any number and keeps another number of patches of each.

    Its decision is that of the model when it was exported, and may be replaced: ``thresholds`` (D numbers) or
    ``num_keep``, ``max_tokens``, ``spread`` and ``confidence``, as in `model.decide.Decision`; ``scale`` is fixed. The
    first groups, in which the model dropped nothing when it was exported, are one graph (``stem`` is their number), so
    a decision cannot drop there.

    Args:
        path: file of ``iared2 export --adaptive-batch``.
        backend: "openvino" or "onnxruntime".
        threads: of the CPU; None: the runtime's choice.
        precision: that of the file, "fp32" or with ONNX Runtime "int8", if None; with OpenVINO "bf16" of an fp32 file.
        threshold: one number or one per group, in place of the model's own decision.

    Raises:
        InputError: the file is not such a file, the package of the backend is missing, the precision is not available
            on this processor, or an argument is unknown.
    """

    def __init__(
        self,
        path: Path | str,
        backend: str = "openvino",
        threads: int | None = None,
        precision: str | None = None,
        threshold: float | Sequence[float] | None = None,
    ) -> None:
        manifest, graphs = read(Path(path))
        about = Manifest(manifest, str(path))
        written = about.choice("precision", "fp32", "int8")
        self.precision = written if precision is None else precision
        if written not in BACKENDS.get(backend, [written]):
            raise InputError(f"{path} is a file of {written}, for onnxruntime: use that, or export it without --int8")
        if (self.precision == "int8") != (written == "int8"):
            advice = "with" if self.precision == "int8" else "without"
            raise InputError(f"{path} is a file of {written}; export it {advice} --int8 for {self.precision}")
        load = loader(backend, threads, self.precision)
        self.num_groups, self.num_patches = about.whole("num_groups", 1, 4096), about.whole("num_patches", 1, 1 << 20)
        self.stem = about.whole("stem", 0, self.num_groups)
        self.scale = about.numbers("scale", float, 1, 1e-6, 1)[0]
        self.whole_patches = about.whole("whole_patches", self.num_patches, 1 << 20)
        if self.scale == 1 and self.whole_patches != self.num_patches:
            raise InputError(f"{path} has two numbers of patches: its manifest is damaged; export the model again")
        self.num_prefix_tokens, self.embed_dim = (
            about.whole("num_prefix_tokens", 0, 4096),
            about.whole("embed_dim", 1, 1 << 16),
        )
        self.path, self.description = Path(path), about.get("model")
        self.input_size = tuple(about.numbers("input_size", int, None, 1, 1 << 16))
        self.mean, self.std = about.numbers("mean", float, None), about.numbers("std", float, None)
        self.interpolation, self.class_names = about.get("interpolation"), about.names("class_names")
        self.pools, self.rotates, self.merges = (bool(about.get(name)) for name in ("pools", "rotates", "merges"))
        self.row_cost = about.numbers("row_cost", float, 1, 1e-3, 1e9)[0]
        groups = self.num_groups
        self.thresholds = about.numbers("thresholds", float, groups) if about.get("thresholds") is not None else None
        self.num_keep = about.numbers("num_keep", int, groups, 0) if about.get("num_keep") is not None else None
        self.max_tokens = about.whole("max_tokens", 0, 1 << 31) if about.get("max_tokens") is not None else None
        self.spread = about.numbers("spread", float, 1, 0)[0]
        self.confidence = about.numbers("confidence", float, 1, 0, 1)[0]
        self.pattern = np.array(about.numbers("pattern", float, self.num_patches), np.float32)
        if threshold is not None:
            values = np.asarray(threshold, np.float64).ravel().tolist()
            if len(values) not in (1, groups) or not all(map(math.isfinite, values)):
                raise InputError(f"threshold={threshold}: give one number, or {groups}, one per group")
            self.thresholds, self.num_keep = tuple(values * (groups // len(values))), None
        if (self.thresholds is None) == (self.num_keep is None):
            raise InputError(f"{path} has no decision, or two: its manifest is damaged; export the model again")
        missing = [name for name in self._stage_names() if name not in graphs]
        if missing:
            raise InputError(f"{path} has no {missing[0]}; export the model again")
        self._stages = {name: _loaded(load, graphs[name], f"{name} in {path}") for name in self._stage_names()}
        self._lock = threading.Lock()

    def _stage_names(self) -> list[str]:
        groups = range(self.stem, self.num_groups)
        names = ["stem", *(f"group{group + 1}" for group in groups), "head", *["small", "embed"] * (self.scale < 1)]
        return [f"{name}.onnx" for name in names]

    def __call__(self, images: np.ndarray, decide: Decide | Decided | None = None) -> Output:
        """Classify a batch.

        Args:
            images: ``(B, in_chans, height, width)``, or clips, normalised with ``mean`` and ``std``; B ≥ 1.
            decide: the decision, in place of the engine's own. A dropped patch does not come back; a function alone has
                no second pass, and sees the images as they are.

        Raises:
            InputError: images of another shape, or graphs that return other shapes than the manifest says.
        """
        images = np.ascontiguousarray(images, np.float32)
        if images.shape[1:] != self.input_size or not len(images):
            raise InputError(f"the model takes images (B, {', '.join(map(str, self.input_size))}), not {images.shape}")
        with self._lock:  # a stage has one set of buffers
            if decide is None:
                decide = Decided(self.decide, scale=self.scale)
                if self.confidence:
                    decide = replace(decide, unsure=self._unsure, first=self._first_drop())
            return self._run(images, decide if isinstance(decide, Decided) else Decided(decide))

    def _unsure(self, logits: np.ndarray) -> np.ndarray:
        """See `model.decide.Decision.unsure`."""
        odds = np.exp(logits - logits.max(1, keepdims=True))
        best = np.sort(odds / odds.sum(1, keepdims=True), 1)[:, :-3:-1]
        return (best[:, 0] - best[:, 1:].sum(1) < self.confidence) | (self.confidence >= 1)

    def _first_drop(self) -> int:
        if self.max_tokens is not None:
            raise InputError(
                "confidence > 0 runs every patch of some images, which max_tokens forbids: set confidence to 0, or"
                " max_tokens to None"
            )
        if self.num_keep is not None:
            drops = [number < self.num_patches for number in self.num_keep]  # of the first pass
        else:
            drops = [threshold > 0 for threshold in self.thresholds or ()]
        return [*drops, True].index(True)

    def decide(self, scores: np.ndarray, alive: np.ndarray, group: int) -> np.ndarray:
        """The deployed decision; see `Decide` and, for what it computes, `model.decide.Decision`."""
        standing = scores
        if self.spread:
            clipped = scores.clip(EPS, 1 - EPS)
            standing = np.log(clipped / (1 - clipped)) - np.float32(self.spread) * self.pattern
        if self.num_keep is not None:
            keep = top_k(standing, alive, self.num_keep[group])
        else:
            assert self.thresholds is not None
            threshold = self.thresholds[group]
            if threshold <= 0:
                keep = alive
            elif threshold >= 1:
                keep = np.zeros_like(alive)
            else:
                keep = alive & (standing > (math.log(threshold / (1 - threshold)) if self.spread else threshold))
        return keep if self.max_tokens is None else top_k(standing, keep, self.max_tokens)

    def _run(self, images: np.ndarray, decided: Decided) -> Output:
        batch, prefix, stem, is_small = len(images), self.num_prefix_tokens, self.stem, decided.scale < 1
        if is_small and decided.scale != self.scale:
            raise InputError(
                f"scale={decided.scale:g}: {self.path} has scale={self.scale:g}, and it is fixed at the export"
            )
        x, given = self._stem(images, is_small)
        patches = given.shape[2]
        x, alive, given = x.reshape(-1, self.embed_dim), np.ones((batch, patches), bool), given.copy()
        for group in range(stem):
            if not self._keep(given[group], alive, group, decided.decide).all():
                raise InputError(
                    f"group {group + 1} drops patches by this decision, and the file has groups 1 to {stem} as one"
                    f" graph: export a model that drops patches in group {group + 1}"
                )
        row_of, sizes = _whole(batch, prefix + patches)
        scores, kept, found = list(given[:stem]), [alive] * stem, given[-1]
        total, first, entrance = np.zeros(3), max(stem, decided.first), x
        for group in range(stem, self.num_groups):
            if decided.unsure and group == first and not is_small:
                if not alive.all():
                    raise InputError(
                        f"a second pass from group {first + 1} needs every patch, and some were dropped before"
                    )
                entrance = x[row_of]  # (B, S, C), a copy
            scores.append(found)
            kept.append(self._keep(found, alive, group, decided.decide))
            if self.merges:
                x = x if group > stem else x.copy()  # the runtime owns what a graph returns
                merge(x, row_of, sizes, alive, kept[-1], prefix)
            alive = kept[-1]
            x, found, cost = self._blocks(group, x, alive, row_of, sizes)
            total += cost
        logits, unsure = self._head(x, alive, row_of), np.zeros(batch, bool)
        if decided.unsure and (is_small or first < self.num_groups):
            unsure = decided.unsure(logits)
        if unsure.any():
            if is_small:
                first, entrance = stem, self._stem(images[unsure], False)[0]
            else:
                entrance = entrance[unsure]
            x, alive = entrance.reshape(-1, self.embed_dim), np.ones((len(entrance), entrance.shape[1] - prefix), bool)
            row_of, sizes = _whole(len(alive), entrance.shape[1])
            for group in range(first, self.num_groups):
                x, _, cost = self._blocks(group, x, alive, row_of, sizes)
                total += cost
            logits[unsure] = self._head(x, alive, row_of)
        work, done, calls = total.tolist()
        padding = 1 - work / done if done else 0.0
        return Output(logits, np.stack(scores), np.stack(kept), unsure, padding, int(calls))

    def _stem(self, images: np.ndarray, is_small: bool) -> list[np.ndarray]:
        """``x (B, S, C)`` behind the first groups, and the scores of these and the next one, of every patch."""
        batch, patches = len(images), self.num_patches if is_small else self.whole_patches
        tokens = batch, self.num_prefix_tokens + patches, self.embed_dim
        inputs = {"images": images}
        if self.scale < 1:
            (x,) = _shaped(self._stages["small.onnx" if is_small else "embed.onnx"](inputs), tokens)
            inputs = {"x": x}
        return _shaped(self._stages["stem.onnx"](inputs), tokens, (min(self.stem + 1, self.num_groups), batch, patches))

    def _blocks(
        self, group: int, x: np.ndarray, alive: np.ndarray, row_of: np.ndarray, sizes: np.ndarray
    ) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """The blocks of a group on the tokens that are left, in calls of images of similar lengths.

        Changes ``row_of``. Returns the rows ``(T, C)``, the scores for the next group ``(B, N)``, and work, work with
        padding (`padded`) and calls.
        """
        prefix, total = self.num_prefix_tokens, np.zeros(3)
        tokens = self._tokens(alive)
        lengths = tokens.sum(1)
        order = lengths.argsort(kind="stable")
        buckets = split(lengths[order].tolist(), self.row_cost)
        left, found = np.empty((lengths.sum(), self.embed_dim), np.float32), np.zeros(alive.shape, np.float32)
        row = 0
        for start, end in pairwise(buckets):
            number = order[start:end]
            y, place = self._run_group(group, x, tokens[number], row_of[number], sizes[number])
            rows, image, position = len(place.image), number[place.image], place.position
            left[row : row + rows] = y[0][:rows]
            row_of[image, position] = np.arange(row, row + rows)
            if len(y) > 1:
                patch = position >= prefix
                found[image[patch], position[patch] - prefix] = y[1][place.image[patch], place.rank[patch] - prefix]
            row += rows
            total += place.work, place.done, 1
        return left, found, total

    def _tokens(self, alive: np.ndarray) -> np.ndarray:
        """``alive (B, N) -> (B, S)`` bool, with the prefix tokens, which stay."""
        return np.concatenate([np.ones((len(alive), self.num_prefix_tokens), bool), alive], 1)

    def _keep(self, scores: np.ndarray, alive: np.ndarray, group: int, decide: Decide) -> np.ndarray:
        """As `ReducedVisionTransformer.decide`: an image whose head pools patches keeps at least one."""
        keep = decide(scores, alive, group) & alive
        if self.pools:
            best = np.where(alive, scores, -1).argmax(1)
            empty = ~keep.any(1)
            keep[empty, best[empty]] = True
        return keep

    def _run_group(
        self, group: int, x: np.ndarray, tokens: np.ndarray, row_of: np.ndarray, sizes: np.ndarray
    ) -> tuple[list[np.ndarray], Place]:
        """The outputs of one call on b images, ``tokens``, ``row_of``, ``sizes (b, S)``, and where their rows are."""
        place = Place(tokens, self.num_prefix_tokens, self.row_cost)
        used, shape = len(place.image), (len(tokens), place.longest)
        entering = np.empty((place.rows, x.shape[1]), np.float32)
        np.take(x, row_of[place.image, place.position], 0, out=entering[:used], mode="clip")  # "raise" would buffer
        entering[used:] = 0
        rows, bias = np.zeros(shape, np.int32), np.full(shape, HIDDEN, np.float32)
        rows[place.image, place.rank] = np.arange(used)
        bias[place.image, place.rank] = np.log(sizes[place.image, place.position])
        back = np.zeros(place.rows, np.int32)
        back[:used] = place.image * place.longest + place.rank
        inputs = {"x": entering, "rows": rows, "back": back, "bias": bias}
        if self.rotates:
            inputs["positions"] = np.zeros(place.rows, np.int32)
            inputs["positions"][:used] = place.position
        last = group + 1 == self.num_groups
        shapes = [entering.shape, (shape[0], shape[1] - self.num_prefix_tokens)][: 1 if last else 2]
        return _shaped(self._stages[f"group{group + 1}.onnx"](inputs), *shapes), place

    def _head(self, x: np.ndarray, alive: np.ndarray, row_of: np.ndarray) -> np.ndarray:
        head, tokens = self._stages["head.onnx"], self._tokens(alive)
        if not self.pools:  # then only the prefix tokens are read
            return _classified(head, x[row_of[:, : self.num_prefix_tokens]])
        lengths = tokens.sum(1)
        found: dict[int, np.ndarray] = {}
        for length in set(lengths.tolist()):  # a head that pools has no mask
            number = np.flatnonzero(lengths == length)
            rows = row_of[number][tokens[number]].reshape(len(number), length)
            if length < SHORTEST:  # no pooling tells a token from two equal ones
                rows = rows.repeat(SHORTEST, 1)
            found |= dict(zip(number.tolist(), _classified(head, x[rows]), strict=True))
        return np.stack([found[image] for image in range(len(tokens))])


def _whole(batch: int, tokens: int) -> tuple[np.ndarray, np.ndarray]:
    """Of images of which nothing was dropped, ``(B, S)``: where their rows are, and of how many patches each is."""
    return np.arange(batch * tokens).reshape(batch, tokens), np.ones((batch, tokens), np.float32)


def _loaded(load: Callable[[bytes], Stage], graph: bytes, name: str) -> Stage:
    def usable(run: Callable[[Any], Any], argument: Any) -> Any:
        try:
            return run(argument)
        except Exception as error:  # the runtimes raise their own kinds
            reason = (str(error).strip() or type(error).__name__).splitlines()[0]
            raise InputError(f"{name} cannot be used: {reason:.200}; export the model again") from error

    return partial(usable, usable(load, graph))


def _shaped(outputs: list[np.ndarray], *shapes: tuple[int, ...]) -> list[np.ndarray]:
    if [output.shape for output in outputs] != list(shapes):
        raise InputError(
            f"a graph returned {', '.join(str(o.shape) for o in outputs)}, not {', '.join(map(str, shapes))};"
            " export the model again"
        )
    return outputs


def _classified(head: Stage, x: np.ndarray) -> np.ndarray:
    (logits,) = head({"x": x})
    return np.array(logits)  # a copy: the next call writes there
