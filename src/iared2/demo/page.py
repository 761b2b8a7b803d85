"""`iared2 demo`: the web page. Owns the layout, the events, and how it is served.

A thin client of `compare`. One queue runs one request at a time, so the times are of an undisturbed pass, and hooks
that a method adds to the model do not affect other visitors. Groups are counted from 1 here, as in the paper.
"""

from __future__ import annotations

import html
import importlib.resources
import importlib.util
import math
import signal
import socket
import tempfile
import time
import weakref
from collections.abc import Sequence
from functools import partial
from pathlib import Path
from typing import Any, Literal

import gradio as gr
import torch
from gradio_client.utils import is_http_url_like, traverse

from ..errors import InputError
from ..explain.heatmap import default_group
from ..explain.names import METHODS
from ..predict.photo import Predictor
from .compare import Choice, Comparison, compare, write_archive
from .words import CSS, FATE, HELP, INTRO, LABELS, caption, classes, facts

MAX_PHOTOS = 8
MAX_WAITING = 32
"""Requests in the queue; a further one is refused with a message."""
MAX_SESSIONS = 64
MAX_BYTES = 512 << 20
"""Limits for visitors and for their total memory. The last comparison of each is kept for gallery and download; the
oldest is deleted first."""
FORGOTTEN = "These results were deleted to free memory. Change any setting to compute them again"
KEEP_SECONDS = 3600
"""Time after which uploads and pictures are deleted from the disk."""

