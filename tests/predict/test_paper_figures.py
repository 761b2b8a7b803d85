"""`iared2 figure`: what a person types, and the file that comes of it."""

from __future__ import annotations

import importlib.util
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import skimage.data
from PIL import Image

from iared2 import cli
from iared2.predict import figure as paper_figures

CHEAP = ["-m", "attention", "interpreter"]
NUM_GROUPS = 4


@pytest.fixture
def main(like_the_box: Path) -> Callable[[list[str]], int]:
    """The command line; of a small model, unless a test names another."""
    return lambda argv: cli.main([*argv, *([] if "-c" in argv else ["-c", str(like_the_box)])])


@pytest.fixture
def photos(tmp_path: Path) -> Path:
    """A folder of two photos, one much taller than wide."""
    folder = tmp_path / "photos"
    folder.mkdir()
    Image.fromarray(skimage.data.chelsea()).save(folder / "cat.png")
    Image.fromarray(skimage.data.coffee()[:, :100]).save(folder / "tall.jpg")
    return folder


def read(file: Path) -> np.ndarray:
    return np.asarray(Image.open(file).convert("RGB")).astype(int)


@pytest.mark.parametrize("kind", ["png", "pdf"])
@pytest.mark.parametrize("figure", ["maps", "hierarchy"])
def test_one_command_makes_one_file(main, photos, tmp_path, capsys, figure, kind):
    file = tmp_path / "new" / f"figure.{kind}"
    assert main(["figure", figure, str(photos), "-o", str(file), *(CHEAP if figure == "maps" else [])]) == 0
    assert [path.name for path in file.parent.iterdir()] == [file.name]
    columns = ["photo", *(f"group {group + 1}" for group in range(NUM_GROUPS))]
    columns = ["photo", "raw attention", "ours"] if figure == "maps" else columns
    assert capsys.readouterr().out == f"{file}: 2 photos, {', '.join(columns)}\n"
    assert file.read_bytes().startswith(b"%PDF" if kind == "pdf" else b"\x89PNG")


def test_columns_show_what_they_say(main, photos, tmp_path):
    def figure(*options: str) -> np.ndarray:
        kind, *rest = options
        assert main(["figure", kind, str(photos / "cat.png"), "-o", str(tmp_path / "f.png"), *rest]) == 0
        return read(tmp_path / "f.png")

    width = 2100 // 3
    both, swapped = figure("maps", *CHEAP), figure("maps", "-m", "interpreter", "attention")
    blue = figure("maps", *CHEAP, "--colormap", "Blues")
    middle, right = np.s_[80:-5, width + 20 : 2 * width - 20], np.s_[80:-5, 2 * width + 20 : -20]
    assert np.abs(both[middle] - swapped[right][:, : both[middle].shape[1]]).mean() < 12
    assert np.abs(both[middle] - both[right][:, : both[middle].shape[1]]).mean() > 20
    assert np.abs(both[:, : width - 20] - swapped[:, : width - 20]).mean() == 0
    assert np.abs(both[right] - blue[right]).mean() > 20

    whole, none = figure("hierarchy", "-t", "0"), figure("hierarchy", "-t", "1")
    panel = 2100 // (NUM_GROUPS + 1)
    last = np.s_[150:-5, NUM_GROUPS * panel + 20 : -20]  # below the ratio
    assert (none[last] == 235).all()
    assert np.abs(whole[last] - whole[150:-5, 20 : panel - 20]).mean() < 25
    assert not np.array_equal(figure("hierarchy", "-t", "0", *"1" * (NUM_GROUPS - 1))[last], whole[last])


def test_memorability_is_left_out_and_said_so_where_it_is_not_installed(main, photos, tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    assert main(["figure", "maps", str(photos), "-o", str(tmp_path / "maps.png")]) == 0
    out, err = capsys.readouterr()
    assert err.startswith("left out: memorability needs the package resmem: run pip install '.[memorability]'")
    assert err.endswith("(489 MB)\n")
    assert out.endswith("2 photos, photo, raw attention, ours\n")


def test_a_bad_photo_is_named_and_the_others_are_drawn(main, photos, tmp_path, capsys):
    (photos / "bad.jpg").write_text("no photo")
    file = tmp_path / "figure.pdf"
    assert main(["figure", "hierarchy", str(photos), "-o", str(file)]) == 1
    out, err = capsys.readouterr()
    assert err.startswith(f"error: {photos / 'bad.jpg'}: not an image")
    assert err.count("\n") == 1
    assert out.startswith(f"{file}: 2 photos")

    assert main(["figure", "hierarchy", str(photos / "bad.jpg"), "-o", str(tmp_path / "none.png")]) == 1
    assert capsys.readouterr().err.endswith("error: none of the photos can be read\n")
    assert not (tmp_path / "none.png").exists()


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["-o", "figure.tiff"], "figure.tiff: give the name of a file that ends in .png or .pdf"),
        (["-o", "cat.png/figure.png"], "is a file, not a folder"),
        (["--colormap", "rainbows"], "unknown colour map 'rainbows'"),
        (["-t", "0.5", "0.4"], "one per group"),
        (["-c", "nowhere.safetensors"], "there is no checkpoint nowhere.safetensors"),
        (["--device", "cuda:99"], "device cuda:99 cannot be used here"),
        (["-m", "saliency"], "there is no method 'saliency': take one of interpreter"),
    ],
)
def test_what_is_wrong_is_one_line_and_nothing_is_written(main, photos, monkeypatch, capsys, options, message):
    monkeypatch.chdir(photos)
    assert main(["figure", "maps" if "-m" in options else "hierarchy", ".", "-o", "figure.png", *options]) == 1
    out, err = capsys.readouterr()
    assert message in err
    assert err.count("\n") == 1
    assert out == ""
    assert sorted(path.name for path in photos.iterdir()) == ["cat.png", "tall.jpg"]


def test_too_many_photos_for_one_picture_is_said(main, photos, monkeypatch, capsys):
    monkeypatch.setattr(paper_figures, "MAX_HEIGHT", 500)
    assert main(["figure", "hierarchy", str(photos), "-o", str(photos / "figure.png")]) == 1
    assert "2 photos are too many for one picture; write a .pdf" in capsys.readouterr().err
    assert main(["figure", "hierarchy", str(photos), "-o", str(photos / "figure.pdf")]) == 0
