"""The pages say what is true: links lead somewhere, line numbers are right, generated pages are up to date."""

from __future__ import annotations

import ast
import re
import runpy
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
PAGES = sorted([*ROOT.glob("*.md"), *ROOT.glob("docs/*.md"), *ROOT.glob("src/iared2/box/*.md")])
INSTALL = re.compile(r"pip install (?:-q )?['\"]?(?:\.\[([^]]+)\]|(iared2[^'\"`, ]*))")
LINK = re.compile(r"\]\(([^)\s]+)\)")
fix_links = runpy.run_path(str(ROOT / "docs" / "fix_links.py"))
settings = runpy.run_path(str(ROOT / "docs" / "settings.py"))

SOURCE = """\
LIMIT = 3

def double(x):
    return x * 2

class Thing:
    size: int = 1

    @property
    def double(self):
        return self.size * 2
"""


def broken_links(page: Path) -> list[str]:
    """Relative links of a page that lead to no file, and links to a line that fix_links.py does not keep right."""
    text = re.sub(r"^```.*?^```", "", page.read_text(encoding="utf-8"), flags=re.MULTILINE | re.DOTALL)
    kept = len(fix_links["CODE_LINK"].findall(text))
    text = re.sub(r"`[^`\n]*`", "``", text)  # code may look like a link
    targets = [t for t in LINK.findall(text) if not re.match(r"[a-z]+:|#", t)]
    broken = [target for target in targets if not (page.parent / target.split("#")[0]).exists()]
    lines = [target for target in targets if re.search(r"#L\d", target)]
    return broken if len(lines) == kept else [*broken, f"{len(lines) - kept} links to a line, but not of `code`"]


def logged_names(source: Path) -> set[str]:
    """What is written: keys of every dictionary called ``metrics`` or ``totals``, and of what ``measure`` returns."""
    names = set()
    for file in [*source.glob("train/*.py"), source / "measure.py"]:
        for node in ast.walk(ast.parse(file.read_text(encoding="utf-8"))):
            values: list[ast.AST] = []
            if isinstance(node, ast.Assign):
                for target in node.targets:
                    owner = target.value if isinstance(target, ast.Subscript) else target
                    if isinstance(owner, ast.Name) and owner.id in ("metrics", "totals"):
                        values += [target.slice] if isinstance(target, ast.Subscript) else [node.value]
            elif isinstance(node, ast.FunctionDef) and node.name == "measure":
                values += [child.value for child in ast.walk(node) if isinstance(child, ast.Return) and child.value]
            for value in values:
                keys = value.keys if isinstance(value, ast.Dict) else [value]
                names |= {key.value for key in keys if isinstance(key, ast.Constant) and isinstance(key.value, str)}
    return names


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_links_lead_to_files(page):
    assert broken_links(page) == []


@pytest.mark.parametrize("page", fix_links["PAGES"], ids=lambda page: page.name)
def test_links_to_code_have_the_right_line(page):
    assert fix_links["fixed"](page) == page.read_text(encoding="utf-8"), "run: python docs/fix_links.py"


def test_the_method_is_linked_to_the_code():
    text = (ROOT / "docs" / "method.md").read_text(encoding="utf-8")
    files = {Path(target).name for _, target, _ in fix_links["CODE_LINK"].findall(text)}
    assert {"interpreter.py", "decide.py", "reduced.py", "reward.py", "policy_gradient.py", "finetune.py"} <= files


def test_settings_page_is_up_to_date():
    assert settings["render"]() == settings["PAGE"].read_text(encoding="utf-8"), "run: python docs/settings.py"


def test_the_gallery_is_up_to_date(tmp_path):
    assert settings["gallery"]() == settings["GALLERY"].read_text(encoding="utf-8"), "run: python docs/settings.py"
    (tmp_path / "new.toml").write_text("# New.")
    with pytest.raises(ValueError, match=r"ORDER: .*\bnew\b"):
        settings["gallery"](tmp_path)


