"""Boxes and masks of every kind of data set, and that a region stays on its object when the photo is resized."""

from __future__ import annotations

import io
import json
import sys
from pathlib import Path

import h5py
import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
from PIL import Image

from iared2.data.batches import eval_transform
from iared2.data.regions import NO_REGION, open_regions, region_batches
from iared2.errors import InputError

BOXES = [[0, 0, 3, 3], [2, 1, 9, 10], [5, 5, 5, 9], [3, 7, 9, 7], [0, 0, 11, 7]]
"""Of photos of 12 × 8; the third and the fourth are degenerate."""
SIZE = 12, 8


def encode(pixels: np.ndarray, kind: str = "PNG") -> bytes:
    buffer = io.BytesIO()
    Image.fromarray(pixels).save(buffer, kind)
    return buffer.getvalue()


def box_mask(box: list[int]) -> np.ndarray:
    rows, columns = np.mgrid[: SIZE[1], : SIZE[0]]
    return (columns >= box[0]) & (columns <= box[2]) & (rows >= box[1]) & (rows <= box[3])


def photo_of(mask: np.ndarray) -> np.ndarray:
    """White where the mask is: so that a test can see whether the two still agree."""
    return np.repeat(mask[..., None] * np.uint8(255), 3, 2)


def write_table(file: Path, **columns: object) -> Path:
    photos = [encode(photo_of(box_mask(box))) for box in BOXES]
    image = pa.array([{"bytes": b, "path": f"{i}.png"} for i, b in enumerate(photos)])
    file.parent.mkdir(parents=True, exist_ok=True)
    pq.write_table(pa.table({"image": image, "label": pa.array([0, 1, 0, 1, 2]), **columns}), file)
    return file


@pytest.fixture
def boxes(tmp_path: Path) -> Path:
    return write_table(tmp_path / "validation.parquet", bbox=pa.array(BOXES, pa.list_(pa.int32(), 4)))


def batches(regions, size=(8, 12), **kwargs):
    """All batches, and what was skipped."""
    skipped: list[tuple[str, str]] = []
    transform = eval_transform(size, mean=(0, 0, 0), std=(1, 1, 1), interpolation="nearest")
    arguments = {"batch_size": 2, "order": torch.arange(len(regions))} | kwargs
    return list(region_batches(regions, transform, skipped=skipped, **arguments)), skipped


def test_boxes(boxes: Path) -> None:
    (boxes.parent / "classes.json").write_text(json.dumps(["cat", "dog", "emu"]))
    regions = open_regions(boxes)
    assert (len(regions), regions.is_box, regions.class_names) == (5, True, ("cat", "dog", "emu"))
    assert regions.labels.tolist() == [0, 1, 0, 1, 2]
    found, skipped = batches(regions)
    assert [batch.rows.tolist() for batch in found] == [[0, 1], [4]]
    assert skipped == [("2.png", NO_REGION), ("3.png", NO_REGION)]
    for batch in found:
        assert batch.masks.dtype == torch.bool
        for mask, image, row in zip(batch.masks, batch.images, batch.rows.tolist(), strict=True):
            assert np.array_equal(mask, box_mask(BOXES[row]))
            assert torch.equal(image[0] > 0.5, mask)


def test_boxes_of_floats_are_rounded(tmp_path: Path) -> None:
    odd = [np.add(BOXES[0], 0.4), np.add(BOXES[1], -0.4), [0, 0, np.nan, 3], [0, 0, np.inf, 3], BOXES[4]]
    found, skipped = batches(open_regions(write_table(tmp_path / "a.parquet", bbox=pa.array([*map(list, odd)]))))
    masks = torch.cat([batch.masks for batch in found]).numpy()
    assert np.array_equal(masks, [box_mask(BOXES[i]) for i in (0, 1, 4)])
    assert skipped == [("2.png", NO_REGION), ("3.png", NO_REGION)]


@pytest.mark.parametrize("size", [(16, 24), (4, 6), (24, 24), (5, 7), (3, 30)])
def test_the_region_goes_through_the_photos_own_resize(boxes: Path, size: tuple[int, int]) -> None:
    found, _ = batches(open_regions(boxes), size)
    for batch in found:
        assert torch.equal(batch.images[:, 0] > 0.5, batch.masks)


def test_a_region_smaller_than_a_pixel_of_the_model_is_none(boxes: Path) -> None:
    found, skipped = batches(open_regions(boxes), (1, 1))  # its centre is at (6, 4) of the photo
    assert [batch.rows.tolist() for batch in found] == [[1, 4]]
    assert [reason for _, reason in skipped] == [NO_REGION] * 3


