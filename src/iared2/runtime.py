"""A reduced model without torch: adaptive batches in OpenVINO or ONNX Runtime, from the file of `iared2 export`.

Imports numpy and the runtime alone, for a server that has no torch. The graphs (stages.py) embed a batch, run the blocks
of one group, and classify. In between, `Engine` decides which patches stay, sorts the images by length, and lays the
remaining tokens end to end. Images of different lengths share one call: the linear layers see no padding, only attention
does. Images go to several calls where padding would cost more than a call.

Nothing in a file is trusted: sizes and types of the manifest are checked, the archive is never unpacked to a disk, and
graphs may not name other files.

Shapes: B images, N patches, P prefix tokens, S = P + N, T rows, C width, D groups, K classes.
"""

from __future__ import annotations

import io
import json
import math
import os
import threading
import zipfile
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from importlib import import_module
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np

from .errors import InputError

FORMAT = "iared2 adaptive batch 1"
MANIFEST = "manifest.json"
EXTERNAL = b"location"
"""A graph that names a file has this key: weights outside of it, which ONNX readers would look for on the disk."""
BACKENDS = {"openvino": ("fp32", "bf16"), "onnxruntime": ("fp32",)}
"""Name of a backend -> its precisions."""
MAX_MANIFEST = 1 << 26
MAX_ROWS = 2048
"""Rows of one call, unless one image has more: beyond, the time per row rises in fp32 (docs/LOG.md)."""
CALL_COST = 25
"""What a call costs besides its rows, in rows."""
MAX_PADDING = 0.05
"""At most this share of the work of a call with several images is padding."""
HIDDEN = -1e9
"""The bias of padding in attention; its softmax is 0."""
EPS = 1e-6  # scores that have rounded to 0 or 1 have no logit

Stage = Callable[[Mapping[str, np.ndarray]], list[np.ndarray]]
"""Inputs by name -> outputs in order. They are valid until the next call."""
Decide = Callable[[np.ndarray, np.ndarray, int], np.ndarray]
"""``(scores (B, N), alive (B, N) bool, group) -> keep (B, N)`` bool."""


@dataclass(frozen=True)
class Output:
    """The result for one batch.

    Attributes:
        logits: ``(B, K)`` float32.
        scores: ``(D, B, N)`` float32 informativeness in (0, 1); 0 where the patch was already dropped.
        kept: ``(D, B, N)`` bool, the patches on which the blocks of each group ran.
        padding: share of the work in the blocks that is padding, in 0…`MAX_PADDING`.
        calls: of the graphs of the groups.
    """

    logits: np.ndarray
    scores: np.ndarray
    kept: np.ndarray
    padding: float
    calls: int


