"""Data sets that lie: class folders, parquet, WebDataset tars, lists of videos, and the classes.json beside them."""

from __future__ import annotations

import io
import json
import tarfile
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
from pictures import jpeg, samples_of, write_folder, write_parquet, write_shard

from . import bytes as mutations
from .case import Case, Make, Place, fifo

LABELS = [0, 1] * 4
WHOLE = ("--split", "train")


def inputs() -> list[tuple[str, Make]]:
    """All of this kind."""
    made: list[tuple[str, Make]] = []
    made += [(f"folder-{name}", partial(folder, change)) for name, change in FOLDERS.items()]
    made += [(f"labels-{name}", partial(parquet_labels, labels)) for name, labels in LABEL_LISTS.items()]
    made += [(f"parquet-{name}", partial(table, make)) for name, make in TABLES.items()]
    made += [(f"parquet-bytes-{name}", partial(parquet_damaged, (name,))) for name in mutations.ALL]
    made += [(f"shard-label-{number}", partial(shard_label, text)) for number, text in enumerate(SHARD_LABELS)]
    made += [(f"shard-{name}", partial(shard, make)) for name, make in SHARDS.items()]
    made += [(f"shard-bytes-{name}", partial(shard_damaged, (name,))) for name in mutations.ALL]
    made += [(f"classes-json-{number}", partial(class_names, text)) for number, text in enumerate(CLASS_NAMES)]
    made += [(f"list-{number}", partial(video_list, text)) for number, text in enumerate(LISTS)]
    made += [(f"options-{number}", partial(options, given)) for number, given in enumerate(OPTIONS)]
    made += [(f"train-{name}", partial(train_on, make)) for name, make in TRAINED.items()]
    return made


def folder(change: Callable[[Place, Path], Any], place: Place) -> Case:
    root = write_folder(place.inside / "set")
    return place.evaluate(change(place, root) or root)


def _write(name: str, content: bytes) -> Callable[[Place, Path], Any]:
    def change(place: Place, root: Path) -> None:
        place.file(f"set/{name}", content)

    return change


def _remove(pattern: str) -> Callable[[Place, Path], Any]:
    def change(place: Place, root: Path) -> None:
        for path in root.glob(pattern):
            path.unlink()

    return change


def _rename(old: str, new: str) -> Callable[[Place, Path], Any]:
    def change(place: Place, root: Path) -> None:
        (root / new).parent.mkdir(parents=True, exist_ok=True)
        (root / old).rename(root / new)

    return change


def _link(name: str, target: str) -> Callable[[Place, Path], Any]:
    return lambda place, root: (root / name).symlink_to(target)


def _pipe(name: str) -> Callable[[Place, Path], Any]:
    def change(place: Place, root: Path) -> None:
        fifo(place, f"set/{name}")

    return change


def _empty(place: Place, root: Path) -> Path:
    (place.inside / "empty").mkdir()
    return place.inside / "empty"


