"""A process that serves: without torch, and with what else runs in it."""

from __future__ import annotations

import ast
import subprocess
import sys

import pytest

# torch 2.10, of itself
pytestmark = [
    pytest.mark.filterwarnings("ignore:.isinstance.treespec, LeafSpec:FutureWarning"),
    pytest.mark.filterwarnings("ignore:The given buffer is not writable"),
]


def test_import_needs_no_torch():
    code = """
import sys
import iared2.runtime
found = sorted({name.split(".")[0] for name in sys.modules} & {"torch", "timm", "onnx", "openvino", "onnxruntime"})
ours = sorted(name for name in sys.modules if name.startswith("iared2."))
print(found, ours)
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.startswith("[] ['iared2.errors', 'iared2.runtime', 'iared2.runtime.archive', ")
    assert all(name.startswith(("iared2.errors", "iared2.runtime")) for name in ast.literal_eval(done.stdout[3:]))


def test_engine_needs_no_torch(small, backend):
    _, path = small
    code = f"""
import sys
import numpy as np
from iared2.runtime import Engine
engine = Engine({str(path)!r}, {backend!r}, threads=1)
print(engine(np.zeros((3, 3, 48, 32))).logits.shape, "torch" in sys.modules)
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "(3, 7) False"


def test_signals_are_handled_after_engines_are_gone(small, backend):
    """In the order in which OpenVINO, with a Core for each, leaves a stack for signals that is gone."""
    code = f"""
import gc, signal, subprocess, sys
from iared2.runtime import Engine
heard = []
signal.signal(signal.SIGCHLD, lambda *_: heard.append(1))
first = Engine({str(small[1])!r}, {backend!r}, threads=1)
second = Engine({str(small[1])!r}, {backend!r}, threads=1)
del first
gc.collect()
del second
gc.collect()
subprocess.run([sys.executable, "-c", ""], check=True)
print(bool(heard))
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert (done.returncode, done.stdout) == (0, "True\n"), done.stderr
