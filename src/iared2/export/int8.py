"""Linear layers of the blocks in 8 bits, for ONNX Runtime: a third of the file, and fewer seconds (docs/speed.md).

Weights have a scale per output channel. The activations of a call have one scale, which the runtime finds when it runs
(dynamic quantization). So no photos are needed to calibrate, and an answer depends on the other images of the call. The
rest stays in float32: attention, norms, embedding, head, and the interpreters, which decide what stays.
"""

from __future__ import annotations

from importlib import import_module
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

from ..errors import InputError, missing

LINEAR = "MatMul", "Gemm"
SCOPES = "pkg.torch.onnx.name_scopes"
"""Key under which `torch.onnx` notes the modules that a node is in."""


def packages() -> tuple[Any, Any, Any]:
    """What quantizing needs.

    Raises:
        InputError: a package is missing.
    """
    names = "onnx", "onnxruntime.quantization", "onnxruntime.quantization.quant_utils"
    try:
        onnx, quantization, utils = map(import_module, names)
    except ImportError as error:
        raise missing("int8", (error.name or "onnxruntime").split(".")[0], "export,onnxruntime") from None
    return onnx, quantization, utils


def in_8_bits(graph: bytes) -> bytes:
    """An ONNX graph of `torch.onnx`, with the linear layers of its blocks in 8 bits.

    Raises:
        InputError: a package is missing, or ONNX Runtime cannot quantize the graph, as where there is no space for its
            temporary files.
    """
    onnx, quantization, utils = packages()
    model = onnx.load_from_string(graph)
    linear = [node.name for node in model.graph.node if node.op_type in LINEAR and _is_of_a_block(node)]
    if not linear:
        return graph
    utils.add_pre_process_metadata(model)  # torch has inferred the shapes; without this mark, a warning is printed
    try:
        with TemporaryDirectory() as folder:
            path = Path(folder, "int8.onnx")
            quantization.quantize_dynamic(
                model,
                path,
                op_types_to_quantize=LINEAR,
                nodes_to_quantize=[*linear, *(f"{name}_MatMul" for name in linear)],  # a Gemm becomes the second
                per_channel=True,
                weight_type=quantization.QuantType.QInt8,
            )
            return path.read_bytes()
    except (OSError, RuntimeError, ValueError) as error:
        reason = (str(error).strip() or type(error).__name__).splitlines()[0]
        raise InputError(f"ONNX Runtime cannot quantize the model: {reason:.300}; export it without int8") from error


def _is_of_a_block(node: Any) -> bool:
    """By the module that it is in, or by its weight where the module was not called."""
    scopes = (entry.value for entry in node.metadata_props if entry.key == SCOPES)
    names = [*scopes, *node.input]
    return any("blocks." in name for name in names) and not any("interpreter" in name for name in names)
