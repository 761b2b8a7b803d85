"""The command line as a whole: one form of every argument, and help that answers at once."""

from __future__ import annotations

import argparse
import json
import os
import re
import subprocess
import sys
import warnings
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

import iared2
from iared2 import cli
from iared2.cli import COMMANDS, main
from iared2.device import usable_device
from iared2.evaluate.explanations.faithfulness import Fill
from iared2.evaluate.speed.command import MODEL, PRECISIONS
from iared2.explain.names import EVERY

PHOTO = Path(iared2.__file__).parent / "box" / "chelsea.jpg"
TAKE_A_MODEL = set(COMMANDS) - {"train", "accelerate"}  # the latter takes -m: a name or a file
HEAVY = "torch", "timm", "numpy", "matplotlib", "rich", "PIL", "pyarrow"


def parser(command: str) -> argparse.ArgumentParser:
    made = argparse.ArgumentParser()
    COMMANDS[command][2](made)
    return made


def actions() -> Iterator[tuple[str, argparse.Action]]:
    """``(command, argument)``, without ``--help``."""
    for command in COMMANDS:
        yield from ((command, a) for a in parser(command)._actions if not isinstance(a, argparse._HelpAction))


def option(command: str, name: str) -> argparse.Action:
    return next(a for c, a in actions() if c == command and name in a.option_strings)


def silent(help_text: str, action: argparse.Action) -> bool:
    """Whether the help of an optional argument conceals its default."""
    if action.required or action.nargs == 0 or (not action.option_strings and action.nargs != "?"):
        return False
    found = re.search(r"\(default: (.+)\)", help_text)
    if not found:
        return True
    default = action.default
    if default in (None, argparse.SUPPRESS, [], ""):  # in words
        return False
    words = default if isinstance(default, (list, tuple)) else [default]
    return not all(f"{word:g}" in found[1] if isinstance(word, float) else str(word) in found[1] for word in words)


@pytest.mark.parametrize("argv", [["--help"], [], *([command, "--help"] for command in COMMANDS)], ids=" ".join)
def test_help_waits_for_no_torch(argv):
    code = (
        "import sys, iared2.cli\n"
        f"try: iared2.cli.main({argv!r})\n"
        f"finally: print(sorted({{*{HEAVY!r}}} & set(sys.modules)), file=sys.stderr)"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done.stderr.endswith("[]\n")
    assert done.stdout.startswith(f"usage: iared2{''.join(f' {word}' for word in argv[:-1])} [-h]")


def test_no_argument_shows_the_help(capsys):
    assert main([]) == 2
    printed = capsys.readouterr().out
    assert all(f"    {command}" in printed for command in COMMANDS)


def test_the_checkpoint_is_c_everywhere():
    for command in TAKE_A_MODEL:
        action = option(command, "-c")
        assert (action.option_strings, action.default, action.required) == (["-c", "--checkpoint"], None, False)
        assert "in the box" in (action.help or "") or command == "bench"
    assert not any(a.dest == "checkpoint" for c, a in actions() if c == "train")


def test_the_device_has_one_default():
    """Except on the page, which also runs engines of the CPU."""
    defaults = {command: action.default for command, action in actions() if action.dest == "device"}
    assert defaults.pop("demo") == "cpu"
    assert set(defaults.values()) == {None}
    assert usable_device(None).type == ("cuda" if torch.cuda.is_available() else "cpu")


def test_a_reader_of_stdout_may_end():
    environment = {**os.environ, "PYTHONUNBUFFERED": ""}  # with a value, argparse itself would hide the error
    for argv in (["--help"], []):
        command = [sys.executable, "-m", "iared2.cli", *argv]
        process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, env=environment)
        assert process.stdout
        process.stdout.close()  # as head does
        assert process.communicate()[1] == b""
        assert process.returncode == 141


def test_a_warning_does_not_control_the_terminal(monkeypatch):
    monkeypatch.setattr(warnings, "formatwarning", None)
    main(["nonsense"])
    assert warnings.formatwarning(UserWarning("\x1b[31m.txt"), UserWarning, "", 1) == "note: \\x1b[31m.txt\n"


def test_every_default_is_stated():
    complaints = []
    for command, action in actions():
        text = (action.help or "") % {"default": action.default}
        complaints += [f"{command} {action.dest}: {text}"] * silent(text, action)
    assert complaints == []


