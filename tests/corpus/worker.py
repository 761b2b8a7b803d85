"""Runs each case in a forked process, so that a crash, a hang or a changed setting harms no other case.

One parent imports everything once; each child of it has a copy, under limits of time and memory. An audit hook notes
what the child opens, starts and looks up, and refuses what would reach out of the case's folder.
"""

from __future__ import annotations

import contextlib
import gc
import importlib
import json
import os
import resource
import signal
import subprocess
import sys
import time
import traceback
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from .case import Case

GB = 1 << 30
IDLE_SECONDS = 6
NETWORK = ("socket.getaddrinfo", "socket.gethostbyname", "socket.connect", "socket.sendto")
PROCESS = ("subprocess.Popen", "os.system", "os.exec", "os.posix_spawn", "os.spawn", "pty.spawn")
CHANGE = ("os.mkdir", "os.rename", "os.remove", "os.rmdir", "os.link", "os.symlink", "os.truncate", "os.chmod")
WRITE = os.O_WRONLY | os.O_RDWR | os.O_CREAT | os.O_APPEND | os.O_TRUNC


@dataclass
class Report:
    """What one case did.

    Attributes:
        status: the exit status; or ``"raised"``, ``"hangs"``, ``"signal N"``.
        events: forbidden things it did: network names, processes, files outside of its folder.
        growth: bytes of memory beyond what the process had before.
    """

    status: int | str
    out: str = ""
    err: str = ""
    events: list[str] = field(default_factory=list)
    growth: int = 0
    seconds: float = 0.0


class Worker:
    """The parent of the processes in which cases run."""

    def __init__(self, home: Path, ready: Path | None = None) -> None:
        home.mkdir(parents=True, exist_ok=True)
        tests = Path(__file__).parents[1]
        environment = {
            **os.environ,
            **dict.fromkeys(("OMP_NUM_THREADS", "PYTHONDONTWRITEBYTECODE", "ACCELERATE_USE_CPU"), "1"),
            **{
                "HOME": str(home),
                "XDG_CACHE_HOME": str(home / "cache"),
                "TMPDIR": str(home),
                "HF_HOME": str(home / "hf"),
            },
            "MPLCONFIGDIR": str(home / "mpl"),
            "CUDA_VISIBLE_DEVICES": "",
            "COLUMNS": "200",
            "PYTHONPATH": os.pathsep.join([str(tests), *sys.path]),
        }
        command = [sys.executable, "-m", "corpus.worker", str(home), *([str(ready)] if ready else [])]
        pipe = subprocess.PIPE
        self.process = subprocess.Popen(command, stdin=pipe, stdout=pipe, env=environment, text=True, cwd=home)

    def run(self, case: Case) -> Report:
        """Run one case to its end, or to a limit."""
        assert self.process.stdin
        assert self.process.stdout
        job = {"root": str(case.root), "argv": case.argv, "python": case.python, "seconds": case.seconds}
        print(json.dumps(job), file=self.process.stdin, flush=True)
        return Report(**json.loads(self.process.stdout.readline()))

    def close(self) -> None:
        """End the parent."""
        assert self.process.stdin
        self.process.stdin.close()
        self.process.wait()
        if self.process.stdout:
            self.process.stdout.close()


def _serve(home: Path, warm: list[str]) -> None:
    replies = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)
    import accelerate  # noqa: F401
    import av  # noqa: F401
    import datasets  # noqa: F401
    import matplotlib.font_manager  # noqa: F401 (asks fc-list once)
    import pyarrow.parquet  # noqa: F401
    import torch
    import torch.utils.tensorboard
    from PIL import Image

    import iared2
    import iared2.cli
    import iared2.train.curriculum

    for path, *_ in iared2.cli.COMMANDS.values():
        importlib.import_module(f"iared2.{path}")
    torch.set_num_threads(1)
    Image.init()
    if warm:  # what a first call costs is paid once: fonts, tables, imports inside of functions
        with contextlib.redirect_stdout(None):
            predictor = iared2.Predictor(iared2.load(warm[0]))
            predictor(Image.new("RGB", (40, 30))).pictures(None, "jet")
    gc.collect()
    gc.freeze()  # else the first collection of a child would touch, and so copy, all pages
    for line in sys.stdin:
        job = json.loads(line)
        print(json.dumps(_watch(job, home)), file=replies, flush=True)


def _watch(job: dict[str, Any], home: Path) -> dict[str, Any]:
    notes = Path(job["root"], "notes")
    notes.mkdir()
    start = time.monotonic()
    if not (pid := os.fork()):
        os.setpgid(0, 0)
        _child(job, home, notes)
    status, used, since = None, -1.0, start
    while True:
        found, code, usage = os.wait4(pid, os.WNOHANG)
        if found:
            break
        now = time.monotonic()
        state, cpu = _state(pid)
        if cpu != used or state == "R":  # it works, or would if others let it
            used, since = cpu, now
        if now - since > IDLE_SECONDS or used > job["seconds"]:
            status = "takes too long" if used > job["seconds"] else "hangs"
            with contextlib.suppress(ProcessLookupError):
                os.kill(pid, signal.SIGKILL)
        time.sleep(0.005)
    with contextlib.suppress(ProcessLookupError, PermissionError):
        os.killpg(pid, signal.SIGKILL)  # readers that it started
    if status is None and os.WIFSIGNALED(code):
        status = f"signal {os.WTERMSIG(code)}"
    texts = {name: _text(notes / name) for name in ("out", "err", "events", "status")}
    return {
        "status": status if status is not None else json.loads(texts["status"] or '"no status"'),
        "out": texts["out"],
        "err": texts["err"],
        "events": texts["events"].splitlines(),
        "growth": 1024 * usage.ru_maxrss - int(_text(notes / "resident") or 0),
        "seconds": time.monotonic() - start,
    }


