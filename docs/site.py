"""A hook of MkDocs: the pages and links of the repository as pages and links of the site.

The pages in docs/ link to each other, to README.md and to the code, as they do on any host of Git repositories. For the
site, README.md is its first page, every other file that a page links to becomes a page of its own, with numbered lines,
and links are changed accordingly. MkDocs then checks every link, lines included (`mkdocs build --strict`).
"""

from __future__ import annotations

import os
import re
from pathlib import Path
from typing import Any

from mkdocs.structure.files import File, Files

ROOT = Path(__file__).resolve().parents[1]
CODE_OR_LINK = re.compile(
    r"^ *```.*?^ *```|`[^`\n]+`|(!?\[(?:`[^`\n]*`|[^][`]|\[[^][]*\])*\])\(([^)\s]+)\)", re.DOTALL | re.MULTILINE
)
HOMES = {"README.md": "index.md", "CONTRIBUTING.md": "CONTRIBUTING.md", "CHANGELOG.md": "CHANGELOG.md"}
LANGUAGES = {".md": "", ".py": "python", ".toml": "toml", ".ipynb": "json", ".cff": "yaml", ".txt": "text", "": "text"}
"""Files that become pages, by their suffix. The others are files of the site as well."""


def uri_of(path: str) -> str:
    """The place in the site of a file of the repository; of a folder, that of the page that lists it."""
    if path.startswith("docs/") and not path.endswith(".py"):
        return path.removeprefix("docs/")
    if path in HOMES or Path(path).suffix not in LANGUAGES:
        return HOMES.get(path, path)
    return f"source/{path.removesuffix('.md')}.md"


def changed(text: str, path: str, found: set[str]) -> str:
    """A page with the links of the site. The files of the repository that it links to are added to ``found``."""
    here = os.path.dirname(uri_of(path)) or "."

    def one(match: re.Match[str]) -> str:
        if not match[1]:
            return match[0]  # code
        label, (target, _, part) = match[1], match[2].partition("#")
        file = os.path.normpath(os.path.join(os.path.dirname(path), target))
        if re.match(r"[a-z]+:", target) or not target or not (ROOT / file).exists():
            return match[0]  # of the web, of this page, or broken, which MkDocs says
        found.add(file)
        anchor = re.sub(r"^L(\d+)$", r"line-0-\1", part)
        return f"{label}({os.path.relpath(uri_of(file), here)}{f'#{anchor}' if part else ''})"

    return CODE_OR_LINK.sub(one, text)


def page_of(path: str) -> str:
    """A file of the repository as a page: Markdown as it is, a folder as a list, anything else as code."""
    file = ROOT / path
    if file.is_dir():
        names = sorted(f.name for f in file.iterdir() if f.name[0] not in "._" and f.suffix in LANGUAGES)
        return f"# {path}\n\n" + "".join(f"- [{name}]({Path(path).name}/{name})\n" for name in names)
    text = file.read_text(encoding="utf-8")
    if file.suffix == ".md":
        return re.sub(r"\A---\n.*?\n---\n", "", text, flags=re.DOTALL)  # the settings of a Space
    fence = "`" * 4
    return f'# {path}\n\n{fence}{LANGUAGES[file.suffix]} linenums="1"\n{text}\n{fence}\n'


def on_files(files: Files, config: Any) -> Files:
    """Add the pages of the files that pages link to, and of those that these link to."""
    left, done = [*HOMES], {*HOMES}
    for file in files.documentation_pages():
        changed(file.content_string, f"docs/{file.src_uri}", found := set())
        left += sorted(found - done)
        done |= found
    while left:
        path = left.pop()
        if files.get_file_from_path(uri_of(path)):
            continue
        if uri_of(path).endswith(".md"):
            text = changed(page_of(path), path, found := set())
            left += sorted(found - done)
            done |= found
            files.append(File.generated(config, uri_of(path), content=text))
        else:
            files.append(File.generated(config, uri_of(path), abs_src_path=str(ROOT / path)))
    return files


def on_page_markdown(text: str, page: Any, **_: Any) -> str:
    """Change the links of the pages that lie in docs/; the others have been changed."""
    return text if page.file.generated_by else changed(text, f"docs/{page.file.src_uri}", set())


def on_page_content(html: str, page: Any, **_: Any) -> str:
    """Tell MkDocs of the lines of code: it looks for anchors, which it checks links to, before code is highlighted."""
    page.present_anchor_ids |= set(re.findall(r'id="(line-0-\d+)"', html))
    return html