@pytest.mark.parametrize(
    ("kwargs", "is_silent"),
    [
        ({"help": "a number", "default": 3}, True),
        ({"help": "a number (default: 3)", "default": 3}, False),
        ({"help": "a number (default: 4)", "default": 3}, True),
        ({"help": "numbers (default: 1 8)", "default": [1, 8], "nargs": "+"}, False),
        ({"help": "numbers (default: 1)", "default": [1, 8], "nargs": "+"}, True),
        ({"help": "text (default: none)"}, False),
        ({"help": "text"}, True),
        ({"help": "text", "required": True}, False),
        ({"help": "a flag", "action": "store_true"}, False),
    ],
)
def test_a_concealed_default_is_noticed(kwargs, is_silent):
    action = argparse.ArgumentParser().add_argument("--x", **kwargs)
    assert silent(kwargs["help"], action) == is_silent


def test_choices_are_those_of_the_modules():
    assert list(option("bench", "--precision").choices or ()) == list(PRECISIONS)
    assert tuple(option("explain-bench", "--fill").choices or ()) == Fill.__args__
    assert option("interpret", "--method").choices == EVERY
    assert MODEL in (next(a for c, a in actions() if (c, a.dest) == ("bench", "model")).help or "")


@pytest.mark.parametrize(
    ("argv", "name", "value"),
    [
        (["bench", "--keep", "0.6", "0.4", "0.2"], "keep", [0.6, 0.4, 0.2]),
        (["bench", "--keep", "0.6,0.4,0.2"], "keep", [0.6, 0.4, 0.2]),
        (["bench", "--keep", "0.6,", "0.4", ",0.2"], "keep", [0.6, 0.4, 0.2]),
        (["bench", "--batch-size", "1,8"], "batch_size", [1, 8]),
        (["evaluate", "DATA", "-t", "0.5,0.4"], "threshold", [0.5, 0.4]),
        (["evaluate", "DATA", "--budget", "0.5", "0.4"], "budget", [0.5, 0.4]),
        (["interpret", "-p", "a.jpg", "-t", "0.5,0.4"], "threshold", [0.5, 0.4]),
        (["predict", "a", "-t", "0.5", "-o", "out", "b"], "photos", ["a", "b"]),
        (["figure", "maps", "a", "-m", "attention,random", "-o", "f.png", "b"], "methods", ["attention", "random"]),
        (["figure", "maps", "-o", "f.png", "--", "-a.jpg"], "photo", ["-a.jpg"]),
        (["explain-bench", "DATA", "--methods", "attention:3,center"], "methods", ["attention:3", "center"]),
        (["export", "m.onnx", "--num-keep", "9,5"], "num_keep", [9, 5]),
        (["evaluate", "DATA", "--classes", "tabby, tabby cat", "ox"], "classes", ["tabby, tabby cat", "ox"]),
        (["evaluate", "DATA", "--json"], "json", "-"),
    ],
)
def test_lists_with_spaces_or_commas(argv, name, value):
    assert getattr(cli.parse(argv[0], argv[1:]), name) == value


@pytest.mark.parametrize(
    ("argv", "message"),
    [
        (["bench", "--keep", "0.5,half"], "argument --keep: '0.5,half': give numbers"),
        (["bench", "--batch-size", "1.5"], "argument --batch-size: '1.5': give whole numbers"),
        (["evaluate", "--budget", "0.5", "DATA"], "'0.5 DATA': give numbers, and words before the option"),
        (["bench", "--keep", ","], "argument --keep: ','"),
        (["evaluate"], "the following arguments are required: data; iared2 evaluate --help"),
        (["evaluate", "a", "b", "c"], "unknown b c"),
        (["evaluate", "a", "b", "-c", "box"], "unknown b"),
        (["evaluate", "a", "--nonsense"], "unknown --nonsense"),
        (["evaluate", "a", "--lim", "3"], "unknown --lim 3"),
        (["predict", "a"], "the following arguments are required: -o/--output"),
        (["nonsense"], "invalid choice: 'nonsense'"),
        (["interpret", "-p", "a.jpg"], "nothing to write: give -o FOLDER for pictures and numbers, --json"),
    ],
)
def test_wrong_arguments_are_one_line(argv, message, capsys):
    assert main(argv) == 1
    printed, errors = capsys.readouterr()
    assert printed == ""
    assert errors.startswith("error: ")
    assert errors.count("\n") == 1
    assert message in errors