def extras_of(project: str) -> set[str]:
    """The optional dependencies of a pyproject.toml."""
    part = project.split("[project.optional-dependencies]")[1].split("\n[")[0]
    return set(re.findall(r"^(\w+) = \[", part, re.MULTILINE))


def test_the_readme_names_every_extra():
    """And nothing says that a registry has the package."""
    extras = extras_of((ROOT / "pyproject.toml").read_text(encoding="utf-8"))
    assert {"train", "export", "docs"} <= extras, "the search itself has gone blind"
    table = (ROOT / "README.md").read_text(encoding="utf-8").split("| extra | for |")[1].split("\n\n")[0]
    assert set(re.findall(r"^\| `(\w+)` \|", table, re.MULTILINE)) == extras
    sources = [*PAGES, *(ROOT / "src").rglob("*.py"), *ROOT.glob("examples/*.ipynb")]
    named = [(file.name, text) for file in sources for text in re.findall(INSTALL, file.read_text(encoding="utf-8"))]
    assert {extra for _, (extra, _) in named if extra} <= extras | {"{extra}"}
    assert [file for file, (_, wrong) in named if wrong] == []
    assert re.findall(INSTALL, "pip install 'iared2[video]' or uv pip install iared2, pip install -q '.[demo]'") == [
        ("", "iared2[video]"), ("", "iared2"), ("demo", ""),
    ]  # fmt: skip


def test_every_logged_metric_is_explained():
    names = logged_names(ROOT / "src" / "iared2")
    assert {"loss", "reward_greedy", "grad_norm", "lr", "gmacs"} <= names, "the search itself has gone blind"
    page = (ROOT / "docs" / "metrics.md").read_text(encoding="utf-8")
    assert [name for name in sorted(names) if f"| `{name}` |" not in page] == []


def test_lines_are_found():
    line_of = fix_links["line_of"]
    for text, line in {
        "LIMIT": 1,
        "double": 3,
        "return x * 2": 4,
        "Thing": 6,
        "Thing.size": 7,
        "Thing.double": 10,
    }.items():
        assert line_of(SOURCE, text) == line
    for text in ("absent", "size", "x + 1", "* 2"):  # unknown, not of that class, nowhere, on two lines
        with pytest.raises(ValueError, match="not once"):
            line_of(SOURCE, text)


def test_broken_pages_are_noticed(tmp_path):
    (tmp_path / "code.py").write_text(SOURCE)
    page = tmp_path / "page.md"
    page.write_text(
        "[`double`](code.py#L9), [here](code.py), [web](https://example.org), `a[i](b)`\n```\n[x](y)\n```\n"
    )
    assert broken_links(page) == []
    assert fix_links["fixed"](page).startswith("[`double`](code.py#L3), ")
    page.write_text("[gone](gone.md#part) [line](code.py#L3)")
    assert broken_links(page) == ["gone.md#part", "1 links to a line, but not of `code`"]
    for text in ("[`double`](gone.py#L3)", "[`halve`](code.py#L3)"):
        page.write_text(text)
        with pytest.raises(ValueError, match=r"page\.md"):
            fix_links["fixed"](page)


def test_settings_are_read_from_the_source(tmp_path):
    source = '''\
@dataclass
class Part:
    """A part."""

    size: float = 1e-3
    """How large.
    Or small."""
    names: tuple[str, ...] = ()
    """Names."""

@dataclass
class Recipe:
    """All."""

    left: Part = field(default_factory=Part)
    right: Part = field(default_factory=lambda: Part(size=2))
    """The other one."""
'''
    (tmp_path / "recipe.py").write_text(source)
    page = settings["render"](tmp_path)
    assert "## `[left]`, `[right]`" in page
    assert "- `[right]`: The other one." in page
    assert "| `size` | float | `0.001` (left), `2` (right) | How large. Or small. |" in page
    assert "| `names` | list of string | `[]` | Names. |" in page
    (tmp_path / "recipe.py").write_text(source.replace('    """Names."""\n', ""))
    with pytest.raises(ValueError, match=r"Part\.names has no docstring"):
        settings["render"](tmp_path)
