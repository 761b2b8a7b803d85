"""`iared2 demo`: the page to play with. What it owns: the page's words and layout, and how it is served.

A thin client of `compare`. One queue runs one request at a time, so the milliseconds are of an undisturbed pass, and
hooks that a method puts into the model meet no other visitor. Groups are counted from 1 here, as in the paper.
"""

from __future__ import annotations

import html
import importlib.resources
import importlib.util
import math
import tempfile
from collections.abc import Sequence
from functools import partial
from pathlib import Path
from typing import Any, Literal

import gradio as gr
import torch

from .compare import Choice, Comparison, compare, write_archive
from .errors import InputError
from .explain.methods import METHODS
from .predictor import Predictor

MAX_PHOTOS = 8
MAX_WAITING = 32
"""Requests in the queue; a further one is refused with a message."""
MAX_SESSIONS = 64
"""Visitors whose last comparison is kept for their gallery and their download; the oldest is forgotten first."""
KEEP_SECONDS = 3600
"""After it, uploads and pictures are deleted from the disk."""

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
NEEDS = {"gradcam": "pytorch_grad_cam", "integrated-gradients": "captum", "memorability": "resmem"}
"""Packages without which a method is not offered."""
EXAMPLES = "chelsea.jpg", "coffee.jpg", "astronaut.jpg"

INTRO = """
# What does a vision transformer look at, and what can it do without?

The model cuts a photo into patches. At the entrance of each of its {groups} groups of layers a small *interpreter*
scores every patch, and the patches below the threshold **leave**: later layers never see them. What stays is the
explanation, what left is the saving. Drop a photo, then move the slider. The method is
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
- **Multiply-adds** are counted from the patches that stayed and include the interpreters; *saved* is against the plain
  transformer. **Milliseconds** are of one pass with one photo: small models gain little, there is little to save.
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
"""


def methods() -> list[str]:
    """The methods whose packages are installed."""
    return [m for m in METHODS if m not in NEEDS or importlib.util.find_spec(NEEDS[m])]


def examples() -> list[str]:
    """Paths of the photos that come with the package."""
    return [str(Path(str(importlib.resources.files("iared2")), "box", name)) for name in EXAMPLES]


def explain(
    predictor: Predictor,
    files: Sequence[str] | None,
    selected: int,
    method: str,
    group: int | Literal["all"],
    rule: str,
    threshold: float,
    budget: float,
) -> list[Any]:
    """The page's answer to any change: the comparisons, the gallery, and the selected photo in detail.

    Without files, an example is shown. What a visitor got wrong is a message on the page, beside what could be done.
    """
    files = files or examples()[:1]
    choice = Choice(method, group, rule, threshold, budget / 100)
    found: list[Comparison] = []
    try:
        if len(files) > MAX_PHOTOS:
            raise InputError(f"{len(files)} photos are too many for this page; give at most {MAX_PHOTOS} at once")
        found, complaints = compare(predictor, files, choice)
    except InputError as error:
        complaints = [error]
    problems = "".join(f"<p role='alert'>{html.escape(str(complaint))}</p>" for complaint in complaints)
    if problems and not found:
        gr.Warning(problems, title="That did not work")
    gallery = [(one.overlay(), caption(one)) for one in found]
    several = gr.Column(visible=len(found) > 1)
    return [found, problems, gallery, several, gr.Button(interactive=bool(found)), *detail(found, selected)]


def detail(found: Sequence[Comparison], selected: int) -> list[Any]:
    """One of the comparisons: figures as HTML, heat map, hierarchy, top-5 before and after. Empty if there is none."""
    if not found:
        return ["<h3>Drop a photo, or take an example.</h3>", None, None, None, None]
    one = found[min(selected, len(found) - 1)]
    top5 = [dict(result.top5) or None for result in (one.before, one.after)]
    return [facts(one), one.overlay(), one.after.hierarchy(), *top5]


def caption(one: Comparison) -> str:
    """What stands below a photo in the gallery."""
    return f"{one.name}: {one.after.top5[0][0] if one.after.top5 else 'no classes'}, {one.saved:.0%} saved"


