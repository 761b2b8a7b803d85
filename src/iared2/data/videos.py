"""Labelled videos as clips: folders of classes or lists, the choice of frames, and their conversion to tensors.

    open_videos(config, …)   -> VideoSamples    names and labels; no video is opened yet
    VideoSamples[i]          -> frames, label   T Pillow images of one clip, V·T of V clips
    train_transform, views_transform: frames -> (3, T, H, W), or (V, 3, T, H, W) of V views

Splits, classes and the holdout are those of images (images.py). Deviations from TimeSformer's loader, for clips of its
length (8 frames at a sampling rate of 32 of 30 a second are 8.53 seconds):

1. Frames are chosen by time, at the centres of equal segments, and not by index from the first to the last.
2. The test clips lie at the centres of equal parts, a single clip in the middle of the video, as in the paper; its code
   puts a single clip at the start.
3. Training crops a random share of the area, as for images, instead of a fixed square of a randomly scaled frame.
"""

from __future__ import annotations

import csv
import warnings
from collections.abc import Sequence
from dataclasses import dataclass, fields
from functools import partial
from pathlib import Path
from typing import Any, Literal, NamedTuple

import numpy as np
import torch
from PIL import Image
from timm.data import resolve_data_config
from torch import Tensor
from torchvision.transforms import v2
from torchvision.transforms.v2 import functional as F

from ..errors import InputError
from .batches import Transform, as_clips, clip_length
from .clips import SUFFIXES, open_video
from .images import DataConfig, Samples, choose, open_samples
from .photo import files_in, readable
from .sources import ALL, Files, Source, Splits, check_labels, folder_splits, open_folder


@dataclass(frozen=True)
class ClipConfig:
    """Which clips of a video to take."""

    span: float = 0.0
    """Seconds per clip; 0: the whole video. TimeSformer uses 8.53 on Kinetics."""
    test_clips: int = 1
    """Test clips per video, spread over it."""
    root: str = ""
    """Folder to which the paths of a list are relative; empty: the folder of the list."""


@dataclass(frozen=True, eq=False)
class VideoSamples(Samples):
    """An open data set. ``samples[i]`` is the frames of video i and its label.

    Frames are upright 8-bit RGB Pillow images of one size: T frames, or for testing those of all clips in a row. A
    video that cannot be read raises InputError. Random clips draw from torch's generator, which ``train_batches`` seeds
    with the key of the sample.
    """

    frames: int
    """T, the frames of a clip."""
    clips: ClipConfig
    is_random: bool
    """A random clip: at a random position, or with random times in the T segments if it is the whole video."""

    def __getitem__(self, index: int) -> tuple[list[Image.Image], int]:
        video = open_video(self.name(index))
        span = self.clips.span or None
        if self.is_random:
            place, *moments = torch.rand(1 + self.frames).tolist()
            taken = video.sample(self.frames, span, place, 0.5 if span else np.array(moments))
        else:
            places = (np.arange(self.clips.test_clips) + 0.5) / self.clips.test_clips
            taken = np.concatenate([video.sample(self.frames, span, p, 0.5 if span else p) for p in places])
        return video.read(taken), int(self.labels[index])


def open_for(
    frames: int,
    config: DataConfig,
    split: Literal["train", "holdout", "eval"],
    clips: ClipConfig | None = None,
    whole: bool = False,
) -> Samples:
    """Open images, or videos for a model of clips of ``frames`` (``batches.clip_length``); see the two functions."""
    return open_videos(config, split, frames, clips, whole) if frames else open_samples(config, split, whole)


