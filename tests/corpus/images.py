"""Photos: damaged bytes of every format, lying headers, odd metadata, every mode and shape, and what is no photo."""

from __future__ import annotations

import io
import struct
import zlib
from collections.abc import Callable
from functools import partial
from itertools import cycle, islice

from . import bytes as mutations
from .bases import noise
from .case import Case, Make, Place, fifo

FORMATS = {
    "jpeg": ("jpg", "JPEG", {}),
    "progressive": ("jpg", "JPEG", {"progressive": True}),
    "png": ("png", "PNG", {}),
    "gif": ("gif", "GIF", {}),
    "webp": ("webp", "WEBP", {"lossless": True}),
    "tiff": ("tif", "TIFF", {}),
    "tiff-lzw": ("tif", "TIFF", {"compression": "tiff_lzw"}),
    "bmp": ("bmp", "BMP", {}),
    "ppm": ("ppm", "PPM", {}),
    "tga": ("tga", "TGA", {}),
    "ico": ("ico", "ICO", {}),
    "jpeg2000": ("jp2", "JPEG2000", {}),
    "avif": ("avif", "AVIF", {}),
    "dds": ("dds", "DDS", {}),
    "pcx": ("pcx", "PCX", {}),
    "sgi": ("sgi", "SGI", {}),
    "icns": ("icns", "ICNS", {}),
    "im": ("im", "IM", {}),
    "qoi": ("qoi", "QOI", {}),
}
MODES = ["1", "L", "P", "PA", "LA", "La", "RGB", "RGBA", "RGBa", "RGBX", "CMYK", "YCbCr", "LAB", "HSV", "I", "F"]
MODES += ["I;16", "I;16L", "I;16B", "I;16N"]
SIDES = [(1, 1), (1, 2), (2, 1), (1, 3000), (3000, 1), (1, 30000), (30000, 1), (65000, 2), (3, 20000), (1, 500000)]
NAMES = [
    "a\nb.jpg", "a\rb.jpg", "\x1b[31mred\x1b[0m.jpg", "tab\t.jpg", "\x07bell.jpg", "ünï-写真.jpg", "\udcff\udcfe.jpg",
    "x" * 251 + ".jpg", "[a]*?.jpg", "...jpg", ".jpg", "--help.jpg", " .jpg", "~", "$HOME.jpg", "%s%n.jpg", "{0}.jpg",
    "\u202egpj.exe.jpg", "\u2028line.jpg", "[bold]rich[/bold].jpg", "[/].jpg", "photo", "photo.mp4", "photo.txt",
    "a\\b.jpg",
]  # fmt: skip


def inputs() -> list[tuple[str, Make]]:
    """All of this kind."""
    single = list(mutations.ALL)
    pairs = cycle([(name, "tail") for name in single] + [("cut", name) for name in single])
    made: list[tuple[str, Make]] = []
    for number, name in enumerate(FORMATS):
        for mutation in single:
            made.append((f"{name}-{mutation}", partial(damaged, name, (mutation,))))
        for pair in islice(pairs, 2 + number % 2):
            made.append((f"{name}-{'-'.join(pair)}", partial(damaged, name, pair)))
    made += [(f"mode-{mode.replace(';', '')}-array", partial(in_memory, mode)) for mode in MODES]
    made += [(f"mode-{mode.replace(';', '')}-file", partial(of_mode, mode)) for mode in MODES]
    made += [(f"side-{w}x{h}", partial(of_size, (w, h))) for w, h in SIDES]
    made += [(f"name-{number}", partial(named, name, None)) for number, name in enumerate(NAMES)]
    made += [(f"name-broken-{number}", partial(named, name, b"broken")) for number, name in enumerate(NAMES)]
    made += [(name, partial(content, *parts)) for name, parts in CONTENTS.items()]
    made += [(f"png-{name}", partial(png_of, make)) for name, make in CHUNKS.items()]
    made += [(f"exif-{name}", partial(exif, block)) for name, block in EXIF.items()]
    made += [(function.__name__.replace("_", "-"), function) for function in PLACES]
    made += [(f"array-{number}", partial(of_array, source)) for number, source in enumerate(ARRAYS)]
    return made


