"""`iared2 predict`: every photo is one row, whatever happens to the processes that write them."""

from __future__ import annotations

import json
import os
import random
import signal
import subprocess
import sys
import time
import zipfile
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from exported import changed
from pictures import jpeg, write_parquet, write_shard
from tiny import sharp_model

import iared2
from iared2 import BatchPredictor
from iared2.cli import main
from iared2.data.unlabelled import open_photos
from iared2.export.stages import export_stages

SIZE = {"img_size": 16, "patch_size": 4, "embed_dim": 48, "depth": 3, "num_heads": 3}
NUM = 10


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> str:
    path = tmp_path_factory.mktemp("checkpoint") / "model.safetensors"
    sharp_model(("deit_tiny_patch16_224", SIZE), num_classes=7).save(path)
    return str(path)


@pytest.fixture(autouse=True)
def place(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A working folder with ten photos, one of them bad."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    for name in ("RANK", "WORLD_SIZE", "LOCAL_RANK"):
        monkeypatch.delenv(name, raising=False)
    Path("photos").mkdir()
    for number in range(NUM):
        Path(f"photos/{number}.jpg").write_bytes(b"I am not a photo" if number == 6 else jpeg(number, 20))


@pytest.fixture
def predict(checkpoint: str):
    """Runs the command on the folder."""

    def run(output: str, *options: str, photos: Sequence[str] = ("photos",)) -> int:
        sizes = ["--batch-size", "3", "--shard-size", "4", "--workers", "0", "--device", "cpu"]
        return main(["predict", *photos, "-o", output, "-c", checkpoint, *sizes, *options])

    return run


def content(output: str | Path) -> dict[str, bytes]:
    return {file.name: file.read_bytes() for file in sorted(Path(output).iterdir())}


def test_every_photo_is_a_row(predict, checkpoint, capsys):
    assert predict("out", "--embedding", "--scores") == 0
    names = [f"photos-{unit:05d}-of-00003.parquet" for unit in range(3)]
    assert list(content("out")) == ["_predict.json", *names]
    assert [pq.read_metadata(f"out/{name}").num_rows for name in names] == [4, 4, 2]
    table = pq.read_table("out")
    assert table["photo"].to_pylist() == [f"photos/{number}.jpg" for number in range(NUM)]
    bad = "not an image that can be read here; convert it to JPEG or PNG"
    assert table["error"].to_pylist() == [None] * 6 + [bad] + [None] * 3
    rows = []  # by the same batches, since their sizes round differently
    expected = BatchPredictor(checkpoint, "cpu", embedding=True, scores=True)
    for first, last in ((0, 3), (3, 4), (4, 7), (7, 8), (8, 10)):
        rows += expected({"image": [Path(f"photos/{i}.jpg").read_bytes() for i in range(first, last)]}).to_pylist()
    assert table.drop_columns("photo").to_pylist() == rows
    printed, errors = capsys.readouterr()
    assert errors == ""
    assert printed == (
        "10 of 10 photos are in out/photos-*.parquet; 1 of this process could not be read, see the column error\n"
    )


@pytest.mark.parametrize("kind", ["tar", "parquet", "files"])
def test_other_sources_have_the_same_rows(predict, kind):
    cells = [Path(f"photos/{number}.jpg").read_bytes() for number in range(NUM)]
    source, names = ["set"], [f"photos/{number}.jpg" for number in range(NUM)]
    if kind == "tar":
        names = [f"set/s.tar/{number}.jpg" for number in range(NUM)]
        write_shard(Path("set/s.tar"), {f"{number}.jpg": cell for number, cell in enumerate(cells)})
    elif kind == "parquet":
        names = [f"set/a.parquet/{row}" for row in range(7)] + [f"set/b.parquet/{row}" for row in range(3)]
        write_parquet(Path("set/a.parquet"), [0] * 7, images=cells[:7])
        write_parquet(Path("set/b.parquet"), [0] * 3, images=cells[7:])
    else:
        source = names
    assert predict("folder") == 0
    assert predict("out", photos=source) == 0
    found, expected = pq.read_table("out"), pq.read_table("folder")
    assert found["photo"].to_pylist() == names
    assert found.drop_columns("photo").equals(expected.drop_columns("photo"))


@pytest.mark.filterwarnings("ignore:.isinstance.treespec, LeafSpec:FutureWarning", "ignore:The given buffer is not")
@pytest.mark.parametrize("engine", ["openvino", "onnxruntime"])
def test_a_runtime_writes_the_same_rows(predict, checkpoint, engine, capsys):
    pytest.importorskip(engine, reason=f"{engine} is missing: pip install 'iared2[test]'")
    model = iared2.load(checkpoint)
    model.dropped, model.spread = "merged", 0.5
    model.save("merged.safetensors")
    for number, output in enumerate(("torch", engine)):
        assert predict(output, "-c", "merged.safetensors", "--scores", "--engine", output) == 0
        if number:
            assert json.loads(Path(output, "_predict.json").read_text())["engine"] == engine
    expected, found = (pq.read_table(output).to_pylist() for output in ("torch", engine))
    assert len({str(row["kept"]) for row in expected if row["kept"]}) > 3, "counts differ between photos"
    for row, other in zip(found, expected, strict=True):
        assert [row[name] for name in ("photo", "kept", "macs", "error")] == [
            other[name] for name in ("photo", "kept", "macs", "error")
        ]
        if row["error"] is None:
            for name in ("class", "index", "probability"):
                values, others = ([best[name] for best in r["top5"]] for r in (row, other))
                assert values == (pytest.approx(others, abs=1e-5) if name == "probability" else others)
            np.testing.assert_allclose(row["scores"], other["scores"], atol=1e-3)
    assert predict("torch", "-c", "merged.safetensors", "--scores", "--engine", engine) == 1
    assert "another run, with other engine" in capsys.readouterr().err


@pytest.mark.filterwarnings("ignore:.isinstance.treespec, LeafSpec:FutureWarning", "ignore:The given buffer is not")
def test_an_exported_file_takes_the_place_of_the_model(predict, checkpoint, capsys):
    """Its rows are those of the model that was exported; no weights are read, and nothing is exported again."""
    pytest.importorskip("onnxruntime", reason="onnxruntime is missing: pip install 'iared2[test]'")
    engine = ["--engine", "onnxruntime", "--scores"]
    model = iared2.load(checkpoint)
    model.threshold, model.class_names = (0.0, 0.5, 0.5), tuple("abcdefg")
    model.save("named.safetensors")
    assert main(["export", "m.zip", "-c", "named.safetensors", "--adaptive-batch"]) == 0
    assert predict("one", "-c", "named.safetensors", *engine) == 0
    assert predict("two", "-c", "m.zip", *engine) == 0
    assert pq.read_table("two").equals(pq.read_table("one"))
    one, two = (json.loads(Path(folder, "_predict.json").read_text()) for folder in ("one", "two"))
    assert {name for name in one if one[name] != two[name]} == {"model"}
    os.rename("m.zip", "weights.bin")  # known by its content
    assert predict("two", "-c", "weights.bin", *engine) == 0, "the same run"
    assert predict("three", "-c", "weights.bin", *engine, "--threshold", "0") == 0
    assert {str(row["kept"]) for row in pq.read_table("three").to_pylist()} == {"[16, 16, 16]", "None"}
    capsys.readouterr()
    for options, message in (
        (["--engine", "torch"], "is exported: it runs in openvino or onnxruntime"),
        ([*engine, "--image-size", "32"], "at its own size"),
        ([*engine, "--threshold", "0.9"], "group 1 drops patches by this decision"),
    ):
        assert predict("four", "-c", "weights.bin", *options) == 1
        (line,) = capsys.readouterr().err.splitlines()
        assert message in line
    assert not Path("four").exists()


@pytest.mark.filterwarnings("ignore:.isinstance.treespec, LeafSpec:FutureWarning", "ignore:The given buffer is not")
def test_the_description_in_an_exported_file_is_not_trusted(predict, checkpoint, capsys):
    pytest.importorskip("onnxruntime", reason="onnxruntime is missing: pip install 'iared2[test]'")
    export_stages(iared2.load(checkpoint), "m.zip")
    with zipfile.ZipFile("m.zip") as file:
        config = json.loads(file.read("manifest.json"))["model"]
    args = config["model_args"]
    for other, message in (
        (None, "no timm name"),
        ([], "there is no configuration"),
        ({}, "is missing"),
        ({**config, "pretrained_cfg": {**config["pretrained_cfg"], "mean": [9.0, 9.0, 9.0]}}, "(mean)"),
        ({**config, "architecture": "/etc/passwd"}, "timm has no model"),
        ({**config, "model_args": {**args, "embed_dim": "48"}}, "model_args.embed_dim"),
        ({**config, "model_args": {**args, "depth": 100_000}}, "blocks are more than"),
        ({**config, "model_args": {**args, "img_size": 32}}, "another model than its graphs are (input_size)"),
        ({**config, "groups": 2, "threshold": 0.5}, "another model than its graphs are (num_groups)"),
        ({**config, "class_names": ["only one"]}, "class names for 7 classes"),
        ({**config, "class_names": list("abcdefg")}, "another model than its graphs are (class_names)"),
        ({**config, "threshold": 0.1}, "another model than its graphs are (thresholds)"),
        ({**config, "dropped": "merged"}, "another model than its graphs are (merges)"),
        ({**config, "model_args": {**args, "embed_dim": 96}}, "another model than its graphs are (embed_dim)"),
    ):
        changed("m.zip", "other.zip", manifest={"model": other})
        assert predict("out", "-c", "other.zip", "--engine", "onnxruntime") == 1
        (line,) = capsys.readouterr().err.splitlines()
        assert message in line
        assert "export" in line
    assert not Path("out").exists()
    changed("m.zip", "other.zip", manifest={"model": {**config, "model_args": {**args, "num_classes": 1 << 24}}})
    assert predict("out", "-c", "other.zip", "--engine", "onnxruntime") == 1
    assert "has 7 outputs, and 16777216 were expected" in capsys.readouterr().err
    assert main(["interpret", "-p", "photos/0.jpg", "-o", "out", "-c", "m.zip"]) == 1
    assert "m.zip is exported: give it to iared2.runtime.Engine" in capsys.readouterr().err


def test_what_a_runtime_does_not_have_is_one_line(predict, capsys):
    for options in (["--embedding"], ["--device", "cuda"]):
        assert predict("out", "--engine", "onnxruntime", *options) == 1
        (line,) = capsys.readouterr().err.splitlines()
        assert "the engine onnxruntime has no embeddings and runs on the CPU" in line
    assert not Path("out").exists()


def test_what_is_there_is_not_written_again(predict):
    assert predict("out") == 0
    whole, first = content("out"), Path("out/photos-00000-of-00003.parquet")
    written = first.stat().st_mtime_ns
    Path("out/photos-00001-of-00003.parquet").unlink()
    Path("out/.iared2-left").mkdir()
    Path("out/.iared2-left/photos-00001-of-00003.parquet").write_bytes(b"half")
    assert predict("out") == 0
    assert content("out") == whole, "and what a killed process has left is gone"
    assert first.stat().st_mtime_ns == written


@pytest.mark.parametrize("batch", range(5))
def test_a_failure_anywhere_leaves_whole_files(predict, monkeypatch, batch):
    assert predict("whole") == 0
    before, left = BatchPredictor.predict, [batch]

    def fail(*args):
        left[0] -= 1
        if left[0] < 0:
            raise RuntimeError("the machine is gone")
        return before(*args)

    with monkeypatch.context() as patch:
        patch.setattr(BatchPredictor, "predict", fail)
        with pytest.raises(RuntimeError, match="gone"):
            predict("out")
    there, whole = content("out"), content("whole")
    assert len(there) == 1 + batch // 2
    assert there.items() <= whole.items()
    assert predict("out") == 0
    assert content("out") == whole


def test_processes_share_the_files(predict, monkeypatch, capsys):
    assert predict("whole") == 0
    monkeypatch.setenv("WORLD_SIZE", "2")
    for rank, count in ((1, 4), (0, 10)):
        monkeypatch.setenv("RANK", str(rank))
        capsys.readouterr()
        assert predict("out") == 0
        assert capsys.readouterr().out.startswith(f"{count} of 10 photos are in out/")
    assert content("out") == content("whole")


@pytest.mark.parametrize(("rank", "world_size"), [("2", "2"), ("-1", "2"), ("0", "zero"), ("0", "0")])
def test_odd_ranks_are_refused(predict, monkeypatch, capsys, rank, world_size):
    monkeypatch.setenv("RANK", rank)
    monkeypatch.setenv("WORLD_SIZE", world_size)
    assert predict("out") == 1
    assert capsys.readouterr().err == (
        f"error: RANK={rank}, WORLD_SIZE={world_size}, LOCAL_RANK={rank}: set them as torchrun does\n"
    )


@pytest.mark.parametrize(
    ("options", "other"),
    [
        (["--scores"], "scores"),
        (["--embedding"], "embedding"),
        (["-t", "0.4"], "decision"),
        (["--batch-size", "2"], "batch_size"),
        (["--shard-size", "5"], "shard_size"),
        (["-c", "box"], "model"),
    ],
)
def test_another_run_is_refused(predict, capsys, options, other):
    assert predict("out") == 0
    before = content("out")
    assert predict("out", *options) == 1
    error = capsys.readouterr().err
    assert error.startswith("error: out: has another run, with other ")
    assert error.endswith("; choose another output\n")
    assert other in error
    assert content("out") == before


def test_changed_photos_are_another_run(predict, capsys):
    assert predict("out") == 0
    assert predict("out", photos=["photos/0.jpg"]) == 1
    message = "error: out: has another run, with other {}; choose another output\n"
    assert capsys.readouterr().err == message.format("num_photos, photos")
    os.rename("photos/0.jpg", "photos/00.jpg")
    assert predict("out") == 1
    assert capsys.readouterr().err == message.format("photos")
    assert predict("out", photos=["missing"]) == 1
    assert capsys.readouterr().err.startswith("error: missing: no such file or folder; give photos, a folder")


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--batch-size", "0"], "--batch-size must be from 1 to 65,536"),
        (["--shard-size", "0"], "--shard-size must be from 1 to 1,048,576"),
        (["--workers", "-1"], "--workers must be from 0 to 256"),
        (["-t", "nan"], "threshold=[nan]: give a finite number, or one per group"),
        (["-o", "photos"], "photos: photos are read from there; choose another output"),
        (["-o", "photos/0.jpg"], "photos/0.jpg: photos/0.jpg is a file, not a folder; choose another output"),
        (["-o", "full"], "full/x.parquet: a Parquet file of something else; choose another output"),
        (["-o", "bad"], "bad/_predict.json: cannot be read"),
        (["-c", "photos/0.jpg"], "photos/0.jpg"),
    ],
)
def test_wrong_use_is_one_line_and_writes_nothing(predict, capsys, options, message):
    for name in ("full/x.parquet", "bad/_predict.json"):
        Path(name).parent.mkdir()
        Path(name).write_bytes(b"[1")
    before = sorted(Path().rglob("*"))
    assert predict("out", *options) == 1
    error = capsys.readouterr().err
    assert error.startswith(f"error: {message}")
    assert error.count("\n") == 1
    assert sorted(Path().rglob("*")) == before


