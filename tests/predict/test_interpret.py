"""The command: where the files go, what is printed, and one clear line for whatever a person gets wrong."""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import skimage.data
import torch
from PIL import Image

import iared2
from iared2.cli import main
from iared2.predict import command, output
from iared2.predict.command import interpret
from iared2.predict.output import folder_names
from iared2.predict.photo import Interpretation, Predictor

ROOT = Path(__file__).parents[2]
RESULT_FILES = [path.name for path in Interpretation.files("")]


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    torch.manual_seed(0)
    size = {"img_size": 32, "patch_size": 8, "embed_dim": 48, "depth": 3, "num_heads": 3}
    path = tmp_path_factory.mktemp("checkpoint") / "model.safetensors"
    iared2.from_timm("deit_tiny_patch16_224", num_classes=7, **size).save(path)
    return path


@pytest.fixture(autouse=True)
def place(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A working folder with photos, one of them bad."""
    monkeypatch.chdir(tmp_path)
    Path("photos").mkdir()
    Image.fromarray(skimage.data.chelsea()).save("photos/cat.jpg")
    Image.fromarray(skimage.data.coffee()).save("photos/cat.png")
    Image.fromarray(skimage.data.astronaut()).save("photos/woman.png")
    Path("photos/bad.jpg").write_text("I am not a photo")
    return tmp_path


def results(folder: str) -> set[str]:
    """The sub-folders of results; each complete, and nothing else beside them."""
    folders = list(Path(folder).iterdir())
    for path in folders:
        assert {p.name for p in path.iterdir()} == set(RESULT_FILES)
    return {path.name for path in folders}


def test_one_photo(checkpoint: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["interpret", "-p", "photos/woman.png", "-o", "out", "-c", str(checkpoint)]) == 0
    assert {p.name for p in Path("out").iterdir()} == set(RESULT_FILES)
    found = json.loads(Path("out/result.json").read_text())
    assert found["photo"]["file"] == "photos/woman.png"
    assert found["model"]["checkpoint"] == str(checkpoint)
    expected = Predictor(iared2.load(checkpoint))("photos/woman.png")
    assert [group["kept"] for group in found["groups"]] == expected.kept.tolist()

    printed, errors = capsys.readouterr()
    assert errors == ""
    lines = printed.splitlines()
    assert len(lines) == 5
    (name, p), (dense, q) = expected.top5[0], Predictor(iared2.load(checkpoint))("photos/woman.png", 0.0).top5[0]
    assert lines[0] == f"photos/woman.png: {name} {100 * p:.1f} % (with every patch: {dense} {100 * q:.1f} %)"
    assert found["dense_top5"][0] == {"class": dense, "probability": round(q, 6)}
    assert " > ".join(["1.00", *(f"{r:.2f}" for r in expected.keep_ratio)]) + " of 16" in lines[1]
    macs, dense = expected.macs, expected.dense_macs
    assert f"{macs / 1e6:.2f} of {dense / 1e6:.2f} M ({100 * (macs / dense - 1):+.1f} %)" in lines[2]
    assert lines[3].endswith(" ms")
    assert all(f"out/{file}" in lines[4] for file in RESULT_FILES)


@pytest.mark.parametrize(
    ("patterns", "expected"),
    [
        (["photos/woman.png", "photos/cat.jpg"], {"woman", "cat"}),
        (["photos/*.png"], {"woman", "cat"}),
        (["photos/wo*"], {"woman"}),
        (["photos/*.png", "photos/cat.jpg"], {"woman", "cat.png", "cat.jpg"}),
    ],
)
def test_several_photos(checkpoint: Path, patterns: list[str], expected: set[str]) -> None:
    assert main(["interpret", "-p", *patterns, "-o", "out", "-c", str(checkpoint)]) == 0
    assert results("out") == expected


@pytest.mark.parametrize("pattern", ["photos", "photos/*"])
def test_one_bad_photo_among_others(checkpoint: Path, capsys: pytest.CaptureFixture[str], pattern: str) -> None:
    assert main(["interpret", "-p", pattern, "-o", "out", "-c", str(checkpoint)]) == 1
    assert results("out") == {"woman", "cat.png", "cat.jpg"}
    named, count = capsys.readouterr().err.splitlines()
    assert named.startswith("error: photos/bad.jpg: not an image")
    assert count == "error: 1 of 4 photos failed"


def test_a_missing_photo_among_others(checkpoint: Path, capsys: pytest.CaptureFixture[str]) -> None:
    patterns = ["photos/woman.png", "missing.jpg"]
    assert main(["interpret", "-p", *patterns, "-o", "out", "-c", str(checkpoint)]) == 1
    assert results("out") == {"woman"}
    assert "error: missing.jpg: no such file" in capsys.readouterr().err


def test_options_reach_the_result(checkpoint: Path) -> None:
    options = ["-t", "0.1", "0.5", "0.6", "-g", "1", "--colormap", "viridis", "--device", "cpu"]
    assert main(["interpret", "-p", "photos/woman.png", "-o", "out", "-c", str(checkpoint), *options]) == 0
    model = iared2.load(checkpoint)
    model.threshold = [0.1, 0.5, 0.6]
    expected = Predictor(model)("photos/woman.png")
    with Image.open("out/interpret-result.png") as figure:
        assert np.array_equal(figure, expected.figure(0, "viridis"))
        assert not np.array_equal(figure, expected.figure(1, "viridis"))
    found = json.loads(Path("out/result.json").read_text())
    assert [group["threshold"] for group in found["groups"]] == [0.1, 0.5, 0.6]
    assert [group["kept"] for group in found["groups"]] == expected.kept.tolist()


def test_another_image_size(checkpoint: Path, capsys: pytest.CaptureFixture[str]) -> None:
    command = ["interpret", "-p", "photos/cat.png", "-c", str(checkpoint), "--json"]
    assert main([*command, "-o", "own"]) == 0
    own = json.loads(capsys.readouterr().out)
    side = 2 * own["grid_size"][0] * iared2.load(checkpoint).backbone.patch_embed.patch_size[0]
    assert main([*command, "-o", "large", "--image-size", str(side)]) == 0
    large = json.loads(capsys.readouterr().out)
    assert large["grid_size"] == [2 * own["grid_size"][0]] * 2
    assert large["dense_macs"] > 4 * own["dense_macs"]
    assert main([*command, "-o", "bad", "--image-size", str(side), "7"]) == 1
    assert "give one side, or height and width, in multiples of the patch" in capsys.readouterr().err
    assert not Path("bad").exists()


def test_a_second_pass_is_told(checkpoint: Path, capsys: pytest.CaptureFixture[str]) -> None:
    command = ["interpret", "-p", "photos/cat.png", "-c", str(checkpoint)]
    assert main([*command, "-o", "one"]) == 0
    assert "second pass" not in capsys.readouterr().out
    assert main([*command, "-o", "two", "--confidence", "1"]) == 0
    assert "second pass   with every patch" in capsys.readouterr().out
    one, two = (json.loads(Path(folder, "result.json").read_text()) for folder in ("one", "two"))
    assert (one["second_pass"], two["second_pass"], two["model"]["confidence"]) == (False, True, 1.0)
    assert one["groups"] == two["groups"]
    for confidence, said in ((0.0, "patches:"), (1.0, "patches, not sure, then with every patch:")):
        model = iared2.load(checkpoint)
        model.confidence = confidence
        (words,) = iared2.Predictor(model)("photos/cat.png")._words()
        assert words.startswith(f"with the kept {said}"), "what the pictures say"
    assert two["macs"] > two["dense_macs"] > one["macs"]
    for found, dense in zip(two["top5"], two["dense_top5"], strict=True):
        assert found["class"] == dense["class"]
        assert found["probability"] == pytest.approx(dense["probability"], abs=1e-4)


def test_what_stays_is_spread_and_the_map_is_as_it_was(checkpoint: Path) -> None:
    assert main(["interpret", "-p", "photos/cat.png", "-o", "plain", "-c", str(checkpoint), "-g", "1"]) == 0
    assert main(["interpret", "-p", "photos/cat.png", "-o", "s", "-c", str(checkpoint), "-g", "1", "--spread=1"]) == 0
    plain, spread = (json.loads(Path(folder, "result.json").read_text()) for folder in ("plain", "s"))
    (before, *_), (after, *_) = plain["groups"], spread["groups"]
    assert after["scores"] == before["scores"]
    assert after["keep_ratio"] == pytest.approx(0.5, abs=0.13), "scores at birth are near 0.5"
    assert after["kept"] != before["kept"]
    assert (plain["model"].get("spread"), spread["model"]["spread"]) == (None, 1.0)
    maps = [Image.open(Path(folder, "interpret-result.png")).crop((0, 0, 600, 400)) for folder in ("s", "plain")]
    assert maps[0] == maps[1]


def keys(value: object, path: str = "") -> set[str]:
    """The paths of all numbers, texts and lists of them in a JSON value."""
    if isinstance(value, dict):
        return set().union(*(keys(one, f"{path}.{key}".lstrip(".")) for key, one in value.items()))
    if isinstance(value, list) and value and isinstance(value[0], dict):
        return keys(value[0], f"{path}[]")
    return {path}


def test_the_file_is_legible_and_every_key_is_documented(checkpoint: Path) -> None:
    command = ["interpret", "-p", "photos/woman.png", "-o", "out", "-c", str(checkpoint)]
    main([*command, "--spread", "1", "--confidence", "0.1", "--scale", "0.7"])
    text = Path("out/result.json").read_text()
    assert '\n  "macs": ' in text
    assert max(map(len, text.splitlines())) < 400, "16 scores in a line"
    assert len(text.splitlines()) < 120
    documented = {
        name.strip().strip("`")
        for line in (ROOT / "docs" / "interpret.md").read_text(encoding="utf-8").splitlines()
        if line.startswith("| `")
        for name in line.split("|")[1].split(",")
    }
    assert keys({k: v for k, v in json.loads(text).items() if k not in ("dense_top5", "versions")}) == documented - {
        "dense_top5[]",
        "versions",
        "method",  # only with another --method
    }


def test_the_map_is_of_the_last_group_or_of_the_second_of_three(checkpoint: Path, like_the_box: Path) -> None:
    for file, group in ((checkpoint, 1), (like_the_box, 3)):
        result = Predictor(iared2.load(file))("photos/cat.png")
        assert np.array_equal(result.heatmap(), result.heatmap(group))
        small = iared2.heatmap(iared2.load(file), Predictor(iared2.load(file)).prepare(result.photo))
        assert torch.equal(
            small, iared2.heatmap(iared2.load(file), Predictor(iared2.load(file)).prepare(result.photo), group=group)
        )
        assert not np.array_equal(result.heatmap(), result.heatmap(0))


def test_a_small_photo_is_enlarged_in_both_pictures(checkpoint: Path) -> None:
    Image.fromarray(skimage.data.coffee()).resize((60, 40)).save("small.png")
    assert main(["interpret", "-p", "small.png", "-o", "out", "-c", str(checkpoint)]) == 0
    for name in RESULT_FILES[:2]:
        with Image.open(Path("out", name)) as picture:
            assert picture.width > 256
            assert picture.height > 200
    assert json.loads(Path("out/result.json").read_text())["photo"]["width"] == 60


def test_a_budget_has_no_second_passes_on_top_of_it(checkpoint: Path) -> None:
    model = iared2.load(checkpoint)
    model.confidence = 1.0
    model.save("twice.safetensors")
    assert interpret(["photos/woman.png"], "out", checkpoint="twice.safetensors") == 0
    assert json.loads(Path("out/result.json").read_text())["second_pass"]
    assert interpret(["photos/woman.png"], "out", checkpoint="twice.safetensors", budget=0.6) == 0
    found = json.loads(Path("out/result.json").read_text())
    assert not found["second_pass"]
    assert found["macs"] < 0.7 * found["dense_macs"]  # of few photos and patches, in steps


def test_one_threshold_is_for_all_groups(checkpoint: Path) -> None:
    assert interpret(["photos/woman.png"], "out", checkpoint=checkpoint, threshold=0.0) == 0
    groups = json.loads(Path("out/result.json").read_text())["groups"]
    assert [(group["threshold"], group["keep_ratio"]) for group in groups] == [(0.0, 1.0)] * 3


BAD_ARGUMENTS = {
    "spread": (["--spread", "wide"], "argument --spread: invalid float value: 'wide'"),
    "a confidence above 1": (["--confidence", "2"], "confidence=2.0: give a number from 0 to 1"),
    "spread below 0": (["--spread=-1"], "spread=-1.0: give a finite number, 0 or more"),
    "threshold nan": (["-t", "nan"], "one per group"),
    "threshold text": (["-t", "half"], "argument -t/--threshold: 'half': give numbers"),
    "two thresholds": (["-t", "0.5", "0.5"], "one per group"),
    "group 0": (["-g", "0"], "no group 0; the model has groups 1 to 3"),
    "group 4": (["-g", "4"], "no group 4"),
    "group text": (["-g", "second"], "argument -g/--group: invalid int value: 'second'"),
    "colour map": (["--colormap", "rainbows"], "unknown colour map 'rainbows'"),
    "device": (["--device", "gpu"], "device gpu cannot be used here"),
    "checkpoint": (["-c", "missing.safetensors"], "missing.safetensors"),
    "checkpoint that is none": (["-c", "photos/bad.jpg"], "photos/bad.jpg"),
    "missing photo": (["-p", "missing.jpg"], "missing.jpg: no such file"),
    "bad photo": (["-p", "photos/bad.jpg"], "photos/bad.jpg: not an image"),
    "empty glob": (["-p", "*.jpg"], "*.jpg: no photo there"),
    "empty folder": (["-p", "empty"], "empty: no photo there"),
    "budget": (["--budget", "1.5"], "--budget 1.5: give a share above 0 and up to 1"),
    "budget too small": (["--budget", "0.001"], "cannot be met"),
    "budget and threshold": (["--budget", "0.5", "-t", "0.5"], "and no --threshold"),
    "budget and confidence": (["--budget", "0.5", "--confidence", "0.1"], "leave out --confidence"),
    "method": (["--method", "magic"], "invalid choice: 'magic'"),
    "json": (["--json", "/no/such/folder/a.json"], "in a folder that is there"),
    "json is the photo": (["--json", "photos/woman.png"], "is read, and a result would replace it"),
    "output is a file": (["-o", "photos/bad.jpg"], "is a file, not a folder"),
    "output in a file": (["-o", "photos/bad.jpg/out"], "is a file, not a folder"),
    "unwritable output": (["-o", "/proc/out"], "/proc/out: cannot be written"),
}


@pytest.mark.parametrize(("options", "message"), BAD_ARGUMENTS.values(), ids=BAD_ARGUMENTS)
def test_bad_arguments(checkpoint: Path, capsys: pytest.CaptureFixture[str], options: list[str], message: str) -> None:
    Path("empty").mkdir()
    arguments = {"-p": "photos/woman.png", "-o": "out", "-c": str(checkpoint)}
    arguments = [part for option in arguments.items() if option[0] not in options for part in option]
    assert main(["interpret", *arguments, *options]) == 1
    printed, errors = capsys.readouterr()
    assert printed == ""
    assert errors.startswith("error: ")
    assert errors.count("\n") == 1
    assert message in errors
    assert not Path("out").exists()


@pytest.mark.parametrize("wrong", ["output", "colormap", "device"])
def test_found_before_any_work(monkeypatch: pytest.MonkeyPatch, wrong: str) -> None:
    def work(*_: object) -> None:
        raise AssertionError("the model was loaded")

    monkeypatch.setattr(command, "load", work)
    arguments = {"output": "out", "colormap": "jet", "device": "cpu"}
    bad = {"output": "photos/bad.jpg", "colormap": "rainbows", "device": "gpu"}
    with pytest.raises(iared2.InputError):
        interpret(["photos/woman.png"], **arguments | {wrong: bad[wrong]})


def test_unwritable_output(checkpoint: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*_: object, **__: object) -> None:
        raise PermissionError(13, "Permission denied")

    monkeypatch.setattr(output.tempfile, "TemporaryFile", refuse)  # root may write everywhere
    with pytest.raises(iared2.InputError, match="out: cannot be written"):
        interpret(["photos/woman.png"], "out", checkpoint=checkpoint)


def test_folder_names() -> None:
    photos = ["a.jpg", "b.jpg", "x/a.png", "y/A.PNG", "b.jpg.png", "...png", "c.d.jpg"]
    assert folder_names([Path(p) for p in photos]) == ["a.jpg", "b", "a.png", "A.PNG-2", "b.jpg", "...png", "c.d"]
    assert folder_names([Path("x/a.jpg"), Path("y/a.jpg"), Path("a.jpg-2.png")]) == ["a.jpg", "a.jpg-2", "a.jpg-2-2"]


def test_the_script(checkpoint: Path, place: Path) -> None:
    """`python interpreter.py -p IMAGE -o DIR`, as people run it."""
    shutil.copy("photos/woman.png", "photo with a space.png")
    script = [sys.executable, str(ROOT / "interpreter.py"), "-c", str(checkpoint)]
    done = subprocess.run([*script, "-p", "photo with a space.png", "-o", "out"], capture_output=True, text=True)
    assert (done.returncode, done.stderr) == (0, "")
    assert done.stdout.startswith("photo with a space.png: ")
    assert {p.name for p in Path("out").iterdir()} == set(RESULT_FILES)


@pytest.mark.parametrize(
    "photos",
    [
        ["out/result.json"],
        ["out/interpret-result.png"],
        ["link.png"],
        ["photos/woman.png", "photos/cat.jpg", "out/woman/hierarchy.png"],
    ],
)
def test_a_photo_named_like_a_result_is_not_replaced(
    checkpoint: Path, capsys: pytest.CaptureFixture[str], photos: list[str]
) -> None:
    Path("out/woman").mkdir(parents=True)
    for name in ("result.json", "interpret-result.png", "hierarchy.png", "woman/hierarchy.png"):
        Image.new("RGB", (20, 30), "red").save(Path("out", name), "PNG")
    Path("link.png").symlink_to("out/hierarchy.png")
    before = {path: path.read_bytes() for path in Path("out").rglob("*.*")}
    assert main(["interpret", "-p", *photos, "-o", "out", "-c", str(checkpoint)]) == 1
    printed, errors = capsys.readouterr()
    assert (printed, errors.count("\n")) == ("", 1)
    assert "is read, and a result would replace it; choose another output" in errors
    assert {path: path.read_bytes() for path in Path("out").rglob("*.*")} == before
    with pytest.raises(iared2.InputError, match="is read"):
        Predictor(iared2.load(checkpoint))("out/result.json").save("out")
    assert main(["figure", "hierarchy", "photos/cat.png", "-o", "photos/cat.png", "-c", str(checkpoint)]) == 1
    assert "photos/cat.png: is read" in capsys.readouterr().err
    with Image.open("photos/cat.png") as photo:
        assert photo.size == (600, 400)


def test_names_cannot_command_the_terminal(
    checkpoint: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """ESC ]0; sets a terminal's title, and U+202E shows what follows from right to left."""
    evil = "\x1b]0;owned\x07\n\u202egpj"
    model = iared2.load(checkpoint)
    model.class_names = tuple(f"{evil}{i}" for i in range(7))
    model.save("evil.safetensors")
    shutil.copy("photos/woman.png", f"{evil}.png")
    Path(f"{evil}.jpg").write_text("no photo")
    options = ["-o", f"out{evil}", "-c", "evil.safetensors"]
    assert main(["interpret", "-p", f"{evil}.png", *options]) == 0
    assert main(["interpret", "-p", f"{evil}.png", f"{evil}.jpg", *options]) == 1
    assert main(["interpret", "-p", f"{evil}.jpg", *options]) == 1
    assert (
        main(["figure", "hierarchy", f"{evil}.png", f"{evil}.jpg", "-o", f"{evil}.pdf", "-c", "evil.safetensors"]) == 1
    )
    printed, errors = capsys.readouterr()
    assert len(printed.splitlines()) == 11
    assert len(errors.splitlines()) == 4
    for text in (*printed.splitlines(), *errors.splitlines()):
        assert text.isprintable()
    assert r"\x1b]0;owned\x07\n\u202egpj.png" in printed
    assert r"\x1b]0;owned\x07\n\u202egpj.jpg: not an image" in errors


def test_json_is_standard_where_a_model_computes_nonsense(checkpoint: Path) -> None:
    def refuse(name: str) -> None:
        raise AssertionError(f"{name} is no JSON")

    model = iared2.load(checkpoint)
    with torch.no_grad():
        model.get_classifier().bias.fill_(torch.nan)
        model.interpreters[2].query.weight.fill_(torch.nan)
    Predictor(model)("photos/woman.png").save("out")
    result = json.loads(Path("out/result.json").read_text(), parse_constant=refuse)
    assert [top["probability"] for top in result["top5"]] == [None] * 5
    assert result["groups"][2]["scores"][0] is None or not result["groups"][1]["kept"][0]
