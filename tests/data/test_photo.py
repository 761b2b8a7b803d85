"""Every kind of image comes out in the right colours, and everything that is not a photo is one clear line."""

from __future__ import annotations

import io
import os
import zlib
from pathlib import Path

import numpy as np
import pytest
import skimage.data
from PIL import Image

from iared2 import InputError
from iared2.data import photo
from iared2.data.photo import find_photos, read_photo, to_rgb

MIDDLE = 0x8080  # 16-bit grey that is exactly 0x80 in 8 bits


def palette(transparency: int | None = None) -> Image.Image:
    image = Image.new("P", (4, 4), 1)
    image.putpalette([255, 0, 0, 0, 0, 255])
    if transparency is not None:
        image.info["transparency"] = transparency
    return image


MODES = {
    "1": (Image.new("1", (4, 4), 1), (255, 255, 255)),
    "L": (Image.new("L", (4, 4), 77), (77, 77, 77)),
    "LA, half transparent": (Image.new("LA", (4, 4), (0, 51)), (204, 204, 204)),
    "La": (Image.new("La", (4, 4), (0, 51)), (204, 204, 204)),
    "P": (palette(), (0, 0, 255)),
    "P, transparent": (palette(transparency=1), (255, 255, 255)),
    "P, another colour transparent": (palette(transparency=0), (0, 0, 255)),
    "RGB": (Image.new("RGB", (4, 4), (10, 20, 30)), (10, 20, 30)),
    "RGBA, opaque": (Image.new("RGBA", (4, 4), (10, 20, 30, 255)), (10, 20, 30)),
    "RGBA, transparent": (Image.new("RGBA", (4, 4), (10, 20, 30, 0)), (255, 255, 255)),
    "RGBA, mixed": (Image.new("RGBA", (4, 4), (255, 0, 0, 51)), (255, 204, 204)),
    "CMYK": (Image.new("CMYK", (4, 4), (255, 0, 0, 0)), (0, 255, 255)),
    "HSV": (Image.new("HSV", (4, 4), (0, 255, 255)), (255, 0, 0)),
    "I;16": (Image.new("I;16", (4, 4), MIDDLE), (128, 128, 128)),
    "I;16B": (Image.new("I;16B", (4, 4), MIDDLE), (128, 128, 128)),
    "I": (Image.new("I", (4, 4), MIDDLE), (128, 128, 128)),
    "F in [0, 1]": (Image.new("F", (4, 4), 0.5), (128, 128, 128)),
    "F in [0, 255]": (Image.new("F", (4, 4), 77.0), (77, 77, 77)),
    "F, not a number": (Image.new("F", (4, 4), float("nan")), (0, 0, 0)),
    "F, beyond": (Image.new("F", (4, 4), 1e6), (0, 0, 0)),
}


@pytest.mark.parametrize(("image", "color"), MODES.values(), ids=MODES)
def test_modes(image: Image.Image, color: tuple[int, int, int]) -> None:
    rgb = to_rgb(image)
    assert rgb.mode == "RGB"
    assert rgb.size == (4, 4)
    assert np.asarray(rgb).tolist() == [[list(color)] * 4] * 4


def test_wide_grey_beyond_its_range_is_stretched() -> None:
    image = Image.fromarray(np.array([[-1000, 500, 99000]], dtype=np.int32))
    assert np.asarray(to_rgb(image))[0, :, 0].tolist() == [0, 4, 255]


@pytest.mark.parametrize("suffix", [".png", ".tif", ".pgm"])
def test_16_bit_files(tmp_path: Path, suffix: str) -> None:
    ramp = np.arange(0, 65536, 257, dtype=np.uint16).reshape(16, 16)
    Image.fromarray(ramp).save(tmp_path / f"grey{suffix}")
    assert np.array_equal(np.asarray(read_photo(tmp_path / f"grey{suffix}"))[..., 0], ramp // 257)


def test_cmyk_jpeg(tmp_path: Path) -> None:
    Image.new("CMYK", (8, 8), (255, 0, 0, 0)).save(tmp_path / "cyan.jpg")
    assert np.abs(np.asarray(read_photo(tmp_path / "cyan.jpg")).astype(int) - [0, 255, 255]).max() <= 3


def test_the_first_frame_of_an_animation(tmp_path: Path) -> None:
    red, blue = Image.new("RGB", (4, 4), "red"), Image.new("RGB", (4, 4), "blue")
    red.save(tmp_path / "a.gif", save_all=True, append_images=[blue])
    assert read_photo(tmp_path / "a.gif").getpixel((0, 0)) == (255, 0, 0)


def test_exif_orientation(tmp_path: Path) -> None:
    """Orientation 6: the camera was held upright, and stored the picture lying on its left side."""
    upright = Image.fromarray(skimage.data.chelsea()).resize((60, 90))
    exif = Image.Exif()
    exif[0x0112] = 6
    upright.transpose(Image.Transpose.ROTATE_90).save(tmp_path / "a.png", exif=exif)
    assert np.array_equal(read_photo(tmp_path / "a.png"), upright)


@pytest.mark.parametrize("exif", [b"Exif\0\0rubbish", b"Exif\0\0MM\0*\0\0\0\x08\0\x20\x01\x12"])
def test_broken_exif_does_no_harm(tmp_path: Path, exif: bytes) -> None:
    Image.new("RGB", (4, 2), "red").save(tmp_path / "a.jpg", exif=exif)
    assert read_photo(tmp_path / "a.jpg").size == (4, 2)


def test_one_pixel(tmp_path: Path) -> None:
    Image.new("RGB", (1, 1), (1, 2, 3)).save(tmp_path / "a.png")
    assert read_photo(str(tmp_path / "a.png")).getpixel((0, 0)) == (1, 2, 3)


def jpeg() -> bytes:
    data = io.BytesIO()
    Image.fromarray(skimage.data.coffee()).save(data, "jpeg")
    return data.getvalue()


def png(width: int, height: int, data: bytes = b"") -> bytes:
    """A one-bit PNG that promises a size."""

    def chunk(kind: bytes, body: bytes) -> bytes:
        return len(body).to_bytes(4, "big") + kind + body + zlib.crc32(kind + body).to_bytes(4, "big")

    header = width.to_bytes(4, "big") + height.to_bytes(4, "big") + bytes([1, 0, 0, 0, 0])
    return b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header) + chunk(b"IDAT", zlib.compress(data)) + chunk(b"IEND", b"")


