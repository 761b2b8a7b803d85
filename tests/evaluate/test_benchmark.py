"""The table: each figure is that of the measure on the maps, its interval that of the bootstrap, and the command's."""

from __future__ import annotations

import io
import json
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
from PIL import Image

import iared2
from iared2 import keyed
from iared2.cli import main
from iared2.data.batches import model_transform
from iared2.data.regions import Regions, open_regions, region_batches
from iared2.errors import InputError
from iared2.evaluate.explanations import benchmark as bench
from iared2.evaluate.explanations import faithfulness, measures, results
from iared2.explain.methods import heatmap

METHODS = ["interpreter", "interpreter:all", "attention:3", "gradcam", "random", "center"]


@pytest.fixture(scope="module")
def model() -> iared2.ReducedVisionTransformer:
    """Not square, and its threshold drops about half of what is left in each group."""
    torch.manual_seed(0)
    model = iared2.from_timm(
        "deit_tiny_patch16_224", img_size=(16, 24), patch_size=4, embed_dim=32, depth=3, num_heads=2, num_classes=3
    ).eval()
    images = torch.randn(16, 3, 16, 24)
    for interpreter in model.interpreters:
        torch.nn.init.normal_(interpreter.query.weight, std=0.5)
    model.threshold = [0.0, 0.0, 0.0]
    with torch.no_grad():
        model.threshold = [scores.median().item() for scores in model.trace(images).scores]
    return model


