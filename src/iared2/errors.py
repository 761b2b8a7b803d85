"""The exceptions that users see."""

from __future__ import annotations

MAX_MESSAGE = 900


def printable(text: str) -> str:
    """Text from a file or its name, safe to print: control characters are escaped, since a terminal obeys them.

    The middle of a text of more than ``MAX_MESSAGE`` characters is left out.
    """
    if len(text) > MAX_MESSAGE:
        text = f"{text[: MAX_MESSAGE // 2]} … {text[-MAX_MESSAGE // 3 :]}"
    return "".join(c if c.isprintable() else c.encode("unicode_escape").decode() for c in text)


class InputError(Exception):
    """The user's input is wrong.

    The message is one line that says what is wrong, where, and what to do about it, ``printable``. The command line
    prints it without a traceback and exits with status 1; library users may catch it.
    """

    def __str__(self) -> str:
        return printable(super().__str__())


def missing(what: str, package: str | None, extra: str) -> InputError:
    """The error where an optional package is not installed. No registry has iared2 yet: it is installed from a clone.

    Args:
        what: needs the package.
        package: its name.
        extra: of pyproject.toml, which has it.
    """
    return InputError(f"{what} needs the package {package}: run pip install '.[{extra}]' in your clone of iared2")


class NoSplit(InputError):
    """The data set exists, but has no such split."""


class Stopped(KeyboardInterrupt):
    """A signal stopped a training run; the same command resumes it.

    Attributes:
        status: exit status of the process, 128 + the signal's number, as shells report it.
    """

    def __init__(self, signal: int, message: str = "stopped; the same command resumes the run") -> None:
        super().__init__(message)
        self.signal, self.status = signal, 128 + signal
