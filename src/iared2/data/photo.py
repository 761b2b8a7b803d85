"""Photos as files: find them, read them, and convert them to 8-bit RGB. Does not depend on models.

Images of cameras, scanners and drawing programs are read as a viewer shows them: rotated according to EXIF, with
transparency over white, and 16-bit grey scaled instead of clipped. Colour profiles (ICC) are ignored, as they were when
the backbones were trained. The first frame of an animation is used.
"""

from __future__ import annotations

import glob
import io
import os
import re
import warnings
import zlib
from collections.abc import Collection, Iterator, Sequence
from contextlib import contextmanager, suppress
from functools import cache
from pathlib import Path
from typing import BinaryIO

import numpy as np
from PIL import ExifTags, Image, UnidentifiedImageError

from ..errors import InputError, missing

HEIC = b"ftypheic", b"ftypheix", b"ftypmif1", b"ftypmsf1", b"ftyphevc"
"""How a photo of an iPhone begins, after 4 bytes."""
FORMATS = (
    *("JPEG", "PNG", "WEBP", "GIF", "BMP", "TIFF", "AVIF", "HEIF", "JPEG2000", "JXL", "PPM", "PSD", "QOI", "DIB"),
    *("ICO", "ICNS", "PCX", "SGI", "XBM", "XPM", "TGA"),
)
"""Formats of still images by Pillow's names; file names do not matter. Some others start programs (EPS) or are no
photos. HEIF needs pillow-heif, and JXL a registered plug-in."""
MAX_PIXELS, MAX_SIDE = 89_478_485, 65_535
"""Larger photos are refused before decoding. Pillow suspects a bomb beyond this size; no JPEG is longer."""
TOO_LARGE = f"too large, the limits are {MAX_PIXELS:,} pixels and {MAX_SIDE:,} a side; make it smaller first"
_TURNS = dict(zip(range(2, 9), map(Image.Transpose, (0, 3, 1, 5, 4, 6, 2)), strict=True))
"""Transpositions by EXIF orientation."""


