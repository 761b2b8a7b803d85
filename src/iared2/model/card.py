"""The model card: what is known about a model, as the README.md of its folder on the Hugging Face Hub.

What the model knows (architecture, input, classes, decision, cost) is written without being asked. Data, figures and
licence are known to its author alone: what is not given is said to be missing, not made up.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from huggingface_hub import ModelCard, ModelCardData

from ..errors import InputError, printable

if TYPE_CHECKING:
    from .reduced import ReducedVisionTransformer

PICTURE = "picture.png"
PAPER = "2106.12620"
MAX_NAMES = 50
"""More names of classes than these are cut off in the card; config.json has them all."""


def model_card(
    model: ReducedVisionTransformer,
    *,
    name: str | None = None,
    data: str | None = None,
    figures: Mapping[str, Any] | str | Path | None = None,
    license: str | None = None,
    picture: Any = None,
    tags: tuple[str, ...] = (),
    repo_id: str = "user/model",
) -> ModelCard:
    """A card in Markdown, with the metadata that the Hub reads.

    Args:
        model: the model.
        name: the title; by default that of the backbone.
        data: on what it was trained, in a sentence or as the name of a data set on the Hub (``user/data``).
        figures: of the model: name -> number, or the file that ``iared2 evaluate --json`` writes, or its contents.
        license: of the weights, by the Hub's identifier (``apache-2.0``). It is not known from the code's licence.
        picture: a Pillow image, such as ``Predictor(model)(photo).overlay()``.
        tags: more tags.
        repo_id: of the examples.

    Raises:
        InputError: ``figures`` cannot be read, or ``picture`` is no image.
    """
    if picture is not None and not hasattr(picture, "save"):
        raise InputError(f"picture={picture!r:.80}: give a Pillow image, such as Predictor(model)(photo).overlay()")
    task = "video-classification" if model.is_video else "image-classification"
    known: dict[str, Any] = {
        "library_name": "iared2",
        "pipeline_tag": task if model.num_classes else "image-feature-extraction",
        "tags": ["iared2", "timm", "vision-transformer", "token-reduction", f"arxiv:{PAPER}", *tags],
        "license": license,
        "datasets": [data] if data and "/" in data and " " not in data else None,
    }
    metadata = ModelCardData(**{key: value for key, value in known.items() if value})
    title = name or f"IA-RED² on {architecture(model)}"
    sections = [
        f"---\n{metadata.to_yaml()}\n---",
        f"# {_line(title)}",
        f"A vision transformer that drops uninformative patches, and shows which ([arXiv {PAPER}]"
        f"(https://arxiv.org/abs/{PAPER})). It was saved by iared2.",
        f"![what the model looks at]({PICTURE})" if picture is not None else "",
        "## Model",
        _table([("", ""), *facts(model)]),
        "## Data",
        f"{_line(data)}" if data else "The author of this card did not state the training data.",
        "## Figures",
        figures_table(figures) if figures else "The author of this card did not state any.",
        "## Use",
        _examples(model, repo_id),
        "## Licence",
        f"The weights: {_line(license)}." if license else "The author of this card did not state the weights' licence.",
    ]
    return ModelCard("\n\n".join(filter(None, sections)) + "\n")


def architecture(model: ReducedVisionTransformer) -> str:
    """timm's name of the backbone, or its class."""
    return model.pretrained_cfg.get("architecture") or type(model.backbone).__name__


def facts(model: ReducedVisionTransformer) -> list[tuple[str, str]]:
    """What the model knows of itself."""
    cfg, millions = model.pretrained_cfg, sum(p.numel() for p in model.parameters()) / 1e6
    names = model.class_names or ()
    shown = ", ".join(map(str, names[:MAX_NAMES])) + (
        f" and {len(names) - MAX_NAMES} more" if names[MAX_NAMES:] else ""
    )
    return [
        ("backbone", f"{architecture(model)}, {len(model.backbone.blocks)} blocks of width {model.num_features}"),
        ("parameters", f"{millions:.1f} M"),
        ("input", " × ".join(map(str, cfg["input_size"])) + f", mean {cfg.get('mean')}, deviation {cfg.get('std')}"),
        ("patches", " × ".join(map(str, model.grid_size))),
        ("groups", f"{model.num_groups}, interpreter {model.interpreter!r}, dropped patches {model.dropped}"),
        ("decision", str(model.decision)),
        ("MACs with all patches", f"{model.dense_macs / 1e9:.3f} G"),
        ("classes", f"{model.num_classes}" + (f": {shown}" if names else "")),
    ]


def figures_table(figures: Mapping[str, Any] | str | Path) -> str:
    """The figures as a table.

    Raises:
        InputError: a file that is not there or no JSON object, or variants that are not those of `iared2 evaluate`.
    """
    if isinstance(figures, (str, Path)):
        try:
            figures = json.loads(Path(figures).read_text(encoding="utf-8"))
        except (OSError, ValueError) as error:
            raise InputError(f"figures: {figures} cannot be read as JSON: {error}") from None
    if not isinstance(figures, Mapping):
        raise InputError("figures: give names and numbers, or the file of `iared2 evaluate --json`")
    if "variants" not in figures:
        return _table([("figure", "value"), *figures.items()])
    rows: list[tuple[Any, ...]] = [("model", "top-1 %", "patches alive after each group, %", "GMACs")]
    try:
        for one in figures["variants"]:
            kept = " · ".join(f"{100 * share:.0f}" for share in one["keep_ratio"])
            rows.append((one["name"], f"{one['top1']:.2f}", kept, f"{one['gmacs']:.4f}"))
        return f"`iared2 evaluate` on {figures['images']:,} images:\n\n{_table(rows)}"
    except (KeyError, TypeError, ValueError) as error:
        raise InputError(f"figures: not the file of `iared2 evaluate --json` ({error!r}); give that") from None


def _examples(model: ReducedVisionTransformer, repo_id: str) -> str:
    lines = ["import iared2", "", f'model = iared2.load("{repo_id}")']
    if not model.is_video:
        lines += ['result = iared2.Predictor(model)("photo.jpg")', "print(result.top5, result.keep_ratio)"]
    lines += ["", "import timm", "", f'model = timm.create_model("hf-hub:{repo_id}", pretrained=True)']
    if not model.is_video and model.num_classes:
        call = f'pipeline("image-classification", "{repo_id}", trust_remote_code=True)("photo.jpg")'
        lines += [
            "",
            "from transformers import pipeline  # pip install '.[transformers]' in a clone of iared2",
            "",
            call,
        ]
    return "\n".join(["```python", *lines, "```"])


def _table(rows: list[tuple[Any, ...]]) -> str:
    head, *body = ["| " + " | ".join(map(_line, row)) + " |" for row in rows]
    return "\n".join([head, "|" + "---|" * len(rows[0]), *body])


def _line(text: Any) -> str:
    """Text in one line that starts no table cell and no HTML."""
    return printable(str(text)).replace("|", "\\|").replace("<", "&lt;")
