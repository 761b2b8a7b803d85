"""Write docs/recipes.md from the recipe's dataclasses and docs/gallery.md from the recipes: `python docs/settings.py`.

Parses the source and runs none of it. A setting is a field of `Recipe` or of its nested dataclasses. The string after a
field is its meaning.
"""

from __future__ import annotations

import ast
import re
from itertools import takewhile
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
SOURCE = ROOT / "src" / "iared2"
PAGE = ROOT / "docs" / "recipes.md"
GALLERY = ROOT / "docs" / "gallery.md"
ORDER = (
    "own_folder",
    "frozen",
    "tiny_imagenet_cpu_backbone",
    "tiny_imagenet_cpu",
    "tiny_imagenet_cpu_paper",
    "cifar10",
    "reference_dense_112",
    "reference_dense",
    "reference",
    "reference_paper",
    "tiny_imagenet_backbone",
    "tiny_imagenet",
    "tiny_imagenet_paper",
    "deit_tiny_imagenet",
    "deit_small_imagenet",
    "deit_base_imagenet",
    "videomae_kinetics400",
)
"""The recipes in the gallery: for your data, for two CPU cores, the reference model, and what was not run yet."""
PICTURES = {
    "tiny_imagenet_cpu": ("pictures/headline.png", "accuracy against MACs: this recipe is `ours`"),
    "tiny_imagenet_cpu_paper": ("pictures/headline.png", "accuracy against MACs: this recipe is `paper`"),
}
"""Those whose result was measured and drawn."""

INTRODUCTION = """\
<!-- Written by docs/settings.py from the docstrings of the dataclasses. Change those, not this page. -->
# Recipes

A recipe is a TOML file that describes a training run. The command line adds the data and the output folder:

```
iared2 train RECIPE --data PATH -o RUN
```

The files in [recipes/](../recipes) are complete runs. The header of each states its cost and its result;
[gallery.md](gallery.md) shows them all. Settings that a recipe leaves out have the defaults below. By default, the
stages have the published lengths ([method.md, section 3](method.md#3-schedule)) and start from a trained backbone: set
`model.pretrained` or `model.checkpoint`, or set `backbone.epochs`. `--set` changes single settings on the command line:

```
iared2 train RECIPE --data PATH -o RUN --set finetune.epochs=2 --set model.groups=4
```

An unknown setting, or a value of the wrong type or out of its range, is an error before anything runs. To resume a run
that was killed or stopped (Ctrl-C), give the same command again. The recipe must be the same, except for
`checkpoint_minutes`, `data.path` and `data.workers`. For several processes, run the command as `torchrun
--nproc-per-node N -m iared2.cli train ...`. `batch_size` is per process. [scale.md](scale.md) describes one GPU, eight
GPUs, several machines, and the data formats.
"""

GALLERY_INTRODUCTION = """\
<!-- Written by docs/settings.py from the headers of the recipes. Change those, not this page. -->
# Gallery of recipes

Every recipe with what it costs, the data and the command that it needs, and what came of it, as its header says. A
recipe whose result was measured and drawn has a picture. [recipes.md](recipes.md) explains the settings.
"""

Fields = list[tuple[str, str, ast.expr | None, str]]
"""Name, type, default and meaning."""
Section = tuple[str, dict[str, ast.expr]]
"""Where a dataclass stands in the recipe, and the defaults that it has there."""


def read_classes(source: Path) -> dict[str, ast.ClassDef]:
    """Every class under ``source`` by its name."""
    trees = [ast.parse(file.read_text(encoding="utf-8")) for file in sorted(source.rglob("*.py"))]
    return {node.name: node for tree in trees for node in tree.body if isinstance(node, ast.ClassDef)}


def fields(cls: ast.ClassDef) -> Fields:
    """The fields of a dataclass in their order."""
    found: Fields = []
    for node, after in zip(cls.body, [*cls.body[1:], None], strict=True):
        if isinstance(node, ast.AnnAssign) and isinstance(node.target, ast.Name):
            text = ""
            if isinstance(after, ast.Expr) and isinstance(after.value, ast.Constant):
                text = " ".join(str(after.value.value).split())
            found.append((node.target.id, ast.unparse(node.annotation), node.value, text))
    return found