def test_a_model_of_clips_is_refused(predict, tmp_path, capsys):
    size = {"img_size": (4, 16, 16), "patch_size": (1, 8, 8), "embed_dim": 24, "depth": 3, "num_heads": 3}
    clips = iared2.from_timm("timesformer_joint_base_patch16_224", **size)
    clips.save(tmp_path / "clips.safetensors")
    assert predict("out", "-c", "clips.safetensors") == 1
    assert capsys.readouterr().err == "error: the model takes videos, not photos; give it to VideoPredictor\n"


def test_the_run_is_described(predict, checkpoint):
    assert predict("out", "-t", "0.4") == 0
    found = json.loads(Path("out/_predict.json").read_text())
    assert found["num_photos"] == NUM
    assert found["photos"] == open_photos(["photos"]).digest()
    assert found["decision"].startswith("Decision(thresholds=(0.4, 0.4, 0.4)")
    assert found["dense_macs"] == iared2.load(checkpoint).dense_macs


def command(checkpoint: str, photos: str, output: str, *options: str) -> list[str]:
    return ["-m", "iared2.cli", "predict", photos, "-o", output, "-c", checkpoint, "--device", "cpu", *options]


@pytest.mark.slow
def test_two_processes_that_are_killed_end_with_the_same_files():
    """SIGKILL of both at five random moments, with workers that read; then `torchrun` goes on."""
    cells = [jpeg(number, 64) for number in range(800)]
    pq.write_table(pa.table({"image": pa.array(cells, pa.binary())}), "many.parquet", row_group_size=350)
    sizes = ["--shard-size", "20", "--batch-size", "16", "--scores"]
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    quiet = {"stdout": subprocess.DEVNULL, "stderr": subprocess.DEVNULL}
    once = [sys.executable, *command("box", "many.parquet", "whole", *sizes, "--workers", "0")]
    subprocess.run(once, env=environment, check=True, **quiet)
    rest = command("box", "many.parquet", "out", *sizes, "--workers", "1")
    whole, draw = content("whole"), random.Random(0)
    for attempt in range(5):
        there = len(list(Path("out").glob("*.parquet")))
        ranks = [{**environment, "WORLD_SIZE": "2", "RANK": str(rank)} for rank in range(2)]
        running = [subprocess.Popen([sys.executable, *rest], env=rank, **quiet) for rank in ranks]
        while running[0].poll() is None and len(list(Path("out").glob("*.parquet"))) <= there:
            time.sleep(0.01)
        time.sleep(draw.uniform(0, 0.1))
        for process in running:
            process.send_signal(signal.SIGKILL)
            process.wait()
        files = {file.name: file.read_bytes() for file in Path("out").glob("*.*") if file.is_file()}
        assert files.items() <= whole.items(), "no file is half written"
        assert attempt or len(files) < len(whole), "killed before the end"
    torchrun = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]
    subprocess.run([*torchrun, *rest], env=environment, check=True, **quiet)
    assert content("out") == whole
    assert pq.read_table("out")["photo"].to_pylist() == [f"many.parquet/{row}" for row in range(800)]


@pytest.mark.slow
@pytest.mark.skipif(sys.platform != "linux", reason="units of ru_maxrss")
def test_memory_does_not_grow_with_the_photos(checkpoint):
    peaks = []
    for number in (2000, 20000):
        cells = [jpeg(row % 500, 20) for row in range(number)]
        pq.write_table(pa.table({"image": pa.array(cells, pa.binary())}), f"{number}.parquet", row_group_size=1000)
        arguments = command(checkpoint, f"{number}.parquet", f"out-{number}", "--shard-size", "1000", "--workers", "1")
        process = subprocess.Popen([sys.executable, *arguments], stdout=subprocess.DEVNULL)
        _, status, usage = os.wait4(process.pid, 0)
        process.returncode = os.waitstatus_to_exitcode(status)
        assert process.returncode == 0
        peaks.append(usage.ru_maxrss)
    assert peaks[1] < 1.1 * peaks[0]
