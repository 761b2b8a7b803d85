"""The valid files that mutations begin from, all of them tiny, made once a session."""

from __future__ import annotations

import io
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch
from made import write_video
from pictures import write_folder
from PIL import Image

import iared2
import iared2.model.video_transformer

CLASSES = ("cat", "dog")
MODEL = {"img_size": 32, "patch_size": 8, "embed_dim": 48, "depth": 3, "num_heads": 3}
VIDEO_MODEL = {**MODEL, "img_size": (4, 32, 32), "patch_size": (1, 8, 8)}


@dataclass(frozen=True)
class Bases:
    """Valid files.

    Attributes:
        model, video_model: files of ``model.save`` for two classes.
        data: a folder of two classes of four photos.
        clip: a short MP4.
        images, videos: encoded, by format; filled when they are asked for.
    """

    folder: Path
    model: Path
    video_model: Path
    data: Path
    clip: Path
    images: dict[Any, bytes] = field(default_factory=dict, repr=False)
    videos: dict[Any, bytes] = field(default_factory=dict, repr=False)

    def image(self, format: str, mode: str = "RGB", size: tuple[int, int] = (40, 30), **options: Any) -> bytes:
        """A photo of noise, encoded by Pillow."""
        key = (format, mode, size, *sorted(map(str, options.items())))
        if key not in self.images:
            buffer = io.BytesIO()
            noise(mode, size).save(buffer, format, **options)
            self.images[key] = buffer.getvalue()
        return self.images[key]

    def video(self, suffix: str, codec: str, frames: int = 12, **options: Any) -> bytes:
        """A video of numbered frames, encoded by FFmpeg."""
        key = (suffix, codec, frames, *sorted(map(str, options.items())))
        if key not in self.videos:
            path = self.folder / f"video{suffix}"
            self.videos[key] = write_video(path, frames, codec=codec, **options).read_bytes()
            path.unlink()
        return self.videos[key]


def noise(mode: str, size: tuple[int, int], seed: int = 0) -> Image.Image:
    """A picture of any of Pillow's modes that is neither flat nor large when compressed."""
    width, height = size
    blocks = np.random.default_rng(seed).integers(0, 256, (-(-height // 4), -(-width // 4), 3), dtype=np.uint8)
    pixels = np.kron(blocks, np.ones((4, 4, 1), np.uint8))[:height, :width]
    if mode.startswith("I;16"):
        wide = pixels[..., 0].astype(np.uint16) * 257
        return Image.frombytes(mode, size, wide.astype(">u2" if mode.endswith("B") else "<u2").tobytes())
    image = Image.fromarray(np.ascontiguousarray(pixels))
    if mode == "LAB":  # Pillow makes it by a colour profile alone
        return Image.merge("LAB", image.split())
    if mode in ("La", "PA"):
        image = image.convert("LA")
    elif mode == "RGBa":
        image = image.convert("RGBA")
    return image.convert(mode)


def make(folder: Path) -> Bases:
    """Write the files into ``folder``."""
    folder.mkdir(parents=True, exist_ok=True)
    torch.manual_seed(0)
    model = iared2.from_timm("deit_tiny_patch16_224", num_classes=len(CLASSES), **MODEL)
    model.class_names = CLASSES
    model.save(folder / "model.safetensors")
    model = iared2.from_timm("timesformer_joint_small_patch16_224", num_classes=len(CLASSES), **VIDEO_MODEL)
    model.class_names = CLASSES
    model.save(folder / "video.safetensors")
    return Bases(
        folder,
        folder / "model.safetensors",
        folder / "video.safetensors",
        write_folder(folder / "data", CLASSES),
        write_video(folder / "clip.mp4", 12),
    )
