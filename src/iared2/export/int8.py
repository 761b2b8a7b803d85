"""Linear layers of the blocks in 8 bits, for ONNX Runtime: a third of the file, and faster on most processors.

Weights have a scale per output channel. The activations of a call have one scale, which the runtime finds when it runs
(dynamic quantization), so no photos are needed to calibrate, and an answer depends a little on the other images of the
call. The rest stays in float32: attention, norms, embedding, head, and the interpreters, which decide what stays.
"""

from __future__ import annotations

from importlib import import_module
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

from ..errors import missing

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
        raise missing("int8", error.name, "export,onnxruntime") from None
    return onnx, quantization, utils


def quantized(graph: bytes) -> bytes:
    """An ONNX graph of `torch.onnx`, with the linear layers of its blocks in 8 bits.

    Raises:
        InputError: a package is missing.
    """
    onnx, quantization, utils = packages()
    model = onnx.load_from_string(graph)
    linear = [node.name for node in model.graph.node if node.op_type in LINEAR and _is_of_a_block(node)]
    if not linear:
        return graph
    utils.add_pre_process_metadata(model)  # torch has inferred the shapes; without this mark, a warning is printed
    with TemporaryDirectory() as folder:
        path = Path(folder, "int8.onnx")
        quantization.quantize_dynamic(
            model,
            path,
            op_types_to_quantize=LINEAR,
            nodes_to_quantize=[*linear, *(f"{name}_MatMul" for name in linear)],  # of which a Gemm becomes the second
            per_channel=True,
            weight_type=quantization.QuantType.QInt8,
        )
        return path.read_bytes()


def _is_of_a_block(node: Any) -> bool:
    """By the module that it is in, or by its weight where the module was not called."""
    scopes = (entry.value for entry in node.metadata_props if entry.key == SCOPES)
    return any("blocks." in name for name in (*scopes, *node.input))
