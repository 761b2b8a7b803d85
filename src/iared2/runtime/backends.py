"""OpenVINO and ONNX Runtime as functions of arrays."""

from __future__ import annotations

import io
from collections.abc import Callable, Mapping
from functools import cache
from importlib import import_module
from typing import Any

import numpy as np

from ..errors import InputError, missing

BACKENDS = {"openvino": ("fp32", "bf16"), "onnxruntime": ("fp32", "int8")}
"""Name of a backend -> its precisions; int8 is one of the file, the others are of the computation."""
Stage = Callable[[Mapping[str, np.ndarray]], list[np.ndarray]]
"""Inputs by name -> outputs in order. They are valid until the next call."""


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
        raise missing("the engine", name, name) from None


@cache
def _core() -> Any:
    """OpenVINO's, one for the process and never freed.

    The first compilation of each Core gives the thread another stack for signals, and the end of the Core restores the
    one that it found: that of another Core, which may be gone. The next signal with a handler, such as SIGCHLD of a
    DataLoader, then ends the process by SIGSEGV (OpenVINO 2026.4).
    """
    return _package("openvino").Core()


def _openvino(threads: int | None, precision: str) -> Callable[[bytes], Stage]:
    core = _core()
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
