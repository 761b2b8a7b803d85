"""`iared2 demo` in a process of its own, as people run it, for the tests of the page."""

from __future__ import annotations

import os
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

# the command, and a line in its log for every address that it looks up or connects to
WATCHED = """
import os, sys

def watch(event, args):
    if event in ("socket.connect", "socket.getaddrinfo"):
        host = args[1][0] if event == "socket.connect" else args[0]
        os.write(2, f"connection {host}\\n".encode())  # print() would take a lock, also while Python shuts down

sys.addaudithook(watch)
from iared2.cli import main

sys.exit(main())
"""


@dataclass(frozen=True)
class Server:
    """A running page.

    Attributes:
        address: ends with a slash.
        folder: holds `log`, and `uploads` with all that visitors brought and got.
        process: ended when the context ends.
    """

    address: str
    folder: Path
    process: subprocess.Popen

    def log(self) -> str:
        """What it printed so far."""
        return (self.folder / "log").read_text()


@contextmanager
def served(folder: Path, *options: str) -> Iterator[Server]:
    """Serve the model in the box, or another by its option, on a free port."""
    with socket.create_server(("127.0.0.1", 0)) as free:
        port = free.getsockname()[1]
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "GRADIO_TEMP_DIR": str(folder / "uploads")}
    command = [sys.executable, "-c", WATCHED, "demo", "--port", str(port), *options]
    with open(folder / "log", "w") as log:
        process = subprocess.Popen(command, stdout=log, stderr=log, env=environment)
        server = Server(f"http://127.0.0.1:{port}/", folder, process)
        try:
            deadline = time.monotonic() + 120
            while "the page is at" not in server.log():
                assert process.poll() is None, server.log()
                assert time.monotonic() < deadline, server.log()
                time.sleep(0.1)
            yield server
        finally:
            process.terminate()
            process.wait(30)
