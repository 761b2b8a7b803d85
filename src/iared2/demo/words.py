"""What the page says: its words, its style, and a comparison's figures as HTML. Knows nothing of gradio."""

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
    "random": "Random numbers (a control)",
    "center": "Centre of the photo (a control)",
}
FATE = {
    "gone": "later layers never see them",
    "merged": "later layers see them only as a part of the patch that each is most like",
}
INTRO = """
# What does a vision transformer look at, and what can it do without?

The model cuts a photo into patches. At the entrance of each of its {groups} groups of layers a small *interpreter*
scores every patch, and the patches below the threshold **leave**: {fate}. What stays is the
explanation, what left is the saving. Drop a photo, then try other thresholds and budgets. The method is
[IA-RED²](https://arxiv.org/abs/2106.12620). {classes}
"""
HELP = """
- **Heat map**: red is high, blue is low. With *IA-RED²* it shows the scores by which a group decides. The first group
  decides before the class token has seen any patch, so it is nearly blind; the second is the paper's choice. The other
  methods explain the same model, with the same patches dropped, from outside.
- **What each group kept**: the number in the corner is the share of patches still there.
- **Threshold**: patches that score above it stay. At 0 all stay and the answer is the plain transformer's; at 1 none
  stays.
- **Budget**: your photos together cost at most this share. Rich photos may keep more than plain ones.
- **MACs** (multiply-adds) are counted from the patches that stayed and include the interpreters; *saved* is against the
  plain transformer. **Milliseconds** are of the forward pass with one photo, the fastest of three; small models gain
  little.
- The model sees the whole photo, squeezed to {height} × {width} pixels (height × width). Photos are shown at up to 1024
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


def caption(one: Comparison) -> str:
    """What stands below a photo in the gallery."""
    return f"{one.name}: {one.after.top5[0][0] if one.after.top5 else 'no classes'}, {one.saved:.0%} saved"


def facts(one: Comparison) -> str:
    """What dropping changed, as HTML."""
    before, after = one.before, one.after
    ratios = " → ".join(f"{100 * ratio:.0f}" for ratio in after.keep_ratio) + " %"
    thresholds = " · ".join(dict.fromkeys(f"{t:.3g}" for t in after.thresholds))
    cells = [
        (
            "MACs",
            f"{one.saved:.0%} saved",
            f"{after.cost}, threshold {thresholds}",
        ),
        ("Patches kept", ratios, f"of {after.kept.shape[1]}, after each group"),
        ("Forward pass", f"{after.milliseconds:.1f} ms", f"{before.milliseconds:.1f} ms with every patch"),
    ]
    if after.top5:
        (now, sure), (then, _) = after.top5[0], before.top5[0]
        same = "the same answer" if now == then else f"it was {then}"
        cells.append(("Answer", now, f"{sure:.0%} sure; {same} with every patch"))
    text = "".join(
        "<div class='fact'><span>{}</span><b>{}</b><span>{}</span></div>".format(*map(html.escape, cell))
        for cell in cells
    )
    return f"<h3>{html.escape(one.name)}</h3><div class='facts'>{text}</div>"


def classes(names: Sequence[str] | None) -> str:
    """A model of few classes calls everything one of them: say so, in Markdown, of which the names are no part."""
    if not names or len(names) > 50:
        return ""
    plain = re.sub(r"[!-+\--/:-@[-`{-~]", r"\\\g<0>", printable(", ".join(names)))
    return f"This model knows only {len(names)} classes: {plain}."
