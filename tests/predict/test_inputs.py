"""What a predictor takes: models by name, lists, bytes, file objects, addresses, folders, HEIC."""

from __future__ import annotations

import functools
import http.server
import io
import threading
import urllib.request
from pathlib import Path

import numpy as np
import pytest
import skimage.data
import torch
from PIL import Image

import iared2
from iared2 import InputError, Predictor
from iared2.cli import main
from iared2.data import photo as reading

CAT = Image.fromarray(skimage.data.chelsea())
COFFEE = Image.fromarray(skimage.data.coffee())


@pytest.fixture
def predictor() -> Predictor:
    torch.manual_seed(0)
    size = {"img_size": (48, 32), "patch_size": 8, "embed_dim": 48, "depth": 6, "num_heads": 3}
    return Predictor(iared2.from_timm("deit_tiny_patch16_224", num_classes=7, **size))


@pytest.fixture
def png() -> bytes:
    file = io.BytesIO()
    CAT.save(file, "PNG")
    return file.getvalue()


def same(a: iared2.Interpretation, b: iared2.Interpretation) -> bool:
    return np.array_equal(a.scores, b.scores) and np.array_equal(a.photo, b.photo)


class TestModels:
    def test_none_is_the_box(self):
        predictor = Predictor()
        assert predictor.model.class_names == iared2.load().class_names
        assert same(predictor(CAT), Predictor(iared2.load())(CAT))

    def test_a_file_or_folder_is_loaded_and_named(self, predictor, tmp_path):
        predictor.model.save(tmp_path / "model.safetensors")
        for source in (tmp_path, str(tmp_path / "model.safetensors")):
            loaded = Predictor(source)
            assert same(loaded(CAT), predictor(CAT))
            assert loaded(CAT).model["checkpoint"] == str(source)

    def test_a_name_of_the_hub_is_loaded(self, predictor, tmp_path, monkeypatch):
        snapshot = tmp_path / "models--user--model" / "snapshots" / ("0" * 40)
        predictor.model.save_pretrained(snapshot)
        (snapshot.parents[1] / "refs").mkdir()
        (snapshot.parents[1] / "refs" / "main").write_text("0" * 40)
        monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path))
        monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
        assert same(Predictor("user/model")(CAT), predictor(CAT))

    def test_that_are_not_there_are_refused(self, tmp_path):
        with pytest.raises(InputError, match="no checkpoint"):
            Predictor(tmp_path / "none.safetensors")

    @pytest.mark.parametrize("engine", ["openVINO", "", None])
    def test_run_in_an_engine_that_there_is(self, predictor, engine):
        with pytest.raises(InputError, match="should be one of torch, openvino, onnxruntime"):
            Predictor(predictor.model, engine=engine)
        with pytest.raises(InputError, match="should be one of torch, openvino, onnxruntime"):
            iared2.BatchPredictor(predictor.model, engine=engine)

    def test_of_timm_are_refused_with_what_to_do(self, predictor):
        with pytest.raises(InputError, match=r"a VisionTransformer drops no patches: give iared2\.from_timm\(model\)"):
            Predictor(predictor.model.backbone)


