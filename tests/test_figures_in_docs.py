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
    assert "<!-- figures -->" in text
    assert "| reduced |" in text
    assert docs_figures.filled(page) == text, "run python docs/figures.py"
