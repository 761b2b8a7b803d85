"""Write the measured figures into the pages that show them: `python docs/figures.py`.

They come from docs/figures/box.json, which this command writes (DATA is CIFAR-10, as the model card says):

    iared2 evaluate box DATA --json docs/figures/box.json
"""

from __future__ import annotations

import json
import re
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
SOURCE = ROOT / "docs" / "figures" / "box.json"
PAGES = (ROOT / "README.md", ROOT / "src" / "iared2" / "box" / "README.md")
BLOCK = re.compile(r"(?<=<!-- figures -->\n).*?(?=<!-- /figures -->)", re.DOTALL)


def table() -> str:
    """The Markdown table of the figures, and where they come from."""
    result = json.loads(SOURCE.read_text(encoding="utf-8"))
    reduced, dense, random = result["variants"]
    rows = [
        "| model | top-1 % | patches alive after each group | GMACs | images/s |",
        "|---|---|---|---|---|",
    ]
    for v in (dense, reduced, random):
        kept = " · ".join(f"{100 * ratio:.0f} %" for ratio in v["keep_ratio"])
        rows.append(f"| {v['name']} | {v['top1']:.2f} | {kept} | {v['gmacs']:.4f} | {v['images_per_second']:.0f} |")
    return "\n".join(
        [
            f"The model in the box, its shipped weights, on the {result['images']:,} test images of CIFAR-10:",
            "`iared2 evaluate box DATA --json docs/figures/box.json`. Images/s: forward passes alone in batches of 64,",
            "float32, the three taking turns on two shared CPU cores.",
            "",
            *rows,
            "",
        ]
    )


def filled(page: Path) -> str:
    """The text of a page with the figures in their place."""
    return BLOCK.sub(lambda _: table(), page.read_text(encoding="utf-8"))


if __name__ == "__main__":
    for path in PAGES:
        path.write_text(filled(path), encoding="utf-8")