class TestLists:
    def test_are_one_batch(self, predictor, monkeypatch):
        batches = []
        trace = predictor.model.trace
        monkeypatch.setattr(predictor.model, "trace", lambda x, decide: batches.append(len(x)) or trace(x, decide))
        predictor(CAT)  # a warm-up
        batches.clear()
        results = predictor([CAT, COFFEE, np.asarray(CAT)])
        assert batches == [3]
        for result, photo in zip(results, (CAT, COFFEE, CAT), strict=True):
            single = predictor(photo)
            np.testing.assert_allclose(result.scores, single.scores, atol=1e-5)
            assert np.array_equal(result.kept, single.kept)
            assert result.macs == single.macs
            assert dict(result.top5) == pytest.approx(dict(single.top5), abs=1e-5)
            assert np.array_equal(result.photo, single.photo)

    def test_keep_the_order_and_the_names(self, predictor, tmp_path):
        files = [tmp_path / "b.png", tmp_path / "a.png"]
        for file, photo in zip(files, (CAT, COFFEE), strict=True):
            photo.save(file)
        assert [result.file for result in predictor(tuple(files))] == [str(file) for file in files]

    def test_take_one_threshold_and_may_be_empty(self, predictor):
        assert [r.keep_ratio.tolist() for r in predictor([CAT, COFFEE], 0)] == [[1, 1, 1]] * 2
        assert predictor([]) == []

    def test_name_the_member_that_cannot_be_read(self, predictor, tmp_path):
        with pytest.raises(InputError, match=r"none\.png: no such file"):
            predictor([CAT, tmp_path / "none.png"])


class TestBytesAndFileObjects:
    def test_give_the_same_as_a_file(self, predictor, png, tmp_path):
        (tmp_path / "cat.png").write_bytes(png)
        expected = predictor(tmp_path / "cat.png")
        assert expected.photo.size == CAT.size
        with (tmp_path / "cat.png").open("rb") as file:
            for photo in (png, bytearray(png), memoryview(png), io.BytesIO(png), file):
                assert same(predictor(photo), expected)

    def test_of_a_file_are_not_overwritten(self, predictor, png, tmp_path):
        (tmp_path / "hierarchy.png").write_bytes(png)
        with (tmp_path / "hierarchy.png").open("rb") as file:
            result = predictor(file)
        with pytest.raises(InputError, match="a result would replace it"):
            result.save(tmp_path)

    @pytest.mark.parametrize("data", [b"", b"no photo", b"\x89PNG\r\n\x1a\n" + bytes(40)])
    def test_that_are_no_photo_are_refused(self, predictor, data):
        with pytest.raises(InputError, match=r"the photo: (not an image|the image is cut short)"):
            predictor(data)
        with pytest.raises(InputError, match=r"the file object: (not an image|the image is cut short)"):
            predictor(io.BytesIO(data))

    def test_that_cannot_be_read_are_refused(self, predictor, png, monkeypatch):
        with pytest.raises(InputError, match="in binary mode"):
            predictor(io.StringIO("text"))
        closed = io.BytesIO(png)
        closed.close()
        with pytest.raises(InputError, match="cannot be read"):
            predictor(closed)
        monkeypatch.setattr("iared2.predict.photo.MAX_BYTES", len(png) - 1)
        with pytest.raises(InputError, match="has more than"):
            predictor(io.BytesIO(png))

    @pytest.mark.parametrize("photo", [None, 3, [[CAT]], {"a": 1}, np.zeros((3, 3))])
    def test_nothing_else_is_a_photo(self, predictor, photo):
        with pytest.raises(InputError, match="is no photo: give a file or its bytes"):
            predictor(photo)


class TestAddresses:
    @pytest.fixture
    def address(self, png, tmp_path):
        (tmp_path / "cat.png").write_bytes(png)
        (tmp_path / "page.html").write_text("<html>")

        class Quiet(http.server.SimpleHTTPRequestHandler):
            def log_message(self, *args):
                pass

        server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), functools.partial(Quiet, directory=tmp_path))
        thread = threading.Thread(target=server.serve_forever)
        thread.start()
        yield f"http://127.0.0.1:{server.server_port}"
        server.shutdown()
        thread.join()
        server.server_close()

    def test_are_read_only_when_asked_for(self, predictor, address, monkeypatch):
        monkeypatch.setattr(urllib.request, "urlopen", None)  # nobody calls it
        with pytest.raises(InputError, match="allow_urls=True"):
            predictor(f"{address}/cat.png")

    def test_give_the_same_as_the_file(self, predictor, address, png):
        predictor.allow_urls = True
        result = predictor(f"{address}/cat.png")
        assert same(result, predictor(png))
        assert result.file == f"{address}/cat.png"

    @pytest.mark.parametrize("name", ["none.png", "page.html"])
    def test_without_a_photo_are_refused(self, predictor, address, name):
        predictor.allow_urls = True
        with pytest.raises(InputError, match=f"{name}: (cannot be downloaded|not an image)"):
            predictor(f"{address}/{name}")

    def test_of_no_server_or_no_form_are_refused(self, predictor):
        predictor.allow_urls = True
        for address in ("http://127.0.0.1:1/a.png", "http://", "https://[", "http://a b/"):
            with pytest.raises(InputError, match="cannot be downloaded"):
                predictor(address)

    def test_of_other_kinds_are_paths(self, predictor, tmp_path):
        predictor.allow_urls = True
        CAT.save(tmp_path / "cat.png")
        with pytest.raises(InputError, match="no such file"):
            predictor(f"file://{tmp_path}/cat.png")