def damaged(name: str, names: tuple[str, ...], place: Place) -> Case:
    suffix, format, options = FORMATS[name]
    size = (64, 64) if name in ("icns", "ico") else (40, 30)
    base = place.bases.image(format, "RGBA" if name == "icns" else "RGB", size, **options)
    return place.interpret(place.file(f"photo.{suffix}", mutations.composed(names, base, place.rng)))


def in_memory(mode: str, place: Place) -> Case:
    size = (place.rng.randrange(1, 50), place.rng.randrange(1, 50))
    source = f"image = __import__('corpus.bases').bases.noise({mode!r}, {size})"
    return place.python(f"{source}\niared2.Predictor(iared2.load({str(place.bases.model)!r}))(image).save('out')")


def of_mode(mode: str, place: Place) -> Case:
    image = noise(mode, (20, 20))
    for format, suffix in (("PNG", "png"), ("TIFF", "tif"), ("JPEG", "jpg"), ("GIF", "gif")):
        if (mode, format) == ("I", "PNG"):
            continue  # Pillow is about to give it up
        buffer = io.BytesIO()
        try:
            image.save(buffer, format)
        except (OSError, KeyError, ValueError):
            continue
        return place.interpret(place.file(f"photo.{suffix}", buffer.getvalue()))
    noise("RGBA", (20, 20)).save(buffer, "TIFF", compression="tiff_deflate")  # no format has it
    return place.interpret(place.file("photo.tif", buffer.getvalue()))


def of_size(size: tuple[int, int], place: Place) -> Case:
    return place.interpret(place.file("photo.png", place.bases.image("PNG", "RGB", size)))


def named(name: str, data: bytes | None, place: Place) -> Case:
    place.file(name, data or place.bases.image("JPEG"))
    return place.interpret(f"in/{name}")


def content(name: str, data: bytes, place: Place) -> Case:
    return place.interpret(place.file(name, data))


def png_of(make: Callable[[Place], bytes], place: Place) -> Case:
    return place.interpret(place.file("photo.png", make(place)))


def chunk(kind: bytes, data: bytes) -> bytes:
    """One chunk of a PNG."""
    return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))


def png(
    *chunks: bytes, width: int = 4, height: int = 4, depth: int = 8, color: int = 2, data: bytes | None = None
) -> bytes:
    """A PNG with these chunks before its pixels, which may be fewer or more than its header says."""
    header = struct.pack(">IIBBBBB", width, height, depth, color, 0, 0, 0)
    pixels = zlib.compress((b"\0" + bytes(range(12))) * 4) if data is None else data
    body = (chunk(b"IHDR", header), *chunks, chunk(b"IDAT", pixels), chunk(b"IEND", b""))
    return b"\x89PNG\r\n\x1a\n" + b"".join(body)


def bomb(megabytes: int) -> bytes:
    """Zeros, compressed."""
    return zlib.compress(bytes(megabytes << 20), 9)


