"""Labelled videos in folders and lists; clips by place and at random; transforms that change a clip as a whole."""

from __future__ import annotations

import itertools
import json
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from made import number_of, numbered, write_video
from PIL import Image
from torch import Tensor

import iared2
from iared2 import InputError
from iared2.cli import main
from iared2.data.batches import Batch, eval_batches, model_transform, train_batches
from iared2.data.images import DataConfig
from iared2.data.videos import ClipConfig, VideoSamples, open_videos, train_transform, views_transform
from iared2.evaluate import command
from iared2.measure import measure, trace
from iared2.model.reduced import Output
from iared2.train.augment import AugmentConfig

CFG = {"input_size": (3, 4, 24, 24), "mean": (0.5,) * 3, "std": (0.5,) * 3, "interpolation": "bilinear"}
CLASSES = "fall", "rise"


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Two classes of three videos each, of 40 numbered frames at 10 a second."""
    root = tmp_path_factory.mktemp("videos")
    for name in CLASSES:
        (root / name).mkdir()
        for i in range(3):
            write_video(root / name / f"{name}{i}.mp4", 40)
    return root


def taken(samples: VideoSamples, index: int) -> list[int]:
    return [number_of(frame) for frame in samples[index][0]]


def test_a_folder_of_classes(made: Path) -> None:
    samples = open_videos(DataConfig(path=str(made)), "eval", 4, whole=True)
    assert samples.class_names == CLASSES
    assert len(samples) == 6
    assert samples.labels.tolist() == [0, 0, 0, 1, 1, 1]
    assert samples.name(4) == str(made / "rise" / "rise1.mp4")
    frames, label = samples[4]
    assert label == 1
    assert all(isinstance(frame, Image.Image) and frame.size == (80, 48) for frame in frames)
    assert taken(samples, 4) == [5, 15, 25, 35]


def test_folders_in_class_folders(made: Path, tmp_path: Path) -> None:
    """And GIFs, which are videos in a folder of videos; hidden folders and what is no video are left out."""
    for name in ("rise/left/old/a.mp4", "fall/a.mp4", ".hidden/a.mp4"):
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_bytes((made / "rise" / "rise0.mp4").read_bytes())
    frames = [Image.fromarray(numbered(i, 80, 48)) for i in range(8)]
    frames[0].save(tmp_path / "fall" / "b.gif", save_all=True, append_images=frames[1:], duration=100)
    (tmp_path / "fall" / "cover.jpg").touch()
    with pytest.warns(UserWarning, match="no videos to be read here are left out: 1 .jpg"):
        samples = open_videos(DataConfig(path=str(tmp_path)), "train", 4)
    assert [Path(samples.name(i)).name for i in range(3)] == ["a.mp4", "b.gif", "a.mp4"]
    assert samples.class_names == ("fall", "rise")
    assert samples.labels.tolist() == [0, 0, 1]
    assert taken(replace(samples, is_random=False), 1) == [1, 3, 5, 7]


def test_numbers_in_a_list_have_an_end(made: Path, tmp_path: Path) -> None:
    (tmp_path / "list.csv").write_text("fall/fall0.mp4,0\nrise/rise0.mp4,1000000000\n")
    with pytest.raises(InputError, match=r"list\.csv, row 2 has the label 1000000000; labels must be in 0…65535"):
        open_videos(DataConfig(path=str(tmp_path / "list.csv")), "train", 4, ClipConfig(root=str(made)))


def test_splits_classes_and_holdout_are_those_of_images(made: Path, tmp_path: Path) -> None:
    for split in ("train", "val"):
        (tmp_path / split).symlink_to(made)
    config = DataConfig(path=str(tmp_path), classes=("rise", "fall"), holdout=0.5)
    train, held, evaluation = (open_videos(config, split, 4) for split in ("train", "holdout", "eval"))
    assert len(train) + len(held) == len(evaluation) == 6
    assert train.class_names == ("rise", "fall")
    assert (train.is_random, held.is_random, evaluation.is_random) == (True, False, False)
    with pytest.raises(InputError, match="did you mean 'rise'"):
        open_videos(DataConfig(path=str(tmp_path), classes=("rice",)), "train", 4)


@pytest.mark.parametrize("header", ["path,label\n", "", "\ufeffpath,label\n", "\ufeff"])
def test_a_list(made: Path, tmp_path: Path, header: str) -> None:
    rows = [f"rise/rise0.mp4,up\n{made}/fall/fall0.mp4,down\n", "rise/rise1.mp4,7\nfall/fall1.mp4,0\n"]
    for text, names, labels in zip(rows, (("down", "up"), tuple("01234567")), ([1, 0], [7, 0]), strict=True):
        (tmp_path / "list.csv").write_text(header + text, encoding="utf-8")
        config = DataConfig(path=str(tmp_path / "list.csv"))
        samples = open_videos(config, "train", 2, ClipConfig(root=str(made)))
        assert samples.class_names == names
        assert samples.labels.tolist() == labels
        assert len(samples[0][0]) == 2
    with pytest.raises(InputError, match=r"list\.csv, row \d: there is no file .*; correct the list, or set its root"):
        open_videos(config, "train", 2)


def test_a_folder_of_lists(made: Path) -> None:
    for split, i in (("train", 0), ("validate", 1)):
        (made / f"{split}.csv").write_text(f"label,path\nup,rise/rise{i}.mp4\ndown,fall/fall{i}.mp4\n")
    try:
        config = DataConfig(path=str(made))
        assert Path(open_videos(config, "train", 2).name(0)).name == "rise0.mp4"
        assert Path(open_videos(config, "eval", 2).name(1)).name == "fall1.mp4"
    finally:
        for split in ("train", "validate"):
            (made / f"{split}.csv").unlink()


def test_lists_of_kinetics(tmp_path: Path) -> None:
    """The names that its downloaders give, where they put them; what is gone is left out, and said."""
    for name in ("train/rock climbing/a_000003_000013.mp4", "train/b_000000_000010.mp4", "c.mp4", "test/e.mp4"):
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).touch()
    (tmp_path / "k.csv").write_text(
        "label,youtube_id,time_start,time_end,split\nrock climbing,a,3,13,train\nyoga,b,0,10,train\n"
        "yoga,c,1,11,train\nyoga,gone,1,11,train\nyoga,c,1,11,validate\n,e,0,10,test\n"
    )
    config = DataConfig(path=str(tmp_path / "k.csv"))
    with pytest.warns(UserWarning, match=r"k\.csv: 1 of 4 videos are not there"):
        samples = open_videos(config, "train", 4)
    assert samples.class_names == ("rock climbing", "yoga")
    assert samples.labels.tolist() == [0, 1, 1]
    assert [Path(samples.name(i)).name for i in range(3)] == ["a_000003_000013.mp4", "b_000000_000010.mp4", "c.mp4"]
    with pytest.warns(UserWarning, match="not there"):
        evaluation = open_videos(config, "eval", 4)
    assert evaluation.labels.tolist() == [1]  # the number of the training split, though it is the only class here
    with pytest.raises(InputError, match=r"row 7: no label"):
        open_videos(DataConfig(path=config.path, eval_split="test"), "eval", 4)
    with pytest.raises(InputError, match="none of its videos is there"):
        open_videos(config, "train", 4, ClipConfig(root=str(tmp_path / "elsewhere")))


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("", "no rows"),
        ("path,label\n", "no rows"),
        ("file,label\na.mp4,b\n", "give columns path,label"),
        ("a.mp4\n", "give columns path,label"),
        (b"\xff\xfe\x00", "not a list of videos"),
    ],
)
def test_lists_that_are_none(tmp_path: Path, content: str | bytes, message: str) -> None:
    path = tmp_path / "list.csv"
    path.write_bytes(content.encode() if isinstance(content, str) else content)
    with pytest.raises(InputError, match=message) as caught:
        open_videos(DataConfig(path=str(path)), "train", 4)
    assert str(path) in str(caught.value)


def test_folders_that_are_none(tmp_path: Path) -> None:
    for path, message in (
        ("", "give --data"),
        (str(tmp_path / "x"), "no such file"),
        (str(tmp_path), "no videos there"),
    ):
        with pytest.raises(InputError, match=message):
            open_videos(DataConfig(path=path), "train", 4)
    for clips in (ClipConfig(span=-1), ClipConfig(test_clips=0)):
        with pytest.raises(InputError, match="clips: "):
            open_videos(DataConfig(path=str(tmp_path)), "train", 4, clips)


def test_clips_at_test(made: Path) -> None:
    config = DataConfig(path=str(made))
    three = open_videos(config, "eval", 4, ClipConfig(span=2, test_clips=2), whole=True)
    assert taken(three, 0) == [7, 12, 17, 22, 17, 22, 27, 32]
    whole = open_videos(config, "eval", 4, ClipConfig(test_clips=2), whole=True)
    assert taken(whole, 0) == [2, 12, 22, 32, 7, 17, 27, 37]


def test_random_clips(made: Path) -> None:
    config = DataConfig(path=str(made))
    torch.manual_seed(0)
    places = {tuple(taken(open_videos(config, "train", 4, ClipConfig(span=2)), 0)) for _ in range(20)}
    assert len(places) > 8
    for clip in places:
        assert 2 <= clip[0] <= 22
        assert all(4 <= b - a <= 6 for a, b in itertools.pairwise(clip))
    whole = open_videos(config, "train", 4)
    moments = np.array([taken(whole, 0) for _ in range(20)])
    assert (moments // 10 == np.arange(4)).all()  # one of each quarter
    assert all(len(set(column)) > 5 for column in moments.T)


def test_draws_depend_on_their_key_alone(made: Path) -> None:
    samples = open_videos(DataConfig(path=str(made)), "train", 4, ClipConfig(span=1))
    transform = AugmentConfig(min_scale=0.5).transform(SimpleNamespace(pretrained_cfg=CFG))  # type: ignore[arg-type]

    def read(**kwargs: int) -> dict[int, Tensor]:
        batches = train_batches(samples, transform, seed=1, epoch=2, **kwargs)
        return {int(key): clip for batch in batches for key, clip in zip(batch.samples, batch.images, strict=True)}

    expected = read(batch_size=3)
    assert len(expected) == 6
    assert expected[0].shape == (3, 4, 24, 24)
    for other in (read(batch_size=2), read(batch_size=3, workers=1), read(batch_size=3, start_step=1)):
        assert all(torch.equal(clip, expected[key]) for key, clip in other.items())
    assert not torch.equal(expected[0], expected[1])


def test_a_broken_video_is_skipped(made: Path, tmp_path: Path) -> None:
    for name in CLASSES:
        (tmp_path / name).mkdir()
        (tmp_path / name / "a.mp4").symlink_to(made / name / f"{name}0.mp4")
    (tmp_path / "rise" / "b.mp4").write_text("no video")
    samples = open_videos(DataConfig(path=str(tmp_path)), "eval", 4, whole=True)
    (batch,) = eval_batches(samples, model_transform(CFG), batch_size=3)
    assert batch.labels.tolist() == [0, 1]
    assert batch.images.shape == (2, 3, 4, 24, 24)
    ((name, reason),) = batch.skipped
    assert name.endswith("b.mp4")
    assert "not a video" in reason


def test_the_whole_frame_as_of_a_photo(made: Path) -> None:
    samples = open_videos(DataConfig(path=str(made)), "eval", 4, whole=True)
    frames, _ = samples[0]
    clip = model_transform(CFG)(frames)
    photo = model_transform({**CFG, "input_size": (3, 24, 24)})
    assert clip.shape == (3, 4, 24, 24)
    for t, frame in enumerate(frames):
        assert torch.equal(clip[:, t], photo(frame))
    assert model_transform(CFG)(frames * 2).shape == (2, 3, 4, 24, 24)


@pytest.mark.parametrize("upright", [False, True])
def test_views(upright: bool) -> None:
    """Crops go along the longer side, from end to end; clips in the outer order."""
    wide = np.broadcast_to(np.linspace(0, 255, 96)[None, :, None], (48, 96, 3))
    frames = [Image.fromarray((wide * shade).astype(np.uint8)) for shade in (0.25, 0.5, 0.75, 1.0) * 2]
    if upright:
        frames = [frame.transpose(Image.Transpose.ROTATE_270) for frame in frames]
    views = views_transform(CFG, 3)(frames)
    assert views.shape == (6, 3, 4, 24, 24)
    assert torch.equal(views[:3], views[3:])
    brightness = views[:3, 0, 3].mean((-2, -1)) / 2 + 0.5
    assert brightness.tolist() == pytest.approx([0.25, 0.5, 0.75], abs=0.02)
    shades = (views[1].mean((0, 2, 3)) + 1) / (views[1, :, 3].mean() + 1)
    assert shades.tolist() == pytest.approx([0.25, 0.5, 0.75, 1], abs=0.02)
    centre = views_transform(CFG, 1)(frames[:4])
    assert torch.equal(centre, views[1])


def test_training_changes_all_frames_of_a_clip_alike() -> None:
    frames = [Image.fromarray(numbered(421, 80, 48))] * 4
    change = train_transform(CFG, 0.3, 0.5, 0.4)
    torch.manual_seed(0)
    clips = torch.stack([change(frames) for _ in range(8)])
    assert clips.shape == (8, 3, 4, 24, 24)
    assert (clips == clips[:, :, :1]).all()
    assert len({clip.sum().item() for clip in clips}) == 8
    plain = train_transform(CFG, 1.0, 0.0, 0.0)(frames)
    assert plain.min() >= -1.2
    assert plain.max() <= 1.2
    model = SimpleNamespace(pretrained_cfg=CFG)
    with pytest.raises(InputError, match="not for clips"):
        AugmentConfig(random_erasing=0.5).transform(model)  # type: ignore[arg-type]


def test_views_count_as_one_video() -> None:
    """Probabilities are averaged, MACs added."""
    sure, torn = torch.tensor([8.0, 0, 0]), torch.tensor([0, 1.0, 0])
    logits = torch.stack([torn, torn, sure, torn, torn, torn])

    class Model:
        num_groups = 1

        def trace(self, clips: Tensor, decide: object = None, keys: object = None) -> Output:
            assert clips.shape == (6, 3, 4, 8, 8)
            kept = torch.arange(6)[None, :, None] >= torch.arange(6)
            return Output(logits, kept.float(), kept, torch.arange(6), torch.arange(6) == 4)

    clips = torch.zeros(2, 3, 3, 4, 8, 8)
    output = trace(Model(), clips)  # type: ignore[arg-type]
    assert output.logits.argmax(1).tolist() == [0, 1]
    assert output.logits.exp().sum(1).tolist() == pytest.approx([1, 1])
    assert output.macs.tolist() == [3, 12]
    assert output.unsure.tolist() == [False, True]
    assert output.keep_ratio[0].tolist() == pytest.approx([6 / 18, 15 / 18])
    batch = Batch(clips, torch.tensor([0, 0]), torch.arange(2), [])
    result = measure(Model(), [batch], "cpu")  # type: ignore[arg-type]
    assert (result["top1"], result["images"]) == (50.0, 2)


def test_the_command_evaluate(
    made: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(command, "CALIBRATION_IMAGES", 8)
    samples, decision_at = [], command.decision_at
    monkeypatch.setattr(
        command, "decision_at", lambda model, x, **kwargs: samples.append(x.shape) or decision_at(model, x, **kwargs)
    )
    size = {"img_size": (4, 16, 16), "patch_size": (1, 8, 8), "embed_dim": 48, "depth": 3, "num_heads": 3}
    iared2.from_timm("timesformer_joint_small_patch16_224", num_classes=2, **size).save(tmp_path / "m.safetensors")
    arguments = ["-c", str(tmp_path / "m.safetensors"), str(made), "--workers", "0", "--budget", "0.5", "--json"]
    assert main(["evaluate", *arguments]) == 0
    found = json.loads(capsys.readouterr().out)
    assert found["images"] == 6
    assert found["skipped"] == []
    assert found["variants"][0]["gmacs"] > 0
    assert found["variants"][1]["name"] == "dense backbone"
    assert main(["evaluate", *arguments, "--clips", "2", "--crops", "3", "--span", "0.3"]) == 0
    out, said = capsys.readouterr()
    views = json.loads(out)
    assert "calibrated on 2 of" in said, "two clips of 4 frames for 8 images"
    assert samples == [(2, 3, 4, 16, 16)] * 2, "one view of each video"
    assert views["images"] == 6
    assert views["variants"][1]["gmacs"] == pytest.approx(6 * found["variants"][1]["gmacs"])
    assert all(0 < share <= 1 for variant in views["variants"] for share in variant["keep_ratio"])
    assert views["variants"][2]["keep_ratio"] == views["variants"][0]["keep_ratio"], "random drops as many of each view"
    assert main(["evaluate", *arguments, "--crops", "0"]) == 1
    assert "--crops must be 1 or more" in capsys.readouterr().err


def test_views_are_refused_for_photos(tmp_path: Path, like_the_box: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["evaluate", "-c", str(like_the_box), str(tmp_path), "--clips", "2"]) == 1
    assert "are of videos" in capsys.readouterr().err
