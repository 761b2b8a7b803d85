"""What every command does with every input, and what of it a case did not."""

from __future__ import annotations

import json
import math
import re
from pathlib import Path
from typing import Any

from .case import Case
from .worker import GB, Report

MAX_GROWTH = 1.5 * GB  # of a photo of 81 megapixels
MAX_MESSAGE = 1000
BEFORE = re.compile(
    r"\s*$|warning: |.*Warning: |  |skipped |budgets |note: |\w+( \d+)?(: starts)?, epoch "
    r"|\S+\.tiff?: |LZWDecode: |More samples per pixel "
)
"""What may stand on stderr before the last line: warnings (two blanks begin the source line of one of Python's), and of
a run that had begun its progress; and what libtiff says by itself."""


def complaints(case: Case, report: Report) -> list[str]:
    """In what the case broke the contract."""
    found = list(report.events)
    if case.marker.exists():
        found.append("code from a file was run")
    if case.canary.exists() and case.canary.stat().st_atime:
        found.append("a file was read that only a file names")
    if report.growth > MAX_GROWTH:
        found.append(f"memory grew by {report.growth / GB:.1f} GB")
    if re.search(r"allocate|MemoryError|bad_alloc|out of memory", report.err):
        found.append("asked for more memory than it may have: " + _last(report.err))
    if report.status == 0:
        found += _broken_promises(case)
    elif report.status == 1:
        found += _wrong_error(report.err)
        found += _left_over(case)
    else:
        found.append(f"{report.status}: {_last(report.err)}")
    return found


def _wrong_error(err: str) -> list[str]:
    lines = err.splitlines()  # at any line end, as a terminal or an editor may see it
    last = lines[-1] if lines else ""
    if not last.startswith("error: "):
        return [f"the last line on stderr is no error: {last[:200]!r}"]
    found = []
    if "Traceback (most recent call last)" in err:
        found.append("a traceback")
    odd = [line for line in lines[:-1] if not BEFORE.match(line)]
    if odd:
        found.append(f"more than one line: {odd[0][:200]!r}")
    if not last.removeprefix("error: ").strip().strip(":"):
        found.append("a message that says nothing")
    if len(last) > MAX_MESSAGE:
        found.append(f"a message of {len(last)} letters: {last[:100]!r}")
    if not all(letter.isprintable() for letter in last):
        found.append(f"control characters in the message: {last[:200]!r}")
    return found


def _broken_promises(case: Case) -> list[str]:
    out = case.root / "out"
    found = [f"{name} is missing or empty" for name in case.promised if not _size(out / name)]
    names = {path.relative_to(out).as_posix() for path in out.rglob("*") if path.is_file()} if out.is_dir() else set()
    if case.promised and names - {*case.promised}:
        found.append(f"left over: {sorted(names - {*case.promised})}")
    for name in names:
        if name.endswith((".json", ".jsonl")):
            found += _not_finite(out / name)
    return found + _temporary(out)


def _left_over(case: Case) -> list[str]:
    out = case.root / "out"
    if not out.is_dir() or case.argv[:1] == ("train",):
        return _temporary(out)
    left = [path for path in out.rglob("*") if path.is_file()]
    if case.argv[:1] == ("evaluate",):  # what was measured for hours is kept even if the plot cannot be written
        return [text for path in left for text in _not_finite(path)]
    return [f"left over: {[path.name for path in left]}"] if left else []


def _temporary(out: Path) -> list[str]:
    odd = [p.name for p in out.rglob("*") if p.name.startswith(".") or p.suffix in (".tmp", ".part")]
    return [f"a temporary file is left: {odd}"] if odd else []


def _not_finite(file: Path) -> list[str]:
    def refuse(name: str) -> Any:
        raise ValueError(f"{name} in it")

    try:
        text = file.read_text(encoding="utf-8")
        for part in text.splitlines() if file.suffix == ".jsonl" else [text]:
            _check_numbers(json.loads(part, parse_constant=refuse))
    except ValueError as error:
        return [f"{file.name} is not JSON: {error}"]
    return []


def _check_numbers(value: Any) -> None:
    if isinstance(value, dict):
        value = list(value.values())
    if isinstance(value, list):
        for item in value:
            _check_numbers(item)
    elif isinstance(value, float) and not math.isfinite(value):
        raise ValueError(f"{value} in it")


def _size(path: Path) -> int:
    return path.stat().st_size if path.is_file() else 0


def _last(err: str) -> str:
    return (err.strip().splitlines() or [""])[-1][:300]
