"""`iared2 evaluate` on a model without classes."""

from __future__ import annotations

import json

import pytest
import torch
import torch.nn.functional as F
from pictures import jpeg
from tiny import sharp_model

import iared2
from iared2.cli import main
from iared2.data.batches import Batch
from iared2.errors import InputError
from iared2.evaluate.agreement import knn_top1, nearest
from iared2.evaluate.embeddings import evaluate_embeddings

SIZE = {"img_size": 16, "patch_size": 4, "embed_dim": 32, "depth": 3, "num_heads": 2, "num_classes": 0}


@pytest.fixture(scope="module")
def model():
    model = sharp_model(("deit_tiny_patch16_224", SIZE))
    with torch.no_grad():
        model.threshold = [float(model.trace(images(8)).scores[0].quantile(0.5)), 0, 0]
    return model


def images(n, seed=0):
    return torch.randn(n, 3, 16, 16, generator=torch.Generator().manual_seed(seed))


def batches(known=True):
    for seed, n in ((0, 16), (1, 11)):
        labels = torch.arange(n) % 3 if known else torch.full((n,), -1)
        yield Batch(images(n, seed), labels, torch.arange(n) + 16 * seed, [("broken.jpg", "why")] if seed else [])
    empty = torch.empty(0, dtype=torch.int64)
    yield Batch(torch.empty(0), empty, empty, [("b.jpg", "why")])


def test_what_is_left_of_the_embeddings(model):
    result = evaluate_embeddings(model, batches(), budgets={"budget 1": model.decision.whole()})
    dense, reduced, whole = result.variants
    assert (result.images, result.skipped) == (27, ["broken.jpg", "b.jpg"])
    x, labels = torch.cat([images(16), images(11, 1)]), torch.cat([torch.arange(16) % 3, torch.arange(11) % 3])
    with torch.inference_mode():
        expected, output = model.backbone(x), model.trace(x)
    cosine = F.cosine_similarity(expected, output.logits)
    assert reduced.agreement.cosine == pytest.approx(cosine.mean().item(), abs=1e-5)
    assert reduced.agreement.cosine_p1 == pytest.approx(cosine.quantile(0.01).item(), abs=1e-5)
    sets = [[set(row) for row in nearest(f, 10)[0].tolist()] for f in (expected, output.logits)]
    shared = sum(len(a & b) for a, b in zip(*sets, strict=True)) / 270
    assert reduced.agreement.neighbours == pytest.approx(shared)
    assert 0 < shared < 1
    assert reduced.knn_top1 == pytest.approx(knn_top1(output.logits, labels))
    assert reduced.gmacs == pytest.approx(output.macs.double().mean().item() / 1e9)
    assert reduced.keep_ratio == pytest.approx(output.keep_ratio.mean(1).tolist())
    for same in (dense, whole):
        assert (same.agreement.cosine, same.agreement.neighbours) == (pytest.approx(1), 1)
        assert same.knn_top1 == pytest.approx(knn_top1(expected, labels))
    assert dense.gmacs == pytest.approx(model.dense_macs / 1e9)
    assert all(v.images_per_second > 0 for v in result.variants)
    (axes,) = result.figure().axes
    assert len(axes.lines[0].get_xdata()) == 3
    assert all(v.knn_top1 is None for v in evaluate_embeddings(model, batches(known=False)).variants)
    with pytest.raises(InputError, match="0 images"):
        evaluate_embeddings(model, [])


def test_command(model, tmp_path, capsys):
    model.save(tmp_path / "m.safetensors")
    for name, shade in (("cat", 0), ("dog", 1)):
        (tmp_path / "data" / name).mkdir(parents=True)
        for number in range(6):
            (tmp_path / "data" / name / f"{number}.jpg").write_bytes(jpeg(10 * shade + number, 16))
    (tmp_path / "data" / "cat" / "broken.jpg").write_bytes(b"no image")
    run = ["evaluate", "-c", str(tmp_path / "m.safetensors"), "--workers", "0"]

    def result(*more):
        assert main([*run, *more, "--json"]) == 0
        return json.loads(capsys.readouterr().out)

    labelled = result(str(tmp_path / "data"), "--budget", "0.6", "--plot", str(tmp_path / "plot.png"))
    assert (labelled["images"], len(labelled["skipped"])) == (12, 1)
    dense, reduced, budget = labelled["variants"]
    assert budget["gmacs"] == pytest.approx(0.6 * dense["gmacs"], rel=0.05)
    assert 0 <= reduced["knn_top1"] <= 100
    assert (tmp_path / "plot.png").exists()
    # any photos will do: here those of one class
    alone = result(str(tmp_path / "data" / "cat"))
    assert (alone["images"], alone["variants"][1]["knn_top1"]) == (6, None)
    assert len(result(str(tmp_path / "data" / "cat"), "--limit", "4")["variants"]) == 2
    assert main([*run, str(tmp_path / "nothing")]) == 1
    assert "no such" in capsys.readouterr().err
    assert iared2.load(tmp_path / "m.safetensors").num_classes == 0
