"""Rules that no single file shows: the public names, who imports whom, and what must not be there.

Each check returns complaints: none for the package, some for a tiny package that is made up to break the rule.
"""

from __future__ import annotations

import ast
import re
import subprocess
from collections.abc import Iterable
from graphlib import CycleError, TopologicalSorter
from pathlib import Path

import pytest

import iared2

ROOT = Path(__file__).resolve().parents[1]
PACKAGE = ROOT / "src" / "iared2"
PUBLIC = [
    "BatchPredictor",
    "InputError",
    "Interpretation",
    "Output",
    "Predictor",
    "ReducedVisionTransformer",
    "accelerate",
    "from_timesformer",
    "from_timm",
    "from_videomae",
    "heatmap",
    "load",
]
MAX_LINES = 350
FORBIDDEN = (  # in pieces, so that this file does not have them
    "/work/" + "shared",
    ".." + "/shared",
    "pypi" + ".org",
    "pythonhosted" + ".org",
    "download.pytorch" + ".org",
)


def read_modules(package: Path) -> dict[str, ast.Module]:
    """The modules of a package by dotted name without the package's own; a package's ``__init__`` is the package."""
    modules = {}
    for file in sorted(package.rglob("*.py")):
        parts = file.relative_to(package).with_suffix("").parts
        name = ".".join(part for part in parts if part != "__init__")
        modules[name] = ast.parse(file.read_text(encoding="utf-8"))
    return modules


def changed_names(package: Path, frozen: Iterable[str]) -> list[str]:
    """What a package's ``__all__`` has more or less than ``frozen``, and names in it that are not there."""
    module = ast.parse((package / "__init__.py").read_text(encoding="utf-8"))
    names: set[str] = set()
    bound: set[str] = set()
    for node in ast.walk(module):  # some imports are for type checkers alone
        if isinstance(node, ast.Assign) and ast.unparse(node.targets[0]) == "__all__":
            names = set(ast.literal_eval(node.value))
        elif isinstance(node, ast.ImportFrom):
            bound |= {alias.asname or alias.name for alias in node.names}
    return [f"{name} is new, gone or not imported" for name in sorted((names ^ set(frozen)) | (names - bound))]


