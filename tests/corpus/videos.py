"""Videos: damaged bytes of every container, lying headers, odd rates and turns, and what is no video."""

from __future__ import annotations

import os
import struct
from collections.abc import Callable
from fractions import Fraction
from functools import partial
from pathlib import Path
from typing import Any

import av
import numpy as np

from . import bytes as mutations
from .case import Case, Make, Place, fifo

CONTAINERS: dict[str, tuple[str, str]] = {
    "mp4": (".mp4", "libx264"), "mkv": (".mkv", "libx264"), "avi": (".avi", "mpeg4"), "webm": (".webm", "libvpx"),
        "mov": (".mov", "mpeg4"),
    "ts": (".ts", "mpeg2video"), "flv": (".flv", "flv"), "mpg": (".mpg", "mpeg1video"), "wmv": (".wmv", "wmv2"),
        "3gp": (".3gp", "mpeg4"),
}  # fmt: skip


def inputs() -> list[tuple[str, Make]]:
    """All of this kind."""
    single = [name for name in mutations.ALL if name != "repeated"]
    made: list[tuple[str, Make]] = []
    for number, name in enumerate(CONTAINERS):
        chosen = single if name in ("mp4", "mkv") else [single[(number * 3 + i) % len(single)] for i in range(3)]
        made += [(f"{name}-{mutation}", partial(damaged, name, (mutation,))) for mutation in chosen]
        made.append((f"{name}-flipped-truncated", partial(damaged, name, ("flipped", "truncated"))))
    made += [(f"box-{name}", partial(box, change)) for name, change in BOXES.items()]
    made += [(f"made-{name}", partial(of_options, options)) for name, options in MADE.items()]
    made += [(name, partial(content, *parts)) for name, parts in CONTENTS.items()]
    made += [(function.__name__.replace("_", "-"), function) for function in PLACES]
    return made


def damaged(name: str, names: tuple[str, ...], place: Place) -> Case:
    suffix, codec = CONTAINERS[name]
    rate = 25 if name in ("mpg", "ts") else 10
    size = (176, 144) if name in ("3gp", "flv") else (80, 48)
    base = place.bases.video(suffix, codec, rate=rate, size=size)
    return place.interpret(place.file(f"clip{suffix}", mutations.composed(names, base, place.rng)), video=True)


def box(change: Callable[[bytearray], Any], place: Place) -> Case:
    """An MP4 with a field of its index changed."""
    changed = bytearray(place.bases.clip.read_bytes())
    change(changed)
    return place.interpret(place.file("clip.mp4", bytes(changed)), video=True)


def _field(kind: bytes, offset: int, value: bytes) -> Callable[[bytearray], Any]:
    def change(content: bytearray) -> None:
        start = content.find(kind)
        if start >= 0:
            content[start + 4 + offset : start + 4 + offset + len(value)] = value

    return change