NEEDS = {"gradcam": "pytorch_grad_cam", "integrated-gradients": "captum", "memorability": "resmem"}
"""Packages without which a method is not offered."""
EXAMPLES = "chelsea.jpg", "coffee.jpg", "astronaut.jpg"


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
    """The output for any change: the comparisons, the gallery, and the selected photo in detail.

    Without files, an example is shown. User errors are shown as a message on the page, next to the other results.
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
    alert = gr.HTML(problems, visible=bool(problems))
    return [found, alert, gallery, several, gr.Button(interactive=bool(found)), *detail(found, selected)]


class Held(list[Comparison]):
    """The comparisons of one visitor, deleted with the session or by ``Memory``."""


class Memory:
    """The comparisons of all sessions, up to a number of bytes; the oldest are deleted first."""

    def __init__(self, max_bytes: int = MAX_BYTES) -> None:
        self.max_bytes = max_bytes
        self.held: list[weakref.ref[Held]] = []

    def hold(self, comparisons: Sequence[Comparison]) -> Held:
        """Store comparisons and return them for the session."""
        newest = Held(comparisons)
        alive = [held for ref in self.held if (held := ref())]
        while alive and sum(one.nbytes for held in (*alive, newest) for one in held) > self.max_bytes:
            alive.pop(0).clear()
        self.held = [*map(weakref.ref, alive), weakref.ref(newest)]
        return newest


class Page(gr.Blocks):
    """A page that fetches nothing: a URL instead of an upload is refused before its host is looked up."""

    async def preprocess_data(self, block_fn: Any, inputs: list[Any], *args: Any, **kwargs: Any) -> list[Any]:
        """Like `gr.Blocks`, which refuses local URLs only after a DNS query."""

        def refuse(file: dict[str, Any]) -> None:
            foreign = "/gradio_api/file=" not in (file.get("url") or "")  # the browser names where it sees its upload
            if is_http_url_like(file["path"]) or (foreign and is_http_url_like(file.get("url"))):
                raise gr.Error("Give a file, not an address: this page fetches nothing", print_exception=False)

        traverse(inputs, refuse, lambda value: isinstance(value, dict) and "path" in value)
        return await super().preprocess_data(block_fn, inputs, *args, **kwargs)


def detail(found: Sequence[Comparison], selected: int) -> list[Any]:
    """One comparison: numbers as HTML, heat map, hierarchy, top-5 before and after. Empty if there is none."""
    if not found:
        return ["<h3>Drop a photo, or take an example.</h3>", None, None, None, None]
    one = found[min(selected, len(found) - 1)]
    top5 = [dict(result.top5) or None for result in (one.before, one.after)]
    return [facts(one), one.overlay(), one.after.hierarchy(), *top5]


def select(found: Sequence[Comparison], event: gr.SelectData) -> list[Any]:
    """Handle a click on a photo in the gallery: its index and details."""
    found = _remembered(found)
    return [event.index, *detail(found, event.index)]


def archive(folder: str, found: Sequence[Comparison]) -> str:
    """Write the comparisons to a ZIP file in a new folder in ``folder``, and return its path."""
    found = _remembered(found)
    path = Path(tempfile.mkdtemp(dir=folder)) / "iared2.zip"
    write_archive(found, path)
    return str(path)


def _remembered(found: Sequence[Comparison]) -> list[Comparison]:
    """A list of its own, which nobody empties at work."""
    if not found:
        raise gr.Error(FORGOTTEN, print_exception=False)
    return list(found)


def build(predictor: Predictor) -> gr.Blocks:
    """The page, not served yet."""
    model, photos = predictor.model, examples()
    height, width = model.pretrained_cfg["input_size"][1:]
    thresholds = model.thresholds or (0.5,) * model.num_groups
    rules = [("Threshold", "threshold"), ("Budget of MACs", "macs"), ("Budget of patches", "patches")]
    if len(set(thresholds)) > 1 or model.num_keep is not None:
        rules.insert(0, (f"The model's own {'thresholds' if model.num_keep is None else 'counts'}", "own"))
    groups = [(str(g + 1), g) for g in range(model.num_groups)] + [("all", "all")]
    nothing = torch.zeros(model.num_groups, 1, dtype=torch.int64)
    least = math.ceil(100 * model.count_macs(nothing).item() / model.dense_macs)
    top5 = partial(gr.Label, num_top_classes=5, show_heading=False)

    def picture(kind: Any = gr.Image, **options: Any) -> Any:
        return kind(show_label=False, interactive=False, **{"buttons": ["fullscreen"]} | options)

    memory = Memory()

    def explain_and_hold(*values: Any) -> list[Any]:
        found, *shown = explain(predictor, *values)
        return [memory.hold(found), *shown]

    with Page(title="IA-RED²", analytics_enabled=False, delete_cache=(600, KEEP_SECONDS)) as page:
        found = gr.State([], time_to_live=KEEP_SECONDS)
        selected = gr.State(0)
        gr.Markdown(INTRO.format(groups=model.num_groups, fate=FATE[model.dropped], classes=classes(model.class_names)))
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
                info = "The method that computes the heat map."
                method = gr.Dropdown(choices, value="interpreter", label="Heat map", info=info, elem_id="method")
                info = "The group whose scores are shown. Deeper groups have seen more."
                default = default_group(model.num_groups)
                group = gr.Radio(groups, value=default, label="Group", info=info, elem_id="group")
                by, info = rules[0][1], "By a minimum score, or by a maximum cost."
                usual = thresholds[0] if by == "threshold" else round(max(thresholds), 2)  # a first group may keep all
                rule = gr.Radio(rules, value=by, label="Drop patches by", info=info, elem_id="rule")
                info, shown = "Keep patches that score above this. 0 keeps all.", by == "threshold"
                options = {"step": 0.01, "label": "Threshold", "info": info, "visible": shown, "elem_id": "threshold"}
                threshold = gr.Slider(0, 1, usual, **options)
                info = "At most this share of the cost of the dense transformer."
                options |= {"step": 1, "label": "Budget in %", "info": info, "visible": False, "elem_id": "budget"}
                budget = gr.Slider(least, 100, 50, **options)
            with gr.Column(scale=5, min_width=320):
                problems = gr.HTML(visible=False, elem_id="problems")
                with gr.Column(visible=False) as several:
                    gr.Markdown("### Your photos: choose one")
                    gallery = picture(gr.Gallery, columns=4, allow_preview=False, buttons=[], elem_id="gallery")
                figures = gr.HTML(elem_id="figures")
                with gr.Row():
                    with gr.Column(scale=3, min_width=280):
                        gr.Markdown("### Heat map")
                        heat = picture(alt_text="the photo under its heat map", elem_id="heat")
                    with gr.Column(scale=2, min_width=200):
                        gr.Markdown("### Top 5")
                        before = top5(label="Before: every patch kept", elem_id="before")
                        after = top5(label="After dropping", elem_id="after")
                gr.Markdown("### The photo, then the patches kept by each group")
                hierarchy = picture(alt_text="the photo, then the patches kept by each group", elem_id="hierarchy")
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
            explain_and_hold,
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
        # created on demand: lossless pictures take longer than the model
        prepare.click(partial(archive, download.GRADIO_CACHE), found, download, api_visibility="private").then(
            None, js="() => setTimeout(() => document.querySelector('#download').click(), 100)"
        )
    return page.queue(max_size=MAX_WAITING, default_concurrency_limit=2, api_open=False)


def serve(
    page: gr.Blocks,
    host: str | None = None,
    port: int | None = None,
    *,
    root_path: str | None = None,
    max_file_size: int = 20,
) -> None:
    """Serve the page until it is interrupted (Ctrl-C), then delete the uploads.

    Args:
        page: from `build`.
        host, port: where to listen. None: what gradio's environment variables say, as on a Hugging Face Space.
        root_path: the path of the page behind a reverse proxy, such as ``/iared2``.
        max_file_size: maximum size of an upload in megabytes.

    Raises:
        InputError: the port is in use, the address is not of this machine, or a number is out of range.
    """
    if max_file_size < 1 or (port is not None and not 0 < port < 65536):
        raise InputError(f"port {port}, uploads of {max_file_size} MB: give a port from 1 to 65535, and 1 MB or more")
    if host is not None and port is not None:
        try:
            family = socket.AF_INET6 if ":" in host else socket.AF_INET
            socket.create_server((host, port), family=family).close()
        except OSError as error:
            reason = str(error.strerror).partition(" (while")[0]
            raise InputError(
                f"cannot listen on {host}, port {port} ({reason}); choose another --port or --host"
            ) from None
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
    print(f"the page is at {address}", flush=True)
    signal.signal(signal.SIGTERM, signal.default_int_handler)  # a container that is stopped cleans up as well
    try:
        while True:  # an endless wait would miss a signal that the kernel gives to another thread
            time.sleep(0.5)
    finally:
        page.close(verbose=False)


def _theme() -> gr.themes.Default:
    """A theme with local fonts, so that none is fetched, and legible small print."""
    fonts = ["system-ui", "sans-serif"]
    grey = "*neutral_600"
    return gr.themes.Default(primary_hue="blue", font=fonts, font_mono=fonts).set(
        body_text_color_subdued=grey, block_info_text_color=grey, block_title_text_color="*neutral_800"
    )
