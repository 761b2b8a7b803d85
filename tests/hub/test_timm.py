"""Our models by timm's names, and each call that timm's own train.py and validate.py make on a model."""

from __future__ import annotations

import argparse
import re
import subprocess
import sys
from pathlib import Path

import pytest
import timm
import torch
from timm.data import resolve_data_config
from timm.models import load_checkpoint, model_parameters, resume_checkpoint
from timm.optim import create_optimizer_v2
from timm.optim._param_groups import param_groups_layer_decay
from timm.utils import CheckpointSaver, ModelEmaV3, dispatch_clip_grad
from torch import Tensor, nn

import iared2
import iared2.hub
from iared2 import InputError, ReducedVisionTransformer
from iared2.model.names import short_name

BOX = iared2.hub.BOX_NAME
NAME = "iared2_vit_tiny_patch16_224"
TINY = {"img_size": 32, "patch_size": 8, "embed_dim": 48, "depth": 4, "num_heads": 3}


@pytest.fixture(scope="module")
def box() -> ReducedVisionTransformer:
    return iared2.load()


def tiny(**kwargs) -> ReducedVisionTransformer:
    torch.manual_seed(0)
    return timm.create_model(NAME, groups=2, **{**TINY, "num_classes": 5, **kwargs})


def images_of(model: ReducedVisionTransformer, batch: int = 2) -> Tensor:
    return torch.randn(batch, *model.pretrained_cfg["input_size"], generator=torch.Generator().manual_seed(0))


class TestTheBox:
    def test_has_a_name_that_tells_its_sizes(self, box):
        (patch, _), (_, side, _) = box.backbone.patch_embed.patch_size, box.pretrained_cfg["input_size"]
        assert BOX.endswith(f"_patch{patch}_{side}.box")
        assert timm.list_models("iared2*.box", pretrained=True) == [BOX]

    def test_of_the_reference_model_will_be_called_by_its_sizes(self):
        config = {"architecture": "vit_small_patch14_dinov2.lvd142m", "model_args": {"img_size": [224, 224]}}
        assert short_name(config) == "iared2_vit_small_patch14_224"

    def test_is_the_default_of_its_architecture(self, box):
        model = timm.create_model(BOX.removesuffix(".box"), pretrained=True).eval()
        assert torch.equal(model(images_of(box)), box(images_of(box)))

    def test_comes_with_its_decision_and_class_names(self, box):
        model = timm.create_model(BOX, pretrained=True).eval()
        assert torch.equal(model(images_of(box)), box(images_of(box)))
        assert (model.decision, model.class_names) == (box.decision, box.class_names)

    def test_is_transformed_by_timm_as_by_us(self, box):
        data = resolve_data_config({}, model=timm.create_model(BOX, pretrained=True))
        assert (data["crop_pct"], data["crop_mode"]) == (1.0, "squash")
        assert data["input_size"] == tuple(box.pretrained_cfg["input_size"])
        registered = timm.get_pretrained_cfg(BOX)
        assert tuple(registered.input_size) == data["input_size"]
        assert (registered.num_classes, registered.license) == (box.num_classes, "apache-2.0")

    def test_without_weights_has_its_architecture_and_decision(self, box):
        model = timm.create_model(BOX).eval()
        assert {name: t.shape for name, t in model.state_dict().items()} == {
            name: t.shape for name, t in box.state_dict().items()
        }
        assert not torch.equal(model.backbone.cls_token, box.backbone.cls_token)
        assert model.decision == box.decision

    def test_gets_a_new_head(self, box):
        model = timm.create_model(BOX, pretrained=True, num_classes=7).eval()
        assert model(images_of(box)).shape == (2, 7)
        assert model.class_names is None
        for name, tensor in box.state_dict().items():
            assert name.startswith("backbone.head") or torch.equal(model.state_dict()[name], tensor), name

    def test_takes_grey_images_and_other_sizes(self, box):
        side = box.pretrained_cfg["input_size"][1] + 2 * box.backbone.patch_embed.patch_size[0]
        model = timm.create_model(BOX, pretrained=True, in_chans=1, img_size=side).eval()
        assert model.pretrained_cfg["input_size"] == (1, side, side)
        assert model(images_of(model)).shape == (2, box.num_classes)
        conv = "backbone.patch_embed.proj.weight"
        torch.testing.assert_close(model.state_dict()[conv], box.state_dict()[conv].sum(1, keepdim=True))

    def test_keeps_its_weights_with_what_does_not_change_them(self, box):
        model = timm.create_model(BOX, pretrained=True, drop_path_rate=0.2, drop_rate=0.1).eval()
        assert torch.equal(model(images_of(box)), box(images_of(box)))
        assert model.backbone.blocks[-1].drop_path1.drop_prob == pytest.approx(0.2)

    def test_loads_a_file_of_weights(self, box, tmp_path):
        box.save(tmp_path / "model.safetensors")
        model = timm.create_model(BOX, checkpoint_path=tmp_path / "model.safetensors").eval()
        assert torch.equal(model(images_of(box)), box(images_of(box)))

    def test_takes_another_decision(self, box):
        model = timm.create_model(BOX, pretrained=True, threshold=0.0).eval()
        torch.testing.assert_close(model(images_of(box)), box.backbone(images_of(box)))
        assert timm.create_model(BOX, pretrained=True, max_tokens=9, confidence=0.0).max_tokens == 9
        assert timm.create_model(BOX, pretrained=True, confidence=0.3).confidence == 0.3
        with pytest.raises(InputError, match="not both"):
            timm.create_model(BOX, pretrained=True, threshold=0.3, num_keep=9)
        with pytest.raises(InputError, match="max_tokens forbids: set confidence=0"):
            timm.create_model(BOX, pretrained=True, max_tokens=9)

    def test_has_this_name_in_the_pages(self):
        root = Path(__file__).parents[2]
        for page in ("README.md", "docs/hub.md"):
            names = set(re.findall(r"iared2_\w+\.box", (root / page).read_text(encoding="utf-8")))
            assert names == {BOX}, page


