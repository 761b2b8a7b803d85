"""The page in a real headless Chromium, as visitors use it: every click goes to the real command in its own process.

``IARED2_SCREENSHOTS=docs/pictures`` makes the picture of the README anew: `demo.png`.
"""

from __future__ import annotations

import http.client
import io
import json
import os
import re
import shutil
import threading
import zipfile
from collections.abc import Callable, Iterator
from contextlib import closing, suppress
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from itertools import pairwise
from pathlib import Path
from typing import Any
from urllib.parse import urlparse

import numpy as np
import pytest
from PIL import Image
from serving import Server, served

import iared2
from iared2.explain.figures import result_figure

pytest.importorskip("gradio", reason="the page: pip install '.[demo]'")
playwright = pytest.importorskip("playwright.sync_api", reason="the browser: pip install playwright")
expect = playwright.expect

CHROMIUM = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None)
if not CHROMIUM:
    pytest.skip("the page in a browser: install chromium", allow_module_level=True)

pytestmark = pytest.mark.slow

EXAMPLES = Path(__file__).parents[2] / "examples"
ALL, NONE = (" → ".join([share] * 4) + " %" for share in ("100", "0"))
WAIT = 30_000  # milliseconds; the machine may be busy
NewPage = Callable[..., Any]


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory, like_the_box: Path) -> Iterator[Server]:
    own = [] if os.environ.get("IARED2_SCREENSHOTS") else ["-c", str(like_the_box)]  # the README shows the box
    with served(tmp_path_factory.mktemp("server"), *own) as running:
        yield running


@pytest.fixture(scope="module")
def predictor(like_the_box: Path) -> iared2.Predictor:
    return iared2.Predictor(iared2.load(like_the_box))


@pytest.fixture(scope="module")
def chromium() -> Iterator[Any]:
    with playwright.sync_playwright() as started:
        browser = started.chromium.launch(executable_path=CHROMIUM, args=["--no-sandbox"])
        yield browser
        browser.close()


@pytest.fixture
def new_page(server: Server, chromium: Any) -> Iterator[NewPage]:
    """Opens the page as a new visitor. At the end: no request went to another host."""
    contexts, hosts = [], set()

    def new(address: str = server.address, **options: Any) -> Any:
        context = chromium.new_context(viewport={"width": 1280, "height": 900}, **options)
        context.set_default_timeout(WAIT)
        contexts.append(context)
        page = context.new_page()
        page.on("request", lambda request: hosts.add(urlparse(request.url).hostname))
        page.goto(address)
        expect(page.locator("#figures")).to_contain_text("MACs", timeout=WAIT)
        expect(page.locator("#heat img")).to_be_visible(timeout=WAIT)
        return page

    yield new
    for context in contexts:
        context.close()
    assert hosts - {None} == {"127.0.0.1"}  # None: data: and blob: addresses


def upload(page: Any, *photos: Path) -> None:
    page.locator("input[type=file]").first.set_input_files([str(photo) for photo in photos])


def set_threshold(page: Any, value: float) -> None:
    page.locator("#rule").get_by_label("Threshold", exact=True).check()
    number = page.locator("#threshold input[type=number]")
    number.fill(str(value))
    number.press("Enter")


def shows(page: Any, *texts: str) -> None:
    for text in texts:
        expect(page.locator("#figures")).to_contain_text(text, timeout=WAIT)


def saved(result: iared2.Interpretation) -> str:
    share = result.macs / result.dense_macs
    return f"{1 - share:.0%} saved" if share <= 1 else f"{share - 1:.0%} more"


def picture(page: Any, name: str) -> Image.Image:
    """The picture that is on the page, as the browser got it."""
    address = page.locator(f"#{name} img").get_attribute("src")
    return Image.open(io.BytesIO(page.request.get(address).body())).convert("RGB")


def changes(page: Any, name: str) -> Callable[[], None]:
    """Call the result to wait until another picture is there."""
    image = page.locator(f"#{name} img")
    before = image.get_attribute("src")
    return lambda: expect(image).not_to_have_attribute("src", before, timeout=WAIT)


def difference(a: Image.Image, b: Image.Image) -> float:
    return float(np.abs(np.asarray(a, float) - np.asarray(b.resize(a.size), float)).mean())


def test_first_visit(new_page: NewPage, predictor: iared2.Predictor) -> None:
    page = new_page()
    result = predictor(EXAMPLES / "chelsea.jpg")
    dense = predictor(EXAMPLES / "chelsea.jpg", predictor.model.decision.whole())
    shows(page, "chelsea.jpg", saved(result), result.top5[0][0])
    assert difference(picture(page, "heat"), result.overlay()) < 5  # the browser got a compressed one
    assert difference(picture(page, "hierarchy"), result.hierarchy()) < 5
    expect(page.locator("#after")).to_contain_text(result.top5[4][0])
    expect(page.locator("#before")).to_contain_text(dense.top5[0][0])
    page.get_by_text("How to read this").click()
    expect(page.get_by_text("The model sees the whole photo")).to_be_visible()


