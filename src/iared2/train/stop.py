"""SIGINT and SIGTERM stop a run between two steps, where a checkpoint is exact."""

from __future__ import annotations

import os
import signal
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from types import FrameType
from typing import Any

from ..errors import Stopped


class Stop:
    """Context in which a signal raises `Stopped`: at once, or at the end of a part that must not be interrupted.

    Further signals are ignored, since the run is already ending. Only the main thread gets signals.

    Attributes:
        signal: the number of the signal received, else 0.
        held: signals are recorded, but do not raise.
    """

    def __init__(self) -> None:
        self.signal, self.held = 0, False
        self._process = os.getpid()
        self._before: dict[int, Any] = {}

    def __enter__(self) -> Stop:
        if threading.current_thread() is threading.main_thread():
            self._before = {number: signal.signal(number, self._note) for number in (signal.SIGINT, signal.SIGTERM)}
        return self

    def __exit__(self, *error: object) -> None:
        for number, handler in self._before.items():
            signal.signal(number, handler)

    @contextmanager
    def whole(self) -> Iterator[None]:
        """A part that is not interrupted."""
        before, self.held = (self.signal, self.held), True
        try:
            yield
        finally:
            known, self.held = before
        if self.signal != known and not self.held:
            raise Stopped(self.signal)

    def _note(self, number: int, frame: FrameType | None) -> None:
        if self.signal or os.getpid() != self._process:  # a forked reader: the main process ends it
            return
        self.signal = number
        # a reader that gets the signal dies of it, and torch would raise that here, in the middle of anything
        self._before[signal.SIGCHLD] = signal.signal(signal.SIGCHLD, signal.SIG_DFL)
        if not self.held:
            raise Stopped(number)