class TestFolders:
    @pytest.fixture
    def folder(self, tmp_path) -> Path:
        for name in ("a.png", "sub/b.png", "sub/deep/c.png", ".hidden/d.png", "sub/.e.png"):
            (tmp_path / "in" / name).parent.mkdir(parents=True, exist_ok=True)
            CAT.resize((60, 40)).save(tmp_path / "in" / name)
        (tmp_path / "in" / "sub" / "up").symlink_to(tmp_path / "in")  # a circle
        return tmp_path / "in"

    def names(self, results) -> list[str]:
        return [Path(result.file).name for result in results]

    def test_are_searched_below_on_request(self, predictor, folder):
        assert self.names(predictor.folder(folder)) == ["a.png"]
        assert self.names(predictor.folder(str(folder), recursive=True)) == ["a.png", "b.png", "c.png"]

    def test_leave_out_what_cannot_be_read(self, predictor, folder):
        (folder / "b.png").write_bytes(b"no photo")
        with pytest.warns(UserWarning, match=r"left out: .*b\.png: not an image"):
            assert self.names(predictor.folder(folder)) == ["a.png"]

    def test_are_no_photo(self, predictor, folder, tmp_path):
        with pytest.raises(InputError, match=r"a folder; Predictor\.folder\(\)"):
            predictor(folder)
        (tmp_path / "empty").mkdir()
        with pytest.raises(InputError, match="no photo there"):
            next(predictor.folder(tmp_path / "empty", recursive=True))

    def test_are_searched_below_by_the_command(self, predictor, folder, tmp_path, capsys):
        predictor.model.save(tmp_path / "model.safetensors")
        command = ["interpret", "-c", str(tmp_path / "model.safetensors"), "-p", str(folder), "-o"]
        assert main([*command, str(tmp_path / "flat")]) == 0
        assert main([*command, str(tmp_path / "deep"), "--recursive"]) == 0
        assert [path.name for path in (tmp_path / "flat").iterdir()] == ["a"]
        assert sorted(path.name for path in (tmp_path / "deep").iterdir()) == ["a", "b", "c"]


class TestHeic:
    def test_is_read_where_the_plug_in_is_installed(self, predictor, tmp_path):
        heif = pytest.importorskip("pillow_heif")
        heif.register_heif_opener()
        CAT.save(tmp_path / "a.heic", quality=95)
        photo = predictor(tmp_path / "a.heic").photo
        assert np.abs(np.asarray(photo, float) - np.asarray(CAT, float)).mean() < 4
        assert ".heic" in reading.photo_suffixes()

    def test_says_what_is_missing_where_it_is_not(self, predictor, monkeypatch):
        monkeypatch.setattr(Image, "OPEN", {k: v for k, v in Image.OPEN.items() if k != "HEIF"})
        with pytest.raises(InputError, match=r"pip install '.\[heic\]'"):
            predictor(b"\0\0\0\x18ftypheic" + bytes(100))