def test_batches_are_full_and_end_at_the_limit(boxes: Path) -> None:
    regions = open_regions(boxes)
    order = torch.tensor([4, 3, 2, 1, 0])
    assert [b.rows.tolist() for b in batches(regions, order=order)[0]] == [[4, 1], [0]]
    found, skipped = batches(regions, order=order, limit=2, batch_size=3)
    assert [batch.rows.tolist() for batch in found] == [[4, 1]]
    assert len(skipped) == 2
    assert [b.rows.tolist() for b in batches(regions, limit=1)[0]] == [[0]]
    assert len(batches(regions, order=torch.tensor([0, 2]))[1]) == 1  # the last is skipped, and counted


MASKS = [box_mask(box) for box in BOXES]


def test_masks_of_a_table(tmp_path: Path) -> None:
    """As bare bytes and in the layout of Hugging Face; any value but 0 is inside."""
    encoded = [encode(mask * np.uint8(1 + 50 * i)) for i, mask in enumerate(MASKS)]
    structs = [{"bytes": b, "path": None} for b in encoded]
    for column in (pa.array(encoded), pa.array(structs)):
        regions = open_regions(write_table(tmp_path / "a.parquet", mask=column, bbox=pa.array(BOXES)))
        assert not regions.is_box
        for i, mask in enumerate(MASKS):
            assert np.array_equal(regions[i][1], mask)
    assert open_regions(tmp_path / "a.parquet", region="bbox").is_box


@pytest.mark.parametrize("mode", ["1", "L", "P", "RGB", "RGBA", "LA", "I;16"])
def test_any_kind_of_mask(tmp_path: Path, mode: str) -> None:
    """Inside is what is not 0 in a colour or an index; opacity says nothing."""
    for folder in ("images", "masks"):
        (tmp_path / folder).mkdir()
    Image.fromarray(photo_of(MASKS[1])).save(tmp_path / "images" / "a.jpg")
    if mode == "P":
        mask = Image.fromarray(MASKS[1] * np.uint8(3))
        mask.putpalette([9, 9, 9, 0, 0, 0, 0, 0, 0, 0, 0, 0])
    elif mode == "I;16":
        mask = Image.fromarray(MASKS[1] * np.uint16(300))
    else:
        mask = Image.fromarray(MASKS[1] * np.uint8(255)).convert(mode)
    assert mask.mode == mode
    mask.save(tmp_path / "masks" / "a.png")
    photo, found = open_regions(tmp_path)[0]
    assert photo.size == SIZE
    assert np.array_equal(found, MASKS[1])


def test_rows_of_a_table(tmp_path: Path) -> None:
    """Other columns of labels, and only some rows."""
    extra = {"class_id": pa.array([5, 6, 7, 8, 9]), "dominant": pa.array([True, False, False, False, True])}
    file = write_table(tmp_path / "a.parquet", bbox=pa.array(BOXES), **extra)
    pq.write_table(pq.read_table(file).drop_columns("label"), file)
    regions = open_regions(file, only="dominant")
    assert regions.labels.tolist() == [5, 9]
    assert [regions.name(i) for i in range(2)] == ["0.png", "4.png"]
    assert np.array_equal(regions[1][1], MASKS[4])
    assert np.array_equal(np.array(regions[1][0]), photo_of(MASKS[4]))


def test_splits_of_a_folder(tmp_path: Path) -> None:
    for name, count in (("train-00000-of-00001", 5), ("val", 2)):
        file = write_table(tmp_path / f"{name}.parquet", bbox=pa.array(BOXES))
        pq.write_table(pq.read_table(file).slice(0, count), file)
    assert len(open_regions(tmp_path)) == 2
    assert len(open_regions(tmp_path, split="train")) == 5
    with pytest.raises(InputError, match="no split 'other', there is train, val"):
        open_regions(tmp_path, split="other")


def test_folders(tmp_path: Path) -> None:
    for folder in ("images", "masks"):
        (tmp_path / folder).mkdir()
    for i, mask in enumerate(MASKS):
        Image.fromarray(photo_of(mask)).save(tmp_path / "images" / f"{i}.bmp")
        Image.fromarray(mask * np.uint8(7)).save(tmp_path / "masks" / f"{i}.png")
    (tmp_path / "images" / "5.jpg").write_bytes(b"no image")
    (tmp_path / "images" / "6.png").write_bytes((tmp_path / "images" / "0.bmp").read_bytes())
    Image.new("L", (8, 12), 1).save(tmp_path / "masks" / "6.png")
    Image.new("L", (8, 12), 1).save(tmp_path / "masks" / "5.png")
    regions = open_regions(tmp_path)
    assert (len(regions), regions.is_box, regions.labels) == (7, False, None)
    found, skipped = batches(regions, batch_size=9)
    assert np.array_equal(found[0].masks, np.stack(MASKS))
    assert [Path(name).name for name, _ in skipped] == ["5.jpg", "6.png"]
    assert "not an image" in skipped[0][1]
    assert "the mask has (12, 8) pixels, the photo (8, 12)" in skipped[1][1]
    (tmp_path / "masks" / "3.png").unlink()
    with pytest.raises(InputError, match=r"3\.bmp: there is no mask .*masks/3\.png"):
        open_regions(tmp_path)


