"""Images that stay on the device are those that a loader reads, and their changes are functions of their keys."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest
import torch
from pictures import write_folder
from torch import Tensor

import iared2
from iared2 import InputError, keyed
from iared2.data import device_dataset
from iared2.data.batches import Batch, eval_batches, eval_transform
from iared2.data.device_dataset import (
    COLOUR_DRAWS,
    CROP_DRAWS,
    ERASE_DRAWS,
    BatchAugment,
    ResidentImages,
    normalise,
    recolour,
)
from iared2.data.images import DataConfig, Samples, open_samples
from iared2.train.augment import AugmentConfig

MEAN, STD = (0.5, 0.4, 0.3), (0.2, 0.25, 0.3)
PLAIN = BatchAugment(1.0, 0.0, 0.0, 0.0, MEAN, STD)
STRONG = BatchAugment(0.3, 0.5, 0.4, 0.5, MEAN, STD)


def opened(root: Path) -> Samples:
    return open_samples(DataConfig(str(root), workers=0), "train")


@pytest.fixture(scope="module")
def samples(tmp_path_factory: pytest.TempPathFactory) -> Samples:
    return opened(write_folder(tmp_path_factory.mktemp("images"), each=12))


@pytest.fixture(scope="module")
def resident(samples: Samples) -> ResidentImages:
    return ResidentImages.read(samples, (12, 12))


def run(resident: ResidentImages, augment: BatchAugment = STRONG, **more: int) -> list[Batch]:
    return list(resident.train_batches(augment, **{"seed": 1, "epoch": 2, "batch_size": 8, **more}))


def by_sample(batches: list[Batch]) -> dict[int, Tensor]:
    return {int(i): image for batch in batches for i, image in zip(batch.samples, batch.images, strict=True)}


def same(a: list[Batch], b: list[Batch]) -> bool:
    return len(a) == len(b) and all(
        torch.equal(x.samples, y.samples) and torch.equal(x.labels, y.labels) and torch.allclose(x.images, y.images)
        for x, y in zip(a, b, strict=True)
    )


def draws(n: int, number: int) -> Tensor:
    return keyed.uniform(torch.arange(n), 0, number)


@pytest.mark.parametrize("size", [(12, 12), (9, 14)])
def test_they_are_what_a_loader_reads(samples: Samples, size: tuple[int, int]):
    found = list(ResidentImages.read(samples, size).eval_batches(MEAN, STD, batch_size=5))
    assert same(found, list(eval_batches(samples, eval_transform(size, MEAN, STD), batch_size=5)))
    parts = [list(ResidentImages.read(samples, size).eval_batches(MEAN, STD, batch_size=5, rank=r, world_size=2))
             for r in range(2)]  # fmt: skip
    assert same(found[::2], parts[0])
    assert same(found[1::2], parts[1])


def test_without_changes_they_are_only_normalised(resident: ResidentImages):
    for batch in run(resident, PLAIN):
        assert torch.equal(batch.labels, resident.labels[batch.samples])
        want = normalise(resident.images[batch.samples].float() / 255, MEAN, STD)
        torch.testing.assert_close(batch.images, want, rtol=0, atol=1e-5)


def test_mirrored_ones_are_mirrored(resident: ResidentImages):
    plain = by_sample(run(resident, PLAIN))
    found = by_sample(run(resident, replace(PLAIN, hflip=0.5)))
    turned = {i: torch.allclose(found[i], plain[i].flip(2), atol=1e-5) for i in plain}
    assert all(turned[i] or torch.allclose(found[i], plain[i], atol=1e-5) for i in plain)
    assert 0 < sum(turned.values()) < len(plain)
    for i, image in by_sample(run(resident, replace(PLAIN, hflip=1.0))).items():
        torch.testing.assert_close(image, plain[i].flip(2), rtol=0, atol=1e-5)


def test_changes_depend_on_the_key_alone(resident: ResidentImages):
    batches = run(resident)
    assert same(batches, run(resident))
    whole = by_sample(batches)
    parts = by_sample(run(resident, batch_size=5))
    assert len(parts) == 20
    for i, image in parts.items():
        torch.testing.assert_close(image, whole[i], rtol=0, atol=1e-5)
    for other in ({"seed": 2}, {"epoch": 3}):
        assert not any(torch.allclose(image, whole[i]) for i, image in by_sample(run(resident, **other)).items())


def test_resumed_and_divided_passes_are_the_same(resident: ResidentImages):
    assert same(run(resident)[2:], run(resident, start_step=2))
    two = [run(resident, batch_size=4, rank=rank, world_size=2) for rank in range(2)]
    for whole, *parts in zip(run(resident), *two, strict=True):
        assert torch.equal(whole.samples, torch.cat([part.samples for part in parts]))
        torch.testing.assert_close(whole.images, torch.cat([part.images for part in parts]), rtol=0, atol=1e-5)
    with pytest.raises(InputError, match="smaller batch_size"):
        run(resident, batch_size=25)


def test_an_unreadable_image_is_left_out_and_reported(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    root = write_folder(tmp_path / "images")
    whole = ResidentImages.read(opened(root), (12, 12))
    assert whole.skipped == []
    (root / "cat" / "2.jpg").write_bytes(b"this is no picture")
    broken = ResidentImages.read(opened(root), (12, 12))
    assert broken.rows.tolist() == [0, 1, 3, 4, 5, 6, 7]
    assert torch.equal(broken.images, whole.images[broken.rows])
    assert torch.equal(broken.labels, whole.labels[broken.rows])
    assert [Path(name).name for name, _ in broken.skipped] == ["2.jpg"]
    seen, before = by_sample(run(broken, batch_size=7)), by_sample(run(whole))
    for i, image in seen.items():  # its neighbours keep their draws
        torch.testing.assert_close(image, before[i], rtol=0, atol=1e-5)
    for file in (root / "cat").glob("*.jpg"):
        file.write_bytes(b"")
    small = {"batch_size": 4}  # the first batch has not one image
    monkeypatch.setattr(device_dataset, "eval_batches", lambda *args, **more: eval_batches(*args, **more | small))
    assert len(ResidentImages.read(opened(root), (12, 12)).skipped) == 4
    for file in root.glob("*/*.jpg"):
        file.write_bytes(b"")
    with pytest.raises(InputError, match="cannot be read"):
        ResidentImages.read(opened(root), (12, 12))


@pytest.mark.parametrize("min_scale", [0.1, 0.8])
def test_crops_lie_in_the_picture(min_scale: float):
    zoom, shift = replace(STRONG, min_scale=min_scale).crop(draws(4000, CROP_DRAWS))
    assert (zoom.abs() + shift.abs()).max() <= 1 + 1e-6
    area, aspect = zoom.prod(1).abs(), (zoom[:, 0] / zoom[:, 1]).abs()
    assert min_scale * 0.8 < area.min() < min_scale * 1.1
    assert 0.95 < area.max() <= 1
    assert 3 / 4 - 1e-6 < aspect.min() < aspect.max() < 4 / 3 + 1e-6
    assert (zoom[:, 1] > 0).all()
    assert (zoom[:, 0] < 0).float().mean() == pytest.approx(0.5, abs=0.03)


def test_erased_boxes():
    ones = torch.ones(500, 3, 32, 32)
    gone = STRONG.erase(ones, draws(500, ERASE_DRAWS)) == 0
    assert torch.equal(gone[:, 0], gone[:, 2])
    share = gone[:, 0].float().mean((1, 2))
    assert (share > 0).float().mean() == pytest.approx(0.5, abs=0.08)
    assert share.max() < 0.36
    boxes = gone[:, 0].any(1).sum(1) * gone[:, 0].any(2).sum(1)
    assert torch.equal(boxes, gone[:, 0].sum((1, 2)))
    assert torch.equal(PLAIN.erase(ones, draws(500, ERASE_DRAWS)), ones)


def test_colours():
    factors = STRONG.colour_factors(draws(1000, COLOUR_DRAWS))
    assert 0.6 <= factors.min() < 0.61
    assert 1.39 < factors.max() <= 1.4
    pixels = 0.4 + 0.2 * torch.rand(2, 3, 4, 4, generator=torch.Generator().manual_seed(0))

    def changed(*factors: float) -> Tensor:
        return recolour(pixels, torch.tensor(factors)[None, :, None, None].expand(2, -1, 1, 1))

    torch.testing.assert_close(changed(1, 1, 1), pixels)
    torch.testing.assert_close(changed(1.5, 1, 1), pixels * 1.5)
    assert changed(1, 0, 1).std((1, 2, 3)).max() < 1e-6
    assert changed(1, 1, 0).std(1).max() < 1e-6


def test_settings_are_those_of_the_recipe():
    model = iared2.from_timm("deit_tiny_patch16_224", img_size=16, patch_size=8, embed_dim=8, depth=1, num_heads=1,
                             groups=1)  # fmt: skip
    config = AugmentConfig(0.4, 0.3, 0.2, "", 0.1)
    cfg = model.pretrained_cfg
    assert config.on_device(model) == BatchAugment(0.4, 0.3, 0.2, 0.1, cfg["mean"], cfg["std"])
    with pytest.raises(InputError, match=r"set data\.resident = false"):
        replace(config, auto_augment="rand-m9-mstd0.5-inc1").on_device(model)
