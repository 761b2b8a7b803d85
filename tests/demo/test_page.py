"""The page without a browser: what it answers, what it says of bad input, and how it is served."""

from __future__ import annotations

import asyncio
import ctypes
import json
import runpy
import signal
import socket
import sys
import zipfile
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import httpx
import numpy as np
import pytest
import torch
from PIL import Image

import iared2
from iared2 import InputError, Predictor
from iared2.cli import main

gr = pytest.importorskip("gradio", reason="the page: pip install '.[demo]'")
from serving import Server, served  # noqa: E402

from iared2.demo import page as demo  # noqa: E402
from iared2.demo.page import (  # noqa: E402
    MAX_PHOTOS,
    Memory,
    archive,
    build,
    examples,
    explain,
    methods,
    select,
    serve,
)
from iared2.demo.words import classes  # noqa: E402

ROOT = Path(__file__).parents[2]


@pytest.fixture(autouse=True)
def no_loop_left_open(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """gradio makes an event loop for each of its locks, and leaves it open: a warning at some later time."""
    make, loops = asyncio.new_event_loop, []
    monkeypatch.setattr(asyncio, "new_event_loop", lambda: loops.append(make()) or loops[-1])
    yield
    for loop in loops:
        loop.close()


@pytest.fixture
def predictor() -> Predictor:
    torch.manual_seed(0)
    size = {"img_size": 32, "patch_size": 8, "embed_dim": 48, "depth": 3, "num_heads": 3}
    return Predictor(iared2.from_timm("deit_tiny_patch16_224", num_classes=7, **size))


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory, like_the_box: Path) -> Iterator[Server]:
    options = ["-c", str(like_the_box), "--max-file-size", "1", "--root-path", "/iared2"]
    with served(tmp_path_factory.mktemp("server"), *options) as running:
        yield running


def ask(predictor: Predictor, files: list[str] | None, **changes: Any) -> dict[str, Any]:
    """The page's answer by the names of its parts."""
    values = {"selected": 0, "method": "interpreter", "group": 1, "rule": "threshold", "threshold": 0.5, "budget": 50}
    names = ("found", "problems", "gallery", "several", "prepare", "facts", "heat", "hierarchy", "before", "after")
    return dict(zip(names, explain(predictor, files, **values | changes), strict=True))


def test_one_photo(predictor: Predictor) -> None:
    answer = ask(predictor, examples()[1:2])
    result = predictor(examples()[1])
    assert np.array_equal(answer["heat"], result.overlay())
    assert np.array_equal(answer["hierarchy"], result.hierarchy())
    assert answer["after"] == pytest.approx(dict(result.top5))
    assert answer["before"] == pytest.approx(dict(predictor(examples()[1], predictor.model.decision.whole()).top5))
    assert f"{1 - result.macs / result.dense_macs:.0%} saved" in answer["facts"]
    assert " → ".join(f"{100 * r:.0f}" for r in result.keep_ratio) in answer["facts"]
    assert not answer["problems"].visible
    assert not answer["several"].visible
    assert answer["prepare"].interactive


def test_a_second_pass_is_said(predictor: Predictor, monkeypatch: pytest.MonkeyPatch) -> None:
    before = predictor.model.decision
    assert "Second pass" not in ask(predictor, examples()[1:2])["facts"]
    try:
        predictor.model.confidence = 1.0
        answer = ask(predictor, examples()[1:2])
    finally:
        predictor.model.decision = before
    assert "Second pass" in answer["facts"]
    assert answer["after"] == pytest.approx(answer["before"], abs=1e-4)


def test_an_example_until_there_is_a_photo(predictor: Predictor) -> None:
    assert "chelsea.jpg" in ask(predictor, None)["facts"]
    assert "chelsea.jpg" in ask(predictor, [])["facts"]


def test_controls_change_the_answer(predictor: Predictor) -> None:
    usual = ask(predictor, None)
    others = [
        ask(predictor, None, **changes)
        for changes in ({"group": 0}, {"group": "all"}, {"method": "center"}, {"threshold": 0.49}, {"rule": "macs"})
    ]
    assert not any(np.array_equal(other["heat"], usual["heat"]) for other in others)
    assert ["hierarchy" for other in others[:3] if not np.array_equal(other["hierarchy"], usual["hierarchy"])] == []
    everything = ask(predictor, None, threshold=0)
    assert "100 → 100 → 100 %" in everything["facts"]
    assert "the same prediction" in everything["facts"]
    assert "0 → 0 → 0 %" in ask(predictor, None, threshold=1)["facts"]


