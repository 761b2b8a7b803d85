"""OpenVINO and ONNX Runtime, for the benchmark: timm's dense model, and ours as `iared2.runtime.Engine` serves it."""

from __future__ import annotations

import copy
import math
from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

import torch
from torch import Tensor

from ...export.int8 import in_8_bits
from ...export.served import as_arrays, exported
from ...model.decide import first_grid
from ...model.reduced import ReducedVisionTransformer
from ...runtime import BACKENDS
from ...runtime.backends import loader
from .inference import INT8
from .workload import Workload

NAMES = {"openvino": "OpenVINO", "onnxruntime": "ONNX Runtime"}


def ways(
    model: ReducedVisionTransformer, workload: Workload, backends: Sequence[str], precision: str, threads: int
) -> dict[str, tuple[Callable[[Tensor], Any], float]]:
    """``"dense, NAME"`` and ``"ours, NAME"`` for each backend that has the precision, as `inference.Ways`.

    They run the batch of the workload, whatever they are given: a runtime takes float32 arrays.

    Raises:
        InputError: a package is missing, or the model cannot be exported (`stages.export_stages`).
    """
    images = workload.images.float().cpu().numpy()
    decide = as_arrays(model, workload.decide)
    found: dict[str, tuple[Callable[[Tensor], Any], float]] = {}
    usable = [backend for backend in backends if precision in BACKENDS[backend]]
    if not usable:
        return found
    graph = dense_graph(model, len(images), precision == "int8")
    patches = math.prod(first_grid(workload.decide, model.grid_size))
    whole = (workload.num_keep == patches).all(1).tolist()
    stem = [*whole, False].index(False)
    for backend in usable:
        run = loader(backend, threads, precision)(graph)
        engine = exported(model, backend, threads, precision, stem)
        name = NAMES[backend] + (INT8 if precision == "int8" else "")
        found[f"dense, {name}"] = partial(_called, run, {"images": images}), model.dense_macs / 1e9
        found[f"ours, {name}"] = partial(_called, engine, images, decide), workload.gmacs
    return found


def _called(run: Callable[..., Any], *arguments: Any) -> Any:
    """Call it on arrays that are ready; the last argument, a tensor of images, is not used."""
    return run(*arguments[:-1])


def dense_graph(model: ReducedVisionTransformer, batch_size: int, int8: bool = False) -> bytes:
    """timm's own model as ONNX, for batches of one size: fixed sizes are the fastest for a runtime.

    With ``int8``, its blocks are quantized as ours are.
    """
    backbone = copy.deepcopy(model.backbone).float().cpu()
    images = torch.zeros(batch_size, *model.pretrained_cfg["input_size"])
    names: dict[str, Any] = {"input_names": ["images"], "output_names": ["logits"]}
    program: Any = torch.onnx.export(backbone, (images,), dynamo=True, verbose=False, **names)
    graph = program.model_proto.SerializeToString()
    return in_8_bits(graph) if int8 else graph