CHUNKS: dict[str, Callable[[Place], bytes]] = {
    "huge-sides": lambda p: png(width=2**31 - 1, height=2**31 - 1),
    "wide": lambda p: png(width=2**31 - 1, height=1),
    "too-large": lambda p: png(width=9460, height=9460),
    "large-but-allowed-without-pixels": lambda p: png(width=9459, height=9459),
    "large-and-allowed": lambda p: png(
        width=9000, height=9000, color=0, data=zlib.compress(bytes(9001) * 9000, 1)
    ),
    "no-width": lambda p: png(width=0),
    "no-height": lambda p: png(height=0),
    "depth": lambda p: png(depth=7),
    "color-type": lambda p: png(color=5),
    "palette-missing": lambda p: png(color=3),
    "palette-short": lambda p: png(chunk(b"PLTE", b"\1\2\3"), color=3),
    "palette-odd": lambda p: png(chunk(b"PLTE", b"\1\2"), color=3),
    "pixel-bomb": lambda p: png(data=bomb(300)),
    "no-pixels": lambda p: png(data=b""),
    "iccp-noise": lambda p: png(chunk(b"iCCP", b"name\0\0" + p.rng.randbytes(50))),
    "iccp-bomb": lambda p: png(chunk(b"iCCP", b"name\0\0" + bomb(300))),
    "iccp-profile": lambda p: png(chunk(b"iCCP", b"name\0\0" + zlib.compress(b"not a profile"))),
    "iccp-empty": lambda p: png(chunk(b"iCCP", b"")),
    "ztxt-bomb": lambda p: png(chunk(b"zTXt", b"key\0\0" + bomb(300))),
    "ztxt-many": lambda p: png(*[chunk(b"zTXt", b"key%d\0\0" % i + bomb(1)) for i in range(80)]),
    "ztxt-method": lambda p: png(chunk(b"zTXt", b"key\0\7" + bomb(1))),
    "ztxt-noise": lambda p: png(chunk(b"zTXt", b"key\0\0noise")),
    "itxt-bomb": lambda p: png(chunk(b"iTXt", b"key\0\1\0\0\0" + bomb(300))),
    "itxt-noise": lambda p: png(chunk(b"iTXt", b"key\0\1\0en\0\xff\xfe\0\xff")),
    "itxt-short": lambda p: png(chunk(b"iTXt", b"key")),
    "text-latin": lambda p: png(chunk(b"tEXt", b"k\xe4\0" + bytes(range(256)))),
    "text-large": lambda p: png(chunk(b"tEXt", b"key\0" + bytes(3 << 20))),
    "text-many": lambda p: png(*[chunk(b"tEXt", b"key\0value")] * 5000),
    "trns-long": lambda p: png(chunk(b"tRNS", bytes(100))),
    "trns-short": lambda p: png(chunk(b"tRNS", b"\1")),
    "trns-with-alpha": lambda p: png(chunk(b"tRNS", bytes(6)), color=6),
    "gamma-zero": lambda p: png(chunk(b"gAMA", bytes(4))),
    "gamma-short": lambda p: png(chunk(b"gAMA", b"\1")),
    "density-short": lambda p: png(chunk(b"pHYs", b"\1\2")),
    "density-zero": lambda p: png(chunk(b"pHYs", bytes(9))),
    "chroma-zero": lambda p: png(chunk(b"cHRM", bytes(32))),
    "exif-noise": lambda p: png(chunk(b"eXIf", p.rng.randbytes(60))),
    "two-headers": lambda p: png(chunk(b"IHDR", struct.pack(">IIBBBBB", 9000, 9000, 8, 2, 0, 0, 0))),
    "animation-of-none": lambda p: png(chunk(b"acTL", bytes(8))),
    "animation-of-many": lambda p: png(chunk(b"acTL", b"\x7f\xff\xff\xff" * 2)),
    "animation-huge-frame": lambda p: png(
        chunk(b"acTL", struct.pack(">II", 2, 0)), chunk(b"fcTL", struct.pack(">IIIIIHHBB", 0, 9**9, 9**9, 0, 0, 1, 0, 0,
        0))
    ),
    "unknown-chunk": lambda p: png(chunk(b"ABCD", p.rng.randbytes(100))),
    "chunk-of-huge-size": lambda p: png().replace(b"\0\0\0\x0dIHDR", b"\xff\xff\xff\xffIHDR"),
    "exif-turn-in-text": lambda p: png(chunk(b"zTXt", b"Raw profile type exif\0\0" + zlib.compress(b"\nexif\n 4\nzz"))),
    "xmp-turn": lambda p: png(chunk(b"iTXt", b"XML:com.adobe.xmp\0\0\0\0\0<x tiff:Orientation='99'/>")),
    "xmp-entities": lambda p: png(chunk(b"iTXt", b"XML:com.adobe.xmp\0\0\0\0\0<!DOCTYPE x [<!ENTITY a 'b'>]>&a;")),
}  # fmt: skip


def _tag(number: int, kind: int, count: int, value: bytes) -> bytes:
    return struct.pack("<HHI", number, kind, count) + value.ljust(4, b"\0")[:4]


def _tiff(*tags: bytes, next: int = 0) -> bytes:
    return b"II*\0\x08\0\0\0" + struct.pack("<H", len(tags)) + b"".join(tags) + struct.pack("<I", next)