def write_mat(file: Path) -> Path:
    """The layout of gtsegs_ijcv.mat: a struct of cells, each a reference, the arrays with their axes reversed."""
    with h5py.File(file, "w") as mat:
        shape = (len(MASKS), 1)
        images = mat.create_dataset("value/img", shape, h5py.ref_dtype)
        truths = mat.create_dataset("value/gt", shape, h5py.ref_dtype)
        for i, mask in enumerate(MASKS):
            images[i, 0] = mat.create_dataset(f"#refs#/img{i}", data=photo_of(mask).transpose(2, 1, 0)).ref
            annotation = mat.create_dataset(f"#refs#/gt{i}", data=mask.T.astype(np.uint8))
            cell = mat.create_dataset(f"#refs#/cell{i}", (1, 1), h5py.ref_dtype)
            cell[0, 0] = annotation.ref
            truths[i, 0] = cell.ref
    return file


def test_imagenet_segmentation(tmp_path: Path) -> None:
    regions = open_regions(write_mat(tmp_path / "gtsegs_ijcv.mat"))
    assert (len(regions), regions.is_box, regions.labels) == (5, False, None)
    found, skipped = batches(regions, batch_size=9)
    assert np.array_equal(found[0].masks, np.stack(MASKS))
    assert torch.equal(found[0].images[:, 0] > 0.5, found[0].masks)
    assert skipped == []


def test_without_h5py(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    file = write_mat(tmp_path / "a.mat")
    monkeypatch.setitem(sys.modules, "h5py", None)
    with pytest.raises(InputError, match=r"pip install '.\[explain\]'"):
        open_regions(file)


def test_bad_cells_are_skipped(tmp_path: Path) -> None:
    masks = [encode(MASKS[0]), b"no image", None, encode(MASKS[1])[:45], encode(MASKS[4])]
    file = write_table(tmp_path / "a.parquet", mask=pa.array(masks))
    found, skipped = batches(open_regions(file))
    assert [batch.rows.tolist() for batch in found] == [[0, 4]]
    assert [name for name, _ in skipped] == ["1.png", "2.png", "3.png"]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"path": "missing"}, "missing: no such file or folder"),
        ({"path": "empty"}, "give a parquet file"),
        ({"path": "notes.txt"}, "give a parquet file"),
        ({"path": "broken.parquet"}, "cannot be opened"),
        ({"path": "broken.mat"}, "not the file of ImageNet-Segmentation"),
        ({"path": "other.mat"}, "not the file of ImageNet-Segmentation"),
        ({"path": "half"}, "there is images/, but no masks/"),
        ({"path": "t/a.parquet", "region": "mask"}, "no column 'mask', there is image, label, bbox, path"),
        ({"path": "t/a.parquet", "label": "class"}, "no column 'class'"),
        ({"path": "t/a.parquet", "only": "best"}, "no column 'best'"),
        ({"path": "t/a.parquet", "region": "path"}, "neither boxes nor encoded masks"),
    ],
)
def test_what_is_wrong_is_one_line(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, arguments, message) -> None:
    monkeypatch.chdir(tmp_path)
    for name in ("notes.txt", "broken.parquet", "broken.mat"):
        Path(name).write_text("I am not")
    h5py.File("other.mat", "w").close()
    Path("half/images").mkdir(parents=True)
    Path("empty").mkdir()
    Image.new("RGB", (4, 4)).save("half/images/a.png")
    write_table(Path("t/a.parquet"), bbox=pa.array(BOXES), path=pa.array([1.5] * 5))
    with pytest.raises(InputError, match=message) as caught:
        open_regions(**arguments)
    assert "\n" not in str(caught.value)


def test_no_photo_at_all(boxes: Path) -> None:
    with pytest.raises(InputError, match=r"no photo with a region.* 3\.png \(no region\)"):
        batches(open_regions(boxes), order=torch.tensor([2, 3]))


def test_tiny_imagenet(data_dir: Path) -> None:
    """The real boxes: 24 of the validation rows are degenerate, as the data's own description says."""
    regions = open_regions(data_dir / "tiny-imagenet-200")
    assert len(regions) == 5000
    assert regions.is_box
    assert len(regions.class_names) == 200
    assert sum(not regions.mask(i, (64, 64)).any() for i in range(5000)) == 24


def test_coco(data_dir: Path) -> None:
    """The real masks cover the share that the data says."""
    file = data_dir / "coco128-seg" / "coco128_seg_shared.parquet"
    for region, column in ((None, "area_fraction"), ("fg_mask", "fg_fraction")):
        regions = open_regions(file, region=region)
        fractions = pq.read_table(file, columns=[column])[column].to_pylist()
        for i in range(0, len(regions), 20):
            assert regions[i][1].mean() == pytest.approx(fractions[i], abs=2e-3)
    dominant = open_regions(file, only="dominant")
    assert len(dominant) == len({encode(np.array(dominant.photo(i))) for i in range(len(dominant))}) == 63