def test_several_photos(predictor: Predictor) -> None:
    answer = ask(predictor, examples(), selected=1)
    assert answer["several"].visible
    assert [caption.split(":")[0] for _, caption in answer["gallery"]] == ["chelsea.jpg", "coffee.jpg", "astronaut.jpg"]
    assert "coffee.jpg" in answer["facts"]
    event = gr.SelectData(None, {"index": 2, "value": None})
    index, facts, heat, *_ = select(answer["found"], event)
    assert index == 2
    assert "astronaut.jpg" in facts
    assert np.array_equal(heat, answer["found"][2].overlay())
    assert "chelsea.jpg" in ask(predictor, examples()[:1], selected=2)["facts"]  # there are fewer than there were


def test_bad_files(predictor: Predictor, tmp_path: Path) -> None:
    bad = tmp_path / "<b>bad<b>.jpg"
    bad.write_text("text")
    answer = ask(predictor, [str(bad), examples()[0]])
    assert "&lt;b&gt;bad&lt;b&gt;.jpg: not an image that can be read here; convert it" in answer["problems"].value
    assert str(tmp_path) not in answer["problems"].value
    assert "chelsea.jpg" in answer["facts"]

    with pytest.warns(UserWarning, match="not an image"):
        answer = ask(predictor, [str(bad)])
    assert "not an image" in answer["problems"].value
    assert (answer["heat"], answer["before"], answer["found"]) == (None, None, [])
    assert not answer["prepare"].interactive


def test_names_are_text(predictor: Predictor, tmp_path: Path) -> None:
    Image.new("RGB", (40, 30), "red").save(tmp_path / "<img src=x>.png")
    answer = ask(predictor, [str(tmp_path / "<img src=x>.png")])
    assert "<img" not in answer["facts"]
    assert "&lt;img src=x&gt;.png" in answer["facts"]


def test_too_many_photos(predictor: Predictor) -> None:
    with pytest.warns(UserWarning, match="too many"):
        assert "give at most 8" in ask(predictor, examples()[:1] * (MAX_PHOTOS + 1))["problems"].value


def test_a_model_without_classes(predictor: Predictor) -> None:
    predictor.model.reset_classifier(0)
    answer = ask(predictor, examples())
    assert (answer["before"], answer["after"]) == (None, None)
    assert "no classes" in answer["gallery"][0][1]


def test_visitors_do_not_see_each_others_thresholds(predictor: Predictor) -> None:
    thresholds = [0.0, 0.499, 0.5, 0.501, 1.0]
    expected = [ask(predictor, None, threshold=t)["found"][0].after.kept for t in thresholds]
    with ThreadPoolExecutor(5) as pool:
        answers = pool.map(lambda t: ask(predictor, None, threshold=t, method="rollout"), thresholds * 4)
        for answer, kept in zip(answers, expected * 4, strict=True):
            assert np.array_equal(answer["found"][0].after.kept, kept)


def test_the_oldest_results_make_room(predictor: Predictor, tmp_path: Path) -> None:
    found = ask(predictor, examples())["found"]
    size = sum(one.nbytes for one in found)
    assert size == sum(8 * one.after.photo.width * one.after.photo.height for one in found)
    assert all(one.before.photo is one.after.photo for one in found)
    memory = Memory(int(2.5 * size))
    held = [memory.hold(found) for _ in range(4)]
    assert [len(one) for one in held] == [0, 0, 3, 3]
    del held[2]  # its visitor has left
    held.append(memory.hold(found))
    assert [len(one) for one in held] == [0, 0, 3, 3]
    with pytest.raises(gr.Error, match="Change any setting"):
        archive(str(tmp_path), held[0])
    with pytest.raises(gr.Error, match="Change any setting"):
        select(held[0], gr.SelectData(None, {"index": 0, "value": None}))


def test_archive(predictor: Predictor, tmp_path: Path) -> None:
    found = ask(predictor, examples())["found"]
    paths = [archive(str(tmp_path), found) for _ in range(2)]
    assert paths[0] != paths[1]
    with zipfile.ZipFile(paths[0]) as file:
        assert len(file.namelist()) == 9
    assert zipfile.is_zipfile(paths[1])


