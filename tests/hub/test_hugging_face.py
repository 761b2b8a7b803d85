"""Folders of the Hugging Face Hub: what is written, what is read, and what is refused. No test uses the network."""

from __future__ import annotations

import copy
import json
import shutil
import socket
from pathlib import Path

import huggingface_hub
import numpy as np
import pytest
import torch
from huggingface_hub import ModelCard
from PIL import Image
from torch import Tensor

import iared2
from iared2 import InputError, ReducedVisionTransformer

TINY = {"img_size": 32, "patch_size": 8, "embed_dim": 48, "depth": 4, "num_heads": 3, "num_classes": 3}
COMMIT = "0123456789abcdef0123456789abcdef01234567"


@pytest.fixture(autouse=True)
def no_network(monkeypatch: pytest.MonkeyPatch) -> None:
    def connect(*args: object) -> None:
        raise AssertionError("the network was used without being asked for")

    monkeypatch.setattr(socket.socket, "connect", connect)


@pytest.fixture
def model() -> ReducedVisionTransformer:
    torch.manual_seed(0)
    model = iared2.from_timm("deit_tiny_patch16_224", groups=2, **TINY).eval()
    model.class_names = ("cat", "dog | <b>", "bird")
    model.threshold = (0.49, 0.5)
    return model


@pytest.fixture
def images() -> Tensor:
    return torch.randn(2, 3, 32, 32, generator=torch.Generator().manual_seed(0))


def test_a_folder_gives_the_same_model(model, images, tmp_path):
    model.save_pretrained(tmp_path / "new" / "folder")
    for load in (ReducedVisionTransformer.from_pretrained, iared2.load):
        loaded = load(tmp_path / "new" / "folder")
        assert torch.equal(loaded(images), model(images))
        assert loaded.decision == model.decision
        assert loaded.class_names == model.class_names
        assert not loaded.training


def test_the_old_single_file_stays_readable(model, images, tmp_path):
    model.save(tmp_path / "model.safetensors")
    for source in (tmp_path / "model.safetensors", str(tmp_path)):
        assert torch.equal(ReducedVisionTransformer.from_pretrained(source)(images), model(images))


def test_the_box_survives_a_folder_bit_for_bit(tmp_path):
    box, images = iared2.load(), torch.randn(1, 3, 64, 64)
    box.save_pretrained(tmp_path)
    images = torch.randn(1, *box.pretrained_cfg["input_size"])
    assert torch.equal(iared2.load(tmp_path)(images), box(images))


def test_a_subclass_loads_as_itself(model, tmp_path):
    class Mine(ReducedVisionTransformer):
        pass

    model.save_pretrained(tmp_path)
    assert type(Mine.from_pretrained(tmp_path)) is Mine
    assert type(copy.deepcopy(model)) is ReducedVisionTransformer


def test_a_video_model_has_a_folder_too(tmp_path):
    small = {"img_size": (4, 32, 32), "patch_size": (2, 16, 16), "embed_dim": 48, "num_heads": 3}
    model = iared2.from_timm("videomae_base_patch16_224", depth=3, num_classes=5, **small).eval()
    model.save_pretrained(tmp_path)
    clips = torch.randn(1, 3, 4, 32, 32)
    assert torch.equal(iared2.load(tmp_path)(clips), model(clips))
    assert "auto_map" not in json.loads((tmp_path / "config.json").read_text())
    assert ModelCard.load(tmp_path / "README.md").data.pipeline_tag == "video-classification"