class TestFolders:
    def test_are_read_by_timm(self, tmp_path):
        model = tiny(threshold=0.49).eval()
        model.save_pretrained(tmp_path)
        loaded = timm.create_model(f"local-dir:{tmp_path}", pretrained=True).eval()
        assert torch.equal(loaded(images_of(model)), model(images_of(model)))
        assert loaded.decision == model.decision
        assert timm.create_model(f"local-dir:{tmp_path}", pretrained=True, num_classes=9).num_classes == 9

    def test_of_the_hub_are_read_by_timm(self, tmp_path, monkeypatch):
        model = tiny().eval()
        repo = tmp_path / "models--user--model"
        model.save_pretrained(repo / "snapshots" / ("0" * 40))
        (repo / "refs").mkdir()
        (repo / "refs" / "main").write_text("0" * 40)
        monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
        loaded = timm.create_model("hf-hub:user/model", pretrained=True, cache_dir=tmp_path).eval()
        assert torch.equal(loaded(images_of(model)), model(images_of(model)))

    def test_of_videos_are_read_by_timm(self, tmp_path):
        small = {"img_size": (4, 32, 32), "patch_size": (2, 16, 16), "embed_dim": 48, "num_heads": 3, "depth": 3}
        model = timm.create_model("iared2_videomae_base_patch16_224", num_classes=5, **small).eval()
        model.save_pretrained(tmp_path)
        clips = torch.randn(1, 3, 4, 32, 32)
        loaded = timm.create_model(f"local-dir:{tmp_path}", pretrained=True).eval()
        assert torch.equal(loaded(clips), model(clips))

    def test_are_checked_as_by_load(self, tmp_path):
        tiny().save_pretrained(tmp_path)
        text = (tmp_path / "config.json").read_text()
        (tmp_path / "config.json").write_text(text.replace('"embed_dim": 48', '"embed_dim": 4800000'))
        with pytest.raises(InputError, match="does not fit the model"):
            timm.create_model(f"local-dir:{tmp_path}", pretrained=True)


