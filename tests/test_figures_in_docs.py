"""Every figure that a page shows is the one that was measured."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest

sys.path.insert(0, str(Path(__file__).parents[1] / "docs"))
import figures as docs_figures


@pytest.mark.parametrize("page", docs_figures.PAGES, ids=lambda page: page.parent.name)
def test_figures_are_those_of_the_json_file(page):
    text = page.read_text(encoding="utf-8")
    assert text.count("<!-- figures ") == len(docs_figures.BLOCK.findall(text)) > 0
    assert docs_figures.filled(page) == text, "run python docs/figures.py"


def test_every_file_of_figures_is_shown():
    shown = {name for page in docs_figures.PAGES for _, name in docs_figures.BLOCK.findall(page.read_text())}
    assert shown == {file.stem for file in docs_figures.FIGURES.glob("*.json")}
    for name in shown:
        assert docs_figures.table(name).count("\n|") >= 3