def collect(classes: dict[str, ast.ClassDef], name: str, section: Section, found: dict[str, list[Section]]) -> None:
    """Note under ``found[name]`` that the class ``name`` stands at ``section``, and so on for its own sections."""
    found.setdefault(name, []).append(section)
    for field, kind, default, _ in fields(classes[name]):
        if kind in classes:
            where = f"{section[0]}.{field}" if section[0] else field
            collect(classes, kind, (where, defaults_there(default)), found)


def defaults_there(default: ast.expr | None) -> dict[str, ast.expr]:
    """``a=1`` of ``field(default_factory=lambda: Config(a=1))``."""
    factory = default.keywords[0].value if isinstance(default, ast.Call) else None
    if isinstance(factory, ast.Lambda) and isinstance(factory.body, ast.Call):
        return {keyword.arg: keyword.value for keyword in factory.body.keywords if keyword.arg}
    return {}


def toml(value: ast.expr | None) -> str:
    """A default as it would stand in a recipe."""
    if isinstance(value, ast.Call):  # field(default_factory=dict)
        return "{}"
    text = ast.unparse(value) if value else ""
    if isinstance(value, ast.Constant) and isinstance(value.value, float):
        return text.replace("e-0", "e-")
    return {"True": "true", "False": "false", "()": "[]"}.get(text, text).replace("'", '"')


def plain(kind: str) -> str:
    """A type in words."""
    kind = re.sub(r"tuple\[(\w+), \.\.\.\]", r"list of \1", re.sub(r"dict\[.*\]", "table", kind))
    return re.sub(r"\bstr\b", "string", kind).replace("|", "or")


def table(classes: dict[str, ast.ClassDef], name: str, sections: list[Section]) -> str:
    """The settings of one dataclass, which may stand at several places with other defaults.

    Raises:
        ValueError: a setting has no docstring.
    """
    rows = ["| setting | type | default | meaning |", "|---|---|---|---|"]
    for field, kind, default, meaning in fields(classes[name]):
        if kind in classes:
            continue
        if not meaning:
            raise ValueError(f"{name}.{field} has no docstring")
        here = {where: toml(own.get(field, default)) for where, own in sections}
        if len(set(here.values())) == 1:
            shown = f"`{next(iter(here.values()))}`"
        else:
            shown = ", ".join(f"`{value}` ({where})" for where, value in here.items())
        rows.append(f"| `{field}` | {plain(kind)} | {shown} | {meaning.replace('|', chr(92) + '|')} |")
    return "\n".join(rows)


def render(source: Path = SOURCE) -> str:
    """The whole page."""
    classes = read_classes(source)
    found: dict[str, list[Section]] = {}
    collect(classes, "Recipe", ("", {}), found)
    meanings = {field: text for name in found for field, kind, _, text in fields(classes[name]) if kind in classes}
    parts = [INTRODUCTION]
    for name, sections in found.items():
        title = ", ".join(f"`[{where}]`" for where, _ in sections if where) or "At the top of the file"
        text = ast.get_docstring(classes[name]) or ""
        lines = [" ".join(text.replace("``", "`").split())]
        if any(meanings.get(where) for where, _ in sections):
            lines += [""]
            lines += [f"- `[{where}]`: {meanings[where]}" for where, _ in sections if meanings.get(where)]
        parts.append(f"## {title}\n\n" + "\n".join(lines) + f"\n\n{table(classes, name, sections)}\n")
    return "\n".join(parts)


def gallery(folder: Path = ROOT / "recipes") -> str:
    """The page of the recipes.

    Raises:
        ValueError: a recipe is missing in ``ORDER``, or there is no such recipe.
    """
    if odd := {*ORDER} ^ {file.stem for file in folder.glob("*.toml")}:
        raise ValueError(f"docs/settings.py, ORDER: {', '.join(sorted(odd))}")
    parts = [GALLERY_INTRODUCTION]
    for name in ORDER:
        lines = (folder / f"{name}.toml").read_text(encoding="utf-8").splitlines()
        header = [line.removeprefix("#").removeprefix(" ") for line in takewhile(lambda line: line[:1] == "#", lines)]
        title, text = header[0], "\n".join(header[1:]).strip("\n")
        picture = "![{1}]({0})\n\n".format(*PICTURES[name]) if name in PICTURES else ""
        parts.append(f"## [{name}.toml](../recipes/{name}.toml)\n\n{title}\n\n{picture}```text\n{text}\n```\n")
    return "\n".join(parts)


if __name__ == "__main__":
    PAGE.write_text(render(), encoding="utf-8")
    GALLERY.write_text(gallery(), encoding="utf-8")