HUGE = b"\x7f\xff\xff\xff"
BOXES: dict[str, Callable[[bytearray], Any]] = {
    "time-scale-zero": _field(b"mdhd", 12, bytes(4)),
    "time-scale-huge": _field(b"mdhd", 12, b"\xff" * 4),
    "time-scale-one": _field(b"mdhd", 12, b"\0\0\0\1"),
    "movie-scale-zero": _field(b"mvhd", 12, bytes(4)),
    "duration-zero": _field(b"mvhd", 16, bytes(4)),
    "duration-huge": _field(b"mvhd", 16, b"\xff" * 4),
    "width-huge": _field(b"avc1", 24, b"\xff\xff\xff\xff"),
    "width-zero": _field(b"avc1", 24, bytes(4)),
    "samples-huge": _field(b"stsz", 8, HUGE),
    "samples-none": _field(b"stsz", 8, bytes(4)),
    "sample-size-huge": _field(b"stsz", 4, HUGE),
    "chunks-huge": _field(b"stco", 4, HUGE),
    "chunk-outside": _field(b"stco", 8, HUGE),
    "times-huge": _field(b"stts", 4, HUGE),
    "time-step-zero": _field(b"stts", 12, bytes(4)),
    "time-step-huge": _field(b"stts", 12, HUGE),
    "time-step-negative": _field(b"stts", 12, b"\xff\xff\xff\xfe"),
    "edit-of-nothing": _field(b"elst", 8, bytes(4)),
    "edit-huge": _field(b"elst", 8, HUGE),
    "edit-empty": _field(b"elst", 12, b"\xff" * 4),
    "edit-late": _field(b"elst", 12, HUGE),
    "edit-rate": _field(b"elst", 16, bytes(4)),
    "edits-many": _field(b"elst", 4, HUGE),
    "matrix-zero": _field(b"tkhd", 40, bytes(36)),
    "matrix-huge": _field(b"tkhd", 40, b"\x7f" * 36),
    "matrix-skewed": _field(b"tkhd", 40, struct.pack(">9i", 65536, 30000, 0, -9999, 65536, 0, 0, 0, 1 << 30)),
    "matrix-mirror": _field(b"tkhd", 40, struct.pack(">9i", -65536, 0, 0, 0, 65536, 0, 0, 0, 1 << 30)),
    "codec-unknown": _field(b"avc1", -4, b"zzzz"),
    "no-sync": _field(b"stss", 4, bytes(4)),
    "sync-outside": _field(b"stss", 8, HUGE),
    "handler-sound": _field(b"hdlr", 8, b"soun"),
    "index-size-huge": _field(b"moov", -8, HUGE),
    "index-in-itself": _field(b"trak", -4, b"moov"),
}
MADE: dict[str, dict[str, Any]] = {
    "one-frame": {"frames": 1},
    "two-frames": {"frames": 2},
    "turn-90": {"rotation": 90},
    "turn-45": {"rotation": 45},
    "times-equal": {"times": [0, 0, 0, 5], "frames": 4, "suffix": ".mkv"},
    "times-far": {"times": [0, 1, 2**31, 2**32], "frames": 4, "suffix": ".mkv"},
    "times-late": {"times": [10**9, 10**9 + 100], "frames": 2},
    "rate-huge": {"rate": 90000},
    "rate-slow": {"rate": Fraction(1, 3600)},
    "pixels-wide": {"pixel_aspect": 30000, "suffix": ".mkv"},
    "pixels-wide-mp4": {"pixel_aspect": 2000},
    "size-small": {"size": (2, 2)},
    "size-long": {"size": (4096, 2)},
    "size-odd": {"size": (81, 47), "codec": "mpeg4", "suffix": ".mkv"},
    "no-keyframes": {"gop": 9999, "frames": 60},
    "gif": {"suffix": ".gif", "codec": "gif", "pix_fmt": "rgb8"},
    "raw": {"suffix": ".h264", "format": "h264"},
    "alpha": {"suffix": ".mkv", "codec": "ffv1", "pix_fmt": "yuva420p"},
    "deep": {"suffix": ".mkv", "codec": "ffv1", "pix_fmt": "gray16le"},
}


def of_options(options: dict[str, Any], place: Place) -> Case:
    given = {"codec": "libx264", "frames": 12, **options}
    suffix = given.pop("suffix", ".mp4")
    return place.interpret(place.file(f"clip{suffix}", place.bases.video(suffix, **given)), video=True)


