"""Videos of any kind are read by time, upright and whole, or refused with one clear line."""

from __future__ import annotations

import builtins
from collections.abc import Callable
from pathlib import Path
from typing import Any

import av
import numpy as np
import pytest
from made import number_of, numbered, trim, write_video
from PIL import Image

from iared2 import InputError
from iared2.data import clips
from iared2.data.clips import find_videos, is_video, open_video

CONTAINERS = {
    "mp4": ("libx264", {}),
    "mkv": ("libx264", {}),
    "ts": ("libx264", {}),
    "h264": ("libx264", {}),  # no times in the file
    "avi": ("mpeg4", {"bf": "2"}),
    "webm": ("libvpx", {}),
    "mpg": ("mpeg2video", {}),
}


def numbers(video: clips.Video, indices: Any) -> list[int]:
    return [number_of(image) for image in video.frames(indices)]


@pytest.fixture
def decoded(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """Positions of the frames that are decoded."""
    seen: list[int] = []
    real = clips.Video._decoded

    def spy(self: clips.Video, *args: Any) -> Any:
        for position, frame in real(self, *args):
            seen.append(position)
            yield position, frame

    monkeypatch.setattr(clips.Video, "_decoded", spy)
    return seen


@pytest.mark.parametrize("suffix", CONTAINERS)
def test_every_frame_is_the_one_it_should_be(tmp_path: Path, suffix: str) -> None:
    codec, options = CONTAINERS[suffix]
    rate = 25
    path = write_video(tmp_path / f"a.{suffix}", 60, codec=codec, rate=rate, options=options)
    video = open_video(path)
    assert len(video) == 60
    assert (video.width, video.height, video.rotation) == (80, 48, 0)
    assert video.times == pytest.approx(np.arange(60) / rate, abs=2e-3)
    assert video.duration == pytest.approx(60 / rate, abs=0.01)
    assert numbers(video, range(60)) == list(range(60))
    for indices in ([0], [59], [7, 31, 31, 58], [13, 14, 50]):
        assert numbers(video, indices) == indices
    assert [number_of(image) for image in video.read(np.array([40, 3, 40, 12]))] == [40, 3, 40, 12]


@pytest.mark.parametrize("suffix", ["mp4", "mkv"])
def test_variable_rate(tmp_path: Path, suffix: str) -> None:
    """Frames crowd at the beginning; those on the screen at the centres of the quarters are late ones."""
    times = [20 * i * i for i in range(20)]  # the last appears at 7.22 s
    video = open_video(write_video(tmp_path / f"a.{suffix}", 20, times=times))
    assert video.times == pytest.approx(np.array(times) / 1000, abs=2e-3)
    moments = video.duration * (np.arange(4) + 0.5) / 4
    expected = [max(i for i, t in enumerate(times) if t <= 1000 * moment + 1) for moment in moments]
    assert video.sample(4).tolist() == expected
    assert numbers(video, video.sample(4)) == expected
    assert expected != [2, 7, 12, 17]


def test_sampling(tmp_path: Path) -> None:
    video = open_video(write_video(tmp_path / "a.mp4", 40, rate=10))
    assert video.duration == pytest.approx(4)
    assert video.sample(4).tolist() == [5, 15, 25, 35]
    assert video.sample(4, offset=0.999).tolist() == [9, 19, 29, 39]
    assert video.sample(4, offset=np.array([0, 0.25, 0.55, 0.95])).tolist() == [0, 12, 25, 39]
    assert video.sample(4, span=2, place=0).tolist() == [2, 7, 12, 17]
    assert video.sample(4, span=2).tolist() == [12, 17, 22, 27]
    assert video.sample(4, span=2, place=1).tolist() == [22, 27, 32, 37]
    assert video.sample(4, span=99, place=0).tolist() == video.sample(4).tolist()
    assert video.sample(80).tolist() == np.repeat(np.arange(40), 2).tolist()
    assert video.sample(80, span=0.1, place=1).tolist() == [39] * 80


def test_one_frame_repeats(tmp_path: Path) -> None:
    video = open_video(write_video(tmp_path / "a.mp4", [numbered(700, 80, 48)]))
    assert len(video) == 1
    assert video.duration > 0
    assert numbers(video, video.sample(8)) == [700] * 8


@pytest.mark.parametrize("suffix", ["mp4", "mov"])
@pytest.mark.parametrize("frames_between", ["0", "2"])
def test_a_trimmed_video_has_the_frames_that_a_player_shows(tmp_path: Path, suffix: str, frames_between: str) -> None:
    path = write_video(tmp_path / f"a.{suffix}", 60, gop=12, options={"bf": frames_between, "sc_threshold": "0"})
    video = open_video(trim(path, 0.7, 3.5))
    with av.open(str(path)) as container:
        plain = [(frame.time, number_of(frame.to_image())) for frame in container.decode(video=0)]
    assert [number for _, number in plain] == list(range(7, 42))
    assert video.times == pytest.approx([time for time, _ in plain])
    assert video.duration == pytest.approx(3.5)
    assert numbers(video, range(35)) == list(range(7, 42))
    for indices in ([0], [4, 5], [3, 20, 34], [34]):
        assert numbers(video, indices) == [7 + i for i in indices]


def test_a_video_of_which_nothing_is_shown(tmp_path: Path) -> None:
    with pytest.raises(InputError, match=r"no frame is there|no video in this file"):
        open_video(trim(write_video(tmp_path / "a.mp4", 20), 50, 1))


def test_matroska_that_begins_late(tmp_path: Path) -> None:
    """Its header says when it ends, not how long it is."""
    video = open_video(write_video(tmp_path / "a.mkv", 20, times=[10_000 + 100 * i for i in range(20)]))
    assert video.times == pytest.approx(np.arange(20) / 10)
    assert video.duration == pytest.approx(2)
    assert numbers(video, [0, 13, 19]) == [0, 13, 19]


@pytest.mark.parametrize(("matrix", "red", "blue"), [(1, 0.2126, 0.0722), (5, 0.299, 0.114)], ids=["HD", "SD"])
@pytest.mark.parametrize("full_range", [False, True])
def test_colours(tmp_path: Path, matrix: int, red: float, blue: float, full_range: bool) -> None:
    """Those of the matrix and the range that the file names (ITU-R BT.709 and BT.601)."""
    luma, cb, cr = 120, 90, 180
    planes = [np.full(pixels, value, np.uint8) for pixels, value in ((64 * 48, luma), (32 * 24, cb), (32 * 24, cr))]
    with av.open(str(tmp_path / "a.mp4"), "w") as out:
        stream = out.add_stream("libx264", rate=10, options={"crf": "1"})
        stream.width, stream.height, stream.pix_fmt = 64, 48, "yuv420p"
        frame = av.VideoFrame.from_ndarray(np.concatenate(planes).reshape(72, 64), format="yuv420p")
        for target in (stream.codec_context, frame):
            target.colorspace, target.color_range = matrix, 1 + full_range
        out.mux([*stream.encode(frame), *stream.encode()])
    y, u, v = (
        (luma / 255, (cb - 128) / 255, (cr - 128) / 255)
        if full_range
        else ((luma - 16) / 219, (cb - 128) / 224, (cr - 128) / 224)
    )
    r, b = y + 2 * (1 - red) * v, y + 2 * (1 - blue) * u
    expected = 255 * np.array([r, (y - red * r - blue * b) / (1 - red - blue), b])
    image = next(open_video(tmp_path / "a.mp4").frames([0]))
    assert np.abs(np.asarray(image)[20, 20] - expected).max() < 2.5


def test_odd_sizes(tmp_path: Path) -> None:
    frames = [np.random.default_rng(i).integers(0, 255, (47, 33, 3), np.uint8) for i in range(3)]
    video = open_video(write_video(tmp_path / "a.mkv", frames, codec="ffv1", pix_fmt="bgr0"))
    assert (video.width, video.height) == (33, 47)
    for image, frame in zip(video.frames(range(3)), frames, strict=True):
        assert image.mode == "RGB"
        assert np.array_equal(image, frame)


@pytest.mark.parametrize(("rotation", "corner"), [(0, "tl"), (90, "bl"), (180, "br"), (270, "tr"), (-90, "tr")])
def test_rotation(tmp_path: Path, rotation: int, corner: str) -> None:
    """A white upper left corner lands where a player that turns the frame counter-clockwise puts it."""
    frame = np.zeros((48, 80, 3), np.uint8)
    frame[:20, :20] = 255
    video = open_video(write_video(tmp_path / "a.mp4", [frame] * 4, rotation=rotation))
    size = (80, 48) if rotation % 180 == 0 else (48, 80)
    assert (video.width, video.height, video.rotation) == (*size, rotation % 360)
    image = next(video.frames([2]))
    assert image.size == size
    y, x = np.argwhere(np.asarray(image)[..., 0] > 127).mean(0)
    assert (y < size[1] / 2, x < size[0] / 2) == ("t" in corner, "l" in corner)


def test_pixels_that_are_not_square(tmp_path: Path) -> None:
    path = write_video(tmp_path / "a.mp4", 3, pixel_aspect=2)
    video = open_video(path)
    assert (video.width, video.height) == (160, 48)
    assert next(video.frames([1])).size == (160, 48)


def test_gif(tmp_path: Path) -> None:
    pictures = [Image.fromarray(numbered(i, 80, 48)) for i in range(6)]
    pictures[0].save(tmp_path / "a.gif", save_all=True, append_images=pictures[1:], duration=[100, 300] * 3)
    video = open_video(tmp_path / "a.gif")
    assert video.times == pytest.approx([0, 0.1, 0.4, 0.5, 0.8, 0.9])
    assert numbers(video, range(6)) == list(range(6))


def test_only_what_is_needed_is_decoded(tmp_path: Path, decoded: list[int], monkeypatch: pytest.MonkeyPatch) -> None:
    made: list[Image.Image] = []
    real = clips.Video._picture
    monkeypatch.setattr(clips.Video, "_picture", lambda self, frame: made.append(real(self, frame)) or made[-1])
    video = open_video(write_video(tmp_path / "a.mp4", 600, gop=10, rate=30, options={"bf": "2", "sc_threshold": "0"}))
    frames = video.frames([105, 305, 308, 505])
    assert len(decoded) == len(made) == 0
    for count, expected in enumerate((105, 305, 308, 505), start=1):
        assert number_of(next(frames)) == expected
        assert len(made) == count  # a picture is made when it is asked for
    assert len(decoded) <= 4 * 12  # a group of pictures each, and what the decoder has seen on the way
    decoded.clear()
    list(video.frames([0, 1, 2, 3]))
    assert len(decoded) == 4


@pytest.mark.parametrize("how", ["refuses", "lands too late"])
def test_a_container_in_which_nothing_can_be_found(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, decoded: list[int], how: str
) -> None:
    video = open_video(write_video(tmp_path / "a.mp4", 60, gop=10))

    def seek(container: Any, stream: Any, position: int) -> None:
        if how == "refuses":
            raise clips._NotFound
        container.seek(int(video._positions[-1]), stream=stream)

    monkeypatch.setattr(clips, "_seek", seek)
    assert numbers(video, [3, 25, 47]) == [3, 25, 47]
    assert 0 in decoded


def cut(share: float) -> Callable[[Path], None]:
    def make(path: Path) -> None:
        whole = write_video(path.with_suffix(".whole" + path.suffix), 200, size=(160, 96)).read_bytes()
        path.write_bytes(whole[: int(share * len(whole))])

    return make


def only_sound(path: Path) -> None:
    with av.open(str(path), "w") as out:
        stream = out.add_stream("aac", rate=48000)
        frame = av.AudioFrame.from_ndarray(np.zeros((2, 4096), np.float32), "fltp", "stereo")
        frame.sample_rate = 48000
        out.mux(stream.encode(frame))
        out.mux(stream.encode())


def photo(path: Path) -> None:
    Image.new("RGB", (40, 40)).save(path, "PNG" if path.suffix == ".png" else "JPEG")


REFUSED: dict[str, tuple[str, Callable[[Path], Any], str]] = {
    "missing": ("a.mp4", lambda path: None, "no such file; give the path of a video"),
    "folder": ("a.mp4", Path.mkdir, "not a file"),
    "empty": ("a.mp4", Path.touch, "the file is empty"),
    "text": ("a.mp4", lambda path: path.write_text("I am no video\n" * 50), "not a video that can be read here"),
    "mp4 without its end": ("a.mp4", cut(0.6), "not a video that can be read here, or its end is missing"),
    "mkv without its end": ("a.mkv", cut(0.6), "the video is cut short or damaged"),
    "mkv with a header alone": ("a.mkv", cut(0.02), "or its end is missing"),
    "webm without its end": ("a.mkv", cut(0.8), "of 20.0 seconds are there"),
    "only sound": ("a.m4a", only_sound, "no video in this file"),
    "photo": ("a.png", photo, "a photo, and a video is needed"),
    "photo called a video": ("a.mp4", photo, "a photo, and a video is needed"),
}


@pytest.mark.parametrize(("name", "make", "message"), REFUSED.values(), ids=REFUSED)
def test_what_is_refused(tmp_path: Path, name: str, make: Callable[[Path], Any], message: str) -> None:
    path = tmp_path / name
    make(path)
    with pytest.raises(InputError) as caught:
        list(open_video(path).frames([0]))
    text = str(caught.value)
    assert text.startswith(f"{path}: ")
    assert message in text
    assert "\n" not in text


@pytest.mark.parametrize("codec", ["libx264", "mjpeg"])
def test_damage_inside(tmp_path: Path, codec: str) -> None:
    """The index is whole, the pictures in the second half are not."""
    noise = [np.random.default_rng(i).integers(0, 255, (48, 80, 3), np.uint8) for i in range(30)]
    pix_fmt = "yuvj420p" if codec == "mjpeg" else "yuv420p"
    path = write_video(tmp_path / "a.mp4", noise, codec=codec, gop=30, pix_fmt=pix_fmt)
    content = bytearray(path.read_bytes())
    begin, end = content.index(b"mdat"), content.index(b"moov")
    middle = (begin + end) // 2
    content[middle : end - 8] = bytes(end - 8 - middle)
    path.write_bytes(content)
    video = open_video(path)
    assert len(list(video.frames([3]))) == 1
    with pytest.raises(InputError, match=r"a\.mp4: .*damaged"):
        list(video.frames(range(30)))


def test_too_large(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = write_video(tmp_path / "a.mp4", 2)
    monkeypatch.setattr("iared2.data.photo.MAX_PIXELS", 80 * 48 - 1)
    with pytest.raises(InputError, match="too large, the limits are"):
        open_video(path)


def test_pixels_that_would_make_it_too_wide(tmp_path: Path) -> None:
    """A small file that says a pixel is 16 times as wide as it is high: shown, a frame has 76,800 pixels a row."""
    path = write_video(tmp_path / "a.mp4", 2, size=(4800, 16), pixel_aspect=16)
    with pytest.raises(InputError, match="too large, the limits are"):
        open_video(path)


def test_a_playlist_fetches_nothing(tmp_path: Path) -> None:
    (tmp_path / "a.m3u8").write_text(
        "#EXTM3U\n#EXT-X-TARGETDURATION:5\n#EXTINF:5,\nhttp://127.0.0.1:9/a.ts\n#EXT-X-ENDLIST\n"
    )
    with pytest.raises(InputError, match=r"a\.m3u8: "):
        open_video(tmp_path / "a.m3u8")


def test_without_pyav(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = write_video(tmp_path / "a.mp4", 2)
    real = builtins.__import__

    def refuse(name: str, *args: Any, **kwargs: Any) -> Any:
        if name == "av":
            raise ModuleNotFoundError("No module named 'av'", name="av")
        return real(name, *args, **kwargs)

    monkeypatch.setattr(builtins, "__import__", refuse)
    with pytest.raises(InputError, match=r"pip install '.\[video\]'"):
        open_video(path)


def test_find_videos(tmp_path: Path) -> None:
    for name in ("b.mp4", "a.MKV", "c.jpg", ".hidden.mp4", "notes.txt"):
        (tmp_path / name).touch()
    assert [path.name for path in find_videos([tmp_path])] == ["a.MKV", "b.mp4"]
    assert is_video("x/a.MOV")
    assert not is_video("a.gif")
    with pytest.raises(InputError, match="no video there; give a file, a folder of videos"):
        find_videos([tmp_path / "*.webm"])


def test_a_real_video(data_dir: Path) -> None:
    video = open_video(data_dir / "video-smoke" / "flipping_a_pancake.mkv")
    assert (len(video), video.width, video.height) == (310, 426, 240)
    assert video.duration == pytest.approx(10.33, abs=0.01)
    indices = video.sample(8)
    assert indices.tolist() == [19, 58, 96, 135, 174, 213, 251, 290]
    plain = {}
    with av.open(str(video.path)) as container:
        for i, frame in enumerate(container.decode(video=0)):
            if i in indices:
                plain[i] = np.asarray(frame.to_image())
    for index, image in zip(indices, video.frames(indices), strict=True):
        assert np.array_equal(image, plain[index])