class TestNames:
    def test_of_every_supported_model_are_there(self):
        names = timm.list_models("iared2*")
        assert len(names) > 150
        assert {NAME, "iared2_deit3_small_patch16_224", "iared2_videomae_base_patch16_224"} <= set(names)
        assert {"iared2_eva02_tiny_patch14_224", "iared2_vit_small_patch16_18x2_224"} <= set(names)
        assert "iared2_vit_tiny_patch16_224.augreg_in21k" in timm.list_pretrained("iared2*")

    @pytest.mark.slow
    def test_can_all_be_built(self):
        for name in timm.list_models("iared2*", exclude_filters="*patch8_64"):
            with torch.device("meta"):
                assert isinstance(timm.create_model(name), ReducedVisionTransformer), name

    def test_take_the_weights_of_timm(self):
        model = timm.create_model(f"{NAME}.augreg_in21k_ft_in1k", groups=2, interpreter="attention", **TINY)
        assert model.pretrained_cfg["hf_hub_id"] == "timm/vit_tiny_patch16_224.augreg_in21k_ft_in1k"
        assert model.pretrained_cfg["architecture"] == "vit_tiny_patch16_224"
        assert (model.num_groups, model.interpreter) == (2, "attention")

    def test_load_weights_from_where_an_overlay_says(self, tmp_path):
        backbone = timm.create_model("vit_tiny_patch16_224", num_classes=5, **TINY)
        torch.save(backbone.state_dict(), tmp_path / "vit.pth")
        overlay = {"file": str(tmp_path / "vit.pth"), "num_classes": 5, "custom_load": False}
        model = tiny(pretrained=True, pretrained_cfg_overlay=overlay)
        assert torch.equal(model.backbone.head.weight, backbone.head.weight)

    def test_can_be_saved_and_loaded(self, tmp_path):
        model = tiny().eval()
        model.save(tmp_path / "model.safetensors")
        assert torch.equal(iared2.load(tmp_path / "model.safetensors")(images_of(model)), model(images_of(model)))

    @pytest.mark.parametrize("name", [NAME, BOX])
    @pytest.mark.parametrize(
        ("kwargs", "message"),
        [
            ({"features_only": True}, "features_only=True needs the features of every patch"),
            ({"scriptable": True}, "TorchScript cannot follow"),
            ({"global_pool": ""}, "global_pool=''"),
            ({"patch_drop_rate": 0.5}, "patch_drop_rate > 0"),
            ({"nonsense": 1}, "unexpected keyword argument 'nonsense'"),
            ({"threshold": "high"}, "threshold"),
        ],
    )
    def test_refuse_what_they_cannot_serve(self, name, kwargs, message):
        with pytest.raises(InputError, match=message):
            timm.create_model(name, **kwargs)


class TestImports:
    def run(self, code: str) -> str:
        return subprocess.run([sys.executable, "-c", code], check=True, capture_output=True, text=True).stdout

    @pytest.mark.parametrize("first", ["iared2, timm", "timm, iared2", "iared2.hub", "iared2.model.backbone, timm"])
    def test_register_in_any_order(self, first):
        assert self.run(f"import {first}, timm; print(timm.is_model({BOX.removesuffix('.box')!r}))") == "True\n"

    def test_of_the_package_and_the_help_wait_for_nothing(self):
        code = (
            "import sys, iared2, iared2.cli\n"
            "try: iared2.cli.main(['--help'])\n"
            "except SystemExit: print(sorted({'torch', 'timm', 'numpy', 'matplotlib', 'rich'} & set(sys.modules)))"
        )
        assert self.run(code).endswith("[]\n")

    def test_give_rooms_and_refuse_what_is_not_there(self):
        assert iared2.measure.__name__ == "iared2.measure"
        with pytest.raises(AttributeError, match="no attribute 'nothing'"):
            iared2.nothing  # noqa: B018


