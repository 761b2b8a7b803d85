"""Nothing in an exported file is trusted."""

from __future__ import annotations

import zipfile

import numpy as np
import pytest
from exported import changed

from iared2.errors import InputError
from iared2.runtime import Engine

# torch 2.10, of itself
pytestmark = [
    pytest.mark.filterwarnings("ignore:.isinstance.treespec, LeafSpec:FutureWarning"),
    pytest.mark.filterwarnings("ignore:The given buffer is not writable"),
]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"backend": "tensorrt"}, "openvino, onnxruntime"),
        ({"backend": "onnxruntime", "precision": "bf16"}, "has fp32"),
        ({"threads": 0}, "1 or more"),
        ({"threshold": [0.1, 0.2]}, "one number, or 3"),
        ({"threshold": float("nan")}, "one number, or 3"),
    ],
)
def test_bad_arguments(small, arguments, message):
    with pytest.raises(InputError, match=message):
        Engine(small[1], **{"backend": "onnxruntime", **arguments})


def test_images_of_another_shape(small, backend):
    engine = Engine(small[1], backend, threads=1)
    for shape in ((2, 3, 32, 48), (3, 48, 32), (0, 3, 48, 32)):
        with pytest.raises(InputError, match=r"takes images \(B, 3, 48, 32\)"):
            engine(np.zeros(shape, np.float32))


DAMAGE = {
    "compressed": ({"compression": zipfile.ZIP_DEFLATED}, "compressed"),
    "no graph": ({"graphs": {"group2.onnx": None}}, "no group2.onnx"),
    "no manifest": ({"graphs": {"manifest.json": None}}, "no file of iared2 export"),
    "not JSON": ({"graphs": {"manifest.json": b"[" * 100_000}}, "no file of iared2 export"),
    "another version": ({"manifest": {"format": "iared2 adaptive batch 9"}}, "another version"),
    "another file": ({"graphs": {"head.onnx": b"\x0a\x08location\x12\x0b/etc/passwd"}}, "names another file"),
    "no graph in it": ({"graphs": {"head.onnx": b"nothing"}}, "head.onnx in .* cannot be used"),
    "huge": ({"manifest": {"num_patches": 10**30}}, "num_patches"),
    "not finite": ({"manifest": {"thresholds": [float("nan")] * 3}}, "thresholds"),
    "more groups than there are": ({"manifest": {"stem": 4}}, "stem"),
    "a word": ({"manifest": {"embed_dim": "48"}}, "embed_dim"),
    "names": ({"manifest": {"class_names": [1, 2]}}, "class_names"),
    "two decisions": ({"manifest": {"num_keep": [1, 1, 1]}}, "no decision, or two"),
    "no decision": ({"manifest": {"thresholds": None}}, "no decision, or two"),
    "two numbers of patches": ({"manifest": {"whole_patches": 48}}, "two numbers of patches"),
    "too few": ({"manifest": {"pattern": [0.0]}}, "pattern"),
}


@pytest.mark.parametrize("damage", DAMAGE)
def test_a_damaged_file_is_one_line(small, tmp_path, damage, backend):
    changes, message = DAMAGE[damage]
    with pytest.raises(InputError, match=message) as error:
        Engine(changed(small[1], tmp_path / "m.zip", **changes), backend)
    assert len(str(error.value).splitlines()) == 1


def test_what_is_no_archive(small, tmp_path, backend):
    (tmp_path / "text.zip").write_text("text")
    (tmp_path / "cut.zip").write_bytes(small[1].read_bytes()[:-30])
    for name in ("absent.zip", "text.zip", "cut.zip", "."):
        with pytest.raises(InputError, match="cannot read"):
            Engine(tmp_path / name, backend)


def test_a_graph_of_another_model_is_noticed(small, tmp_path, backend):
    """The manifest says 24 patches of width 48; the graph returns others."""
    fewer = {"num_patches": 12, "whole_patches": 12, "pattern": [0.0] * 12}
    for manifest in ({"embed_dim": 96}, fewer, {"num_prefix_tokens": 0}):
        engine = Engine(changed(small[1], tmp_path / "m.zip", manifest=manifest), backend, threads=1)
        with pytest.raises(InputError, match="a graph returned"):
            engine(np.zeros((2, 3, 48, 32), np.float32))
    with zipfile.ZipFile(small[1]) as folder:
        graphs = {"group2.onnx": folder.read("stem.onnx")}
    engine = Engine(changed(small[1], tmp_path / "m.zip", graphs=graphs), backend, threads=1)
    with pytest.raises(InputError, match=r"cannot be used|a graph returned"):
        engine(np.zeros((2, 3, 48, 32), np.float32))
