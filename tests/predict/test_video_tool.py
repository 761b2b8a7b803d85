"""A video in, Figure 3 out: what is drawn is what the model kept, and files are whole or not there."""

from __future__ import annotations

import io
import json
import os
from pathlib import Path

import av
import numpy as np
import pytest
import torch
from made import numbered, write_video
from PIL import Image

import iared2
import iared2.model.video_transformer  # registers the video models with timm
from iared2 import InputError, Predictor, ReducedVisionTransformer
from iared2.cli import main
from iared2.data.batches import model_transform
from iared2.data.clips import open_video
from iared2.explain.figures import BLANK
from iared2.predict import video_figures as figures
from iared2.predict.result import RESULT
from iared2.predict.video import ClipInterpretation, VideoPredictor

FILES = {*ClipInterpretation.PICTURES, RESULT}
SIZE = {"patch_size": 8, "embed_dim": 48, "depth": 3, "num_heads": 3, "num_classes": 7}


def video_model(frames: int = 4, tubelet: int = 1) -> ReducedVisionTransformer:
    torch.manual_seed(0)
    size = {**SIZE, "img_size": (frames, 32, 24), "patch_size": (tubelet, 8, 8)}
    return iared2.from_timm("timesformer_joint_small_patch16_224", **size).eval()