def imports(name: str, package: Path, modules: dict[str, ast.Module], types: bool = True) -> set[str]:
    """The modules of the package that module ``name`` imports, anywhere in it. ``""`` is the package itself.

    Without ``types``, what stands under ``if TYPE_CHECKING`` is left out.
    """
    top = package.name
    known = {".".join(filter(None, (top, other))): other for other in modules}
    here = [top, *filter(None, name.split("."))]
    if not (package.joinpath(*here[1:]) / "__init__.py").exists():
        here.pop()  # "." in a module is the package that it lies in
    targets = []
    blocks = (node for node in ast.walk(modules[name]) if isinstance(node, ast.If))
    checks = [node for node in blocks if ast.unparse(node.test) == "TYPE_CHECKING" and not types]
    left_out = {inner for check in checks for inner in ast.walk(check)}
    for node in {*ast.walk(modules[name])} - left_out:
        if isinstance(node, ast.Import):
            targets += [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            base = here[: len(here) - node.level + 1] if node.level else []
            targets += [".".join([*base, *filter(None, [node.module]), alias.name]) for alias in node.names]
    found = set()
    for target in targets:
        while target and target not in known:
            target = target.rpartition(".")[0]  # a name in a module
        if target:
            found.add(known[target])
    return found


def read_layers(page: str) -> list[list[str]]:
    """The line ``a, b < c`` of the page's block of code under "Files and imports": rooms and files, lowest first."""
    block = re.search(r"## Files and imports.*?```\n(.*?)```", page, re.DOTALL)
    assert block, "docs/design.md has no block of code under 'Files and imports'"
    return [[name.strip() for name in layer.split(",")] for layer in " ".join(block[1].split()).split("<")]


def wrong_imports(package: Path, page: str) -> list[str]:
    """Imports against the layers of the page or round in a circle, and rooms on one side only."""
    layers = read_layers(page)
    height = {name: number for number, layer in enumerate(layers) for name in layer}
    modules = read_modules(package)
    graph = {name: imports(name, package, modules) for name in modules if name}
    rooms = {name.split(".")[0] for name in graph}
    complaints = [f"{name} is in docs/design.md, but not in the package" for name in height.keys() - rooms]
    complaints += [f"{name} is not in docs/design.md" for name in rooms - height.keys()]
    for name, others in graph.items():
        room = name.split(".")[0]
        for other in others:
            target = other.split(".")[0]
            if not other or (room != target and height.get(target, -1) >= height.get(room, 0)):
                complaints.append(f"{name} imports {other or package.name}")
    try:
        TopologicalSorter({name: imports(name, package, modules, types=False) for name in graph}).prepare()
    except CycleError as error:
        complaints.append("a circle: " + " < ".join(error.args[1]))
    return sorted(complaints)


def without_docstring(package: Path) -> list[str]:
    """Modules, and public functions, classes and methods; a property's name may say it all."""

    def search(node: ast.AST, path: str) -> list[str]:
        found = [] if ast.get_docstring(node) else [path]  # type: ignore[arg-type]
        for child in node.body if isinstance(node, (ast.Module, ast.ClassDef)) else ():
            decorators = [ast.unparse(d) for d in getattr(child, "decorator_list", ())]
            is_property = any(d == "property" or d.endswith(".setter") for d in decorators)
            if isinstance(child, (ast.FunctionDef, ast.AsyncFunctionDef, ast.ClassDef)):
                found += [] if child.name.startswith("_") or is_property else search(child, f"{path}:{child.name}")
        return found

    return [path for name, module in read_modules(package).items() for path in search(module, name)]


def too_long(package: Path) -> list[str]:
    """Files of more than ``MAX_LINES`` lines."""
    lengths = {file.name: len(file.read_text(encoding="utf-8").splitlines()) for file in package.rglob("*.py")}
    return [f"{name}: {length} lines" for name, length in lengths.items() if length > MAX_LINES]


def named_utils(files: Iterable[Path]) -> list[str]:
    """Files whose name says nothing."""
    return [str(file) for file in files if file.stem.strip("_") in ("util", "utils", "helpers", "misc")]


def with_forbidden_text(files: Iterable[Path]) -> list[str]:
    """Files that name a folder of one machine, or a registry."""
    return [f"{f}: {text}" for f in files for text in FORBIDDEN if text.encode() in f.read_bytes()]


@pytest.fixture(scope="module")
def shipped() -> list[Path]:
    """Every file of the repository that is in git, or will be."""
    if not (ROOT / ".git").exists():
        pytest.skip("not a git checkout")
    # a checkout that belongs to somebody else is no reason to stop
    command = ["git", "-c", "safe.directory=*", "ls-files", "-z", "--cached", "--others", "--exclude-standard"]
    names = subprocess.run(command, cwd=ROOT, check=True, capture_output=True, text=True).stdout.split("\0")
    return [file for name in names if name and (file := ROOT / name).is_file()]


@pytest.fixture
def made_up(tmp_path: Path):
    """Writes a small package, given as file names and their texts."""

    def write(files: dict[str, str]) -> Path:
        for name, text in {"__init__.py": '"""It."""', **files}.items():
            file = tmp_path / "made_up" / name
            file.parent.mkdir(parents=True, exist_ok=True)
            file.write_text(text)
        return tmp_path / "made_up"

    return write


def page(chains: str) -> str:
    return f"# Design\n\n```\nother\n```\n\n## Files and imports\n\nText.\n\n```\n{chains}\n```\n"


def test_public_names_are_frozen():
    assert changed_names(PACKAGE, PUBLIC) == []
    assert sorted(iared2.__all__) == PUBLIC
    assert {name: getattr(iared2, name).__name__ for name in PUBLIC} == {name: name for name in PUBLIC}
    assert set(PUBLIC) <= set(dir(iared2))


def test_imports_point_one_way():
    assert wrong_imports(PACKAGE, (ROOT / "docs" / "design.md").read_text(encoding="utf-8")) == []


def test_every_public_thing_has_a_docstring():
    assert without_docstring(PACKAGE) == []


def test_files_are_short():
    assert too_long(PACKAGE) == []


def test_no_file_is_called_utils(shipped):
    assert named_utils(shipped) == []


def test_no_shipped_file_names_a_foreign_place(shipped):
    assert with_forbidden_text(shipped) == []


def test_changed_names_are_noticed(made_up):
    package = made_up({"__init__.py": "from .a import f, g\n__all__ = ['f', 'h']"})
    assert changed_names(package, ["f", "g"]) == ["g is new, gone or not imported", "h is new, gone or not imported"]
    assert changed_names(made_up({"__init__.py": "from .a import f\n__all__ = ['f']"}), ["f"]) == []


def test_wrong_imports_are_noticed(made_up):
    package = made_up({"low.py": "", "sub/__init__.py": "", "sub/mid.py": "", "sub/high.py": "", "top.py": ""})
    order = page("low < sub\n  < top")
    assert wrong_imports(package, order) == []
    assert read_layers(order) == [["low"], ["sub"], ["top"]]

    for text in (
        "from ..low import x",
        "from .. import low",
        "import made_up.low as l",
        "def f():\n    from . import mid",
    ):
        (package / "sub" / "high.py").write_text(text)
        assert wrong_imports(package, order) == []
    for text, other in {
        "from ..top import x": "top",
        "from .. import top": "top",
        "from .. import x": "made_up",
        "import made_up.top": "top",
        "from made_up import low, top": "top",
        "def f():\n    from ..top import x": "top",
    }.items():
        (package / "sub" / "high.py").write_text(text)
        assert wrong_imports(package, order) == [f"sub.high imports {other}"]

    (package / "sub" / "high.py").write_text("from .mid import x")
    (package / "sub" / "mid.py").write_text("def f():\n    from .high import y")
    assert wrong_imports(package, order) == ["a circle: sub.high < sub.mid < sub.high"]
    (package / "sub" / "mid.py").write_text("if TYPE_CHECKING:\n    from .high import y\n    from ..top import x")
    assert wrong_imports(package, order) == ["sub.mid imports top"], "a type makes no circle, but has its layer"
    (package / "sub" / "mid.py").write_text("")
    assert wrong_imports(package, page("low < sub")) == ["top is not in docs/design.md"]
    assert wrong_imports(package, page("low, top < sub")) == []
    assert wrong_imports(package, page("low, gone < sub < top")) == [
        "gone is in docs/design.md, but not in the package"
    ]


def test_missing_docstrings_are_noticed(made_up):
    good = (
        '"""M."""\nclass A:\n    """A."""\n    @property\n    def p(self): ...\n    def _f(self): ...\ndef _g(): ...\n'
    )
    assert without_docstring(made_up({"a.py": good})) == []
    package = made_up(
        {"a.py": good + "    \nclass B:\n    def f(self): ...\n    def __len__(self): ...\n", "b.py": "x = 1"}
    )
    assert without_docstring(package) == ["a:B", "a:B:f", "b"]


def test_long_files_are_noticed(made_up):
    assert too_long(made_up({"a.py": "x = 1\n" * MAX_LINES})) == []
    assert too_long(made_up({"a.py": "x = 1\n" * (MAX_LINES + 1)})) == ["a.py: 351 lines"]


def test_forbidden_names_and_texts_are_noticed(made_up):
    package = made_up({"a.py": "x = 1", "utils.py": "", "b.md": f"see {FORBIDDEN[1]}/data"})
    files = sorted(file for file in package.iterdir())
    assert [Path(name).name for name in named_utils(files)] == ["utils.py"]
    assert with_forbidden_text(files) == [f"{package / 'b.md'}: {FORBIDDEN[1]}"]
