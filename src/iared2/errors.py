"""The exceptions that are meant for people."""

from __future__ import annotations

MAX_MESSAGE = 900


def printable(text: str) -> str:
    """Text from a file or its name, safe to print: control characters, which a terminal obeys, become escapes.

    Of more than ``MAX_MESSAGE`` characters the middle is left out.
    """
    if len(text) > MAX_MESSAGE:
        text = f"{text[: MAX_MESSAGE // 2]} … {text[-MAX_MESSAGE // 3 :]}"
    return "".join(c if c.isprintable() else c.encode("unicode_escape").decode() for c in text)


class InputError(Exception):
    """Something that a person gave is wrong.

    The message is one line that says what is wrong, where, and what to do about it, ``printable``. The command line
    prints it without a traceback and exits with status 1; library users may catch it.
    """

    def __str__(self) -> str:
        return printable(super().__str__())


class NoSplit(InputError):
    """The data set is there, but has no such split."""


class Stopped(KeyboardInterrupt):
    """A signal ended a training run; the same command goes on with it.

    Attributes:
        status: exit status of the process, 128 + the signal's number, as shells report it.
    """

    def __init__(self, signal: int, message: str = "stopped; the same command goes on") -> None:
        super().__init__(message)
        self.signal, self.status = signal, 128 + signal