class TestTrainScript:
    """The calls of train.py and validate.py of timm 1.0, in their order."""

    def test_create_and_resolve(self):
        given = {"drop_rate": 0.0, "drop_path_rate": None, "drop_block_rate": None, "global_pool": None}
        model = timm.create_model(
            NAME, pretrained=False, in_chans=3, num_classes=5, bn_momentum=None, bn_eps=None, scriptable=False,
            checkpoint_path=None, **given, **TINY,
        )  # fmt: skip
        assert model.num_classes == 5
        model.get_classifier().weight.data.mul_(0.5)
        model.set_grad_checkpointing(enable=True)
        data = resolve_data_config({"img_size": None, "input_size": None, "crop_pct": None}, model=model, verbose=False)
        assert (data["input_size"], data["interpolation"]) == ((3, 32, 32), "bicubic")

    @pytest.mark.parametrize("name", [NAME, BOX])
    def test_resolve_arguments_as_newer_scripts_do(self, name):
        resolve = pytest.importorskip("timm.models._factory").__dict__.get("resolve_model_input_args")
        if resolve is None:
            pytest.skip("timm >= 1.0.31")
        from timm.data import resolve_input_data_config

        pretrained = name == BOX
        model = timm.create_model(**resolve(name, {"img_size": None}, pretrained=pretrained, num_classes=None)).eval()
        assert resolve_input_data_config(model, {})["input_size"] == tuple(model.pretrained_cfg["input_size"])
        if pretrained:
            assert torch.equal(model(images_of(model)), iared2.load()(images_of(model)))

    def test_optimizer(self):
        model = tiny()
        optimizer = create_optimizer_v2(model, opt="adamw", lr=1e-3, weight_decay=0.05)
        decay, free = {}, {}
        for group in optimizer.param_groups:
            (decay if group["weight_decay"] else free).update({id(p): p for p in group["params"]})
        names = {name: id(p) for name, p in model.named_parameters()}
        for name in ("backbone.pos_embed", "backbone.cls_token", "backbone.norm.weight", "interpreters.0.query.bias"):
            assert names[name] in free, name
        for name in ("backbone.head.weight", "backbone.patch_embed.proj.weight", "interpreters.0.query.weight"):
            assert names[name] in decay, name
        assert model.no_weight_decay() >= {"backbone.pos_embed", "backbone.cls_token"}

    def test_layers_are_those_of_timm(self):
        """The rate of each parameter is that of timm's own model; interpreters have that of the head."""
        model = tiny()

        def rates(module: nn.Module) -> dict[str, float]:
            names = {id(p): name for name, p in module.named_parameters()}
            groups = param_groups_layer_decay(module, weight_decay=0.05, layer_decay=0.5)
            return {names[id(p)]: group["lr_scale"] for group in groups for p in group["params"]}

        ours, theirs = rates(model), rates(model.backbone)
        assert {name.removeprefix("backbone."): r for name, r in ours.items() if name.startswith("backbone")} == theirs
        assert len({*theirs.values()}) == 6
        assert {rate for name, rate in ours.items() if name.startswith("interpreters")} == {theirs["head.weight"]}

    def test_training_step_average_and_checkpoints(self, tmp_path):
        model = tiny(drop_path_rate=0.1)
        optimizer = create_optimizer_v2(model, opt="adamw", lr=1e-2, layer_decay=0.75)
        average = ModelEmaV3(model, decay=0.5)
        before = {name: p.detach().clone() for name, p in model.named_parameters()}
        model.train()
        loss = nn.CrossEntropyLoss()(model(images_of(model, 4)), torch.tensor([0, 1, 2, 3]))
        loss.backward()
        dispatch_clip_grad(model_parameters(model, exclude_head=False), value=1.0)
        optimizer.step()
        average.update(model)
        moved = {name for name, p in model.named_parameters() if not torch.equal(p, before[name])}
        assert {"backbone.head.weight", "backbone.patch_embed.proj.weight"} <= moved
        images = images_of(model)
        model.eval()
        assert not torch.equal(average.module.eval()(images), model(images))

        args = argparse.Namespace(model=NAME)
        saver = CheckpointSaver(model, optimizer, args, average, checkpoint_dir=str(tmp_path))
        saver.save_checkpoint(0, metric=0.5)
        for use_ema, expected in ((False, model), (True, average.module)):
            other = tiny(num_classes=5).eval()
            load_checkpoint(other, str(tmp_path / "last.pth.tar"), use_ema=use_ema)
            assert torch.equal(other(images), expected(images))
        resumed = tiny()
        optimizer = create_optimizer_v2(resumed, opt="adamw", lr=1e-2, layer_decay=0.75)
        assert resume_checkpoint(resumed, str(tmp_path / "last.pth.tar"), optimizer) == 1

    def test_a_checkpoint_of_timm_becomes_a_model_of_ours(self, tmp_path):
        """What docs/hub.md shows: train.py writes last.pth.tar, validate.py and iared2 read it."""
        model = tiny().eval()
        CheckpointSaver(model, create_optimizer_v2(model), checkpoint_dir=str(tmp_path)).save_checkpoint(0, metric=0.5)
        loaded = tiny(checkpoint_path=tmp_path / "last.pth.tar").eval()
        loaded.save_pretrained(tmp_path / "folder")
        images = images_of(model)
        assert torch.equal(iared2.load(tmp_path / "folder")(images), model(images))
