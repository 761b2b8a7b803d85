"""What many tests need: tiny models of every covered family, and few threads so that workers do not fight."""

from __future__ import annotations

import os
from pathlib import Path

import pytest
import timm
import torch
from tiny import TINY, sharp_images, sharp_model

torch.set_num_threads(1)


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption("--all", action="store_true", help="also the slow tests, as continuous integration does")


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    if not config.getoption("--all"):
        for item in items:
            if item.get_closest_marker("slow"):
                item.add_marker(pytest.mark.skip(reason="slow: give --all"))


FAMILIES: dict[str, dict] = {
    "deit_tiny_patch16_224": {"depth": 6},
    "deit3_small_patch16_224": {"depth": 7},  # layer scale, depth that 3 does not divide
    "deit_tiny_distilled_patch16_224": {"depth": 6},  # two prefix tokens, two heads
    "vit_small_patch16_224.augreg_in1k": {"depth": 5},
    "vit_base_patch16_clip_224.openai": {"depth": 6},  # pre-norm
    "vit_small_patch14_dinov2": {"depth": 6},
    "vit_small_patch14_reg4_dinov2": {"depth": 6},  # registers
    "vit_giant_patch14_reg4_dinov2": {"depth": 3, "mlp_ratio": 4.0},  # gated MLP
    "vit_base_patch16_siglip_224": {"depth": 6},  # no class token, attention pooling
    "vit_medium_patch16_gap_256": {"depth": 6},  # average pooling, no class token
    "vit_small_patch16_224": {"depth": 6, "qk_norm": True, "global_pool": "avg"},  # pools patches, has a class token
    "vit_base_patch16_rpn_224": {"depth": 3},  # post-norm
    "vit_small_patch16_18x2_224": {"depth": 3},  # two attentions, then two MLPs in parallel
    "vit_base_patch16_xp_224": {"depth": 3},  # attention and MLP in parallel
    "vit_small_patch16_dinov3": {"depth": 4, "global_pool": "token"},  # rotary, registers, layer scale
    "eva02_tiny_patch14_224": {"depth": 3},  # rotary and absolute positions, gated MLP, average pooling
    "eva02_base_patch14_448": {"depth": 3},  # split projections, norms in attention and MLP
    "vit_pe_core_small_patch16_384": {"depth": 3},  # pools all tokens by attention
    "vit_base_patch16_rope_mixed_224": {"depth": 3},  # angles are learned, per block and head
    "vit_base_patch16_sapiens2": {"depth": 3, "num_kv_heads": (3, 1, 3)},  # keys shared by heads
}


# older versions of timm do not have all of them
@pytest.fixture(params=[item for item in FAMILIES.items() if timm.is_model(item[0])], ids=lambda item: item[0])
def family(request: pytest.FixtureRequest) -> tuple[str, dict]:
    """``(timm name, arguments)`` of a tiny model of each covered family."""
    name, kwargs = request.param
    return name, {**TINY, **kwargs}


@pytest.fixture(scope="session")
def data_dir() -> Path:
    """The folder of real data sets named by IARED2_DATA; tests that need it say loudly that they were skipped."""
    path = os.environ.get("IARED2_DATA")
    if not path:
        pytest.skip("real data: set IARED2_DATA to the folder that holds cifar10/ and tiny-imagenet-200/")
    return Path(path)


@pytest.fixture(scope="session")
def like_the_box(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A file of a small model with all that the one in the box has, for tests in which that one is incidental."""
    size = {"img_size": 64, "patch_size": 8, "embed_dim": 48, "depth": 8, "num_heads": 3, "num_classes": 7}
    model = sharp_model(("deit_tiny_patch16_224", size), groups=4)
    model.class_names = ("ant", "bee", "cat", "dog", "elk", "fox", "gnu")
    model.calibrate(sharp_images(64, 64, 64), keep=(1.0, 0.6, 0.4, 0.3))
    path = tmp_path_factory.mktemp("like-the-box") / "model.safetensors"
    model.save(path, int8=True)
    return path


@pytest.fixture(scope="session")
def device() -> torch.device:
    """Of tests/cuda. ``IARED2_TEST_DEVICE=cpu`` runs on a CPU those that are not about CUDA itself."""
    name = os.environ.get("IARED2_TEST_DEVICE", "cuda")
    if name.startswith("cuda") and not torch.cuda.is_available():
        pytest.skip("needs CUDA")
    return torch.device(name)


@pytest.fixture
def cuda(device: torch.device) -> torch.device:
    """The device, for tests about CUDA itself."""
    if device.type != "cuda":
        pytest.skip("is about CUDA itself")
    return device