@pytest.fixture(scope="module")
def checkpoints(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    folder = tmp_path_factory.mktemp("checkpoints")
    paths = {kind: folder / f"{kind}.safetensors" for kind in ("videos", "photos")}
    video_model().save(paths["videos"])
    iared2.from_timm("deit_tiny_patch16_224", img_size=32, **SIZE).save(paths["photos"])
    return paths


@pytest.fixture
def clip(tmp_path: Path) -> Path:
    noise = [np.random.default_rng(i).integers(0, 255, (48, 80, 3), np.uint8) for i in range(20)]
    return write_video(tmp_path / "clip.mp4", noise, rate=5)


@pytest.fixture
def planted(monkeypatch: pytest.MonkeyPatch, clip: Path) -> ClipInterpretation:
    """Of moment t (two frames) group g keeps the first t + 7 − 3g patches, and later moments score higher."""
    model = video_model(8, 2)
    n = torch.arange(12).repeat(4)
    limit = torch.arange(4).repeat_interleave(12) + 7

    def score(packed: object, group: int) -> torch.Tensor:
        return torch.where(n < limit - 3 * group, 0.6 + n / 100, 0.1) * packed.alive  # type: ignore[attr-defined]

    monkeypatch.setattr(model, "score", score)
    return VideoPredictor(model)(clip)


def test_agrees_with_the_model(clip: Path) -> None:
    model = video_model()
    advanced: list[int] = []
    result = VideoPredictor(model)(clip, advance=advanced.append)
    assert advanced == [1] * 4
    assert result.indices.tolist() == [2, 7, 12, 17]
    assert result.times == pytest.approx([0.4, 1.4, 2.4, 3.4])
    frames = open_video(clip).read(result.indices)
    for shown, frame in zip(result.frames, frames, strict=True):
        assert np.array_equal(shown, frame)
    with torch.no_grad():
        output = model.trace(model_transform(model.pretrained_cfg)(frames)[None])
    assert np.array_equal(result.scores, output.scores[:, 0])
    assert np.array_equal(result.kept, output.kept[:, 0])
    assert result.macs == output.macs[0]
    assert result.dense_macs == model.dense_macs
    assert result.top5[0][0] == str(int(output.logits.argmax()))  # and not a class of ImageNet
    assert VideoPredictor(model)(clip, 0.0).keep_ratio.tolist() == [1, 1, 1]
    with pytest.raises(InputError, match="one per group"):
        VideoPredictor(model)(clip, [0.5, 0.5])


def test_ratios_are_of_each_frame(planted: ClipInterpretation) -> None:
    kept = planted.kept_in_frames
    assert kept.shape == (3, 8, 4, 3)
    assert kept.sum((2, 3)).tolist() == [[7 - 3 * g + t // 2 for t in range(8)] for g in range(3)]
    groups = planted.to_dict()["groups"]
    assert [g["keep_ratio_of_frames"] for g in groups] == (kept.mean((2, 3))).tolist()


def test_what_is_blank_was_dropped(planted: ClipInterpretation) -> None:
    figure = np.asarray(planted.frames_figure())
    width, height, gap = 160, 96, 8  # 80 × 48 by a whole factor
    assert figure.shape == (4 * (height + gap) - gap, 8 * (width + gap) - gap, 3)
    for g, group in enumerate(planted.kept_in_frames, start=1):
        for t, kept in enumerate(group):
            panel = figure[g * (height + gap) :, t * (width + gap) :][:height, :width]
            for (row, column), is_kept in np.ndenumerate(kept):
                if (row, column) != (0, 0):  # there the ratio stands
                    patch = panel[row * 24 : (row + 1) * 24, column * 53 + 1 : column * 53 + 53]
                    assert (patch == BLANK).all() == (not is_kept)


def test_heat_maps_compare_the_frames(planted: ClipInterpretation) -> None:
    heat = planted.heatmap()
    assert heat.shape == (8, 48, 80)
    highest = heat.max((1, 2))
    assert np.array_equal(heat[0], heat[1])  # of one tubelet
    assert (np.diff(highest[::2]) > 0).all()  # not each normalised by itself
    assert highest[-1] > 0.95
    assert not np.array_equal(planted.heatmap(0), heat)
    with pytest.raises(InputError, match="no group 3"):
        planted.heatmap(3)
    one = planted.heatmap_figure()
    assert one.width > planted.frames_figure().width  # the colour bar
    assert not np.array_equal(one, planted.heatmap_figure(0, "viridis"))


@pytest.mark.parametrize("size", [(80, 48), (33, 47), (1, 9)])
@pytest.mark.parametrize("codec", [None, "mpeg4"])
def test_animations(size: tuple[int, int], codec: str | None, monkeypatch: pytest.MonkeyPatch) -> None:
    if codec:
        monkeypatch.setattr(figures, "mp4_codec", lambda: codec)
    frames = [Image.fromarray(numbered(i * 37, *size)) for i in range(4)]
    kept = np.random.default_rng(0).random((4, 4, 3)) < 0.5
    pictures = figures.animation(frames, np.arange(4.0), kept)
    assert len({picture.size for picture in pictures}) == 1
    with Image.open(io.BytesIO(figures.gif(pictures, 0.25))) as gif:
        assert (gif.n_frames, gif.size, gif.info["duration"]) == (4, pictures[0].size, 250)
        for i, picture in enumerate(pictures):
            gif.seek(i)
            assert np.abs(np.asarray(gif.convert("RGB"), float) - np.asarray(picture, float)).mean() < 6
    with av.open(io.BytesIO(figures.mp4(pictures, 0.25))) as mp4:
        stream = mp4.streams.video[0]
        assert (stream.width - pictures[0].width, stream.height - pictures[0].height) in [
            (a, b) for a in (0, 1) for b in (0, 1)
        ]
        assert (stream.codec_context.name, stream.pix_fmt) == ("mpeg4" if codec else "h264", "yuv420p")
        played = list(mp4.decode(video=0))
    assert [frame.time for frame in played] == pytest.approx([0, 0.25, 0.5, 0.75])
    for frame, picture in zip(played, pictures, strict=True):
        close = np.asarray(frame.to_image().crop((0, 0, *picture.size)), float)
        assert np.abs(close - np.asarray(picture, float)).mean() < 6


@pytest.mark.parametrize(
    ("times", "seconds"), [([0, 0.04, 0.08], 0.2), ([0, 0.3], 0.3), ([0, 9], 0.5), ([0], 0.5), ([0, 0], 0.2)]
)
def test_pace(times: list[float], seconds: float) -> None:
    assert figures.pace(np.array(times)) == pytest.approx(seconds)


def test_many_frames_are_small() -> None:
    frames = [Image.new("RGB", (640, 360))] * 32
    figure = figures.frames_figure(frames, np.arange(32.0), np.ones((1, 32, 2, 2), bool))
    assert figure.width == 32 * (128 + 8) - 8


def test_the_command(
    checkpoints: dict[str, Path], clip: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "out"
    arguments = ["-c", str(checkpoints["videos"]), "-t", "0.4", "0.5", "0.6", "-g", "1", "--colormap", "viridis"]
    assert main(["interpret", "-p", str(clip), "-o", str(out), *arguments]) == 0
    assert {path.name for path in out.iterdir()} == FILES
    found = json.loads((out / RESULT).read_text())
    assert found["video"] == {"file": str(clip), "width": 80, "height": 48, "rotation": 0, "frames": 20, "seconds": 4.0}
    assert [frame["index"] for frame in found["frames"]] == [2, 7, 12, 17]
    assert [frame["seconds"] for frame in found["frames"]] == pytest.approx([0.4, 1.4, 2.4, 3.4])
    assert found["animation"] == {"codec": figures.mp4_codec(), "seconds_of_a_frame": 0.5}
    assert found["grid_size"] == [4, 4, 3]
    assert found["model"]["input_size"] == [4, 32, 24]
    assert found["versions"].keys() == {"iared2", "torch", "timm", "av", "python"}
    model = iared2.load(checkpoints["videos"])
    expected = VideoPredictor(model)(clip, [0.4, 0.5, 0.6])
    assert [group["kept"] for group in found["groups"]] == expected.kept.tolist()
    with Image.open(out / "heatmap.png") as figure:
        assert np.array_equal(figure, expected.heatmap_figure(0, "viridis"))
    with Image.open(out / "frames.png") as figure:
        assert np.array_equal(figure, expected.frames_figure())
    printed, errors = capsys.readouterr()
    assert errors == ""
    assert len(printed.splitlines()) == 5
    assert all(str(out / name) in printed for name in FILES)


def test_several_videos(
    checkpoints: dict[str, Path], clip: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    folder = tmp_path / "videos"
    folder.mkdir()
    clip.rename(folder / "good.mp4")
    (folder / "bad.mp4").write_text("no video")
    (folder / "photo.jpg").touch()  # is not of the videos in the folder
    out = tmp_path / "out"
    assert main(["interpret", "-p", str(folder), "-o", str(out), "-c", str(checkpoints["videos"])]) == 1
    assert {path.name for path in out.iterdir()} == {"good"}
    assert {path.name for path in (out / "good").iterdir()} == FILES
    named, count = capsys.readouterr().err.splitlines()
    assert named.startswith(f"error: {folder / 'bad.mp4'}: not a video")
    assert count == "error: 1 of 2 videos failed"


def test_a_model_for_the_other_kind(
    checkpoints: dict[str, Path], clip: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    Image.new("RGB", (40, 40)).save(tmp_path / "photo.jpg")
    for file, model, message in (
        (clip, ["-c", str(checkpoints["photos"])], "a video, and this model takes photos; give a video model with -c"),
        (clip, [], "a video, and this model takes photos; give a video model with -c"),
        (tmp_path / "photo.jpg", ["-c", str(checkpoints["videos"])], "a photo, and a video is needed"),
    ):
        assert main(["interpret", "-p", str(file), "-o", str(tmp_path / "out"), *model]) == 1
        error = capsys.readouterr().err
        assert error.startswith(f"error: {file}: {message}")
        assert error.count("\n") == 1
    assert not (tmp_path / "out").exists()
    with pytest.raises(InputError, match="give it to VideoPredictor"):
        Predictor(video_model())
    with pytest.raises(InputError, match="give it to Predictor"):
        VideoPredictor(iared2.load(checkpoints["photos"]))


def test_a_failed_save_leaves_what_was_there(
    planted: ClipInterpretation, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = tmp_path / "out"
    planted.save(folder)
    before = {path.name: path.read_bytes() for path in folder.iterdir()}
    assert before.keys() == FILES

    def full(*_: object, **__: object) -> None:
        raise OSError(28, os.strerror(28))

    monkeypatch.setattr(Path, "write_text", full)
    with pytest.raises(InputError, match="No space left"):
        planted.save(folder, group=0)
    assert {path.name: path.read_bytes() for path in folder.iterdir()} == before


def test_one_frame_and_a_turned_one(checkpoints: dict[str, Path], tmp_path: Path) -> None:
    predictor = VideoPredictor(iared2.load(checkpoints["videos"]))
    one = predictor(write_video(tmp_path / "one.mp4", 1))
    assert one.indices.tolist() == [0] * 4
    one.save(tmp_path / "one")
    turned = predictor(write_video(tmp_path / "turned.mp4", 5, rotation=90))
    assert turned.frames[0].size == (48, 80)
    assert turned.heatmap().shape == (4, 80, 48)
    turned.save(tmp_path / "turned")


def test_large_frames_are_kept_small(checkpoints: dict[str, Path], tmp_path: Path) -> None:
    result = VideoPredictor(iared2.load(checkpoints["videos"]))(write_video(tmp_path / "a.mp4", 4, size=(1280, 720)))
    assert {frame.size for frame in result.frames} == {(640, 360)}
    assert (result.video.width, result.video.height) == (1280, 720)


def test_a_real_video(data_dir: Path, checkpoints: dict[str, Path], tmp_path: Path) -> None:
    video = data_dir / "video-smoke" / "flipping_a_pancake.mkv"
    assert main(["interpret", "-p", str(video), "-o", str(tmp_path), "-c", str(checkpoints["videos"])]) == 0
    assert {path.name for path in tmp_path.iterdir()} == FILES
    assert json.loads((tmp_path / RESULT).read_text())["video"]["frames"] == 310