BAD_FILES = {
    "empty": (b"", "empty"),
    "text": (b"I am not a photo\n", "not an image"),
    "truncated JPEG": (jpeg()[:5000], "cut short"),
    "JPEG cut in its header": (jpeg()[:100], "cut short"),
    "truncated PNG": (png(100, 100), "cut short"),
    "20,000×20,000": (png(20_000, 20_000, bytes(2501 * 20_000)), "too large"),
    "bomb": (png(60_000, 60_000), "too large"),
    "just too large": (png(photo.MAX_PIXELS + 1, 1), "too large"),
}


@pytest.mark.parametrize(("content", "message"), BAD_FILES.values(), ids=BAD_FILES)
def test_bad_files(tmp_path: Path, content: bytes, message: str) -> None:
    path = tmp_path / "photo.jpg"
    path.write_bytes(content)
    with pytest.raises(InputError, match=message) as caught:
        read_photo(path)
    assert str(caught.value).startswith(f"{path}: ")
    assert "\n" not in str(caught.value)


def test_the_largest_photo_is_read(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(photo, "MAX_PIXELS", 6)
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 4)  # Pillow warns here, and pytest makes warnings errors
    Image.new("RGB", (3, 2)).save(tmp_path / "a.png")
    assert read_photo(tmp_path / "a.png").size == (3, 2)
    Image.new("RGB", (7, 1)).save(tmp_path / "a.png")
    with pytest.raises(InputError, match="too large"):
        read_photo(tmp_path / "a.png")


def test_not_a_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(InputError, match="no such file"):
        read_photo(tmp_path / "missing.jpg")
    with pytest.raises(InputError, match="not a file"):
        read_photo(tmp_path)
    (tmp_path / "locked.jpg").write_bytes(jpeg())

    def refuse(*_: object) -> None:
        raise PermissionError(13, "Permission denied")

    monkeypatch.setattr(Path, "open", refuse)  # root may read everything
    with pytest.raises(InputError, match="permission denied"):
        read_photo(tmp_path / "locked.jpg")


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    for name in ("b.jpg", "a.PNG", "notes.txt", "film.mpg", ".hidden.jpg", "cat[1].jpg"):
        (tmp_path / name).touch()
    (tmp_path / "album.jpg").mkdir()
    (tmp_path / "album.jpg" / "c.jpg").touch()
    return tmp_path


def test_a_folder_is_its_photos(folder: Path) -> None:
    assert [p.name for p in find_photos([folder])] == ["a.PNG", "b.jpg", "cat[1].jpg"]


def test_globs_and_files(folder: Path) -> None:
    assert [p.name for p in find_photos([f"{folder}/*.jpg"])] == ["b.jpg", "cat[1].jpg"]
    assert [p.name for p in find_photos([f"{folder}/**/*.jpg"])] == ["c.jpg", "b.jpg", "cat[1].jpg"]
    assert find_photos([folder / "cat[1].jpg"]) == [folder / "cat[1].jpg"]
    assert find_photos([folder / "b.jpg", f"{folder}/*.PNG", folder]) == [
        folder / name for name in ("b.jpg", "a.PNG", "cat[1].jpg")
    ]
    assert find_photos([folder / "missing.jpg"]) == [folder / "missing.jpg"]  # named by read_photo


@pytest.mark.parametrize("pattern", ["*.gif", "empty"])
def test_nothing_there(tmp_path: Path, pattern: str) -> None:
    (tmp_path / "empty").mkdir()
    with pytest.raises(InputError, match="no photo there"):
        find_photos([tmp_path / pattern])


def test_unreadable_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*_: object) -> None:
        raise PermissionError(13, os.strerror(13))

    monkeypatch.setattr(Path, "iterdir", refuse)  # root may read everything
    with pytest.raises(InputError, match="cannot be read"):
        find_photos([tmp_path])