def write_photos(folder: Path, n: int = 12) -> Path:
    """Bright boxes on noise, one of them degenerate and one photo that is none."""
    generator = np.random.default_rng(0)
    cells, boxes = [], []
    for i in range(n):
        pixels = generator.integers(0, 90, (20, 30, 3), dtype=np.uint8)
        left, top = (int(generator.integers(0, side // 2)) for side in (30, 20))
        box = [left, top, left + 9, top + 7]
        pixels[box[1] : box[3] + 1, box[0] : box[2] + 1] = 200
        buffer = io.BytesIO()
        Image.fromarray(pixels).save(buffer, "PNG")
        cells.append({"bytes": b"broken" if i == 3 else buffer.getvalue(), "path": f"{i}.png"})
        boxes.append([5, 5, 5, 5] if i == 7 else box)
    folder.mkdir(parents=True, exist_ok=True)
    table = pa.table({"image": cells, "label": [i % 3 for i in range(n)], "bbox": pa.array(boxes)})
    pq.write_table(table, folder / "validation.parquet")
    return folder


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_photos(tmp_path_factory.mktemp("data"))


def all_of(regions: Regions, model) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    order = keyed.permutation(0, 0, len(regions))
    transform = model_transform(model.pretrained_cfg)
    (batch,) = region_batches(regions, transform, batch_size=99, order=order, skipped=[])
    return batch


def test_every_figure_is_that_of_its_measure(model, data: Path) -> None:
    regions = open_regions(data)
    images, masks, rows = all_of(regions, model)
    result = bench.benchmark(model, regions, METHODS, batch_size=99, steps=3)
    assert (result.images, result.skipped) == (10, {"unreadable": 1, "no region": 1})
    assert (result.region, result.target) == ("box", "label")
    target = torch.from_numpy(regions.labels)[rows]
    with torch.no_grad():
        output = model.trace(images)
    kept = output.kept[-1]
    assert result.keep_ratio == pytest.approx(kept.float().mean().item())
    assert 0 < result.keep_ratio < 1
    arguments = {"interpreter": {}, "interpreter:all": {"group": "all"}, "attention:3": {"block": 2}}
    for row in result.methods:
        method = row.method.split(":")[0]
        maps = heatmap(model, images, method, target, **arguments.get(row.method, {}))
        shown = kept
        if method != "interpreter":
            shown = faithfulness.best_patches(maps, kept.sum(1), model.grid_size)
        lost, agreement = faithfulness.blanking(model.backbone, images, shown, model.grid_size)
        expected = {
            "pointing game": measures.pointing_game(maps, masks).mean(),
            "energy in box": measures.energy_in_box(maps, masks).mean(),
            "mass accuracy": measures.mass_accuracy(maps, masks).mean(),
            "rank accuracy": measures.rank_accuracy(maps, masks).mean(),
            "sparsity": measures.sparsity(maps).mean(),
            "mAP": measures.average_precision(maps, masks).mean(),
            **measures.segmentation(measures.confusion(maps, masks).sum(0)),
            "insertion": faithfulness.insertion(model, images, maps, target, steps=3).mean(),
            "deletion": faithfulness.deletion(model, images, maps, target, steps=3).mean(),
            "probability lost": lost.mean(),
            "agreement": agreement.float().mean(),
        }
        assert expected.keys() == row.measures.keys() == {measure.name for measure in results.MEASURES}
        for name, value in expected.items():
            figure = row.measures[name]
            assert figure.value == pytest.approx(value.item(), abs=1e-6), (row.method, name)
            assert figure.low <= figure.value <= figure.high
        assert row.milliseconds > 0
    assert result.forward_milliseconds > 0


def figures(result: results.Benchmark) -> dict[str, dict[str, results.Estimate]]:
    return {row.method: row.measures for row in result.methods}


def test_neither_the_batches_nor_the_other_methods_change_a_figure(model, data: Path) -> None:
    regions = open_regions(data)
    together = figures(bench.benchmark(model, regions, METHODS, batch_size=99, steps=3))
    apart = figures(bench.benchmark(model, regions, METHODS[::-1][:3], batch_size=4, steps=3))
    for method, row in apart.items():
        for name, figure in row.items():
            other = together[method][name]
            for part in ("value", "low", "high"):
                assert getattr(figure, part) == pytest.approx(getattr(other, part), abs=1e-5), (method, name)


def test_seeds(model, data: Path) -> None:
    def run(seed: int) -> results.Benchmark:
        return bench.benchmark(model, open_regions(data), ["center"], seed=seed, limit=6, steps=1)

    assert figures(run(0)) == figures(run(0))
    assert run(0).images == 6
    assert figures(run(0)) != figures(run(1))  # other photos


def test_the_class_that_is_explained(model, data: Path) -> None:
    regions = open_regions(data)  # of classes "0", "1", "2"

    def named(*names: str) -> Regions:
        return Regions(regions.photo, regions.mask, regions.name, 12, True, regions.labels, names)

    try:
        assert bench.class_numbers(regions, model).tolist() == [0, 1, 2]  # as many, and nothing is known of names
        assert bench.class_numbers(named("a", "b"), model) is None
        assert bench.class_numbers(Regions(regions.photo, regions.mask, regions.name, 12, True), model) is None
        model.class_names = ("cat", "dog", "emu")
        assert bench.class_numbers(named("emu", "cat"), model).tolist() == [2, 0]
        assert bench.class_numbers(named("emu", "cow"), model) is None
        assert bench.class_numbers(regions, model) is None
        assert bench.benchmark(model, regions, ["center"], steps=1).target == "top-1"
    finally:
        model.class_names = None


def test_a_model_without_classes(data: Path) -> None:
    size = {"img_size": 16, "patch_size": 4, "embed_dim": 32, "depth": 3, "num_heads": 2}
    model = iared2.from_timm("deit_tiny_patch16_224", num_classes=0, **size)
    with pytest.raises(InputError, match="no classes"):
        bench.benchmark(model, open_regions(data), ["center"])


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("magic", "no method 'magic'; take some of interpreter, "),
        ("interpreter:4", "interpreter:4: there is no group 4; take 1 to 3"),
        ("attention:0", "there is no block 0; take 1 to 3"),
        ("gradcam:x", "there is no block x; take 1 to 3"),
        ("attention:all", "there is no block all"),
        ("center:1", "there is no group or block 1; leave it out"),
    ],
)
def test_methods_that_are_none(model, text: str, message: str) -> None:
    with pytest.raises(InputError, match=message):
        bench.read_method(text, model)


@pytest.fixture
def checkpoint(model, tmp_path: Path) -> Path:
    model.save(tmp_path / "m.safetensors")
    return tmp_path / "m.safetensors"


@pytest.mark.parametrize("kind", ["png", "pdf", "svg"])
def test_command(model, data: Path, checkpoint: Path, tmp_path: Path, capsys, kind: str) -> None:
    files = {"--json": tmp_path / "a.json", "--plot": tmp_path / f"a.{kind}"}
    options = [str(part) for option in files.items() for part in option]
    arguments = ["explain-bench", "-c", str(checkpoint), str(data), "--steps", "2", "--batch-size", "4", *options]
    assert main([*arguments, "--methods", *METHODS]) == 0
    printed, errors = capsys.readouterr()
    result, table = json.loads(files["--json"].read_text()), " ".join(printed.split())
    expected = bench.benchmark(model, open_regions(data), METHODS, steps=2, batch_size=4)
    for row, ours in zip(result["methods"], expected.methods, strict=True):
        assert row["method"] == ours.method
        for name, figure in ours.measures.items():
            assert row["measures"][name] == pytest.approx(vars(figure)), (ours.method, name)
            assert f"{100 * figure.value:.1f}" in table
    assert "10 photos with a box each (1 skipped: unreadable, 1 skipped: no region)" in table
    assert "mass" not in table  # of a box, it is the energy
    assert "Traceback" not in errors
    start = {"png": b"\x89PNG", "pdf": b"%PDF", "svg": b"<?xml"}[kind]
    assert files["--plot"].read_bytes().startswith(start)


def test_json_has_no_nan_and_replaces_nothing_that_is_read(model, data: Path, checkpoint: Path, tmp_path: Path, capsys):
    file = next(data.rglob("*.parquet")) if data.is_dir() else data
    before = file.read_bytes(), checkpoint.read_bytes()
    for target in (file, checkpoint):
        assert main(["explain-bench", "-c", str(checkpoint), str(data), "--json", str(target)]) == 1
        assert "is read, and a result would replace it" in capsys.readouterr().err
    assert (file.read_bytes(), checkpoint.read_bytes()) == before
    broken = iared2.load(checkpoint)
    with torch.no_grad():
        broken.get_classifier().weight.fill_(3e38)  # finite, but its sums are not
    broken.save(tmp_path / "broken.safetensors")
    arguments = [
        "explain-bench",
        "-c",
        str(tmp_path / "broken.safetensors"),
        str(data),
        "--steps",
        "1",
        "--methods",
        "center",
    ]
    assert main([*arguments, "--json", str(tmp_path / "a.json")]) == 0
    assert "NaN" not in (tmp_path / "a.json").read_text()
    assert json.loads((tmp_path / "a.json").read_text())["methods"][0]["measures"]["insertion"]["value"] is None


@pytest.mark.parametrize(
    ("more", "message"),
    [
        (["--methods", "magic"], "no method 'magic'"),
        (["--limit", "0"], "must be 1 or more"),
        (["--steps", "-1"], "--steps and --seed 0 or more"),
        (["--json", "/no/such/folder/a.json"], "in a folder that is there"),
        (["--json", "/"], "--json /: give the name of a file"),
        (["--json", "a.png", "--plot", "a.png"], "give two names"),
        (["--seed", "-1"], "--seed 0 or more"),
        (["--seed", "9" * 30], "below 2⁶³"),
        (["--plot", "a.bmp"], "unknown kind of picture"),
        (["--region", "mask"], "no column 'mask'"),
        (["--device", "cuda:9"], "device cuda:9"),
    ],
)
def test_bad_arguments_are_one_line(data: Path, checkpoint: Path, capsys, more: list[str], message: str) -> None:
    assert main(["explain-bench", "-c", str(checkpoint), str(data), *more]) == 1
    printed, errors = capsys.readouterr()
    assert printed == ""
    assert message in errors
    assert errors.count("\n") == 1