def test_upload(new_page: NewPage, predictor: iared2.Predictor, tmp_path: Path) -> None:
    photo = tmp_path / "my own photo.png"
    Image.open(EXAMPLES / "astronaut.jpg").rotate(90).save(photo)
    page = new_page()
    upload(page, photo)
    shows(page, photo.name)
    expected = predictor(photo)
    shows(page, saved(expected))
    assert difference(picture(page, "heat"), expected.overlay()) < 5


def test_example(new_page: NewPage) -> None:
    page = new_page()
    page.locator("#samples button").nth(1).click()
    shows(page, "coffee.jpg")


def test_threshold(new_page: NewPage) -> None:
    page = new_page()
    heat, hierarchy = changes(page, "heat"), changes(page, "hierarchy")
    set_threshold(page, 0)
    shows(page, ALL, "the same prediction")
    heat()
    hierarchy()
    hierarchy = changes(page, "hierarchy")
    set_threshold(page, 1)
    shows(page, NONE)
    hierarchy()
    assert np.ptp(np.asarray(picture(page, "hierarchy"))[100:, 600:]) < 25  # blank after the photo itself

    handle = page.locator("#threshold input[type=range]")
    handle.focus()
    for _ in range(55):  # faster than the model answers; the last one counts
        handle.press("ArrowLeft")
    shows(page, "threshold 0.45")
    expect(page.locator("#figures")).not_to_contain_text(NONE)


def test_budget(new_page: NewPage) -> None:
    page = new_page()
    expect(page.locator("#budget")).to_be_hidden()
    page.get_by_label("Budget of MACs").click()
    expect(page.locator("#budget")).to_be_visible(timeout=WAIT)
    expect(page.locator("#threshold")).to_be_hidden(timeout=WAIT)
    for percent in (30, 60):
        number = page.locator("#budget input[type=number]")
        number.fill(str(percent))
        number.press("Enter")
        expect(page.locator("#figures")).to_contain_text(
            re.compile(rf"({100 - percent}|{100 - percent + 1}|{100 - percent + 2})% saved"), timeout=WAIT
        )


def test_method_and_group(new_page: NewPage) -> None:
    page = new_page()
    decided = page.locator("#figures b").first.inner_text()
    seen = [picture(page, "heat")]

    def see(choice: Any) -> None:
        changed = changes(page, "heat")
        choice.click()
        changed()
        seen.append(picture(page, "heat"))

    see(page.locator("#group").get_by_label("3"))
    for method in ("Attention rollout", "Grad-CAM", "Centre of the photo"):
        page.locator("#method input").click()
        see(page.get_by_role("option", name=method))
    expect(page.locator("#group")).to_be_hidden()
    assert min(difference(a, b) for a, b in pairwise(seen)) > 3
    assert page.locator("#figures b").first.inner_text() == decided  # other maps of the same decision


def test_gallery(new_page: NewPage) -> None:
    page = new_page()
    expect(page.locator("#gallery")).to_be_hidden()
    upload(page, *(EXAMPLES / name for name in ("astronaut.jpg", "chelsea.jpg", "coffee.jpg")))
    thumbnails = page.locator("#gallery .thumbnail-item")
    expect(thumbnails).to_have_count(3, timeout=WAIT)
    expect(page.locator("#gallery")).to_contain_text("coffee.jpg:")
    shows(page, "astronaut.jpg")
    thumbnails.nth(2).click()
    shows(page, "coffee.jpg")
    set_threshold(page, 0)
    shows(page, "coffee.jpg", ALL)  # still the one that was chosen


def test_bad_file(new_page: NewPage, tmp_path: Path) -> None:
    bad = tmp_path / "fake.jpg"
    bad.write_text("this is no photo")
    message = "fake.jpg: not an image that can be read here; convert it to JPEG or PNG"
    page = new_page()
    upload(page, bad)
    expect(page.locator("#problems")).to_have_text(message, timeout=WAIT)
    expect(page.get_by_test_id("toast-body")).to_contain_text(message)
    expect(page.locator("#prepare")).to_be_disabled()
    page.get_by_label("Clear").first.click()
    expect(page.locator("#problems")).to_be_hidden(timeout=WAIT)
    upload(page, bad, EXAMPLES / "coffee.jpg")
    expect(page.locator("#problems")).to_have_text(message, timeout=WAIT)
    shows(page, "coffee.jpg")


def test_50_megabytes(new_page: NewPage, server: Server, tmp_path: Path) -> None:
    large = tmp_path / "large.jpg"
    with large.open("wb") as file:
        file.truncate(50 * 2**20)
    page = new_page()
    upload(page, large)
    expect(page.get_by_test_id("toast-body")).to_contain_text("exceed the maximum allowed size of 20", timeout=WAIT)
    shows(page, "chelsea.jpg")
    assert not list((server.folder / "uploads").rglob("large*"))
    set_threshold(page, 0)  # and the page goes on
    shows(page, ALL)