EXIF: dict[str, bytes] = {
    **{f"turn-{n}": _tiff(_tag(274, 3, 1, struct.pack("<H", n))) for n in (0, 5, 6, 9, 65535)},
    "turn-text": _tiff(_tag(274, 2, 4, b"abc\0")),
    "turn-fraction": _tiff(_tag(274, 5, 1, struct.pack("<I", 8))),
    "turn-many": _tiff(_tag(274, 3, 2, struct.pack("<HH", 6, 8))),
    "turn-none": _tiff(_tag(274, 3, 0, b"")),
    "turn-huge-count": _tiff(_tag(274, 3, 2**32 - 1, b"\1\0\0\0")),
    "turn-signed": _tiff(_tag(274, 9, 1, struct.pack("<i", -6))),
    "turn-float": _tiff(_tag(274, 11, 1, struct.pack("<f", float("nan")))),
    "kind-unknown": _tiff(_tag(274, 99, 1, b"\6")),
    "circle": _tiff(_tag(274, 3, 1, b"\6"), next=8),
    "sub-circle": _tiff(_tag(274, 3, 1, b"\6"), _tag(34665, 4, 1, struct.pack("<I", 8))),
    "gps-circle": _tiff(_tag(274, 3, 1, b"\6"), _tag(34853, 4, 1, struct.pack("<I", 8))),
    "maker-note": _tiff(_tag(274, 3, 1, b"\6"), _tag(37500, 7, 9999, struct.pack("<I", 99999))),
    "outside": _tiff(_tag(271, 2, 9999, struct.pack("<I", 2**31)), _tag(274, 3, 1, b"\6")),
    "many-tags": b"II*\0\x08\0\0\0\xff\xff" + _tag(274, 3, 1, b"\6") * 200,
    "short": b"II*\0",
    "no-header": b"noise and nothing else",
    "empty": b"",
    "thumbnail": _tiff(_tag(274, 3, 1, b"\6"), next=26) + _tiff(_tag(513, 4, 1, b"\xff" * 4))[8:],
}


def exif(block: bytes, place: Place) -> Case:
    """A JPEG, or a WebP, with this block."""
    jpeg = place.bases.image("JPEG")
    marker = b"\xff\xe1" + struct.pack(">H", len(block) + 8) + b"Exif\0\0" + block
    return place.interpret(place.file("photo.jpg", jpeg[:2] + marker + jpeg[2:]))


def _gif(width: int, height: int, frames: int = 1, side: int = 2) -> bytes:
    frame = b",\0\0\0\0" + struct.pack("<HH", side, side) + b"\0\x02\x03\x84\x01\x05\0"
    return b"GIF89a" + struct.pack("<HH", width, height) + b"\x80\0\0" + b"\0\0\0\xff\xff\xff" + frame * frames + b";"


def _jpeg(height: int = 8, width: int = 8, precision: int = 8, parts: int = 1) -> bytes:
    frame = struct.pack(">BHHB", precision, height, width, parts) + b"\1\x11\0" * parts
    return b"\xff\xd8\xff\xc0" + struct.pack(">H", len(frame) + 2) + frame + b"\xff\xda\0\x08\1\1\0\0\x3f\0" + bytes(99)


def _strips(*tags: bytes) -> bytes:
    sizes = _tag(256, 4, 1, struct.pack("<I", 4)), _tag(257, 4, 1, struct.pack("<I", 4))
    return _tiff(*sizes, *tags)


