"""Whatever a person hands to the tool, it succeeds, or says in one line what is wrong, and nothing else happens.

Of the inputs of tests/corpus a sample runs by default; all of them by ``IARED2_CORPUS=all``.
"""

from __future__ import annotations

import os
import random
import shutil
import sys
from collections import Counter
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import pytest
from corpus import Input, bases, inputs
from corpus.case import Case, Place
from corpus.contract import complaints
from corpus.worker import Worker

pytestmark = pytest.mark.skipif(sys.platform != "linux", reason="the worker reads /proc")
SAMPLE = 24
"""Inputs of each kind."""


def chosen() -> list[Input]:
    """All inputs, or the same so many of each kind."""
    if os.environ.get("IARED2_CORPUS") == "all":
        return inputs()
    by_kind = {kind: [i for i in inputs() if i.kind == kind] for kind in Counter(i.kind for i in inputs())}
    return [i for kind, listed in by_kind.items() for i in random.Random(kind).sample(listed, SAMPLE)]


@pytest.fixture(scope="module")
def valid(tmp_path_factory: pytest.TempPathFactory) -> bases.Bases:
    return bases.make(tmp_path_factory.mktemp("bases"))


@pytest.fixture(scope="module")
def worker(valid: bases.Bases, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Worker]:
    worker = Worker(tmp_path_factory.mktemp("home"), valid.model)
    yield worker
    worker.close()


@pytest.mark.parametrize("given", chosen(), ids=lambda given: given.id)
def test_contract(given: Input, worker: Worker, valid: bases.Bases, tmp_path: Path) -> None:
    case = given.make(tmp_path / "case", valid)
    assert complaints(case, worker.run(case)) == []
    shutil.rmtree(tmp_path / "case")  # else pytest would keep all of them, links in circles and pipes among them


def test_there_are_enough() -> None:
    count = Counter(given.kind for given in inputs())
    least = {"image": 350, "checkpoint": 200, "recipe": 250, "data": 130, "video": 70}
    assert all(count[kind] >= least[kind] for kind in least)
    assert sum(count.values()) >= 1000
    ids = [given.id for given in inputs()]
    assert len(set(ids)) == len(ids)
    assert all(name.isprintable() and " " not in name for name in ids)


def test_an_input_is_a_function_of_kind_and_seed(valid: bases.Bases, tmp_path: Path) -> None:
    for number, given in enumerate(random.Random(0).sample([i for i in inputs() if "-flipped" in i.id], 12)):
        found = []
        for twin in "ab":
            root = tmp_path / twin / str(number)
            given.make(root, valid)
            found.append({p.name: p.read_bytes() for p in (root / "in").rglob("*") if p.is_file()})
        assert found[0] == found[1] != {}