def to_rgb(image: Image.Image) -> Image.Image:
    """Any Pillow image as 8-bit RGB, transparent parts over white.

    More than 8 bits of grey are scaled, where Pillow's `convert` would clip: modes `I;16*` and `I` from the 16-bit
    range, `F` from [0, 1] or [0, 255], and values outside these ranges from minimum to maximum.
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
    """Grey levels of a wider type, (H, W), as an 8-bit image. NaN is black."""
    values = np.nan_to_num(grey.astype(np.float32), posinf=0, neginf=0)
    low, high = 0.0, 65535.0
    if grey.dtype.kind == "f":
        high = 1.0 if values.max() <= 1 else 255.0
    if values.min() < low or values.max() > high:
        low, high = values.min(), max(values.max(), values.min() + 1)
    return Image.fromarray(np.rint((values - low) * (255 / (high - low))).astype(np.uint8))


def as_rgb(photo: Image.Image | np.ndarray | bytes | BinaryIO) -> Image.Image:
    """A photo in memory, upright and 8-bit RGB.

    Args:
        photo: a Pillow image of any mode; uint8 ``(H, W)`` or ``(H, W, 1)`` grey, ``(H, W, 3)`` RGB or ``(H, W, 4)``
            RGBA; or what is in an image file, as bytes or as a binary file object that can seek, which is closed.

    Raises:
        InputError: it is none of these, or has no pixels; anything else that decoders raise (see `fault`).
    """
    if isinstance(photo, (bytes, bytearray, memoryview)):
        return as_rgb(io.BytesIO(photo))
    if isinstance(photo, np.ndarray):
        layout = photo.ndim == 2 or photo.shape[2:] in ((1,), (3,), (4,))
        if layout and photo.size and photo.dtype == np.uint8:
            return to_rgb(Image.fromarray(photo[..., 0] if photo.shape[2:] == (1,) else photo))
    elif isinstance(photo, Image.Image):
        if all(photo.size):
            return to_rgb(upright(photo))
    elif hasattr(photo, "read"):
        with photo:
            return to_rgb(upright(load_image(photo)))
    what = f"{photo.shape} {photo.dtype}" if isinstance(photo, np.ndarray) else f"{photo!r:.80}"
    raise InputError(
        f"{what} is no photo: give a file or its bytes, a Pillow image with pixels, or a uint8 array (H, W), (H, W, 3)"
        " RGB or (H, W, 4) RGBA"
    )


def is_too_large(width: int, height: int) -> bool:
    """Whether an image of this size is refused."""
    return width * height > MAX_PIXELS or max(width, height) > MAX_SIDE


def load_image(file: BinaryIO) -> Image.Image:
    """A decoded still image in one of ``FORMATS``, with the mode and orientation of the file.

    Text, colour profile and EXIF may be damaged. Raises `Image.DecompressionBombError` if it ``is_too_large`` (from the
    header, before decoding), and any exception of the decoders.
    """
    try:
        return _load(file)
    except Image.DecompressionBombError:
        raise
    except Exception as error:  # decoders raise anything, also of odd text that has nothing to do with the pixels
        file.seek(0)
        try:
            return _load(io.BytesIO(_without_metadata(file.read(8 * MAX_PIXELS))))
        except Exception:
            raise error from None


@cache
def register_plugins() -> None:
    """Register all formats of Pillow, and HEIF where pillow-heif is installed."""
    Image.init()
    with suppress(ImportError):
        import pillow_heif

        pillow_heif.register_heif_opener()


def _load(file: BinaryIO) -> Image.Image:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # remarks on odd metadata; the size, also a mere warning, is checked here
        register_plugins()
        start, readable = file.read(12), [name for name in FORMATS if name in Image.OPEN]
        if start[4:] in HEIC and "HEIF" not in readable:
            raise missing("a HEIC photo", "pillow-heif", "heic")
        file.seek(0)
        image = Image.open(file, formats=readable)
        for _ in range(2):  # what lies in an icon may be larger than the icon's header says
            if is_too_large(*image.size):
                raise Image.DecompressionBombError(TOO_LARGE)
            image.load()
        return image


def _without_metadata(data: bytes) -> bytes:
    """A PNG or JPEG reduced to the blocks of its pixels and orientation; empty if it is neither."""
    kept, at = [], 8
    if data.startswith(b"\x89PNG\r\n\x1a\n"):
        while at < len(data):
            end = at + 12 + int.from_bytes(data[at : at + 4], "big")
            kind = data[at + 4 : at + 8]
            is_sound = zlib.crc32(data[at + 4 : end - 4]) == int.from_bytes(data[end - 4 : end], "big")
            if kind in (b"IHDR", b"PLTE", b"tRNS", b"IDAT", b"IEND") or (kind == b"eXIf" and is_sound):
                kept.append(data[at:end])
            at = end
        return data[:8] + b"".join(kept)
    if not data.startswith(b"\xff\xd8"):
        return b""
    at = 2
    while data[at : at + 1] == b"\xff" and (kind := data[at + 1 : at + 2]) != b"\xda":  # the scan is not in blocks
        end = at + 2 + int.from_bytes(data[at + 2 : at + 4], "big")
        if not b"\xe2" <= kind <= b"\xed":  # APP2 … APP13; APP0 and APP14 tell the colours, APP1 the direction
            kept.append(data[at:end])
        at = end
    return data[:2] + b"".join(kept) + data[at:]


def upright(image: Image.Image) -> Image.Image:
    """Rotate according to EXIF, if readable. Pillow's own function rewrites the EXIF, which fails for odd ones."""
    try:
        turn = _TURNS.get(image.getexif().get(ExifTags.Base.Orientation, 1))
    except Exception:  # it raises anything
        turn = None
    return image if turn is None else image.transpose(turn)


def read_photo(path: str | Path) -> Image.Image:
    """The photo in a file, decoded, upright, 8-bit RGB.

    Raises `InputError` with one line that names the file if it is missing, not a file, not readable, empty, not a still
    image, truncated or damaged, or has more than `MAX_PIXELS` pixels or `MAX_SIDE` per side.
    """
    path = Path(path)
    check_file(path, "an image")
    try:
        with path.open("rb") as file:
            return to_rgb(upright(load_image(file)))
    except Exception as error:  # decoders raise anything: OSError, SyntaxError, struct.error, zlib.error, IndexError, …
        raise InputError(f"{path}: {fault(error)}") from None


def fault(error: Exception) -> str:
    """What is wrong with a photo that could not be read, and what to do; the same for the same file."""
    if isinstance(error, InputError):
        return str(error)
    if isinstance(error, Image.DecompressionBombError):
        return TOO_LARGE
    if isinstance(error, UnidentifiedImageError):
        return "not an image that can be read here; convert it to JPEG or PNG"
    if isinstance(error, OSError) and error.errno:
        return f"cannot be read ({error.strerror}); make it readable for you"
    return f"the image is cut short or damaged ({reason(error)}); copy it again"