def test_two_users_at_once(new_page: NewPage) -> None:
    pages = new_page(), new_page()
    for first, second in ((0, 1), (1, 0), (0, 1)):
        for page, value in zip(pages, (first, second), strict=True):
            set_threshold(page, value)
        for page, value in zip(pages, (first, second), strict=True):
            shows(page, NONE if value else ALL, f"threshold {value}")
    upload(pages[0], EXAMPLES / "coffee.jpg")
    shows(pages[0], "coffee.jpg")
    shows(pages[1], "chelsea.jpg", NONE)


def test_download(new_page: NewPage, predictor: iared2.Predictor) -> None:
    page = new_page()
    upload(page, EXAMPLES / "astronaut.jpg", EXAMPLES / "coffee.jpg")
    expect(page.locator("#gallery .thumbnail-item")).to_have_count(2, timeout=WAIT)
    with page.expect_download(timeout=WAIT) as download:
        page.locator("#prepare").click()
    assert download.value.suggested_filename == "iared2.zip"
    expected = predictor(EXAMPLES / "coffee.jpg")
    with zipfile.ZipFile(download.value.path()) as archive:
        files = ("heatmap.png", "hierarchy.png", "result.json")
        assert archive.namelist() == [f"{folder}/{file}" for folder in ("astronaut", "coffee") for file in files]
        heat = result_figure(expected.photo, expected.heatmap())
        assert np.array_equal(Image.open(archive.open("coffee/heatmap.png")), heat)  # == also compares the classes
        assert np.array_equal(Image.open(archive.open("coffee/hierarchy.png")), expected.hierarchy())
        result = json.loads(archive.read("coffee/result.json"))
    assert result["after"]["macs"] == expected.macs
    assert str(Path.home()) not in json.dumps(result)


def test_behind_a_reverse_proxy(new_page: NewPage, like_the_box: Path, tmp_path: Path) -> None:
    """One that shows the page under a path, and does not pass that path on."""
    with served(tmp_path, "-c", str(like_the_box), "--root-path", "/iared2") as behind:

        class Proxy(BaseHTTPRequestHandler):
            def forward(self) -> None:
                if not self.path.startswith("/iared2"):
                    self.send_error(404)
                    return
                body = self.rfile.read(int(self.headers.get("Content-Length", 0)))
                upstream = http.client.HTTPConnection(urlparse(behind.address).netloc)
                with closing(upstream), suppress(ConnectionError):  # the browser may leave in the middle of a stream
                    upstream.request(self.command, self.path.removeprefix("/iared2"), body, dict(self.headers))
                    answer = upstream.getresponse()
                    self.send_response(answer.status)
                    for name, value in answer.getheaders():
                        if name.lower() not in ("transfer-encoding", "connection", "date", "server"):
                            self.send_header(name, value)
                    self.end_headers()
                    while chunk := answer.read1(65536):  # as it comes: answers of the queue are a stream of events
                        self.wfile.write(chunk)

            do_GET = do_POST = do_HEAD = forward

            def log_message(self, *_: object) -> None: ...

        proxy = ThreadingHTTPServer(("127.0.0.1", 0), Proxy)
        thread = threading.Thread(target=proxy.serve_forever)
        thread.start()
        try:
            page = new_page(f"http://127.0.0.1:{proxy.server_port}/iared2/")
            upload(page, EXAMPLES / "coffee.jpg")
            shows(page, "coffee.jpg")
            set_threshold(page, 0)
            shows(page, ALL)
            assert "/iared2/" in page.locator("#heat img").get_attribute("src")
            page.context.close()
        finally:
            proxy.shutdown()
            proxy.server_close()
            thread.join()


@pytest.mark.parametrize("device", ["desktop", "phone"])
def test_layout(new_page: NewPage, tmp_path: Path, device: str) -> None:
    page = new_page()
    if device == "phone":
        page.set_viewport_size({"width": 390, "height": 844})
    page.locator("#hierarchy").scroll_into_view_if_needed()  # pictures are loaded when they come into view
    expect(page.locator("#hierarchy img")).to_be_visible()
    page.wait_for_function("[...document.querySelectorAll('img')].every(image => image.complete && image.naturalWidth)")
    assert page.evaluate("document.scrollingElement.scrollWidth") <= page.viewport_size["width"]
    page.evaluate("scrollTo(0, 0)")
    file = tmp_path / "page.png"
    page.screenshot(path=file, full_page=True)
    with Image.open(file) as screenshot:
        assert len(screenshot.convert("RGB").quantize(64).getcolors()) > 32  # not a blank page
        if device == "desktop" and (folder := os.environ.get("IARED2_SCREENSHOTS")):
            colors = screenshot.convert("RGB")  # as many as a small file can hold
            colors.quantize(palette=colors.quantize(256)).save(Path(folder) / "demo.png", optimize=True)