GOOD = {
    "nothing": "pass",
    "an error": "raise iared2.InputError('in/x.jpg: not a photo; give one')",
    "a warning and an error": "import warnings; warnings.warn('odd'); raise iared2.InputError('x: wrong')",
    "a file": "import os; os.mkdir('out'); open('out/x.json', 'w').write('[1.5]')",
    "an import": "import this",
}
RAW = "class Raw(iared2.InputError):\n    __str__ = Exception.__str__\n"
BAD = {
    "two lines": (RAW + "raise Raw('a\\nb')", "the last line on stderr"),
    "two errors": ("import sys; print('odd', file=sys.stderr); raise iared2.InputError('b')", "more than one line"),
    "no words": ("raise iared2.InputError('')", "says nothing"),
    "too many words": (RAW + "raise Raw('x' * 5000)", "a message of"),
    "an escape": (RAW + "raise Raw('\\x1b[31m')", "control characters"),
    "another exception": ("raise ValueError('x')", "ValueError: x"),
    "a traceback": (
        "import traceback\ntry:\n    1 / 0\nexcept Exception:\n    traceback.print_exc()\nraise iared2.InputError('x')",
        "a traceback",
    ),
    "an exit": ("raise SystemExit(2)", "SystemExit(2)"),
    "a temporary file": ("import os; os.mkdir('out'); open('out/.x.tmp', 'w')", "a temporary file is left"),
    "half of the files": ("import os; os.mkdir('out'); open('out/x', 'w'); raise iared2.InputError('x')", "left over"),
    "NaN in JSON": ("import os; os.mkdir('out'); open('out/x.json', 'w').write('[NaN]')", "NaN in it"),
    "1e999 in JSON": ("import os; os.mkdir('out'); open('out/x.json', 'w').write('[1e999]')", "inf in it"),
    "half of a JSON": ("import os; os.mkdir('out'); open('out/x.json', 'w').write('[1')", "is not JSON"),
    "a name": (
        "import socket\ntry:\n    socket.getaddrinfo('example.com', 80)\nexcept OSError:\n    pass",
        "network: socket.getaddrinfo",
    ),
    "an address": (
        "import socket\ntry:\n    socket.socket().connect(('127.0.0.1', 9))\nexcept OSError:\n    pass",
        "network: socket.connect",
    ),
    "a process": (
        "import subprocess\ntry:\n    subprocess.run(['true'])\nexcept OSError:\n    pass",
        "process: subprocess",
    ),
    "a shell": ("import os\ntry:\n    os.system('true')\nexcept OSError:\n    pass", "process: os.system"),
    "a file elsewhere": ("try:\n    open('/tmp/corpus-x', 'w')\nexcept OSError:\n    pass", "opens for writing"),
    "a folder elsewhere": (
        "import os\ntry:\n    os.mkdir('/tmp/corpus-x')\nexcept OSError:\n    pass",
        "changes: os.mkdir",
    ),
    "a file that a file names": (
        "try:\n    open('outside/canary.pth')\nexcept OSError:\n    pass",
        "what a file names",
    ),
    "the same in C": (
        "import ctypes; d = ctypes.CDLL(None).open(b'outside/canary.pth', 0); ctypes.CDLL(None).read(d, bytes(9), 9)",
        "only a file names",
    ),
    "code": ("import os; os.mkdir('outside/code-was-run')", "code from a file was run"),
    "memory": ("x = bytearray(7 << 28)", "memory grew by 1."),
    "too much memory": ("x = bytearray(5 << 30)", "MemoryError"),
    "a crash": ("import os; os.abort()", "signal 6"),
    "a wait": ("import time; time.sleep(99)", "hangs"),
    "a loop": ("while True: pass", "takes too long"),
    "weights of NaN": (
        "p = torch.nn.Parameter(torch.ones(1)); p.grad = p * float('nan'); torch.optim.SGD([p], 1).step()",
        "infinite or NaN",
    ),
}


def case_of(source: str, root: Path, valid: bases.Bases) -> Case:
    return replace(Place(root, "made up", valid).python(source), seconds=8)


@pytest.mark.parametrize("source", GOOD.values(), ids=GOOD)
def test_what_is_right_passes(source: str, worker: Worker, valid: bases.Bases, tmp_path: Path) -> None:
    case = case_of(source, tmp_path / "case", valid)
    assert complaints(case, worker.run(case)) == []


@pytest.mark.parametrize(("source", "complaint"), BAD.values(), ids=BAD)
def test_what_is_wrong_is_noticed(
    source: str, complaint: str, worker: Worker, valid: bases.Bases, tmp_path: Path
) -> None:
    case = case_of(source, tmp_path / "case", valid)
    assert any(complaint in found for found in complaints(case, worker.run(case)))
    assert not Path("/tmp/corpus-x").exists()


def test_a_promise_that_is_not_kept_is_noticed(worker: Worker, valid: bases.Bases, tmp_path: Path) -> None:
    case = case_of(
        "import os; os.mkdir('out'); open('out/a', 'w'); open('out/b', 'w').write('x')", tmp_path / "case", valid
    )
    case = replace(case, promised=("a",))
    assert complaints(case, worker.run(case)) == ["a is missing or empty", "left over: ['b']"]


def test_the_first_step_is_the_last(worker: Worker, valid: bases.Bases, tmp_path: Path) -> None:
    source = "p = torch.nn.Parameter(torch.ones(1)); p.grad = p.data; torch.optim.SGD([p], 1).step(); 1 / 0"
    case = case_of(source, tmp_path / "case", valid)
    assert complaints(case, worker.run(case)) == []