FOLDERS: dict[str, Callable[[Place, Path], Any]] = {
    "valid": lambda place, root: None,
    "empty": _empty,
    "missing": lambda place, root: root / "missing\n\x1b[31m",
    "nul": lambda place, root: f"{root}/a\0b",
    "long": lambda place, root: "x" * 5000,
    "is-file": lambda place, root: root / "cat" / "0.jpg",
    "stray-file": _write("stray.jpg", b"x"),
    "stray-newline": _write("a\nb\x1b[31m.jpg", b"x"),
    "text-as-photo": _write("cat/9.jpg", b"text"),
    "empty-photo": _write("cat/9.jpg", b""),
    "eps-as-photo": _write("cat/9.jpg", b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 9 9\n%%EndComments\n%%EOF\n"),
    "other-suffix": _write("cat/9.txt", b"x"),
    "hidden-folder": _write(".git/x.jpg", b"x"),
    "hidden-photo": _write("cat/.x.jpg", b"x"),
    "empty-class": lambda place, root: (root / "empty\nclass").mkdir(),
    "one-class": lambda place, root: _rename("dog", "cat/dog")(place, root),
    "no-photos": _remove("*/*.jpg"),
    "one-photo": _remove("*/[1-3].jpg"),
    "class-newline": _rename("dog", "do\ng\x1b[31m"),
    "class-odd-letters": _rename("dog", "d\udcffg"),
    "class-unicode": _rename("dog", "\u202edög"),
    "three-classes": _write("bird/0.jpg", jpeg(5)),
    "train-only": lambda place, root: (_rename("cat", "train/cat")(place, root), _rename("dog", "train/dog")(place,
        root))[2:],
    "val-of-other-classes": lambda place, root: (_rename("cat", "train/cat")(place, root), _rename("dog",
        "val/dog")(place, root))[2:],
    "val-empty": lambda place, root: (_rename("cat", "val/cat")(place, root), _remove("val/cat/*")(place, root),
        _rename("dog", "train/dog")(place, root))[3:],
    "circle": _link("cat/circle", ".."),
    "circle-as-class": _link("circle", "."),
    "circle-to-itself": _link("loop", "loop"),
    "photo-to-itself": _link("cat/loop.jpg", "loop.jpg"),
    "photo-to-nowhere": _link("cat/x.jpg", "nowhere.jpg"),
    "photo-to-zero": _link("cat/x.jpg", "/dev/zero"),
    "pipe-as-photo": _pipe("cat/x.jpg"),
    "pipe-as-class": _pipe("bird"),
    "pipe-as-set": lambda place, root: fifo(place, "pipe"),
    "pipe-parquet": lambda place, root: fifo(place, "pipe.parquet"),
    "pipe-tar": lambda place, root: fifo(place, "pipe.tar"),
    "pipe-parquet-inside": _pipe("x.parquet"),
    "folder-named-parquet": lambda place, root: (root / "x.parquet").mkdir(),
    "folder-as-photo": lambda place, root: (root / "cat" / "x.jpg").mkdir(),
    "classes-in-files": lambda place, root: (root / "cat.jpg").mkdir(),
    "huge-photo": _write("cat/9.bmp", b"BM" + bytes(16) + b"\xff" * 36),
}  # fmt: skip
LABEL_LISTS: dict[str, Sequence[Any]] = {
    "negative": [-1, 0, 1], "all-negative": [-5, -4], "huge": [0, 1, 10**12], "max": [0, 2**63 - 1], "gap": [0, 7],
        "float": [0.0, 1.0],
    "nan": [float("nan"), 1.0], "null": [0, None, 1], "all-null": [None, None], "text": ["cat", "dog"],
        "numbers-as-text": ["0", "1"],
    "bool": [True, False], "lists": [[0], [1]], "tables": [{"a": 0}, {"a": 1}], "bytes": [b"0", b"1"], "one": [0],
        "same": [1] * 8, "none": [],
    "half": [0.5, 1.5], "million": [0, 1_000_000], "valid": LABELS, "third": [0, 1, 2],
}  # fmt: skip


def parquet_labels(labels: Sequence[Any], place: Place) -> Case:
    """A column of labels of any type."""
    image = pa.array([{"bytes": jpeg(i), "path": None} for i in range(len(labels))], IMAGE)
    path = place.inside / "train.parquet"
    pq.write_table(pa.table({"image": image, "label": pa.array(labels)}), path)
    return place.evaluate(path)


IMAGE = pa.struct([("bytes", pa.binary()), ("path", pa.string())])


def _table(images: Any, labels: Any = LABELS, **columns: Any) -> Callable[[Place], Path]:
    def make(place: Place) -> Path:
        given = images(place) if callable(images) else images
        path = place.inside / "x.parquet"
        pq.write_table(pa.table({"image": given, "label": pa.array(list(labels)[: len(given)]), **columns}), path)
        return path

    return make


def _cells(*cells: Any) -> Any:
    good = [{"bytes": jpeg(i), "path": None} for i in range(4)]
    return pa.array([*good, *cells], IMAGE)


def _with_metadata(text: bytes) -> Callable[[Place], Path]:
    def make(place: Place) -> Path:
        path = _table(_cells())(place)
        pq.write_table(pq.read_table(path).replace_schema_metadata({b"huggingface": text}), path)
        return path

    return make


def _class_label(names: Any) -> Callable[[Place], Path]:
    features = {"image": {"_type": "Image"}, "label": {"names": names, "_type": "ClassLabel"}}
    return _with_metadata(json.dumps({"info": {"features": features}}).encode())


TABLES: dict[str, Callable[[Place], Path]] = {
    "image-null": _table(_cells(None)),
    "images-all-null": _table(pa.array([None] * 4, IMAGE)),
    "image-bytes-null": _table(_cells({"bytes": None, "path": None})),
    "image-empty": _table(_cells({"bytes": b"", "path": None})),
    "image-text": _table(_cells({"bytes": b"text", "path": "a\nb\x1b[31m"})),
    "image-path": _table(lambda p: _cells({"bytes": None, "path": str(p.canary)})),
    "image-all-paths": _table(lambda p: pa.array([{"bytes": None, "path": str(p.canary)}] * 4, IMAGE)),
    "image-url": _table(lambda p: pa.array([{"bytes": None, "path": "http://example.com/x.jpg"}] * 4, IMAGE)),
    "image-zip-url": _table(lambda p: pa.array([{"bytes": None, "path": "zip://a::https://example.com/x"}] * 4, IMAGE)),
    "image-strings": _table(lambda p: pa.array([str(p.canary)] * 4)),
    "image-string-url": _table(pa.array(["https://example.com/x.jpg"] * 4)),
    "image-binary": _table(pa.array([jpeg(i) for i in range(4)])),
    "image-numbers": _table(pa.array([1, 2, 3, 4])),
    "image-lists": _table(pa.array([[1], [2]])),
    "image-other-struct": _table(pa.array([{"a": 1}, {"a": 2}])),
    "image-nulls-only": _table(pa.array([None, None])),
    "no-image": lambda p: _plain(p, {"picture": [1], "label": [0]}),
    "no-label": lambda p: _plain(p, {"image": [b"x"]}),
    "no-columns": lambda p: _plain(p, {}),
    "column-newline": lambda p: _plain(p, {"a\nb\x1b[31m": [1]}),
    "two-columns-of-a-name": lambda p: _twins(p),
    "metadata-text": _with_metadata(b"not json"),
    "metadata-list": _with_metadata(b"[]"),
    "metadata-deep": _with_metadata(b"[" * 100000),
    "metadata-features": _with_metadata(b'{"info": {"features": 5}}'),
    "metadata-type": _with_metadata(b'{"info": {"features": {"image": {"_type": "os.system"}, "label": 5}}}'),
    "names-empty": _class_label([]),
    "names-one": _class_label(["cat"]),
    "names-twice": _class_label(["cat", "cat"]),
    "names-numbers": _class_label([1, 2]),
    "names-newline": _class_label(["cat", "d\nog\x1b[31m"]),
    "names-other": _class_label(["cat", "fish"]),
    "names-null": _class_label(None),
    "is-text": lambda p: p.file("x.parquet", b"text"),
    "is-empty": lambda p: p.file("x.parquet", b""),
    "is-magic": lambda p: p.file("x.parquet", b"PAR1" + b"\xff" * 8 + b"PAR1"),
    "footer-huge": lambda p: p.file("x.parquet", b"PAR1" + bytes(20) + b"\xff\xff\xff\x7fPAR1"),
    "two-files-that-differ": lambda p: _two(p),
    "no-rows": _table(pa.array([], IMAGE)),
}  # fmt: skip


def _plain(place: Place, columns: dict[str, list[Any]]) -> Path:
    pq.write_table(pa.table(columns), place.inside / "x.parquet")
    return place.inside / "x.parquet"


def _twins(place: Place) -> Path:
    pq.write_table(
        pa.Table.from_arrays([_cells(), _cells(), pa.array([0, 1, 0, 1])], ["image", "image", "label"]),
        place.inside / "x.parquet",
    )
    return place.inside / "x.parquet"


def _two(place: Place) -> Path:
    write_parquet(place.inside / "train-00000-of-00002.parquet", [0, 1])
    pq.write_table(pa.table({"image": ["x"], "label": ["y"]}), place.inside / "train-00001-of-00002.parquet")
    return place.inside


def table(make: Callable[[Place], Path], place: Place) -> Case:
    return place.evaluate(make(place))


def parquet_damaged(names: tuple[str, ...], place: Place) -> Case:
    path = write_parquet(place.inside / "x.parquet", LABELS, ("cat", "dog"))
    path.write_bytes(mutations.composed(names, path.read_bytes(), place.rng))
    return place.evaluate(path)


SHARD_LABELS: list[bytes] = [
    b"", b"-1", b"1e3", b"0.5", b"nan", b"null", b"x", b"\xff", b"9" * 30, b"9" * 5000, b"1_0", b" 1\n", b"0x1",
    b"true", b"[1]",
    "١".encode(), b"2", b"1\n2",
]  # fmt: skip


def shard_label(text: bytes, place: Place) -> Case:
    members = samples_of([0, 1, 0, 1])
    members["n01_7.cls"] = text
    if place.rng.random() < 0.4:
        members["n01_7.json"] = b'{"label": ' + text + b"}"
        del members["n01_7.cls"]
    return place.evaluate(write_shard(place.inside / "x.tar", members))


def _members(**changes: bytes | None) -> Callable[[Place], Path]:
    names = {name.replace("__", "."): content for name, content in changes.items()}

    def make(place: Place) -> Path:
        members = {**samples_of([0, 1, 0, 1]), **names}
        return write_shard(place.inside / "x.tar", {n: c for n, c in members.items() if c is not None})

    return make


def _infos(*infos: tuple[str, dict[str, Any]]) -> Callable[[Place], Path]:
    """Members with odd headers behind good ones."""

    def make(place: Place) -> Path:
        path = place.inside / "x.tar"
        with tarfile.open(path, "w") as tar:
            for name, content in samples_of([0, 1, 0, 1]).items():
                info = tarfile.TarInfo(name)
                info.size = len(content)
                tar.addfile(info, io.BytesIO(content))
            for name, fields in infos:
                info = tarfile.TarInfo(name)
                for field, value in fields.items():
                    setattr(info, field, value)
                tar.addfile(info, io.BytesIO(b"x" * info.size) if info.isreg() else None)
        return path

    return make


SHARDS: dict[str, Callable[[Place], Path]] = {
    "no-images": lambda p: write_shard(p.inside / "x.tar", {"a.cls": b"0"}),
    "no-labels": lambda p: write_shard(p.inside / "x.tar", {"a.jpg": jpeg(0)}),
    "empty": lambda p: write_shard(p.inside / "x.tar", {}),
    "zero-bytes": lambda p: p.file("x.tar", b""),
    "text": lambda p: p.file("x.tar", b"text" * 300),
    "gzip": lambda p: p.file("x.tar", b"\x1f\x8b\x08" + bytes(600)),
    "image-text": _members(n00_7__jpg=b"text"),
    "image-empty": _members(n00_7__jpg=b""),
    "all-images-text": _members(**{f"n0{i}_7__jpg": b"text" for i in range(4)}),
    "json-list": _members(n00_7__json=b"[]", n00_7__cls=None),
    "json-deep": _members(n00_7__json=b"[" * 100000, n00_7__cls=None),
    "json-label-table": _members(n00_7__json=b'{"label": {"a": 1}}', n00_7__cls=None),
    "json-label-huge": _members(n00_7__json=b'{"label": 1' + b"0" * 400 + b"}", n00_7__cls=None),
    "name-newline": lambda p: write_shard(p.inside / "x.tar", {"a\nb\x1b[31m.jpg": jpeg(0), "a\nb\x1b[31m.cls": b"x"}),
    "name-bytes": lambda p: write_shard(p.inside / "x.tar", {"\udcff.jpg": jpeg(0), "\udcff.cls": b"x"}),
    "name-up": lambda p: write_shard(p.inside / "x.tar", {"../../a.jpg": jpeg(0), "../../a.cls": b"0",
        "/b.jpg": jpeg(1), "/b.cls": b"1"}),
    "name-long": lambda p: write_shard(p.inside / "x.tar", {"x" * 9000 + ".jpg": jpeg(0), "x" * 9000 + ".cls": b"y"}),
    "link-out": _infos(("z.jpg", {"type": tarfile.SYMTYPE, "linkname": "../outside/canary.pth"})),
    "hard-link": _infos(("z.jpg", {"type": tarfile.LNKTYPE, "linkname": "n00_7.jpg"}), ("z.cls", {"size": 1})),
    "link-circle": _infos(("z.jpg", {"type": tarfile.SYMTYPE, "linkname": "z.jpg"})),
    "device": _infos(("z.jpg", {"type": tarfile.CHRTYPE, "devmajor": 1, "devminor": 5})),
    "fifo": _infos(("z.jpg", {"type": tarfile.FIFOTYPE})),
    "sparse": _infos(("z.jpg", {"type": tarfile.GNUTYPE_SPARSE})),
    "twice": _infos(("n00_7.jpg", {"size": 3}), ("n00_7.cls", {"size": 1})),
    "size-lies": lambda p: _lying_size(p, b"77777777777"),
    "size-negative": lambda p: _lying_size(p, b"-0000000001"),
    "size-binary": lambda p: _lying_size(p, b"\x80" + b"\xff" * 11),
    "label-of-a-gigabyte": lambda p: _sparse_label(p),
    "parquet-beside": lambda p: (write_shard(p.inside / "x.tar", samples_of([0, 1])), p.file("x.parquet",
        b"x"))[1].parent,
}  # fmt: skip


def _lying_size(place: Place, size: bytes) -> Path:
    path = write_shard(place.inside / "x.tar", samples_of([0, 1]))
    content = bytearray(path.read_bytes())
    content[124 : 124 + len(size)] = size
    content[148:156] = b" " * 8
    content[148:156] = f"{sum(content[:512]):06o}\0 ".encode()
    path.write_bytes(content)
    return path


def _sparse_label(place: Place) -> Path:
    """A class number that is 1.5 GB long, in a file with a hole."""
    path = place.inside / "x.tar"
    info = tarfile.TarInfo("a.cls")
    info.size = 3 << 29
    with path.open("wb") as file:
        file.write(info.tobuf())
        file.truncate(512 + info.size + 1024)
    with path.open("r+b") as file:
        file.seek(512 + info.size)
        image = tarfile.TarInfo("a.jpg")
        image.size = len(jpeg(0))
        file.write(image.tobuf() + jpeg(0).ljust(-(-image.size // 512) * 512, b"\0") + bytes(1024))
    return path


def shard(make: Callable[[Place], Path], place: Place) -> Case:
    return place.evaluate(make(place))


def shard_damaged(names: tuple[str, ...], place: Place) -> Case:
    path = write_shard(place.inside / "x.tar", samples_of([0, 1, 0, 1]))
    path.write_bytes(mutations.composed(names, path.read_bytes(), place.rng))
    return place.evaluate(path)


CLASS_NAMES = [
    "", "null", "[]", "{}", "5", '"cat"', '["cat"]', '["cat", "dog", "fish"]', '["cat", 5]', '["cat", null]',
    '["cat", "cat"]',
    '["dog", "cat"]', '[{"index": 0}]', '[{"index": "0", "name": "cat"}, {"index": "1", "name": "dog"}]',
    '[{"index": 0, "name": 5}, {"index": 1, "name": []}]',
    '[{"index": NaN, "name": "cat"}]',
    '[{"index": 0, "name": "cat", "synonyms": 5}, {"index": 1, "name": "dog", "wnid": []}]', "[" * 100000,
    '["c\\nat", "d\\u001b[31mog"]', '["\\ud800", "dog"]', '[["cat"], ["dog"]]', "\ufeff[]",
    '[{"index": true, "name": "dog"}, {"index": 0, "name": "cat"}]',
    '["[bold]", "[/x]"]', "\udcff",
]  # fmt: skip


def class_names(text: str, place: Place) -> Case:
    place.file("classes.json", text)
    if place.rng.random() < 0.5:
        return place.evaluate(write_parquet(place.inside / "x.parquet", LABELS))
    return place.evaluate(write_shard(place.inside / "x.tar", samples_of(LABELS)))


LISTS = [
    "", "\n\n", "path,label\n", "clip.mp4,0\n", "clip.mp4,0\nclip.mp4,1\n", "path,label\nclip.mp4\n", "clip.mp4,\n",
    "clip.mp4,-1\nclip.mp4,0",
    "clip.mp4,9999999999\nclip.mp4,0", "clip.mp4," + "9" * 5000, "clip.mp4,0.5\nclip.mp4,1.5", "missing.mp4,0\n",
    "a\x1b[31m.mp4,0\nclip.mp4,1",
    '"a\nb.mp4",0\n', "/dev/zero,0\n/dev/null,1", "../outside/canary.pth,0\nclip.mp4,1", "https://example.com/x.mp4,0",
    "\0,0\n", "x" * 5000 + ",0\n",
    '"' + "x" * 200000 + '",0', "label,youtube_id,time_start,time_end,split\ncat,x,nan,inf,val",
    "label,youtube_id,time_start,time_end,split\ncat,x,1e400,,val",
    "label,youtube_id,time_start,time_end,split\ncat,../../x,0,1,../..",
    "path,label,split\nclip.mp4,0,\x1b[31m\nclip.mp4,1,val",
    "label\n0\n", "clip.mp4,cat\nclip.mp4,dog\n", "clip.mp4,²\nclip.mp4,1", "clip.mp4,١\nclip.mp4,0", "\udcff,0",
    "clip.mp4\t0\n", "clip.mp4,0,1,2\n", ".,0\nclip.mp4,1",
    "path,path,label,label\nclip.mp4,clip.mp4,0,1\n", "clip.mp4,1000000\nclip.mp4,0",
]  # fmt: skip


def video_list(text: str, place: Place) -> Case:
    place.file("clip.mp4", place.bases.clip.read_bytes())
    return place.evaluate(place.file("list.csv", text), video=True)


OPTIONS: list[tuple[str, ...]] = [
    ("--threshold", "nan"), ("--threshold", "inf"), ("--threshold", "1e400"), ("--threshold", "-5"), ("--threshold",
    "0.1", "0.2"),
    ("--budget", "nan"), ("--budget", "0"), ("--budget", "1e-300"), ("--budget", "1", "1"), ("--limit", "0"),
    ("--limit", "-3"),
    ("--limit", "99999999999999999999"), ("--batch-size", "0"), ("--batch-size", "99999999999999999999"), ("--workers",
    "-1"),
    ("--split", "a\nb\x1b[31m"), ("--split", ""), ("--split", "../.."), ("--classes", "cat"), ("--classes", "cat",
    "cat"),
    ("--classes", "a\nb", "\x1b[31m"), ("--classes", ""), ("--device", "a\nb"), ("--device", "cuda:99"), ("--device",
    ""), ("--device", "meta"),
    ("--json", "in/none/x.json"), ("--json", "in"), ("--json", ""), ("--json", "a\0b"), ("--plot", "in/x.docx"),
    ("--plot", "in"),
    ("--plot", "out/a\0.png"), ("--plot", ""), ("--clips", "0"), ("--crops", "0"), ("--span", "nan"), ("--crops",
    "99999999"),
]  # fmt: skip


def options(given: tuple[str, ...], place: Place) -> Case:
    case = place.evaluate(write_folder(place.inside / "set"), *given)
    return Case(case.root, case.argv, promised=() if "--json" in given or "--plot" in given else case.promised)


TRAINED: dict[str, Callable[[Place], Path]] = {
    "images-text": lambda p: _texts(p),
    "label-far": lambda p: write_parquet(p.inside / "x.parquet", [0, 200_000] * 4),
    "label-huge": lambda p: write_parquet(p.inside / "x.parquet", [0, 10**12] * 4),
    "label-negative": lambda p: write_parquet(p.inside / "x.parquet", [0, -1] * 4),
    "one-class": lambda p: write_folder(p.inside / "set", ("cat",)),
    "nulls": lambda p: write_parquet(p.inside / "x.parquet", LABELS, images=[None] * 8),
    "broken": lambda p: write_parquet(p.inside / "x.parquet", LABELS, images=[b"text\n\x1b[31m"] * 8),
    "some-broken": lambda p: write_parquet(
        p.inside / "x.parquet", LABELS, images=[b"text", *[jpeg(i) for i in range(7)]]
    ),
    "one-photo-each": lambda p: write_folder(p.inside / "set", each=1),
    "shard-broken": lambda p: write_shard(p.inside / "x.tar", samples_of(LABELS, [b"text"] * 8)),
}


def _texts(place: Place) -> Path:
    for path in write_folder(place.inside / "set").glob("*/*.jpg"):
        path.write_text("no photo")
    return place.inside / "set"


def train_on(make: Callable[[Place], Path], place: Place) -> Case:
    from .recipes import BASE, dump

    return place.train(place.file("recipe.toml", dump(BASE)), data=make(place))