class TestNames:
    @pytest.fixture
    def cached(self, model, tmp_path, monkeypatch) -> ReducedVisionTransformer:
        """``user/model`` in the cache of huggingface_hub, in offline mode, at ``main`` and at the tag ``v1``."""
        repo = tmp_path / "cache" / "models--user--model"
        model.save_pretrained(repo / "snapshots" / COMMIT)
        for name in ("main", "v1"):
            (repo / "refs").mkdir(exist_ok=True)
            (repo / "refs" / name).write_text(COMMIT)
        monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_CACHE", str(tmp_path / "cache"))
        monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", True)
        monkeypatch.chdir(tmp_path)
        return model

    @pytest.mark.parametrize(
        "name",
        [
            *("user/model", "user/model@v1", f"user/model@{COMMIT}"),
            *("hf-hub:user/model@v1", "https://huggingface.co/user/model"),
        ],
    )
    def test_of_the_hub_are_found_in_the_cache(self, cached, images, name):
        for load in (iared2.load, ReducedVisionTransformer.from_pretrained):
            assert torch.equal(load(name)(images), cached(images))
        assert torch.equal(
            ReducedVisionTransformer.from_pretrained("user/model", revision="v1")(images), cached(images)
        )

    def test_with_other_weights_are_refused(self, cached, tmp_path):
        file = tmp_path / "cache" / "models--user--model" / "snapshots" / COMMIT / "model.safetensors"
        torch.save(cached.state_dict(), file)
        for load in (iared2.load, ReducedVisionTransformer.from_pretrained):
            with pytest.raises(InputError, match="not in that format, and no other is read"):
                load("user/model")
        file.unlink()
        with pytest.raises(InputError, match="there is no checkpoint"):
            iared2.load("user/model")

    @pytest.mark.parametrize("name", ["user/other", "user/model@v2"])
    def test_that_are_not_there_are_named(self, cached, name):
        with pytest.raises(InputError, match=f"no file or folder {name}, and the Hugging Face Hub gives no such model"):
            iared2.load(name)

    @pytest.mark.parametrize(
        "name", ["runs/mine", "pipe/x", "user/model.safetensors", "user/model.pth", "a/b/c", "../x", "model"]
    )
    def test_that_are_paths_ask_nobody(self, cached, name):
        Path("runs").mkdir()
        Path("pipe").touch()
        with pytest.raises(InputError, match=f"there is no checkpoint {name}"):
            iared2.load(name)

    def test_that_are_no_names_are_refused(self, cached):
        with pytest.raises(InputError, match="is called user/model"):
            ReducedVisionTransformer.from_pretrained("no such model")

    def test_a_folder_comes_before_the_hub(self, cached, tmp_path):
        Path("user/model").mkdir(parents=True)
        with pytest.raises(InputError, match=r"there is no checkpoint user/model/model\.safetensors"):
            iared2.load("user/model")


class TestNothingFromAFileIsTrusted:
    @pytest.mark.parametrize(
        ("change", "message"),
        [
            ({"model_args": {"embed_dim": 1 << 23, "num_heads": 1}}, "does not fit the model"),
            ({"model_args": {"embed_dim": 1 << 40}}, "embed_dim should not be"),
            ({"model_args": {"img_size": [1 << 20, 1 << 20]}}, "does not (describe a|fit the) model"),
            ({"model_args": {"depth": 100_000}}, "100000 blocks are more than 1000"),
            ({"model_args": {"checkpoint": "/etc/passwd"}}, "model_args.checkpoint should not be"),
            ({"model_args": {"norm_layer": "os.system"}}, "timm cannot build .* .os.system"),
            ({"architecture": "resnet50"}, "not a plain vision transformer"),
            ({"architecture": "hf-hub:evil/model"}, "timm has no model"),
            ({"architecture": "iared2_deit_tiny_patch16_224"}, "not supported"),
            ({"threshold": [0.5]}, "threshold has 1 numbers for 2 groups"),
            ({"groups": 0}, "2 numbers for 0 groups"),
            ({"pretrained_cfg": {"url": "https://evil.example"}}, "pretrained_cfg.url should not be"),
        ],
    )
    def test_not_the_configuration(self, model, tmp_path, change, message):
        model.save_pretrained(tmp_path)
        config = json.loads((tmp_path / "config.json").read_text())
        for key, value in change.items():
            config["iared2"][key] = config["iared2"][key] | value if isinstance(value, dict) else value
        (tmp_path / "config.json").write_text(json.dumps(config))
        with pytest.raises(InputError, match=message):
            iared2.load(tmp_path)

    @pytest.mark.parametrize("text", ["", "[]", "{}", '{"iared2": 3}', '{"iared2": ', "\0", "[" * 100_000, "NaN"])
    def test_not_that_it_is_one(self, model, tmp_path, text):
        model.save_pretrained(tmp_path)
        (tmp_path / "config.json").write_text(text)
        with pytest.raises(InputError, match=r"config\.json"):
            iared2.load(tmp_path)

    def test_not_the_values(self, model, tmp_path):
        with torch.no_grad():
            model.backbone.head.bias[0] = torch.nan
        with pytest.raises(InputError, match="is not finite"):
            model.save_pretrained(tmp_path)
        assert not (tmp_path / "config.json").exists()

    def test_no_pickle_is_read(self, model, tmp_path):
        model.save_pretrained(tmp_path)
        (tmp_path / "model.safetensors").unlink()
        torch.save(model.state_dict(), tmp_path / "pytorch_model.bin")
        with pytest.raises(InputError, match="there is no checkpoint"):
            ReducedVisionTransformer.from_pretrained(tmp_path)