CONTENTS: dict[str, tuple[str, bytes]] = {
    "empty": ("clip.mp4", b""),
    "text": ("clip.mp4", b"I am not a video\n" * 20),
    "html": ("clip.mp4", b"<html>404</html>"),
    "zeros": ("clip.mkv", bytes(5000)),
    "ftyp-only": ("clip.mp4", b"\0\0\0\x18ftypmp42\0\0\0\0mp42isom"),
    "box-of-no-size": ("clip.mp4", b"\0\0\0\0moov" * 50),
    "box-deep": ("clip.mp4", b"".join(struct.pack(">I", 9999) + b"moov" for _ in range(2000))),
    "playlist": ("clip.m3u8", b"#EXTM3U\n#EXTINF:1,\nhttps://example.com/a.ts\n#EXT-X-ENDLIST\n"),
    "playlist-as-mp4": ("clip.mp4", b"#EXTM3U\n#EXTINF:1,\n../outside/canary.pth\n#EXT-X-ENDLIST\n"),
    "concat": ("clip.mp4", b"ffconcat version 1.0\nfile ../outside/canary.pth\n"),
    "dash": ("clip.mpd",
        b"<MPD xmlns='urn:mpeg:dash:schema:mpd:2011'><Period><BaseURL>http://example.com/</BaseURL></Period></MPD>"),
    "sdp": ("clip.mp4", b"v=0\no=- 0 0 IN IP4 127.0.0.1\ns=x\nc=IN IP4 127.0.0.1\nt=0 0\nm=video 5004 RTP/AVP 96\n"),
    "subtitles": ("clip.mp4", b"1\n00:00:00,000 --> 00:00:01,000\ntext\n"),
    "avi-empty": ("clip.avi", b"RIFF\xff\xff\xff\xffAVI LIST\x04\0\0\0hdrl"),
    "mkv-head": ("clip.mkv", b"\x1aE\xdf\xa3\x01\xff\xff\xff\xff\xff\xff\xff"),
    "y4m-huge": ("clip.y4m", b"YUV4MPEG2 W999999 H999999 F25:1\nFRAME\n"),
    "y4m-no-rate": ("clip.y4m", b"YUV4MPEG2 W4 H4 F0:0\nFRAME\n" + bytes(24)),
    "name-with-newline": ("cl\nip\x1b[31m.mp4", b"text"),
}  # fmt: skip


def content(name: str, data: bytes, place: Place) -> Case:
    place.file(name, data)
    return place.interpret(f"in/{name}", video=True)


def sound(place: Place) -> Case:
    path = place.inside / "clip.mp4"
    with av.open(str(path), "w") as out:
        stream: Any = out.add_stream("aac", rate=8000)
        frame = av.AudioFrame.from_ndarray(np.zeros((1, 8000), np.float32), format="fltp", layout="mono")
        frame.sample_rate = 8000
        out.mux(stream.encode(frame))
        out.mux(stream.encode())
    return place.interpret(path, video=True)


def photo(place: Place) -> Case:
    return place.interpret(place.file("clip.mp4", place.bases.image("JPEG")), video=True)


def photo_for_a_video_model(place: Place) -> Case:
    return place.interpret(place.file("photo.jpg", place.bases.image("JPEG")), video=True)


def video_for_a_photo_model(place: Place) -> Case:
    return place.interpret(place.file("clip.mp4", place.bases.clip.read_bytes()))


def video_named_photo(place: Place) -> Case:
    return place.interpret(place.file("photo.jpg", place.bases.clip.read_bytes()))


def two_halves(place: Place) -> Case:
    one, two = place.bases.video(".ts", "mpeg2video", rate=25), place.bases.video(".mkv", "libx264", rate=10)
    return place.interpret(place.file("clip.ts", one + two + one), video=True)


def a_directory(place: Place) -> Case:
    (place.inside / "clip.mp4").mkdir()
    return place.interpret(place.inside / "clip.mp4", video=True)


def pipe(place: Place) -> Case:
    return place.interpret(fifo(place, "clip.mp4"), video=True)


def link_circle(place: Place) -> Case:
    os.symlink("clip.mp4", place.inside / "clip.mp4")
    return place.interpret(place.inside / "clip.mp4", video=True)


def missing(place: Place) -> Case:
    return place.interpret("in/a\nb.mp4", video=True)


def a_url(place: Place) -> Case:
    return place.interpret("https://example.com/clip.mp4", video=True)


def a_protocol(place: Place) -> Case:
    path: Path = place.file("clip.mp4", place.bases.clip.read_bytes())
    return place.interpret(f"concat:{path}|{path}", video=True)


PLACES: list[Make] = [
    sound, photo, photo_for_a_video_model, video_for_a_photo_model, video_named_photo, two_halves, a_directory, pipe,
    link_circle,
    missing, a_url, a_protocol,
]  # fmt: skip