@pytest.mark.parametrize(
    ("command", "old", "name"),
    [
        ("evaluate", ["m.safetensors", "--limit", "3", "DATA"], "data"),
        ("explain-bench", ["m.safetensors", "DATA", "--limit", "3"], "data"),
        ("export", ["m.safetensors", "--num-keep", "3", "--batch-size", "1", "DATA"], "output"),
    ],
)
def test_the_old_form_works_and_says_so(command, old, name, capsys):
    given = cli.parse(command, old)
    assert (given.checkpoint, getattr(given, name)) == ("m.safetensors", "DATA")
    what = f"note: iared2 {command} CHECKPOINT {name.upper()} is now iared2 {command} -c CHECKPOINT {name.upper()}\n"
    assert capsys.readouterr() == ("", what)
    new = [word for word in old if word != "m.safetensors"]
    assert vars(cli.parse(command, ["-c", "m.safetensors", *new])) == vars(given)
    assert capsys.readouterr() == ("", "")


def test_old_names_of_bench(like_the_box, capsys):
    assert cli.parse("bench", ["--spread", "0.2"]).keep_std == 0.2
    assert capsys.readouterr().err == "note: --spread is now --keep-std\n"
    short = ["--keep", "1", "1", "1", "1", "--batch-size", "1", "--seconds", "0", "--no-compile", "--json"]
    assert main(["bench", str(like_the_box), *short]) == 0
    printed, said = capsys.readouterr()
    assert said.startswith("note: iared2 bench CHECKPOINT is now iared2 bench -c CHECKPOINT\n")
    arguments = json.loads(printed)["arguments"]
    assert (arguments["model"], arguments["checkpoint"]) == (None, str(like_the_box))


def test_json_of_interpret(like_the_box, tmp_path, capsys):
    """To stdout and nothing else there; the same lines in a file; no folder is needed."""
    bad = tmp_path / "bad.jpg"
    bad.write_text("no photo")
    photos = ["-p", str(PHOTO), str(PHOTO.with_name("coffee.jpg"))]
    arguments = ["interpret", "-c", str(like_the_box), "--device", "cpu"]
    assert main([*arguments, *photos, "--json"]) == 0
    printed, said = capsys.readouterr()
    found = [json.loads(line) for line in printed.splitlines()]
    assert [one["photo"]["file"] for one in found] == photos[1:]
    assert "MACs" in said
    assert main([*arguments, *photos, str(bad), "--json", str(tmp_path / "all.json"), "-o", str(tmp_path / "out")]) == 1
    printed, said = capsys.readouterr()
    assert "results" in printed
    assert "bad.jpg: not an image" in said
    again = [json.loads(line) for line in (tmp_path / "all.json").read_text().splitlines()]
    for one in found + again:
        one.pop("milliseconds")
    assert again == found
    saved = json.loads((tmp_path / "out" / "coffee" / "result.json").read_text())
    assert saved["groups"] == found[1]["groups"]


def test_a_budget_is_met_by_other_thresholds(like_the_box, capsys):
    arguments = ["interpret", "-p", str(PHOTO), "-c", str(like_the_box), "--device", "cpu", "--json"]
    shares = []
    for share in ("0.4", "0.8"):
        assert main([*arguments, "--budget", share]) == 0
        result = json.loads(capsys.readouterr().out)
        shares.append(result["macs"] / result["dense_macs"])
    assert shares == pytest.approx([0.4, 0.8], abs=0.05)


def test_a_method_makes_the_heat_map(like_the_box, tmp_path, capsys):
    """The map of the method itself, also in the picture; the numbers stay those of the model."""
    arguments = ["interpret", "-p", str(PHOTO), "-c", str(like_the_box), "--device", "cpu"]
    results = []
    for method in ("interpreter", "center"):
        assert main([*arguments, "-o", str(tmp_path / method), "-m", method]) == 0
        results.append(json.loads((tmp_path / method / "result.json").read_text()))
    assert results[1].pop("method") == "center"
    for result in results:
        result.pop("milliseconds")
    assert results[0] == results[1]
    pictures = [(tmp_path / m / "interpret-result.png").read_bytes() for m in ("interpreter", "center")]
    assert pictures[0] != pictures[1]
    predictor = iared2.Predictor(like_the_box)
    result = predictor(PHOTO)
    line = repr(result)  # what print(result) shows: before, all arrays, in hundreds of lines
    assert line.startswith(f"<Interpretation {PHOTO}: {result.top5[0][0]} ")
    assert len(line.splitlines()) == 1
    heat = predictor.heatmap(result.photo, "center")
    assert heat.shape == (result.photo.height, result.photo.width)
    assert heat[heat.shape[0] // 2, heat.shape[1] // 2] > 0.98
    assert heat[0, 0] < 0.05
