"""Photos as files: find them, read them, and bring any of them to 8-bit RGB. Knows nothing of models.

What a camera, a scanner or a drawing program calls an image is read the way a viewer would show it: turned as its EXIF
says, transparency over white, 16-bit grey scaled and not clipped. Colour profiles (ICC) are ignored, as they were when
the backbones were trained. Of an animation the first frame is taken.
"""

from __future__ import annotations

import glob
import warnings
from collections.abc import Collection, Sequence
from pathlib import Path

import numpy as np
from PIL import Image, ImageOps, UnidentifiedImageError

from ..errors import InputError

MAX_PIXELS = 89_478_485
"""Larger photos are refused before they are decoded. It is the size from which on Pillow suspects a bomb."""


def to_rgb(image: Image.Image) -> Image.Image:
    """Any Pillow image as 8-bit RGB, transparent parts over white.

    More than 8 bits of grey are scaled, where Pillow's own `convert` would clip: modes `I;16*` and `I` from the 16-bit
    range, `F` from [0, 1] or [0, 255], and values outside these ranges from the smallest to the largest.
    """
    if image.mode == "F" or image.mode.startswith("I"):
        return _eight_bit(np.asarray(image)).convert("RGB")
    if image.mode == "La":
        image = image.convert("LA")
    if image.mode.endswith(("A", "a")) or "transparency" in image.info:
        image = image.convert("RGBA")
        white = Image.new("RGBA", image.size, "white")
        return Image.alpha_composite(white, image).convert("RGB")
    return image.convert("RGB")


def _eight_bit(grey: np.ndarray) -> Image.Image:
    """Grey levels of a wider type, (H, W), as an 8-bit image. What is not a number is black."""
    values = np.nan_to_num(grey.astype(np.float32), posinf=0, neginf=0)
    low, high = 0.0, 65535.0
    if grey.dtype.kind == "f":
        high = 1.0 if values.max() <= 1 else 255.0
    if values.min() < low or values.max() > high:
        low, high = values.min(), max(values.max(), values.min() + 1)
    return Image.fromarray(np.rint((values - low) * (255 / (high - low))).astype(np.uint8))


def read_photo(path: str | Path) -> Image.Image:
    """The photo in a file, decoded, upright, 8-bit RGB.

    Raises `InputError` with one line that names the file if it is missing, not a file, not readable, empty, not an
    image, cut short or damaged, or of more than `MAX_PIXELS` pixels (found out from the header, before decoding).
    """
    path = Path(path)
    try:
        check_file(path, "an image")
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # remarks on odd metadata; the size, also a mere warning, is checked below
            with Image.open(path) as image:
                if image.width * image.height > MAX_PIXELS:
                    raise Image.DecompressionBombError
                return to_rgb(ImageOps.exif_transpose(image))
    except InputError:
        raise
    except Image.DecompressionBombError:
        raise InputError(f"{path}: too large, the limit is {MAX_PIXELS:,} pixels; make it smaller first") from None
    except UnidentifiedImageError:
        raise InputError(f"{path}: not an image that can be read here; convert it to JPEG or PNG") from None
    except Exception as error:  # decoders raise anything: OSError, SyntaxError, struct.error, zlib.error, IndexError, …
        reason = " ".join(str(error).split()) or type(error).__name__
        raise InputError(f"{path}: the image is cut short or damaged ({reason}); copy or download it again") from None


def check_file(path: Path, what: str) -> None:
    """Refuse what need not be opened: no such file, not a file, not readable, empty. ``what`` was to be in it.

    Raises:
        InputError: it is one of these.
    """
    try:
        if not path.is_file():
            fault = "not a file" if path.exists() else "no such file"
            raise InputError(f"{path}: {fault}; give the path of {what}")
        with path.open("rb") as file:
            if not file.read(1):
                raise InputError(f"{path}: the file is empty; copy or download it again")
    except PermissionError:
        raise InputError(f"{path}: permission denied; make it readable for you") from None


def find_photos(patterns: Sequence[str | Path]) -> list[Path]:
    """The images that files, folders and globs stand for, see ``find_files``; `read_photo` says what is wrong with one.

    Raises `InputError` if a folder cannot be read, or if a folder or a glob has no photo.
    """
    return find_files(patterns, _photo_suffixes(), "photo")


def find_files(patterns: Sequence[str | Path], suffixes: Collection[str], what: str) -> list[Path]:
    """The files that files, folders and globs stand for, in the order given and each once.

    A folder stands for the files of these suffixes directly in it, by name; hidden files are left out. Go deeper with a
    glob (`photos/**/*.jpg`). A plain path is taken as it is, whether there is such a file or not.
    Raises `InputError` if a folder cannot be read, or if a folder or a glob has none; ``what`` says what was sought.
    """
    found_in_all: list[Path] = []
    for pattern in map(str, patterns):
        path = Path(pattern)
        if path.is_dir():
            found = _files_in(path, suffixes)
        elif path.exists() or not glob.has_magic(pattern):  # a file may well be called `cat[1].jpg`
            found = [path]
        else:
            found = [match for match in map(Path, sorted(glob.glob(pattern, recursive=True))) if match.is_file()]
        if not found:
            raise InputError(f"{pattern}: no {what} there; give a file, a folder of {what}s or a glob like '{what}s/*'")
        found_in_all += found
    return list(dict.fromkeys(found_in_all))


def _files_in(folder: Path, suffixes: Collection[str]) -> list[Path]:
    try:
        files = sorted(folder.iterdir())
    except OSError as error:
        raise InputError(f"{folder}: the folder cannot be read ({error.strerror}); make it readable for you") from None
    return [f for f in files if f.suffix.lower() in suffixes and not f.name.startswith(".") and f.is_file()]


def _photo_suffixes() -> set[str]:
    """The suffixes of the still images that Pillow opens, not of the videos and data files that it only recognises."""
    formats = Image.registered_extensions().items()
    return {suffix for suffix, name in formats if name in Image.OPEN and Image.MIME.get(name, "").startswith("image/")}
