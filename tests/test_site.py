"""The site builds, with every link checked, from the pages as they lie in the repository."""

from __future__ import annotations

import re
import runpy
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
pytest.importorskip("mkdocs", reason="the site: pip install '.[docs]'")
pytest.importorskip("mkdocstrings", reason="the site: pip install '.[docs]'")
site = runpy.run_path(str(ROOT / "docs" / "site.py"))


def test_the_site_builds_and_every_link_leads_somewhere(tmp_path):
    command = [sys.executable, "-m", "mkdocs", "build", "--strict", "--site-dir", str(tmp_path / "site")]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    reference = (tmp_path / "site" / "reference" / "index.html").read_text(encoding="utf-8")
    assert re.search(r"Interpret one photo, or a list of photos in one batch", reference)
    method = (tmp_path / "site" / "method" / "index.html").read_text(encoding="utf-8")
    target, line = re.findall(r'href="\.\./(source/src/iared2/train/reward\.py/)#(line-0-\d+)"', method)[0]
    code = (tmp_path / "site" / target / "index.html").read_text(encoding="utf-8")
    assert f'id="{line}"' in code
    assert not re.search(r'(?:src|href)="https?://[^"]*\.(?:js|css|woff2?)"', method), "a page loads from elsewhere"


def test_links_of_the_repository_become_those_of_the_site():
    changed, found = site["changed"], set()
    text = "[a](../README.md#video) [`b`](../src/iared2/cli.py#L3) `c[i](../README.md)` [d](scale.md) [e](#f)"
    text += " [g](https://example.org) [h](../gone.md)\n```\n[k](../README.md)\n```\n![l](pictures/demo.png)"
    expected = "[a](index.md#video) [`b`](source/src/iared2/cli.py.md#line-0-3) `c[i](../README.md)` [d](scale.md)"
    expected += " [e](#f) [g](https://example.org) [h](../gone.md)\n```\n[k](../README.md)\n```\n"
    assert changed(text, "docs/page.md", found) == f"{expected}![l](pictures/demo.png)"
    assert found == {"README.md", "src/iared2/cli.py", "docs/scale.md", "docs/pictures/demo.png"}
    assert changed("[a](docs/scale.md) [b](recipes)", "README.md", set()) == "[a](scale.md) [b](source/recipes.md)"
    assert changed("[a](../../../docs/hub.md)", "src/iared2/box/README.md", set()) == "[a](../../../../hub.md)"
