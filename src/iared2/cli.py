"""The command line: finds the module of a command and runs it. Its arguments are in arguments/."""

from __future__ import annotations

import argparse
import errno
import logging
import os
import sys
import warnings
from collections.abc import Callable, Sequence
from importlib import import_module
from importlib.metadata import version
from typing import NoReturn

from .arguments import commands, shared
from .errors import InputError, printable

COMMANDS: dict[str, tuple[str, str, Callable[[argparse.ArgumentParser], None]]] = {
    # name: a module with run(), the help text, and what adds the arguments
    "interpret": ("predict.command", "show which patches of a photo the model keeps", commands.interpret),
    "predict": (
        "predict.many",
        "predict any number of photos: Parquet files, resumable, several processes",
        commands.predict,
    ),
    "figure": ("predict.figure", "draw the figures of the paper for your photos, for print", commands.figure),
    "train": ("train.command", "train a model with Algorithm 1, or resume a killed run", commands.train),
    "accelerate": (
        "adapt.command",
        "make your own model faster on photos without labels, and say what that costs",
        commands.accelerate,
    ),
    "evaluate": (
        "evaluate.command",
        "measure top-1, patches kept, MACs and speed on labelled images or videos",
        commands.evaluate,
    ),
    "bench": (
        "evaluate.speed.command",
        "compare the speed with dense, masked, padded and random baselines",
        commands.bench,
    ),
    "export": ("export.static", "write a static model: ONNX or torch.export", commands.export),
    "explain-bench": (
        "evaluate.explanations.command",
        "measure methods of explanation on boxes or masks",
        commands.explain_bench,
    ),
    "demo": ("demo.command", "serve a demo page for the browser", commands.demo),
}


class _Parser(argparse.ArgumentParser):
    def error(self, message: str) -> NoReturn:
        """A wrong argument is a user error like any other: one line."""
        raise InputError(f"{message}; {self.prog} --help lists the arguments")


def main(argv: Sequence[str] | None = None) -> int:
    """Run one command. Returns 0 on success; a user error prints one line on stderr and returns 1.

    Without any argument, prints the help and returns 2, as argparse does where the command is missing. If the reader of
    stdout, such as `head`, has ended, returns 141, as shells report it.
    """
    try:
        try:
            return _run(argv)
        finally:
            print(end="", flush=True)  # here, since a traceback of the flush at the end cannot be caught
    except BrokenPipeError:
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())  # which that flush then writes to
        return 141


def _run(argv: Sequence[str] | None) -> int:
    # without the line of code that warns
    warnings.formatwarning = lambda message, *_, **__: f"note: {printable(str(message))}\n"
    argv = list(sys.argv[1:] if argv is None else argv)
    for stream in (sys.stdout, sys.stderr):  # a file name that the terminal cannot show must not stop the command
        if hasattr(stream, "reconfigure"):
            stream.reconfigure(errors="backslashreplace")
    try:
        if any("\0" in word for word in argv):
            raise InputError("an argument has a null character; leave it out")
        if not argv:
            _main_parser().print_help()
            return 2
        if argv[0] not in COMMANDS:
            _main_parser().parse_args(argv)  # --help, --version, or an error
        given = parse(argv[0], argv[1:])
        module = import_module(f".{COMMANDS[argv[0]][0]}", __package__)  # only now: --help needs no torch
        logging.getLogger("timm").setLevel(logging.ERROR)
        return module.run(given)
    except InputError as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    except OSError as error:  # wherever a name is looked up first
        if error.errno not in (errno.ENAMETOOLONG, errno.ELOOP):
            raise
        print(f"error: {InputError(f'{error.filename}: {error.strerror}; give another path')}", file=sys.stderr)
        return 1
    except KeyboardInterrupt as stop:
        print(stop if stop.args else "stopped", file=sys.stderr)
        return getattr(stop, "status", 130)


def parse(command: str, argv: Sequence[str]) -> argparse.Namespace:
    """The arguments of a command.

    Raises:
        InputError: they are wrong.
    """
    _, text, add_arguments = COMMANDS[command]
    parser = _Parser(prog=f"iared2 {command}", description=f"{text[0].upper()}{text[1:]}.", allow_abbrev=False)
    add_arguments(parser)
    # options may stand between positional arguments; but behind "--", that parser would look for options again
    read = parser.parse_known_args if "--" in argv else parser.parse_known_intermixed_args
    given, rest = read(argv)
    if rest and not shared.old_form(command, given, rest):
        parser.error(f"unknown {' '.join(map(printable, rest))}")
    return given


def _main_parser() -> argparse.ArgumentParser:
    parser = _Parser(prog="iared2", description="Vision transformers that drop uninformative patches, and show which.")
    parser.add_argument("--version", action="version", version=version("iared2"))
    subparsers = parser.add_subparsers(required=True, metavar="COMMAND", parser_class=argparse.ArgumentParser)
    for name, (_, text, _) in COMMANDS.items():
        subparsers.add_parser(name, help=text)
    parser.epilog = "iared2 COMMAND --help lists the arguments of a command."
    return parser


if __name__ == "__main__":
    sys.exit(main())
