"""The command line: finds the module of a command and runs it."""

from __future__ import annotations

import argparse
import errno
import logging
import sys
import warnings
from collections.abc import Sequence
from importlib import import_module
from importlib.metadata import version

from .errors import InputError

COMMANDS = {  # name -> a module with add_arguments() and run(), and the help text
    "interpret": ("predict.command", "show which patches of a photo the model keeps"),
    "predict": ("predict.many", "predict any number of photos: Parquet files, resumable, several processes"),
    "figure": ("predict.figure", "draw the figures of the paper for your photos, for print"),
    "train": ("train.command", "train a model with Algorithm 1, or resume a killed run"),
    "accelerate": ("adapt.command", "make your own model faster on photos without labels, and say what that costs"),
    "evaluate": ("evaluate.command", "measure top-1, patches kept, MACs and speed on labelled images or videos"),
    "bench": ("evaluate.speed.command", "compare the speed with dense, masked, padded and random baselines"),
    "export": ("export", "write a static model: ONNX or torch.export"),
    "explain-bench": ("evaluate.explanations.command", "measure methods of explanation on boxes or masks"),
    "demo": ("demo.command", "serve a demo page for the browser"),
}


def main(argv: Sequence[str] | None = None) -> int:
    """Run one command. Returns 0 on success; a user error prints one line on stderr and returns 1."""
    warnings.formatwarning = lambda message, *_, **__: f"note: {message}\n"  # without the line of code that warns
    argv = sys.argv[1:] if argv is None else argv
    parser = argparse.ArgumentParser(
        prog="iared2", description="Vision transformers that drop uninformative patches, and show which."
    )
    parser.add_argument("--version", action="version", version=version("iared2"))
    commands = parser.add_subparsers(required=True, metavar="COMMAND")
    for name, (path, text) in COMMANDS.items():
        command = commands.add_parser(name, help=text)
        if name in argv[:1]:  # the modules of other commands need not be imported
            module = import_module(f".{path}", __package__)
            module.add_arguments(command)
            command.set_defaults(run=module.run)
    arguments = parser.parse_args(argv)
    for stream in (sys.stdout, sys.stderr):  # a file name that the terminal cannot show must not stop the command
        if hasattr(stream, "reconfigure"):
            stream.reconfigure(errors="backslashreplace")
    logging.getLogger("timm").setLevel(logging.ERROR)
    try:
        if any("\0" in word for word in argv):
            raise InputError("an argument has a null character; leave it out")
        return arguments.run(arguments)
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


if __name__ == "__main__":
    sys.exit(main())