CONTENTS: dict[str, tuple[str, bytes]] = {
    "empty": ("photo.jpg", b""),
    "one-byte": ("photo.jpg", b"\xff"),
    "zeros": ("photo.jpg", bytes(5000)),
    "text": ("photo.jpg", b"I am not a photo\n" * 50),
    "html": ("photo.jpg", b"<!DOCTYPE html><html><body>404 not found</body></html>"),
    "svg": ("photo.jpg",
        b"<svg xmlns='http://www.w3.org/2000/svg' width='9' height='9'><image href='http://x/'/></svg>"),
    "eps-as-jpg": ("photo.jpg", b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 9 9\n%%EndComments\nshowpage\n%%EOF\n"),
    "eps": ("photo.eps", b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 9 9\n%%EndComments\n(out/x) (w) file\n%%EOF\n"),
    "eps-huge": ("photo.eps", b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 99999 99999\n%%EndComments\n%%EOF\n"),
    "eps-with-preview": ("photo.eps", b"\xc5\xd0\xd3\xc6" + struct.pack("<IIIIII", 32, 40, 0, 0, 0,
        0) + b"\xff\xff%!PS"),
    "ps-as-png": ("photo.png", b"%!PS\nshowpage\n"),
    "pdf-as-jpg": ("photo.jpg", b"%PDF-1.7\n1 0 obj<</Type/Catalog>>endobj\ntrailer<</Root 1 0 R>>\n%%EOF"),
    "zip": ("photo.png", b"PK\3\4" + bytes(100)),
    "gzip": ("photo.png", b"\x1f\x8b\x08" + bytes(50)),
    "elf": ("photo.png", b"\x7fELF" + bytes(100)),
    "pickle": ("photo.png", b"\x80\4cos\nsystem\n(S'touch outside/code-was-run'\ntR."),
    "wmf": ("photo.wmf", b"\xd7\xcd\xc6\x9a\0\0" + bytes(40)),
    "fits": ("photo.fits", b"SIMPLE  =                    T".ljust(80) + b"END".ljust(80)),
    "fits-huge": ("photo.fits", b"".join(c.ljust(80) for c in (b"SIMPLE  = T", b"BITPIX  = 8", b"NAXIS   = 2",
        b"NAXIS1  = 999999", b"NAXIS2  = 999999", b"END"))),
    "hdf5": ("photo.h5", b"\x89HDF\r\n\x1a\n" + bytes(50)),
    "grib": ("photo.grib", b"GRIB\0\0\0\1" + bytes(50)),
    "bufr": ("photo.bufr", b"BUFR\0\0\0\1" + bytes(50)),
    "mpeg": ("photo.mpg", b"\0\0\1\xb3" + bytes(50)),
    "psd": ("photo.psd", b"8BPS\0\1" + bytes(6) + struct.pack(">HIIHH", 3, 9, 9, 8, 3) + bytes(40)),
    "psd-huge": ("photo.psd", b"8BPS\0\1" + bytes(6) + struct.pack(">HIIHH", 3, 2**31, 2**31, 8, 3) + bytes(40)),
    "xbm": ("photo.xbm", b"#define a_width 8\n#define a_height 8\nstatic char a_bits[] = {0xzz};"),
    "xpm": ("photo.xpm", b'/* XPM */\nstatic char *a[]={"1 1 99999 9","a c red","a"};'),
    "fli": ("photo.fli", struct.pack("<IHHHHH", 200, 0xAF11, 1, 99, 99, 8) + bytes(200)),
    "msp": ("photo.msp", b"DanM" + bytes(40)),
    "sun": ("photo.ras", struct.pack(">8I", 0x59A66A95, 2**20, 2**20, 8, 0, 1, 0, 0)),
    "blp": ("photo.blp", b"BLP1" + bytes(200)),
    "ftex": ("photo.ftc", b"FTEX" + bytes(100)),
    "spider": ("photo.spider", struct.pack("<27f", *[1.0] * 27) + bytes(1000)),
    "mic": ("photo.mic", b"\xd0\xcf\x11\xe0\xa1\xb1\x1a\xe1" + bytes(600)),
    "ppm-ascii": ("photo.ppm", b"P3 2 2 255 1 2 3 4 5 6 7 8 9 10 11 999999999999999999999999"),
    "ppm-huge": ("photo.ppm", b"P6 99999999 99999999 255 "),
    "ppm-negative": ("photo.ppm", b"P6 -5 -5 255 abc"),
    "ppm-long-number": ("photo.ppm", b"P6 " + b"9" * 5000 + b" 1 255 abc"),
    "ppm-float": ("photo.pfm", b"Pf 2 2 -1.0\n" + struct.pack("<4f", float("nan"), float("inf"), 1e38, -1e38)),
    "ppm-float-scale": ("photo.pfm", b"Pf 2 2 nan\n" + bytes(16)),
    "tiff-circle": ("photo.tif", _tiff(next=8)),
    "tiff-no-tags": ("photo.tif", _tiff()),
    "tiff-no-strips": ("photo.tif", _strips()),
    "tiff-strips-outside": ("photo.tif", _strips(_tag(273, 4, 1, b"\xff\xff\xff\x7f"), _tag(279, 4, 1,
        b"\xff\xff\xff\x7f"))),
    "tiff-many-samples": ("photo.tif", _strips(_tag(277, 3, 1, b"\xff\xff"), _tag(258, 3, 1, b"\x08"))),
    "tiff-huge-count": ("photo.tif", _strips(_tag(258, 3, 2**32 - 1, b"\x08"))),
    "tiff-big": ("photo.tif", b"II+\0\x08\0\0\0" + struct.pack("<Q", 16) + struct.pack("<Q", 2**60)),
    "tiff-float": ("photo.tif", _strips(_tag(258, 3, 1, b"\x20"), _tag(273, 4, 1, b"\x08"), _tag(339, 3, 1, b"\x03"))),
    "gif-no-frames": ("photo.gif", b"GIF89a\4\0\4\0\0\0\0;"),
    "gif-no-sides": ("photo.gif", _gif(0, 0)),
    "gif-huge": ("photo.gif", _gif(65535, 65535)),
    "gif-frame-outside": ("photo.gif", _gif(2, 2, side=60000)),
    "gif-many-frames": ("photo.gif", _gif(2, 2, frames=20000)),
    "jpeg-no-height": ("photo.jpg", _jpeg(height=0)),
    "jpeg-huge": ("photo.jpg", _jpeg(65500, 65500)),
    "jpeg-12-bits": ("photo.jpg", _jpeg(precision=12)),
    "jpeg-no-parts": ("photo.jpg", _jpeg(parts=0)),
    "jpeg-two-parts": ("photo.jpg", _jpeg(parts=2)),
    "jpeg-no-tables": ("photo.jpg", _jpeg()),
    "bmp-huge": ("photo.bmp", b"BM" + struct.pack("<IHHI", 99, 0, 0, 54) + struct.pack("<IiiHHIIiiII", 40, 2**30, 2**30,
        1, 24, 0, 0, 0, 0, 0, 0)),
    "bmp-negative": ("photo.bmp", b"BM" + struct.pack("<IHHI", 99, 0, 0, 54) + struct.pack("<IiiHHIIiiII", 40, -4, -4,
        1, 24, 0, 0, 0, 0, 0, 0) + bytes(99)),
    "bmp-colors": ("photo.bmp", b"BM" + struct.pack("<IHHI", 99, 0, 0, 54) + struct.pack("<IiiHHIIiiII", 40, 4, 4, 1, 8,
        0, 0, 0, 0, 2**31, 0) + bytes(99)),
    "ico-none": ("photo.ico", b"\0\0\1\0\0\0"),
    "ico-many": ("photo.ico", b"\0\0\1\0\xff\xff" + bytes(64)),
    "ico-outside": ("photo.ico", b"\0\0\1\0\1\0\x10\x10\0\0\1\0\x20\0" + b"\xff" * 8),
    "webp-huge": ("photo.webp", b"RIFF\x1e\0\0\0WEBPVP8X\x0a\0\0\0\x10\0\0\0" + b"\xff" * 6 + bytes(8)),
    "riff": ("photo.webp", b"RIFF\xff\xff\xff\xffWAVEfmt "),
    "avif-brand": ("photo.avif", b"\0\0\0\x1cftypavif\0\0\0\0avifmif1" + bytes(40)),
    "heic": ("photo.heic", b"\0\0\0\x18ftypheic\0\0\0\0mif1heic" + bytes(40)),
    "jp2-box": ("photo.jp2", b"\0\0\0\x0cjP  \r\n\x87\n" + b"\xff" * 40),
    "dds-huge": ("photo.dds", b"DDS |\0\0\0" + b"\xff" * 116),
    "qoi-huge": ("photo.qoi", b"qoif" + b"\xff" * 8 + b"\4\0" + bytes(20)),
    "lying-suffix": ("photo.png",
        b"GIF89a\2\0\2\0\x80\0\0\0\0\0\xff\xff\xff,\0\0\0\0\2\0\2\0\0\x02\x03\x84\x01\x05\0;"),
}  # fmt: skip


def a_directory(place: Place) -> Case:
    (place.inside / "photo.jpg").mkdir()
    return place.interpret(place.inside / "photo.jpg")


def link_circle(place: Place) -> Case:
    path = place.inside / "photo.jpg"
    path.symlink_to(path)
    return place.interpret(path)


def link_circle_in_folder(place: Place) -> Case:
    place.file("a/photo.jpg", place.bases.image("JPEG"))
    (place.inside / "a" / "b").symlink_to(place.inside / "a")
    return place.interpret(f"{place.inside}/**/*.png")


def link_to_nowhere(place: Place) -> Case:
    path = place.inside / "photo.jpg"
    path.symlink_to(place.inside / "nowhere")
    return place.interpret(path)


def link_to_zero(place: Place) -> Case:
    path = place.inside / "photo.jpg"
    path.symlink_to("/dev/zero")
    return place.interpret(path)


def pipe(place: Place) -> Case:
    return place.interpret(fifo(place, "photo.jpg"))


def pipe_in_folder(place: Place) -> Case:
    return place.interpret(fifo(place, "photo.jpg").parent)


def missing(place: Place) -> Case:
    return place.interpret(place.inside / "photo.jpg")


def missing_with_newline(place: Place) -> Case:
    return place.interpret("in/a\nb\x1b[31m.jpg")


def too_long_a_name(place: Place) -> Case:
    return place.interpret("in/" + "x" * 5000)


def nul_in_the_name(place: Place) -> Case:
    return place.interpret("in/a\0b.jpg")


def empty_name(place: Place) -> Case:
    return place.interpret("")


def a_url(place: Place) -> Case:
    return place.interpret("https://example.com/photo.jpg")


def below_a_file(place: Place) -> Case:
    return place.interpret(place.file("photo.jpg", place.bases.image("JPEG")) / "x.jpg")


def endless_glob(place: Place) -> Case:
    return place.interpret(f"{place.inside}/[z]**/" + "*/" * 50)


def output_named_like_a_file(place: Place) -> Case:
    place.out.write_text("a file")
    photo = place.file("photo.jpg", place.bases.image("JPEG"))
    case = place.interpret(photo)
    place.out.unlink()
    (place.root / "out").symlink_to(place.root / "out")
    return case


def output_with_escape(place: Place) -> Case:
    photo = place.file("photo.jpg", place.bases.image("JPEG"))
    place.file("file", "x")
    argv = place.interpret(photo).argv
    return Case(place.root, tuple(f"{place.inside}/file/\x1b[31m\n" if a == str(place.out) else a for a in argv))


def twin_names(place: Place) -> Case:
    """Two files of one name in one call."""
    one, two = (place.file(f"{folder}/a.jpg", place.bases.image("JPEG")) for folder in "xy")
    argv = list(place.interpret(one).argv)
    return Case(place.root, (*argv[:2], str(one), str(two), *argv[3:]))


def a_closed_file(place: Place) -> Case:
    path = place.file("photo.jpg", place.bases.image("JPEG"))
    path.chmod(0)
    return place.interpret(path)


PLACES: list[Make] = [
    a_directory, link_circle, link_circle_in_folder, link_to_nowhere, link_to_zero, pipe, pipe_in_folder, missing,
    missing_with_newline, too_long_a_name, nul_in_the_name, empty_name, a_url, below_a_file, endless_glob,
    output_named_like_a_file, output_with_escape, twin_names, a_closed_file,
]  # fmt: skip
ARRAYS = [
    "np.zeros((0, 5, 3), np.uint8)", "np.zeros((5, 5), np.uint8)", "np.zeros((5, 5, 4), np.uint8)",
    "np.full((5, 5, 3), np.nan)", "np.zeros((3, 5, 5), np.uint8)", "np.zeros((2, 5, 5, 3), np.uint8)",
    "np.array(None)", "np.zeros((5, 5, 3), bool)", "np.zeros((5, 5, 3), complex)",
    "np.zeros((5, 5, 3), np.uint8)[::-1, ::2]",
    "Image.new('RGB', (0, 0))", "Image.new('RGB', (0, 5))", "Image.new('L', (5, 0))", "Image.new('P', (5, 5))",
    "Image.new('F', (5, 5), float('nan'))", "Image.new('F', (5, 5), float('inf'))", "Image.new('I', (5, 5), -2**31)",
    "None", "5", "b'bytes'", "torch.zeros(3, 5, 5)", "[[1, 2]]",
]  # fmt: skip


def of_array(source: str, place: Place) -> Case:
    model = str(place.bases.model)
    return place.python(f"iared2.Predictor(iared2.load({model!r}))({source}).save('out')")