def test_methods_whose_package_is_missing_are_not_offered(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(demo.importlib.util, "find_spec", lambda name: None)
    assert methods() == ["interpreter", "attention", "rollout", "random", "center"]


def test_examples_are_those_of_the_repository() -> None:
    for path in map(Path, examples()):
        assert path.read_bytes() == (ROOT / "examples" / path.name).read_bytes()


def parts(page: Any) -> dict[str, dict[str, Any]]:
    """The page's parts by their ids."""
    components = page.config["components"]
    return {c["props"]["elem_id"]: c["props"] for c in components if c["props"].get("elem_id")}


def test_the_page_fits_the_model(predictor: Predictor) -> None:
    found = parts(build(predictor))
    assert [value for _, value in found["group"]["choices"]] == [0, 1, 2, "all"]
    assert (found["rule"]["value"], found["threshold"]["value"], found["threshold"]["visible"]) == (
        "threshold",
        0.5,
        True,
    )
    predictor.model.threshold = [0.3, 0.5, 0.5]
    predictor.model.class_names = tuple("abcdefg")
    page = build(predictor)
    found = parts(page)
    assert found["rule"]["value"] == "own"
    assert (found["threshold"]["value"], found["threshold"]["visible"]) == (0.5, False)
    assert "knows only 7 classes: a, b, c" in str(page.config)


def test_a_model_of_few_classes_names_them() -> None:
    names = [str(n) for n in range(40)]
    assert classes(names).endswith(f"knows only 40 classes: {', '.join(names)}.")
    assert classes([str(n) for n in range(1000)]) == classes(None) == ""
    fetches = classes(["![x](http://a/x.png)", "<img src=x>"])
    assert r"\!\[x\]\(http\:\/\/a\/x\.png\), \<img src\=x\>" in fetches


def test_every_use_of_the_model_waits_in_one_line(predictor: Predictor) -> None:
    page = build(predictor)
    queued = [fn for fn in page.fns.values() if fn.queue and "explain" in str(fn.fn)]
    assert [(fn.concurrency_limit, fn.concurrency_id) for fn in queued] == [(1, "model")]


def test_served(server: Server) -> None:
    with httpx.Client(base_url=server.address) as client:
        page = client.get("/").text
        assert "IA-RED²" in page
        assert "fonts.googleapis" not in page
        config = client.get("/config").json()
        assert config["analytics_enabled"] is False
        assert config["root"].endswith("/iared2")
        small, large = ({"files": ("a.jpg", b"0" * size)} for size in (1_000_000, 1_100_000))
        assert client.post("/gradio_api/upload", files=small).status_code == 200
        assert client.post("/gradio_api/upload", files=large).status_code == 413
        assert client.get(f"/gradio_api/file={examples()[0]}").status_code == 200
        weights = Path(examples()[0]).with_name("model.safetensors")
        assert weights.exists()
        for secret in (weights, ROOT / "pyproject.toml", "/etc/passwd"):
            assert client.get(f"/gradio_api/file={secret}").status_code == 403


@pytest.mark.parametrize(
    "file",
    [
        {"path": "http://example.org/a.png"},
        {"path": "https://127.0.0.1/a.png"},
        {"path": "a.png", "url": "http://example.org/a.png"},
    ],
)
@pytest.mark.parametrize("place", [0, 2])
def test_a_url_is_refused_and_never_looked_up(server: Server, file: dict[str, str], place: int) -> None:
    """`test_no_connection_leaves_this_machine` below sees whether it was."""
    data: list[Any] = [None, None, "center", 1, "threshold", 0.5, 50]
    data[place] = [{**file, "meta": {"_type": "gradio.FileData"}}]
    with httpx.Client(base_url=server.address, timeout=60) as client:
        functions = client.get("/config").json()["dependencies"]
        (explain_id,) = [f["id"] for f in functions if len(f["inputs"]) == 7]
        session = f"{file}{place}"
        join = {"data": data, "fn_index": explain_id, "session_hash": session}
        assert client.post("/gradio_api/queue/join", json=join).status_code == 200
        with client.stream("GET", "/gradio_api/queue/data", params={"session_hash": session}) as events:
            messages = [json.loads(line[6:]) for line in events.iter_lines() if line.startswith("data: ")]
    (answer,) = [message for message in messages if message["msg"] == "process_completed"]
    assert not answer["success"]
    assert "this page fetches nothing" in answer["output"]["error"]


def test_a_full_queue_refuses(server: Server) -> None:
    with httpx.Client(base_url=server.address) as client:
        functions = client.get("/config").json()["dependencies"]
        (explain_id,) = [f["id"] for f in functions if len(f["inputs"]) == 7]
        data = [None, None, "integrated-gradients", 1, "threshold", 0.5, 50]
        join = {"data": data, "fn_index": explain_id}
        codes = [
            client.post("/gradio_api/queue/join", json={**join, "session_hash": str(i)}).status_code
            for i in range(demo.MAX_WAITING + 20)
        ]
    assert codes[:5] == [200] * 5
    assert codes[-1] == 503


def test_no_connection_leaves_this_machine(server: Server) -> None:
    """Runs after the tests above have used the server."""
    hosts = {line.split()[1] for line in server.log().splitlines() if line.startswith("connection")}
    assert hosts == {"127.0.0.1"}


def test_ctrl_c_ends_it_and_nothing_is_left(server: Server) -> None:
    """The last test of the server. The kernel may give the signal to any thread, which interrupts no endless wait."""
    assert list((server.folder / "uploads").rglob("*.*"))
    pid = server.process.pid
    other = max(int(path.name) for path in Path(f"/proc/{pid}/task").iterdir())
    assert other != pid
    assert ctypes.CDLL(None).tgkill(pid, other, signal.SIGINT) == 0
    assert server.process.wait(60) == 130
    left = {path.name for path in (server.folder / "uploads").rglob("*.*")}
    assert left <= {Path(path).name for path in examples()}
    assert "Traceback" not in server.log()


def test_a_port_in_use(predictor: Predictor) -> None:
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = taken.getsockname()[1]
        with pytest.raises(InputError, match=rf"port {port} \(Address already in use\)") as caught:
            serve(build(predictor), "127.0.0.1", port)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    "options", [["--port", "0"], ["--port", "70000"], ["--max-file-size", "0"], ["-c", "gone"], ["--host", "192.0.2.1"]]
)
def test_the_command_on_bad_input(options: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["demo", *options]) == 1
    error = capsys.readouterr().err
    assert error.startswith("error: ")
    assert error.count("\n") == 1