def facts(one: Comparison) -> str:
    """What dropping changed, as HTML."""
    before, after = one.before, one.after
    unit, letter = (1e9, "G") if after.dense_macs >= 1e9 else (1e6, "M")
    ratios = " → ".join(f"{100 * ratio:.0f}" for ratio in after.keep_ratio) + " %"
    thresholds = " · ".join(dict.fromkeys(f"{t:.3g}" for t in after.thresholds))
    cells = [
        (
            "Multiply-adds",
            f"{one.saved:.0%} saved",
            f"{after.macs / unit:.2f} of {after.dense_macs / unit:.2f} {letter}, threshold {thresholds}",
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


def select(found: Sequence[Comparison], event: gr.SelectData) -> list[Any]:
    """A photo of the gallery was clicked: which one, and its details."""
    return [event.index, *detail(found, event.index)]


def archive(folder: str, found: Sequence[Comparison]) -> str:
    """Write the comparisons to a ZIP file in a new folder in ``folder``, and return its path."""
    path = Path(tempfile.mkdtemp(dir=folder)) / "iared2.zip"
    write_archive(found, path)
    return str(path)


def build(predictor: Predictor) -> gr.Blocks:
    """The page, not served yet."""
    model, photos = predictor.model, examples()
    height, width = model.pretrained_cfg["input_size"][1:]
    thresholds = model.thresholds
    rules = [("Threshold", "threshold"), ("Budget of multiply-adds", "macs"), ("Budget of patches", "patches")]
    if len(set(thresholds)) > 1:
        rules.insert(0, ("The model's own thresholds", "own"))
    groups = [(str(g + 1), g) for g in range(model.num_groups)] + [("all", "all")]
    nothing = torch.zeros(model.num_groups, 1, dtype=torch.int64)
    least = math.ceil(100 * model.count_macs(nothing).item() / model.dense_macs)
    top5 = partial(gr.Label, num_top_classes=5, show_heading=False)
    picture = partial(gr.Image, show_label=False, interactive=False, buttons=["fullscreen"])

    with gr.Blocks(title="IA-RED²", analytics_enabled=False, delete_cache=(600, KEEP_SECONDS)) as page:
        found = gr.State([], time_to_live=KEEP_SECONDS)
        selected = gr.State(0)
        gr.Markdown(INTRO.format(groups=model.num_groups, classes=_classes(model.class_names)))
        with gr.Row():
            with gr.Column(scale=2, min_width=300):
                label = f"Photos (up to {MAX_PHOTOS})"
                files = gr.File(label=label, file_count="multiple", file_types=["image"], height=170)
                samples = gr.Dataset(
                    label="Or take an example",
                    components=[gr.Image(visible=False)],
                    samples=[[photo] for photo in photos],
                    type="index",
                    elem_id="samples",
                )
                choices = [(LABELS[m], m) for m in methods()]
                info = "Which method says where it matters."
                method = gr.Dropdown(choices, value="interpreter", label="Heat map", info=info, elem_id="method")
                info = "Whose scores are shown. The deeper, the more it has seen."
                default = min(1, model.num_groups - 1)
                group = gr.Radio(groups, value=default, label="Group", info=info, elem_id="group")
                by = rules[0][1]
                rule = gr.Radio(
                    rules,
                    value=by,
                    label="Drop patches by",
                    info="A score to exceed, or a cost to keep to.",
                    elem_id="rule",
                )
                info = "Patches that score above it stay. 0 keeps all."
                threshold = gr.Slider(
                    0,
                    1,
                    thresholds[0],
                    step=0.01,
                    label="Threshold",
                    info=info,
                    visible=by == "threshold",
                    elem_id="threshold",
                )
                info = "At most this share of what the plain transformer spends."
                budget = gr.Slider(
                    least, 100, 50, step=1, label="Budget in %", info=info, visible=False, elem_id="budget"
                )
            with gr.Column(scale=5, min_width=320):
                problems = gr.HTML(elem_id="problems")
                with gr.Column(visible=False) as several:
                    gr.Markdown("### Your photos: choose one")
                    gallery = gr.Gallery(
                        columns=4,
                        show_label=False,
                        allow_preview=False,
                        interactive=False,
                        buttons=[],
                        elem_id="gallery",
                    )
                figures = gr.HTML(elem_id="figures")
                with gr.Row():
                    with gr.Column(scale=3, min_width=280):
                        gr.Markdown("### Heat map")
                        heat = picture(alt_text="the photo under its heat map", elem_id="heat")
                    with gr.Column(scale=2, min_width=200):
                        gr.Markdown("### Top 5")
                        before = top5(label="Before: every patch kept", elem_id="before")
                        after = top5(label="After dropping", elem_id="after")
                gr.Markdown("### The photo, then what each group kept of it")
                hierarchy = picture(alt_text="the photo, then the patches that each group kept", elem_id="hierarchy")
                prepare = gr.Button("Download pictures and figures (ZIP)", elem_id="prepare")
                download = gr.DownloadButton(visible="hidden", elem_id="download")
        with gr.Accordion("How to read this", open=False):
            gr.Markdown(HELP.format(height=height, width=width))

        inputs = [files, selected, method, group, rule, threshold, budget]
        details = [figures, heat, hierarchy, before, after]
        model_alone: dict[str, Any] = {"concurrency_id": "model", "concurrency_limit": 1, "show_progress": "minimal"}
        at_once: dict[str, Any] = {"queue": False, "show_progress": "hidden", "api_visibility": "private"}
        gr.on(
            [page.load, *(part.change for part in (files, method, group, rule, threshold, budget))],
            partial(explain, predictor),
            inputs,
            [found, problems, gallery, several, prepare, *details],
            trigger_mode="always_last",  # of the positions of a moving slider
            api_visibility="private",
            **model_alone,
        )
        samples.click(lambda index: [photos[index]], samples, files, **at_once)
        method.change(lambda name: gr.Radio(visible=name == "interpreter"), method, group, **at_once)
        sliders = [("threshold",), ("macs", "patches")]
        rule.change(
            lambda by: [gr.Slider(visible=by in shown) for shown in sliders], rule, [threshold, budget], **at_once
        )
        gallery.select(select, found, [selected, *details], **at_once)
        # made only when it is asked for: pictures without loss take longer than the model
        prepare.click(partial(archive, download.GRADIO_CACHE), found, download, api_visibility="private").then(
            None, js="() => setTimeout(() => document.querySelector('#download').click(), 100)"
        )
    return page.queue(max_size=MAX_WAITING, default_concurrency_limit=2, api_open=False)


def _classes(names: Sequence[str] | None) -> str:
    """A model of few classes calls everything one of them: say so."""
    return f"This model knows only {len(names)} classes: {', '.join(names)}." if names and len(names) <= 20 else ""


def serve(
    page: gr.Blocks,
    host: str | None = None,
    port: int | None = None,
    *,
    root_path: str | None = None,
    max_file_size: int = 20,
    wait: bool = True,
) -> str:
    """Serve the page, until Ctrl-C if ``wait``, and return its address.

    Args:
        page: of `build`.
        host, port: where to listen. None: what gradio's environment variables say, as on a Hugging Face Space, or
            else 127.0.0.1 and 7860 or the next free port.
        root_path: the path under which a reverse proxy shows the page, such as ``/iared2``.
        max_file_size: of an upload, in megabytes.
        wait: False returns at once; ``page.close()`` ends it.

    Raises:
        InputError: the port is taken, the address is not of this machine, or a number makes no sense.
    """
    if max_file_size < 1 or (port is not None and not 0 < port < 65536):
        raise InputError(f"port {port}, uploads of {max_file_size} MB: give a port from 1 to 65535, and 1 MB or more")
    try:
        _, address, _ = page.launch(
            server_name=host,
            server_port=port,
            root_path=root_path,
            max_file_size=f"{max_file_size}mb",
            share=False,
            quiet=True,
            prevent_thread_lock=True,
            allowed_paths=examples(),
            footer_links=[],
            run_history=False,
            enable_monitoring=False,
            mcp_server=False,
            ssr_mode=False,
            pwa=False,
            state_session_capacity=MAX_SESSIONS,
            css=CSS,
            theme=_theme(),
        )
    except OSError:
        raise InputError(
            f"cannot listen on {host}, port {port}: it is in use or not ours; choose another --port"
        ) from None
    print(f"the page is at {address}", flush=True)
    if wait:
        page.block_thread()
    return address


def _theme() -> gr.themes.Default:
    """Fonts of the visitor's own machine, so that none is fetched; small print dark enough to be read."""
    fonts = ["system-ui", "sans-serif"]
    grey = "*neutral_600"
    return gr.themes.Default(primary_hue="blue", font=fonts, font_mono=fonts).set(
        body_text_color_subdued=grey, block_info_text_color=grey, block_title_text_color="*neutral_800"
    )