def open_videos(
    config: DataConfig,
    split: Literal["train", "holdout", "eval"],
    frames: int,
    clips: ClipConfig | None = None,
    whole: bool = False,
) -> VideoSamples:
    """Open one part of a data set of videos, like ``open_samples`` for images. Opens no video.

    Args:
        config: its path is a folder of videos per class (directly, or in train/ and val/); a list, or a folder of
            lists train.csv, val.csv …: rows ``path,label``, under such a header or none, or Kinetics'
            ``label,youtube_id,time_start,time_end,split`` with files ``ID_000012_000022.mp4`` (or ``ID.mp4``), directly
            or in a folder of their split or label. A column `split` makes the splits.
        split, whole: see ``images.open_samples``. Only "train" takes clips at random.
        frames: T, the frames of a clip.
        clips: the choice of clips.

    Raises:
        InputError: see ``open_samples``; a list without such columns, or with a missing file. For lists of Kinetics,
            missing files are left out with a warning, since many are no longer available.
    """
    clips = clips or ClipConfig()
    if clips.span < 0 or clips.test_clips < 1 or frames < 1:
        raise InputError("clips: span must not be negative, and a clip needs a frame and a video a test clip")
    if not config.path:
        raise InputError("no data set; give --data PATH")
    path = Path(config.path)
    opener = partial(open_folder, suffixes={*SUFFIXES, ".gif"}, what="video")
    with readable():
        if path.is_file():
            splits = _list_splits([path], clips.root)
        elif not path.is_dir():
            raise InputError(f"{path}: no such file or folder; give the path of a data set")
        elif lists := files_in(path, [".csv"]):
            splits = _list_splits(lists, clips.root)
        else:
            splits = folder_splits(path, opener, (config.train_split, config.eval_split))
        chosen = choose(config, splits, split, whole)
    parts = {field.name: getattr(chosen, field.name) for field in fields(Samples)}
    return VideoSamples(**parts, frames=frames, clips=clips, is_random=split == "train")


def train_transform(pretrained_cfg: dict[str, Any], min_scale: float, hflip: float, color_jitter: float) -> Transform:
    """Frames -> ``(3, T, H, W)`` with random augmentation, the same for all frames of a clip.

    Args:
        pretrained_cfg: of a model of clips.
        min_scale: smallest share of the area in a crop.
        hflip: probability of a flip. Use 0 if left and right distinguish classes.
        color_jitter: strength of brightness, contrast and saturation changes; 0: none.
    """
    cfg = resolve_data_config(pretrained_cfg=pretrained_cfg)
    return v2.Compose(
        [
            _stack,
            v2.RandomResizedCrop(cfg["input_size"][2:], (min_scale, 1.0), interpolation=v2.InterpolationMode.BICUBIC),
            v2.RandomHorizontalFlip(hflip),
            v2.ColorJitter(color_jitter, color_jitter, color_jitter),
            *_normalise(cfg),
        ]
    )


def views_transform(pretrained_cfg: dict[str, Any], crops: int) -> Transform:
    """Frames of V clips -> ``(V·crops, 3, T, H, W)``, or ``(3, T, H, W)`` for one: resize the short side, then crop.

    Args:
        pretrained_cfg: of a model of clips. ``batches.model_transform`` shows the whole frame instead.
        crops: spread over the longer side, from end to end; 1: in the middle.
    """
    cfg = resolve_data_config(pretrained_cfg=pretrained_cfg)
    _, length, *size = cfg["input_size"]
    places = [0.5] if crops == 1 else [i / (crops - 1) for i in range(crops)]
    return v2.Compose([partial(_views, size, places, length), *_normalise(cfg)])


def _stack(images: Sequence[Image.Image]) -> Tensor:
    return torch.stack([F.pil_to_tensor(image) for image in images])


def _normalise(cfg: dict[str, Any]) -> list[Transform]:
    """Frames ``(V·T, 3, H, W)`` uint8 -> clips float32."""
    to_clips = partial(as_clips, length=clip_length(cfg))
    return [v2.ToDtype(torch.float32, scale=True), v2.Normalize(cfg["mean"], cfg["std"]), to_clips]


