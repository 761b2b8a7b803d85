"""Update the line numbers in links from the Markdown pages to the code: `python docs/fix_links.py`.

Write a link to a line as [`name`](../src/file.py#L1), with any number. A name, such as `reward` or `Output.macs`, links
to its definition. Any other text, such as `x[rows] * 2`, links to the only line of the file that contains it.
"""

from __future__ import annotations

import ast
import re
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
PAGES = (ROOT / "README.md", *sorted(ROOT.glob("docs/*.md")))
CODE_LINK = re.compile(r"\[`([^`]+)`\]\(([^)#\s]+)#L(\d+)\)")


def line_of(source: str, text: str) -> int:
    """The line of ``source`` that ``text`` stands for, from 1.

    Raises:
        ValueError: there is none, or more than one.
    """
    if all(part.isidentifier() for part in text.split(".")):
        lines = [line for name, line in definitions(ast.parse(source)) if name == text]
    else:
        lines = [number for number, line in enumerate(source.splitlines(), 1) if text in line]
    if len(lines) != 1:
        raise ValueError(f"`{text}` is found {len(lines)} times, not once")
    return lines[0]


def definitions(node: ast.AST, prefix: str = "") -> list[tuple[str, int]]:
    """Functions, classes, methods, fields and constants with their lines; what is in a class as ``Class.name``."""
    found = []
    for child in ast.iter_child_nodes(node):
        if isinstance(child, (ast.FunctionDef, ast.AsyncFunctionDef, ast.ClassDef)):
            found.append((prefix + child.name, child.lineno))
            if isinstance(child, ast.ClassDef):
                found += definitions(child, f"{prefix}{child.name}.")
        elif isinstance(child, (ast.Assign, ast.AnnAssign)):
            targets = child.targets if isinstance(child, ast.Assign) else [child.target]
            found += [(prefix + target.id, child.lineno) for target in targets if isinstance(target, ast.Name)]
    return found


def fixed(page: Path) -> str:
    """The text of a page with the right line numbers.

    Raises:
        ValueError: a link leads to no file, or its text is not found there exactly once.
    """

    def fix(match: re.Match[str]) -> str:
        text, target, _ = match.groups()
        file = page.parent / target
        if not file.is_file():
            raise ValueError(f"{page.name}: [`{text}`]: there is no file {target}")
        try:
            return f"[`{text}`]({target}#L{line_of(file.read_text(encoding='utf-8'), text)})"
        except ValueError as error:
            raise ValueError(f"{page.name}: {target}: {error}") from None

    return CODE_LINK.sub(fix, page.read_text(encoding="utf-8"))


if __name__ == "__main__":
    try:
        for path in PAGES:
            path.write_text(fixed(path), encoding="utf-8")
    except ValueError as error:
        sys.exit(f"error: {error}")