class Engine:
    """An exported model that takes batches of images of any number and keeps another number of patches of each.

    Its decision is that of the model when it was exported, and may be replaced: ``thresholds`` (D numbers) or
    ``num_keep``, ``max_tokens`` and ``spread``, as in `model.decide.Decision`.

    Args:
        path: file of ``iared2 export --adaptive-batch``.
        backend: "openvino" or "onnxruntime".
        threads: of the CPU; None: the runtime's choice.
        precision: "fp32", or with OpenVINO "bf16".
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
        precision: str = "fp32",
        threshold: float | Sequence[float] | None = None,
    ) -> None:
        load = loader(backend, threads, precision)
        manifest, graphs = _read(Path(path))
        about = _Manifest(manifest, str(path))
        self.num_groups, self.num_patches = about.whole("num_groups", 1, 4096), about.whole("num_patches", 1, 1 << 20)
        self.num_prefix_tokens, self.embed_dim = about.whole("num_prefix_tokens", 0, 4096), about.whole("embed_dim", 1, 1 << 16)
        self.input_size = tuple(about.numbers("input_size", int, None, 1, 1 << 16))
        self.mean, self.std = about.numbers("mean", float, None), about.numbers("std", float, None)
        self.interpolation, self.class_names = about.get("interpolation"), about.names("class_names")
        self.pools, self.rotates = bool(about.get("pools")), bool(about.get("rotates"))
        self.row_cost = about.numbers("row_cost", float, 1, 1e-3, 1e9)[0]
        groups = self.num_groups
        self.thresholds = about.numbers("thresholds", float, groups) if about.get("thresholds") is not None else None
        self.num_keep = about.numbers("num_keep", int, groups, 0) if about.get("num_keep") is not None else None
        self.max_tokens = about.whole("max_tokens", 0, 1 << 31) if about.get("max_tokens") is not None else None
        self.spread = about.numbers("spread", float, 1, 0)[0]
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
        self._stages = [_loaded(load, graphs[name], f"{name} in {path}") for name in self._stage_names()]
        self._lock = threading.Lock()

    def _stage_names(self) -> list[str]:
        return ["embed.onnx", *(f"group{group + 1}.onnx" for group in range(self.num_groups)), "head.onnx"]

    def __call__(self, images: np.ndarray, decide: Decide | None = None) -> Output:
        """Classify a batch.

        Args:
            images: ``(B, in_chans, height, width)``, or clips, normalised with ``mean`` and ``std``; B ≥ 1.
            decide: the decision, in place of the engine's own. A dropped patch does not come back.

        Raises:
            InputError: images of another shape, or graphs that return other shapes than the manifest says.
        """
        images = np.ascontiguousarray(images, np.float32)
        if images.shape[1:] != self.input_size or not len(images):
            raise InputError(f"the model takes images (B, {', '.join(map(str, self.input_size))}), not {images.shape}")
        with self._lock:  # a stage has one set of buffers
            return self._run(images, decide or self.decide)

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

    def _run(self, images: np.ndarray, decide: Decide) -> Output:
        batch, prefix, patches = len(images), self.num_prefix_tokens, self.num_patches
        x, found = _shaped(self._stages[0]({"images": images}), (batch, prefix + patches, self.embed_dim), (batch, patches))
        x, alive = x.reshape(-1, self.embed_dim), np.ones((batch, patches), bool)
        row_of = np.arange(len(x)).reshape(batch, -1)  # (B, S): where in x a token is
        scores, kept, work, done, calls = [], [], 0.0, 0.0, 0
        for group in range(self.num_groups):
            scores.append(found)
            kept.append(self._keep(found, alive, group, decide))
            alive = kept[-1]
            tokens = np.concatenate([np.ones((batch, prefix), bool), alive], 1)  # (B, S)
            lengths = tokens.sum(1)
            order = lengths.argsort(kind="stable")
            buckets = split(lengths[order].tolist(), self.row_cost)
            left, found, first = np.empty((lengths.sum(), self.embed_dim), np.float32), np.zeros_like(found), 0
            for start, end in pairwise(buckets):
                number = order[start:end]
                y, place = self._run_group(group, x, tokens[number], row_of[number])
                rows, image, position = len(place.image), number[place.image], place.position
                left[first : first + rows] = y[0][:rows]
                row_of[image, position] = np.arange(first, first + rows)
                if len(y) > 1:
                    patch = position >= prefix
                    found[image[patch], position[patch] - prefix] = y[1][place.image[patch], place.rank[patch] - prefix]
                first += rows
                work += self.row_cost * rows + (lengths[number] ** 2).sum()
                done += self.row_cost * place.rows + (end - start) * place.longest**2
            x, calls = left, calls + len(buckets) - 1
        return Output(self._head(x, tokens, row_of), np.stack(scores), np.stack(kept), 1 - work / done, calls)

    def _keep(self, scores: np.ndarray, alive: np.ndarray, group: int, decide: Decide) -> np.ndarray:
        """As `ReducedVisionTransformer.decide`: an image whose head pools patches keeps at least one."""
        keep = decide(scores, alive, group) & alive
        if self.pools:
            best = np.where(alive, scores, -1).argmax(1)
            empty = ~keep.any(1)
            keep[empty, best[empty]] = True
        return keep

    def _run_group(self, group: int, x: np.ndarray, tokens: np.ndarray, row_of: np.ndarray) -> tuple[list[np.ndarray], _Place]:
        """The outputs of one call on b images, ``tokens`` and ``row_of (b, S)``, and where their rows are."""
        place = _Place(tokens, self.num_prefix_tokens)
        used, shape = len(place.image), (len(tokens), place.longest)
        entering = np.empty((place.rows, x.shape[1]), np.float32)
        np.take(x, row_of[place.image, place.position], 0, out=entering[:used], mode="clip")  # "raise" would buffer
        entering[used:] = 0
        rows, bias = np.zeros(shape, np.int32), np.full(shape, HIDDEN, np.float32)
        rows[place.image, place.rank] = np.arange(used)
        bias[place.image, place.rank] = 0
        back = np.zeros(place.rows, np.int32)
        back[:used] = place.image * place.longest + place.rank
        inputs = {"x": entering, "rows": rows, "back": back, "bias": bias}
        if self.rotates:
            inputs["positions"] = np.zeros(place.rows, np.int32)
            inputs["positions"][:used] = place.position
        last = group + 1 == self.num_groups
        shapes = [entering.shape, (shape[0], shape[1] - self.num_prefix_tokens)][: 1 if last else 2]
        return _shaped(self._stages[1 + group](inputs), *shapes), place

    def _head(self, x: np.ndarray, tokens: np.ndarray, row_of: np.ndarray) -> np.ndarray:
        head = self._stages[-1]
        if not self.pools:  # then only the prefix tokens are read
            return _classified(head, x[row_of[:, : self.num_prefix_tokens]])
        lengths, found = tokens.sum(1), {}
        for length in set(lengths.tolist()):  # a head that pools has no mask
            for image, logits in zip(
                number := np.flatnonzero(lengths == length),
                _classified(head, x[row_of[number][tokens[number]]].reshape(len(number), length, -1)),
                strict=True,
            ):
                found[image] = logits
        return np.stack([found[image] for image in range(len(tokens))])


class _Place:
    """Where the tokens of b images lie, end to end, from ``tokens (b, S)`` bool.

    Attributes:
        image, position: ``(T,)`` of each row, the place in the whole image.
        rank: ``(T,)`` the place among the remaining tokens of the image.
        rows, longest: T and the longest length, rounded.
    """

    def __init__(self, tokens: np.ndarray, prefix: int) -> None:
        self.image, self.position = np.nonzero(tokens)
        lengths = tokens.sum(1)
        self.rank = np.arange(len(self.image)) - np.repeat(lengths.cumsum() - lengths, lengths)
        # one patch at least, padding if need be: the graphs have not been tried with none
        self.rows, self.longest = rounded(len(self.image)), max(rounded(int(lengths.max())), prefix + 1)


def rounded(number: int) -> int:
    """Not below ``number`` and by at most 1/64 above: the runtimes prepare kernels for each new size, so few is fast."""
    step = 1 << max(0, number.bit_length() - 7)
    return -(-number // step) * step


def split(lengths: Sequence[int], row_cost: float) -> list[int]:
    """Bounds of the calls, from 0 to B, that take the least time on images of these ascending lengths.

    Args:
        lengths: tokens of each image, ascending.
        row_cost: MACs of the linear layers per row over those of attention per pair of rows.
    """
    best, start_of = [0.0], [0]
    for end in range(1, len(lengths) + 1):
        longest, rows, pairs, options = rounded(lengths[end - 1]), 0, 0, []
        for start in range(end - 1, -1, -1):
            rows, pairs = rows + lengths[start], pairs + lengths[start] ** 2
            several = start < end - 1
            if several and rows > MAX_ROWS:
                break
            done = row_cost * rounded(rows) + (end - start) * longest**2
            if not several or row_cost * rows + pairs >= (1 - MAX_PADDING) * done:
                options.append((best[start] + done + CALL_COST * row_cost, start))
        cost, start = min(options)
        best.append(cost)
        start_of.append(start)
    bounds = [len(lengths)]
    while bounds[-1]:
        bounds.append(start_of[bounds[-1]])
    return bounds[::-1]


def top_k(scores: np.ndarray, alive: np.ndarray, num_keep: int) -> np.ndarray:
    """``(B, N)`` bool: the best-scored living patches of each image; ties fall to the lower position."""
    ranked = np.where(alive, -scores, np.inf).argsort(1, kind="stable")
    rank = np.empty_like(ranked)
    np.put_along_axis(rank, ranked, np.arange(scores.shape[1])[None], 1)
    return alive & (rank < num_keep)


# ---- the file -------------------------------------------------------------------------------------------------------


def _read(path: Path) -> tuple[dict[str, Any], dict[str, bytes]]:
    """The manifest and the graphs by name. Entries are not compressed, so none is larger than the file."""
    try:
        with zipfile.ZipFile(path) as folder:
            entries = folder.infolist()
            if any(entry.compress_type != zipfile.ZIP_STORED for entry in entries):
                raise InputError(f"{path}: its entries are compressed; export the model again")
            if sum(entry.file_size for entry in entries) > os.path.getsize(path):
                raise InputError(f"{path}: its entries are larger than the file; export the model again")
            content = {entry.filename: folder.read(entry) for entry in entries}
    except (OSError, zipfile.BadZipFile, RuntimeError, NotImplementedError, EOFError, ValueError) as error:
        reason = getattr(error, "strerror", None) or str(error).split("\n")[0]
        raise InputError(f"cannot read {path}: {reason}; give a file of iared2 export --adaptive-batch") from None
    text = content.pop(MANIFEST, b"")
    try:
        manifest = json.loads(text[:MAX_MANIFEST])
    except (ValueError, RecursionError):
        manifest = None
    if not isinstance(manifest, dict) or manifest.get("format") != FORMAT:
        raise InputError(f"{path} is no file of iared2 export --adaptive-batch, or of another version")
    for name, graph in content.items():
        if EXTERNAL in graph:
            raise InputError(f"{path}: {name} names another file; export the model again")
    return manifest, content


class _Manifest:
    """Checked entries of a manifest."""

    def __init__(self, entries: dict[str, Any], path: str) -> None:
        self.get, self.path = entries.get, path

    def _refuse(self, name: str) -> InputError:
        return InputError(f"{self.path}: {name}={self.get(name)!r:.80} in its manifest is not usable; export the model again")

    def whole(self, name: str, low: int, high: int) -> int:
        """An integer in ``low…high``."""
        return int(self.numbers(name, int, 1, low, high)[0])

    def numbers(self, name: str, kind: type, count: int | None, low: float = -1e9, high: float = 1e9) -> tuple[Any, ...]:
        """``count`` finite numbers, or 1 to 16 if None."""
        values = self.get(name)
        values = values if isinstance(values, list) else [values]
        kinds = (int,) if kind is int else (int, float)
        right = 1 <= len(values) <= 16 if count is None else len(values) == count
        if not right or not all(type(value) in kinds and low <= value <= high for value in values):
            raise self._refuse(name)
        return tuple(map(kind, values))

    def names(self, name: str) -> tuple[str, ...] | None:
        """A list of strings, or None."""
        values = self.get(name)
        if values is not None and not (isinstance(values, list) and all(isinstance(value, str) for value in values)):
            raise self._refuse(name)
        return None if values is None else tuple(values)


def _loaded(load: Callable[[bytes], Stage], graph: bytes, name: str) -> Stage:
    try:
        return load(graph)
    except Exception as error:  # the runtimes raise their own kinds
        raise InputError(f"{name} cannot be loaded: {str(error).strip().splitlines()[0]:.200}; export the model again") from None


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


# ---- the backends ---------------------------------------------------------------------------------------------------


def loader(backend: str, threads: int | None, precision: str) -> Callable[[bytes], Stage]:
    """What loads an ONNX graph; arguments and errors as of `Engine`."""
    if backend not in BACKENDS:
        raise InputError(f"backend={backend!r} should be one of {', '.join(BACKENDS)}")
    if precision not in BACKENDS[backend]:
        raise InputError(f"precision={precision!r}: {backend} has {', '.join(BACKENDS[backend])} here")
    if threads is not None and threads < 1:
        raise InputError(f"threads={threads}: give 1 or more, or None")
    return (_openvino if backend == "openvino" else _onnxruntime)(threads, precision)


def _package(name: str) -> Any:
    try:
        return import_module(name)
    except ImportError:
        raise InputError(f"the package {name} is missing: pip install 'iared2[{name}]'") from None


def _openvino(threads: int | None, precision: str) -> Callable[[bytes], Stage]:
    core = _package("openvino").Core()
    if precision == "bf16" and "BF16" not in core.get_property("CPU", "OPTIMIZATION_CAPABILITIES"):
        raise InputError('precision="bf16": this processor has no bfloat16; use "fp32"')
    options: dict[str, Any] = {
        "PERFORMANCE_HINT": "LATENCY",
        "INFERENCE_PRECISION_HINT": {"fp32": "f32", "bf16": "bf16"}[precision],
        **({"INFERENCE_NUM_THREADS": threads} if threads else {}),
    }

    def load(graph: bytes) -> Stage:
        request = core.compile_model(core.read_model(io.BytesIO(graph)), "CPU", options).create_infer_request()
        names = [{*port.names} for port in request.model_inputs]

        def run(inputs: Mapping[str, np.ndarray]) -> list[np.ndarray]:
            ports = {index: inputs[name] for index, known in enumerate(names) for name in known & inputs.keys()}
            found = request.infer(ports, share_inputs=True, share_outputs=True)
            return list(found.values())

        return run

    return load


def _onnxruntime(threads: int | None, _: str) -> Callable[[bytes], Stage]:
    onnxruntime = _package("onnxruntime")
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = threads or 0
    options.log_severity_level = 3

    def load(graph: bytes) -> Stage:
        session = onnxruntime.InferenceSession(graph, options, providers=["CPUExecutionProvider"])
        names = [port.name for port in session.get_inputs()]
        return lambda inputs: session.run(None, {name: inputs[name] for name in names})

    return load