def reason(error: Exception) -> str:
    """The message of an exception, in one line, without addresses in memory."""
    return re.sub(r" at 0x[0-9a-f]+", "", " ".join(str(error).split())) or type(error).__name__


def check_file(path: Path, what: str) -> None:
    """Refuse a path without opening it: no such file, not a file, not readable, empty. ``what`` was expected.

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


def find_photos(patterns: Sequence[str | Path], recursive: bool = False) -> list[Path]:
    """The images of files, folders and globs, see ``find_files``; `read_photo` reports a bad one.

    Raises `InputError` if a folder cannot be read, or if a folder or a glob has no photo.
    """
    return find_files(patterns, photo_suffixes(), "photo", recursive)


def find_files(
    patterns: Sequence[str | Path], suffixes: Collection[str], what: str, recursive: bool = False
) -> list[Path]:
    """The files of files, folders and globs, in the order given and each once.

    A folder stands for the files with these suffixes in it, without hidden files: if ``recursive``, at any depth,
    sorted by path, else directly in it, sorted by name. A plain path is returned unchanged, even of no file. Raises
    `InputError` if a folder cannot be read, or if a folder or a glob has none; ``what`` names what was expected.
    """
    found_in_all: list[Path] = []
    for pattern in map(str, patterns):
        path = Path(pattern)
        if path.is_dir():
            found = files_below(path, suffixes) if recursive else files_in(path, suffixes)
        elif path.exists() or not glob.has_magic(pattern):  # a file may well be called `cat[1].jpg`
            found = [path]
        else:
            found = sorted(_glob(pattern))
        if not found:
            raise InputError(f"{pattern}: no {what} there; give a file, a folder of {what}s or a glob like '{what}s/*'")
        found_in_all += found
    return list(dict.fromkeys(found_in_all))


def _glob(pattern: str) -> set[Path]:
    """The regular files of a glob. Python's own `**` loops if links lead upwards."""
    deep = re.search(r"(^|(?<=/))\*\*(/|$)", pattern)
    if not deep:
        return {path for path in map(Path, glob.glob(pattern)) if path.is_file()}
    found: set[Path] = set()
    with readable():
        for folder in map(Path, glob.glob(pattern[: deep.start()] or ".")):
            below = {place for file in walk(folder, set()) for place in file.relative_to(folder).parents}
            rest = pattern[deep.end() :] or "*"
            found.update(*(_glob(f"{glob.escape(str(folder / place))}/{rest}") for place in below))
    return found


def files_in(folder: Path, suffixes: Collection[str]) -> list[Path]:
    """The regular files with these suffixes directly in a folder, sorted, without hidden ones; none if it is missing.

    Raises:
        InputError: the folder cannot be read.
    """
    with readable():
        files = sorted(folder.iterdir()) if folder.is_dir() else []
    return [f for f in files if f.suffix.lower() in suffixes and not f.name.startswith(".") and f.is_file()]


def files_below(folder: Path, suffixes: Collection[str]) -> list[Path]:
    """The regular files with these suffixes in a folder and its subfolders, sorted, without hidden ones.

    Raises:
        InputError: a folder cannot be read.
    """
    with readable():
        return sorted(file for file in walk(folder, set()) if file.suffix.lower() in suffixes)


def walk(folder: Path, seen: set[str]) -> Iterator[Path]:
    """The regular files below a folder, without hidden ones. Each real folder is entered once, and its parents never.

    ``seen`` contains real folders not to enter; entered folders are added. Raises OSError.
    """
    seen.update(map(str, [folder.resolve(), *folder.resolve().parents]))
    folders = [str(folder)]
    while folders:
        for entry in sorted(os.scandir(folders.pop()), key=lambda entry: entry.name):
            is_link = entry.is_symlink()  # which may lead nowhere, or to itself: os.path is never surprised
            if entry.name.startswith("."):
                continue
            if os.path.isdir(entry) if is_link else entry.is_dir():
                if (real := os.path.realpath(entry)) not in seen:
                    seen.add(real)
                    folders.append(entry.path)
            elif os.path.isfile(entry) if is_link else entry.is_file():
                yield Path(entry.path)


@contextmanager
def readable() -> Iterator[None]:
    """An ``InputError`` with the system's message for a file or folder that cannot be accessed."""
    try:
        yield
    except OSError as error:
        raise InputError(f"{error.filename}: cannot be read ({error.strerror}); make it readable for you") from None


def photo_suffixes() -> set[str]:
    """The suffixes of ``FORMATS``."""
    register_plugins()
    return {suffix for suffix, name in Image.registered_extensions().items() if name in FORMATS}