def test_the_command_serves(monkeypatch: pytest.MonkeyPatch) -> None:
    asked = []
    monkeypatch.setattr(demo, "serve", lambda *args, **kwargs: asked.append((args[1:], kwargs)))
    assert main(["demo", "--host", "0.0.0.0", "--port", "80", "--root-path", "/x", "--max-file-size", "5"]) == 0
    assert asked == [((), {"host": "0.0.0.0", "port": 80, "root_path": "/x", "max_file_size": 5})]


def test_the_command_with_a_runtime(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], like_the_box: Path
) -> None:
    monkeypatch.setattr("iared2.export.served.exported", lambda model, engine, *args, **kwargs: engine)
    made = []
    monkeypatch.setattr(demo, "build", made.append)
    monkeypatch.setattr(demo, "serve", lambda *args, **kwargs: None)
    assert main(["demo", "-c", str(like_the_box), "--engine", "openvino"]) == 0
    assert made[0]._served == "openvino"
    monkeypatch.undo()
    monkeypatch.setitem(sys.modules, "onnxruntime", None)
    assert main(["demo", "-c", str(like_the_box), "--engine", "onnxruntime"]) == 1
    assert "needs the package onnxruntime" in capsys.readouterr().err


def test_without_gradio(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.setitem(sys.modules, "gradio", None)
    monkeypatch.delitem(sys.modules, "iared2.demo.page")
    assert main(["demo"]) == 1
    assert capsys.readouterr().err == (
        "error: the page needs the package gradio: run pip install '.[demo]' in your clone of iared2\n"
    )


def test_the_space_builds() -> None:
    page = runpy.run_path(str(ROOT / "space" / "app.py"))["page"]
    assert parts(page)["method"]["value"] == "interpreter"
    header = (ROOT / "space" / "README.md").read_text(encoding="utf-8").split("---\n")[1]
    settings = dict(line.split(": ", 1) for line in header.splitlines())
    assert settings["sdk"] == "gradio"
    assert (ROOT / "space" / settings["app_file"]).exists()
    floor = (ROOT / "pyproject.toml").read_text().split('"gradio>=')[1].split('"')[0]
    assert settings["sdk_version"].startswith(floor)
