"""The texts and the style of the page, and the numbers of a comparison as HTML. Does not depend on gradio."""

from __future__ import annotations

import html
import re
from collections.abc import Sequence

from ..errors import printable
from .compare import Comparison

LABELS = {
    "interpreter": "IA-RED²: the model's own scores",
    "attention": "Raw attention",
    "rollout": "Attention rollout",
    "gradcam": "Grad-CAM",
    "integrated-gradients": "Integrated gradients",
    "memorability": "Memorability (ResMem)",
    "random": "Random (baseline)",
    "center": "Centre of the photo (baseline)",
}
FATE = {
    "gone": "later layers never see them",
    "merged": "later layers see them only merged into the most similar kept patch",
}
INTRO = """
# Which patches does a vision transformer need?

The model splits a photo into patches. At the entrance of each of its {groups} groups of layers, a small *interpreter*
scores every patch, and patches below the threshold are **dropped**: {fate}. The scores show where the
model looks, and dropping saves compute. Drop a photo, then try other thresholds and budgets. The method is
[IA-RED²](https://arxiv.org/abs/2106.12620). {classes}
"""
HELP = """
- **Heat map**: red is high, blue is low. *IA-RED²* shows the scores by which a group decides. The first group decides
  before the class token has attended to any patch, so it is nearly blind. The paper uses the second of three groups.
  The other methods explain the same model, with the same patches dropped.
- **Patches kept by each group**: the number above is the share of patches that are left.
- **Threshold**: patches that score above it are kept. At 0, all patches are kept, and the prediction is that of the
  dense transformer. At 1, none is kept.
- **Budget**: your photos together cost at most this share. Detailed photos may keep more patches than plain ones.
- **MACs** (multiply-adds) are counted from the kept patches and include the interpreters. *Saved* compares with the
  dense transformer. **Milliseconds** measure the forward pass of one photo, the fastest of three. Small models gain
  little.
- The model sees the whole photo, resized to {height} × {width} pixels (height × width). Photos are shown at up to 1024
  pixels. Uploads are deleted after about an hour.
"""
CSS = """
.gradio-container { max-width: 1280px !important; margin: 0 auto !important; }
.facts { display: grid; grid-template-columns: repeat(auto-fit, minmax(140px, 1fr)); gap: 12px; }
#figures .html-container { padding: 0; }
#problems p { border-left: 4px solid #c2410c; padding: 6px 12px; font-weight: 600; color: var(--body-text-color); }
#gallery .grid-wrap { height: auto; min-height: 0; }
#figures h3 { margin: 0 0 10px; }
.fact { border: 1px solid var(--border-color-primary); border-radius: 10px; padding: 10px 14px;
        background: var(--block-background-fill); }
.fact b { overflow-wrap: anywhere; display: block; font-size: 1.3em; line-height: 1.3; color: var(--body-text-color); }
.fact span { color: var(--body-text-color-subdued); font-size: .9em; }
@media (max-width: 600px) {  /* wide pictures are scrolled, not shrunk */
  #hierarchy { contain: inline-size; }
  #hierarchy .image-container { overflow-x: auto; }
  #hierarchy .image-container > button, #hierarchy .image-frame { display: block; width: 860px; }
}
"""


def saved(one: Comparison) -> str:
    """What dropping saves of the dense MACs, or what two passes cost more."""
    return f"{one.saved:.0%} saved" if one.saved >= 0 else f"{-one.saved:.0%} more"


def caption(one: Comparison) -> str:
    """The caption of a photo in the gallery."""
    return f"{one.name}: {one.after.top5[0][0] if one.after.top5 else 'no classes'}, {saved(one)}"


def facts(one: Comparison) -> str:
    """The effect of dropping, as HTML."""
    before, after = one.before, one.after
    ratios = " → ".join(f"{100 * ratio:.0f}" for ratio in after.keep_ratio) + " %"
    thresholds = " · ".join(dict.fromkeys(f"{t:.3g}" for t in after.thresholds))
    smaller = " of the smaller photo" if "scale" in after.model else ""
    cells = [
        (
            "MACs",
            saved(one),
            f"{after.cost}, threshold {thresholds}",
        ),
        ("Patches kept", ratios, f"of {after.kept.shape[1]}{smaller}, after each group"),
        ("Forward pass", f"{after.milliseconds:.1f} ms", f"{before.milliseconds:.1f} ms with every patch"),
    ]
    if after.second_pass:
        cells.append(("Second pass", "with every patch", "the first one was not sure; the MACs are those of both"))
    if after.top5:
        (now, sure), (then, _) = after.top5[0], before.top5[0]
        same = "the same prediction" if now == then else f"it was {then}"
        cells.append(("Prediction", now, f"{sure:.0%} sure; {same} with every patch"))
    text = "".join(
        "<div class='fact'><span>{}</span><b>{}</b><span>{}</span></div>".format(*map(html.escape, cell))
        for cell in cells
    )
    return f"<h3>{html.escape(one.name)}</h3><div class='facts'>{text}</div>"


def classes(names: Sequence[str] | None) -> str:
    """A note for a model with few classes, which always predicts one of them; Markdown with escaped names."""
    if not names or len(names) > 50:
        return ""
    plain = re.sub(r"[!-+\--/:-@[-`{-~]", r"\\\g<0>", printable(", ".join(names)))
    return f"This model knows only {len(names)} classes: {plain}."
