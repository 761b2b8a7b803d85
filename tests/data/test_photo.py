"""Every kind of image comes out in the right colours, and everything that is not a photo is one clear line."""

from __future__ import annotations

import io
import os
import struct
import zlib
from pathlib import Path

import numpy as np
import pytest
import skimage.data
from PIL import Image

from iared2 import InputError
from iared2.data import photo
from iared2.data.images import DataConfig, open_samples
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


def chunk(kind: bytes, content: bytes, checksum: int | None = None) -> bytes:
    checksum = zlib.crc32(kind + content) if checksum is None else checksum
    return len(content).to_bytes(4, "big") + kind + content + checksum.to_bytes(4, "big")


def segment(marker: int, content: bytes) -> bytes:
    return bytes([0xFF, marker]) + (len(content) + 2).to_bytes(2, "big") + content


TURNED = b"Exif\0\0MM\0*\0\0\0\x08\0\x01\x01\x12\0\x03\0\0\0\x01\0\x06\0\0\0\0\0\0"
ODD = {
    "zTXt, not compressed": chunk(b"zTXt", b"key\0\0text"),
    "zTXt, unknown method": chunk(b"zTXt", b"key\0\7text"),
    "zTXt, a bomb": chunk(b"zTXt", b"key\0\0" + zlib.compress(bytes(100_000_000))),
    "zTXt, many": b"".join(chunk(b"zTXt", b"%d\0\0" % i + zlib.compress(bytes(1_000_000))) for i in range(70)),
    "iTXt, a bomb": chunk(b"iTXt", b"key\0\1\0\0\0" + zlib.compress(bytes(10_000_000))),
    "iTXt, not UTF-8": chunk(b"iTXt", b"key\0\0\0\xff\0\xff\0\xff"),
    "tEXt, wrong checksum": chunk(b"tEXt", b"key\0text", 1),
    "iCCP, not compressed": chunk(b"iCCP", b"name\0\0profile"),
    "iCCP, unknown method": chunk(b"iCCP", b"name\0\5profile"),
    "eXIf, rubbish": chunk(b"eXIf", b"rubbish"),
    "eXIf, wrong checksum": chunk(b"eXIf", TURNED[6:], 1),
    "pHYs, short": chunk(b"pHYs", b"1"),
    "JPEG, profile without a number": segment(0xE2, b"ICC_PROFILE\0"),
    "JPEG, several pictures": segment(0xE2, b"MPF\0MM\0*\0\0\0\x08\0\1\xb0\1\0\4\0\0\0\2"),
    "JPEG, Photoshop": segment(0xED, b"Photoshop 3.0\x008BIM\3"),
    "JPEG, a maker's notes": segment(0xE1, TURNED.replace(b"\x01\x12\0\x03", b"\x92\x7c\xff\xff")),
}


@pytest.mark.parametrize("odd", ODD)
def test_odd_metadata_does_no_harm(tmp_path: Path, odd: str) -> None:
    """The pixels are all there; and what the rest says of their direction counts."""
    picture, turned = Image.fromarray(skimage.data.chelsea()[:40, :60]), "eXIf" not in odd and "maker" not in odd
    is_jpeg, data = odd.startswith("JPEG"), io.BytesIO()
    picture.save(data, "JPEG" if is_jpeg else "PNG")
    at = 2 if is_jpeg else 33  # behind the header
    exif = (segment(0xE1, TURNED) if is_jpeg else chunk(b"eXIf", TURNED[6:])) if turned else b""
    (tmp_path / "a.jpg").write_bytes(data.getvalue()[:at] + exif + ODD[odd] + data.getvalue()[at:])
    found = np.asarray(read_photo(tmp_path / "a.jpg"))
    assert np.array_equal(found, np.rot90(Image.open(data), -1) if turned else Image.open(data))


@pytest.mark.parametrize("head", [b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 9 9\n%%EndComments\n", b"%PDF-1.4\n"])
def test_no_format_but_those_of_photos_is_opened(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, head: bytes) -> None:
    """Of a file of any name. An EPS would start Ghostscript, which runs what is in it."""
    Image.init()
    for name in ("EPS", "FITS", "WMF", "GBR", "FLI", "SPIDER"):
        monkeypatch.setitem(Image.OPEN, name, (lambda *_: pytest.fail("opened"), None))
    for folder in ("cat", "dog"):
        (tmp_path / folder).mkdir()
        (tmp_path / folder / "a.jpg").write_bytes(head + bytes(200))
    with pytest.raises(InputError, match="not an image that can be read here"):
        read_photo(tmp_path / "cat" / "a.jpg")
    samples = open_samples(DataConfig(str(tmp_path)), "train")
    with pytest.raises(Image.UnidentifiedImageError):
        samples[0]


def test_every_image_is_opened_in_one_place() -> None:
    """Which is the one that knows the formats."""
    sources = Path(photo.__file__).parents[1].rglob("*.py")
    assert [file.name for file in sources if "Image.open(" in file.read_text(encoding="utf-8")] == ["photo.py"]


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


def icon(content: bytes) -> bytes:
    """An .ico whose header says 16×16 of whatever is in it."""
    return struct.pack("<3H4B2H2I", 0, 1, 1, 16, 16, 0, 0, 1, 32, len(content), 22) + content


BAD_FILES = {
    "empty": (b"", "empty"),
    "text": (b"I am not a photo\n", "not an image"),
    "truncated JPEG": (jpeg()[:5000], "cut short"),
    "JPEG cut in its header": (jpeg()[:100], "cut short"),
    "truncated PNG": (png(100, 100), "cut short"),
    "20,000×20,000": (png(20_000, 20_000, bytes(2501 * 20_000)), "too large"),
    "bomb": (png(60_000, 60_000), "too large"),
    "just too large": (png(photo.MAX_PIXELS + 1, 1), "too large"),
    "too long for a resize": (png(20_000_000, 1, bytes(2_500_001)), "too large"),
    "too high": (png(1, photo.MAX_SIDE + 1, bytes(2 * photo.MAX_SIDE + 2)), "too large"),
    "an icon with more in it": (icon(png(20_000_000, 1, bytes(2_500_001))), "too large"),
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


def test_globs_where_links_lead_upwards(folder: Path) -> None:
    """Python's own `**` follows both at each of 40 levels. A file has one name, a hidden folder none."""
    for name in ("up", "also_up"):
        (folder / "album.jpg" / name).symlink_to("..")
    (folder / ".hidden").mkdir()
    (folder / ".hidden" / "d.jpg").touch()
    os.mkfifo(folder / "album.jpg" / "pipe.jpg")
    assert [p.name for p in find_photos([f"{folder}/**/*.jpg"])] == ["c.jpg", "b.jpg", "cat[1].jpg"]
    assert [p.name for p in find_photos([f"{folder}/**/album*/**/?.jpg"])] == ["c.jpg"]
    assert [p.name for p in find_photos([f"{folder}/a*/**"])] == ["c.jpg"]


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