def _views(size: Sequence[int], places: list[float], length: int, images: Sequence[Image.Image]) -> Tensor:
    scale = max(size[0] / images[0].height, size[1] / images[0].width)
    height, width = (max(s, round(scale * side)) for s, side in zip(size, images[0].size[::-1], strict=True))
    frames = F.resize(_stack(images), [height, width], v2.InterpolationMode.BICUBIC)
    crops = [F.crop(frames, round(p * (height - size[0])), round(p * (width - size[1])), *size) for p in places]
    by_clip = torch.stack(crops).unflatten(1, (-1, length)).transpose(0, 1)  # (V, crops, T, 3, H, W)
    return by_clip.flatten(0, 2)


class _Row(NamedTuple):
    where: str
    root: Path
    names: list[str]
    """The possible paths of a video below the root."""
    label: str
    may_be_gone: bool


def _list_splits(lists: list[Path], root: str) -> Splits:
    splits: dict[str, list[_Row]] = {}
    for file in lists:
        for split, row in _read_list(file, Path(root) if root else file.parent):
            split = split or (file.stem if len(lists) > 1 else ALL)
            splits.setdefault("validation" if split == "validate" else split, []).append(row)
    if not splits:
        raise InputError(f"{lists[0]}: no rows; give a list of videos")
    return {split: partial(_open_list, rows) for split, rows in splits.items()}


def _read_list(file: Path, root: Path) -> list[tuple[str, _Row]]:
    try:
        with file.open(encoding="utf-8-sig", newline="") as text:
            lines = [line for line in csv.reader(text) if line]
    except (UnicodeDecodeError, csv.Error):
        raise InputError(f"{file}: not a list of videos; give a CSV file in UTF-8") from None
    header = lines[0] if lines and "label" in lines[0] else ["path", "label"]
    if {"path", "youtube_id"}.isdisjoint(header) or any(len(line) < len(header) for line in lines):
        raise InputError(f"{file}: not a list of videos; give columns path,label or Kinetics' label,youtube_id,…")
    rows = []
    for number, line in enumerate(lines, start=1):
        if line is header:
            continue
        row = dict(zip(header, line, strict=False))
        split, label = row.get("split", ""), row["label"]
        if "path" in row:
            names = [row["path"]]
        else:
            key = row["youtube_id"]
            try:
                times = [int(float(row[t])) for t in ("time_start", "time_end") if row.get(t)]
            except (ValueError, OverflowError):
                raise InputError(f"{file}, row {number}: a time is no number of seconds; correct the list") from None
            stems = ["_".join([key, *(f"{t:06d}" for t in times)]), key]
            folders = ["", split, label, label.replace(" ", "_"), f"{split}/{label}"]
            names = [f"{folder}/{stem}.mp4".strip("/") for folder in folders for stem in stems]
        names = list(dict.fromkeys(names))
        rows.append((split, _Row(f"{file}, row {number}", root, names, label, "path" not in row)))
    return rows


def _open_list(rows: list[_Row]) -> Source:
    found: list[tuple[str, _Row]] = []
    for row in rows:
        if not row.label:
            raise InputError(f"{row.where}: no label; give one, or leave the row out")
        if name := next((name for name in row.names if (row.root / name).is_file()), None):
            found.append((name, row))
        elif not row.may_be_gone:
            raise InputError(
                f"{row.where}: there is no file {row.root / row.names[0]}; correct the list, or set its root"
            )
    root, first = rows[0].root, rows[0].where
    if not found:
        raise InputError(f"{first}: none of its videos is there, such as {root / rows[0].names[0]}; set its root")
    if gone := len(rows) - len(found):
        warnings.warn(f"{first.split(',')[0]}: {gone} of {len(rows)} videos are not there", stacklevel=2)
    files = Files(root, [name for name, _ in found])
    if all(row.label.isdecimal() and len(row.label) < 19 for _, row in found):
        labels = np.array([int(row.label) for _, row in found])
        check_labels(labels, 0, lambda i: found[i][1].where)
        return Source(files, labels, tuple(map(str, range(labels.max() + 1))))
    names = sorted({row.label for row in rows})
    number = {name: i for i, name in enumerate(names)}
    return Source(files, np.array([number[row.label] for _, row in found]), tuple(names))