def _child(job: dict[str, Any], home: Path, notes: Path) -> None:
    status: int | str = "raised"
    try:
        os.chdir(job["root"])
        (notes / "resident").write_text(str(_resident()))
        for fd, name in ((1, "out"), (2, "err")):
            os.dup2(os.open(notes / name, os.O_WRONLY | os.O_CREAT), fd)
        pages = int(Path("/proc/self/statm").read_text().split()[0])
        limit = pages * resource.getpagesize() + 2 * GB
        resource.setrlimit(resource.RLIMIT_AS, (limit, limit))
        resource.setrlimit(resource.RLIMIT_CPU, (job["seconds"] + 5,) * 2)
        resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
        status = _run(job, home, notes)
    except BaseException:
        traceback.print_exc()
    try:
        sys.stdout.flush()
        sys.stderr.flush()
        (notes / "status").write_text(json.dumps(status))
    finally:
        os._exit(0)


def _run(job: dict[str, Any], home: Path, notes: Path) -> int | str:
    import numpy as np
    import torch
    from PIL import Image
    from torch.optim.optimizer import register_optimizer_step_post_hook

    import iared2
    from iared2.cli import main

    class Started(BaseException):
        """Training has begun, and that was all that was asked."""

    def stop(optimizer: torch.optim.Optimizer, *_: Any) -> None:
        if sum(p.numel() for group in optimizer.param_groups for p in group["params"]) == 6:
            return  # the trial of train/optimizer.py
        for group in optimizer.param_groups:
            for parameter in group["params"]:
                if not parameter.isfinite().all():
                    raise ArithmeticError("a setting was accepted that makes weights infinite or NaN in one step")
        raise Started

    register_optimizer_step_post_hook(stop)
    events = os.open(notes / "events", os.O_WRONLY | os.O_CREAT | os.O_APPEND)
    sys.addaudithook(_Guard(events, [Path(job["root"]).resolve(), home.resolve()]))
    try:
        if job["argv"]:
            return main(job["argv"])
        exec(job["python"], {"iared2": iared2, "Image": Image, "np": np, "torch": torch})
        return 0
    except Started:
        return 0
    except SystemExit as error:
        return f"SystemExit({error.code})"
    except iared2.InputError as error:
        if job["argv"]:
            raise
        print(f"error: {error}", file=sys.stderr)
        return 1


class _Guard:
    """An audit hook that writes down what is forbidden, and refuses it."""

    def __init__(self, events: int, allowed: list[Path]) -> None:
        self.events, self.allowed = events, [str(path) for path in allowed]

    def __call__(self, event: str, args: tuple[Any, ...]) -> None:
        if event in NETWORK:
            where = args[-1] if event == "socket.connect" else args[0]
            if event != "socket.connect" or isinstance(where, tuple):
                self.refuse(f"network: {event} {where!r}")
        elif event in PROCESS:
            self.refuse(f"process: {event} {args[:2]!r}")
        elif event == "open":
            path, _, flags = args
            if isinstance(path, (str, bytes)):
                name = os.fsdecode(path)
                if "canary" in name:
                    self.refuse(f"opens what a file names: {name}")
                if isinstance(flags, int) and flags & WRITE and not self.inside(name):
                    self.refuse(f"opens for writing: {name}")
        elif event in CHANGE:
            for path in args[: 2 if event in ("os.rename", "os.link") else 1]:
                if isinstance(path, (str, bytes, os.PathLike)) and not self.inside(os.fsdecode(path)):
                    self.refuse(f"changes: {event} {path!r}")

    def inside(self, name: str) -> bool:
        if name.startswith(("/dev/null", "/dev/shm/", "/dev/tty", "/proc/self/")):
            return True
        path = os.path.realpath(name)
        return any(path == root or path.startswith(root + os.sep) for root in self.allowed)

    def refuse(self, what: str) -> None:
        os.write(self.events, (what.replace("\n", " ") + "\n").encode(errors="backslashreplace"))
        raise PermissionError(13, f"forbidden in this test: {what}")


def _text(path: Path) -> str:
    return path.read_bytes().decode(errors="replace") if path.exists() else ""


def _resident() -> int:
    return int(Path("/proc/self/statm").read_text().split()[1]) * resource.getpagesize()


def _state(pid: int) -> tuple[str, float]:
    """Whether it runs or sleeps, and the seconds that it has computed."""
    try:
        fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
    except OSError:
        return "Z", -1.0
    return fields[0], (int(fields[11]) + int(fields[12])) / os.sysconf("SC_CLK_TCK")


if __name__ == "__main__":
    _serve(Path(sys.argv[1]), sys.argv[2:])