class TestTheFolder:
    def test_is_replaced_as_a_whole_but_for_the_card(self, model, images, tmp_path):
        (tmp_path / "README.md").write_text("my own words")
        (tmp_path / "notes.txt").write_text("mine")
        model.save_pretrained(tmp_path)
        model.threshold = 0.1
        model.save_pretrained(tmp_path)
        assert iared2.load(tmp_path).threshold == 0.1
        assert (tmp_path / "README.md").read_text() == "my own words"
        names = {"README.md", "config.json", "model.safetensors", "modeling_iared2.py", "notes.txt"}
        assert {file.name for file in tmp_path.iterdir()} == names

    def test_keeps_the_old_model_if_the_new_one_cannot_be_written(self, model, tmp_path):
        model.save_pretrained(tmp_path)
        before = {file.name: file.read_bytes() for file in tmp_path.iterdir()}
        model.backbone.pretrained_cfg = {}  # it has no timm name now
        with pytest.raises(InputError, match="no timm name"):
            model.save_pretrained(tmp_path)
        assert {file.name: file.read_bytes() for file in tmp_path.iterdir()} == before

    def test_that_is_a_file_is_refused(self, model, tmp_path):
        (tmp_path / "file").touch()
        with pytest.raises(InputError, match="cannot write"):
            model.save_pretrained(tmp_path / "file")

    def test_takes_no_other_configuration(self, model, tmp_path):
        with pytest.raises(InputError, match="leave config out"):
            model.save_pretrained(tmp_path, config={"groups": 3})


class TestTheCard:
    def test_says_what_the_model_knows(self, model):
        card = model.generate_model_card()
        assert card.data.library_name == "iared2"
        assert card.data.pipeline_tag == "image-classification"
        assert {"iared2", "timm", "arxiv:2106.12620"} <= set(card.data.tags)
        assert card.data.license is None
        for text in ("4 blocks of width 48", "3 × 32 × 32", "| 4 × 4 |", "0.49", "3: cat, dog \\| &lt;b>, bird"):
            assert text in card.text, text
        assert card.text.count("did not state") == 3

    def test_says_what_is_given(self, model, tmp_path):
        overlay = iared2.Predictor(model)(np.full((40, 60, 3), 90, np.uint8)).overlay()
        figures = {"top-1 %": 58.1}
        known = {"data": "uoft-cs/cifar10", "figures": figures, "license": "mit", "tags": ("mine",), "picture": overlay}
        model.save_pretrained(tmp_path, model_card_kwargs=known)
        card = ModelCard.load(tmp_path / "README.md")
        assert (card.data.license, card.data.datasets) == ("mit", ["uoft-cs/cifar10"])
        assert "mine" in card.data.tags
        assert "| top-1 % | 58.1 |" in card.text
        assert "(picture.png)" in card.text
        assert "did not state" not in card.text
        with Image.open(tmp_path / "picture.png") as picture:
            assert picture.size == overlay.size

    def test_takes_the_figures_of_evaluate(self, model, tmp_path):
        one = {"name": "reduced", "top1": 58.1, "keep_ratio": [1.0, 0.5], "gmacs": 0.18, "images_per_second": 3.0}
        (tmp_path / "box.json").write_text(json.dumps({"images": 1000, "skipped": [], "variants": [one]}))
        card = model.generate_model_card(figures=tmp_path / "box.json")
        assert "on 1,000 images" in card.text
        assert "| reduced | 58.10 | 100 · 50 | 0.1800 |" in card.text

    @pytest.mark.parametrize("known", [{"figures": "none.json"}, {"figures": 3}, {"picture": 3}, {"picture": "x.png"}])
    def test_refuses_what_it_cannot_show(self, model, tmp_path, known):
        with pytest.raises(InputError, match=r"figures|picture"):
            model.save_pretrained(tmp_path, model_card_kwargs=known)
        assert not list(tmp_path.iterdir())


def test_a_model_is_pushed_with_its_card(model, images, tmp_path, monkeypatch):
    def create_repo(self, repo_id, **kwargs):
        return huggingface_hub.RepoUrl(f"https://huggingface.co/{repo_id}")

    def upload_folder(self, *, repo_id, folder_path, **kwargs):
        shutil.copytree(folder_path, tmp_path / "pushed")
        return f"https://huggingface.co/{repo_id}/commit/main"

    monkeypatch.setattr(huggingface_hub.HfApi, "create_repo", create_repo)
    monkeypatch.setattr(huggingface_hub.HfApi, "upload_folder", upload_folder)
    assert model.push_to_hub("me/mine", model_card_kwargs={"license": "mit"}).endswith("me/mine/commit/main")
    assert torch.equal(iared2.load(tmp_path / "pushed")(images), model(images))
    card = ModelCard.load(tmp_path / "pushed" / "README.md")
    assert card.data.license == "mit"
    assert 'iared2.load("me/mine")' in card.text
