"""`iared2.accelerate` and the command: a model and photos without labels -> a faster model and what it costs."""

from __future__ import annotations

import json
from dataclasses import asdict

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from pictures import jpeg
from PIL import Image
from skimage import data
from tiny import sharp_model

import iared2
from iared2 import InputError
from iared2.adapt import accelerate as module
from iared2.adapt import decision, policy, report
from iared2.adapt.photos import read
from iared2.adapt.policy import stopped_rising, train
from iared2.cli import main
from iared2.data.batches import model_transform
from iared2.evaluate.agreement import agreement, photos_needed
from iared2.model.decide import keep_all

SIZE = {"img_size": 64, "patch_size": 8, "embed_dim": 32, "depth": 4, "num_heads": 2, "num_classes": 7}
NAME = "deit_tiny_patch16_224"


@pytest.fixture(autouse=True)
def quick(monkeypatch):
    """Fewer trials and a timing that does not depend on the machine."""
    monkeypatch.setattr(decision, "TRIALS", 4)
    monkeypatch.setattr(report, "_speeds", lambda model, batch: (10.0, 15.0, 20.0))


@pytest.fixture(scope="module")
def photos():
    """Pieces of real photos."""
    pieces = []
    for photo in (data.astronaut(), data.chelsea(), data.coffee(), data.rocket()):
        for top in range(0, photo.shape[0] - 100, 60):
            pieces += [photo[top : top + 100, left : left + 100] for left in range(0, photo.shape[1] - 100, 60)]
    return [Image.fromarray(np.ascontiguousarray(piece)) for piece in pieces][:120]


@pytest.fixture
def model():
    return sharp_model((NAME, SIZE))


def tensor(photos, model):
    transform = model_transform(model.pretrained_cfg)
    return torch.stack([transform(photo) for photo in photos])


@pytest.mark.parametrize("classes", [7, 0])
def test_a_budget(photos, classes, capsys):
    backbone = sharp_model((NAME, {**SIZE, "num_classes": classes})).backbone
    before = {name: value.clone() for name, value in backbone.state_dict().items()}
    model = iared2.accelerate(backbone, photos, macs=0.7)
    assert model.backbone is backbone
    assert all(torch.equal(value, before[name]) for name, value in backbone.state_dict().items())
    assert not model.training

    # what it says is what the model does on the half of the photos on which nothing was chosen
    told = model.report
    images, _ = read(photos, model, 1000)
    others = images[len(images) // 2 :]
    with torch.inference_mode():
        output, dense = model.trace(others), backbone(others)
    expected = agreement(dense, output.logits, classes > 0)
    told_of, expected_of = ([v for v in asdict(a).values() if v is not None] for a in (told.reported, expected))
    assert told_of == pytest.approx(expected_of, rel=1e-3, abs=1e-4)
    assert len(told_of) == (3 if classes else 6)
    assert told.found.photos == len(images) // 2
    assert output.macs.double().mean().item() / model.dense_macs == pytest.approx(told.macs)
    assert told.macs == pytest.approx(0.7, abs=0.02)
    assert (told.second_pass, model.confidence) == (0, 0)  # a budget of MACs does not depend on the photos
    assert told.keep_ratio == pytest.approx(output.keep_ratio.mean(1).tolist())
    assert (told.speed_up, told.speed_up_of_dropping) == (2, pytest.approx(4 / 3))
    assert told.pays
    # equal counts: a batch is not ragged
    assert model.num_keep is not None
    out = capsys.readouterr().out
    assert f"({100 * told.macs:.0f} %)" in out
    assert ("10 nearest neighbours kept" in out) == (classes == 0)
    json.dumps(told.to_dict())


def test_the_share_that_may_change(photos, model):
    found = iared2.accelerate(model.backbone, photos, max_drop=0.2)
    told = found.report
    assert told.found.bound < 0.2
    assert told.macs < 1
    tighter = iared2.accelerate(model.backbone, photos, max_drop=0.06).report
    assert tighter.found is None or (tighter.found.bound < 0.06 and tighter.macs >= told.macs - 0.05)


def test_a_second_pass_makes_the_same_promise_cheaper(photos, model, monkeypatch, capsys):
    found = iared2.accelerate(model.backbone, photos, max_drop=0.06)
    out = capsys.readouterr().out
    monkeypatch.setattr(decision, "FIRST_PASS", ())
    monkeypatch.setattr(decision, "SCALES", ())
    once = iared2.accelerate(model.backbone, photos, max_drop=0.06).report
    assert once.decision is None or once.decision.confidence == 0
    told = found.report
    assert told.decision.confidence > 0
    assert told.found.bound < 0.06
    assert told.macs < once.macs
    images, _ = read(photos, model, 1000)
    with torch.inference_mode():
        output = found.trace(images[60:])
    assert told.second_pass == output.unsure.double().mean()
    assert told.macs == pytest.approx(output.macs.double().mean().item() / model.dense_macs)
    assert f"{100 * told.second_pass:.0f} % of the photos" in out


def test_first_passes_of_smaller_photos_are_tried(photos, model, monkeypatch, capsys):
    model.spread, images = 0.5, tensor(photos, model)
    with torch.inference_mode():
        half = decision.Half(images, model.backbone(images), True)
        before = model.decision
        found = list(decision._smaller_passes(decision.Choice("own", model), half, (0.5, 0.4, 0.3)))
        assert model.decision == before
        assert [one.decision.scale for one in found] == [scale for scale in decision.SCALES for _ in range(3)]
        for one in found:
            output = model.trace(images, one.decision)
            assert one.macs == pytest.approx(output.macs.double().mean().item() / model.dense_macs)
            torch.testing.assert_close(one.output, output.logits, atol=1e-4, rtol=0)
    # where a smaller photo says the same, it is what is found
    monkeypatch.setattr(decision, "FIRST_PASS", ())
    smooth = [photo.resize((4, 4)).resize((100, 100)) for photo in photos]
    found = iared2.accelerate(model, smooth, max_drop=0.06)
    assert found.report.found.bound < 0.06
    assert found.scale < 1
    assert f"{100 * found.scale:.3g} % of its width and height" in capsys.readouterr().out
    assert found.report.macs < 0.5


def test_too_few_photos_to_promise_says_how_many(photos, model):
    assert photos_needed(0.01) == 299
    with pytest.raises(InputError, match=r"max_drop=0.01 .* 120 photos.* give 598 at least"):
        iared2.accelerate(model, photos)
    with pytest.raises(InputError, match="7 photos are too few"):
        iared2.accelerate(model, photos[:7], macs=0.5)


def test_no_decision_changes_so_little(photos, model, monkeypatch, capsys):
    monkeypatch.setattr(decision.Target, "allows", lambda target, found: False)
    found = iared2.accelerate(model.backbone, photos, max_drop=0.1)
    assert found.threshold == 0
    assert not found.report.pays
    assert found.report.reported is None
    assert "no decision with fewer MACs" in " ".join(capsys.readouterr().out.split())
    images = tensor(photos[:4], model)
    with torch.inference_mode():
        torch.testing.assert_close(found(images), model.backbone(images), atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize("speeds", [(20.0, 15.0, 19.0), (10.0, 21.0, 20.0)])  # timm's, or ours without dropping
def test_where_dropping_does_not_pay_it_says_so(photos, model, monkeypatch, capsys, speeds):
    monkeypatch.setattr(report, "_speeds", lambda model, batch: speeds)
    model.max_tokens = 60
    found = iared2.accelerate(model, photos, macs=0.7)
    assert found.threshold == 0
    assert found.max_tokens is None
    assert "dropping does not pay here" in " ".join(capsys.readouterr().out.split())
    images, _ = read(photos, model, 1000)
    with torch.inference_mode():
        cost = found.trace(images[60:], found.report.decision).macs.double().mean().item()
    assert cost / found.dense_macs == pytest.approx(found.report.macs)


def test_sixteen_patches_do_not_pay(photos, monkeypatch, capsys):
    monkeypatch.undo()  # with the real timing
    monkeypatch.setattr(decision, "TRIALS", 2)
    tiny = sharp_model((NAME, {**SIZE, "img_size": 32, "embed_dim": 16}))
    found = iared2.accelerate(tiny.backbone, photos[:40], macs=0.8)
    assert found.threshold == 0
    assert "dropping does not pay here" in " ".join(capsys.readouterr().out.split())


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"max_drop": 0.1, "macs": 0.5}, "not both"),
        ({"max_drop": 0}, "max_drop=0:"),
        ({"macs": 1.0}, "macs=1.0:"),
        ({"macs": float("nan")}, "macs=nan"),
        ({"macs": 0.5, "minutes": -1}, "minutes"),
        ({"macs": 0.5, "limit": 3}, "limit"),
        ({"macs": 0.5, "workers": -1}, "workers=-1"),
        ({"macs": 0.5, "device": "nowhere"}, "device"),
        ({"macs": 1e-5}, "cannot be met"),
    ],
)
def test_what_cannot_be_asked_for(photos, model, settings, message):
    with pytest.raises(InputError, match=message):
        iared2.accelerate(model, photos[:20], **settings)


def test_what_is_no_photo_and_what_is_no_model(model, photos):
    with pytest.raises(InputError, match="none of the photos can be read"):
        iared2.accelerate(model, [b"no photo"] * 20, macs=0.5)
    with pytest.raises(InputError, match=r"\(20, 3, 32, 32\)"):
        iared2.accelerate(model, torch.zeros(20, 3, 32, 32), macs=0.5)
    with pytest.raises(InputError, match="1 photos are too few"):
        iared2.accelerate(model, photos[0], macs=0.5)
    with pytest.raises(InputError, match="the model takes 1: give a tensor"):
        iared2.accelerate(sharp_model((NAME, {**SIZE, "in_chans": 1})), photos, macs=0.5)
    with pytest.raises(InputError, match="not supported"):
        iared2.accelerate(torch.nn.Linear(2, 2), photos, macs=0.5)
    with pytest.raises(InputError, match="nothing_of_the_kind"):
        iared2.accelerate("nothing_of_the_kind", photos, macs=0.5)


def test_photos_from_anywhere_are_the_same_photos(photos, model, tmp_path):
    arrays = [np.asarray(photo) for photo in photos[:20]]
    for number, photo in enumerate(photos[:20]):
        photo.save(tmp_path / f"{number:02}.png")
    (tmp_path / "05b.png").write_bytes(b"broken")
    images, unreadable = read(arrays, model, 1000)
    assert (len(images), unreadable) == (20, 0)
    found, unreadable = read(str(tmp_path), model, 1000)
    assert (len(found), unreadable) == (20, 1)
    # another order, since there is one photo more
    key = lambda x: x.flatten(1).sum(1).sort().values  # noqa: E731
    torch.testing.assert_close(key(found), key(images))
    torch.testing.assert_close(read(tensor(photos[:20], model), model, 1000)[0], images)
    assert len(read(arrays, model, 8)[0]) == 8
    assert not torch.equal(images, tensor(photos[:20], model))  # the halves are random


def test_a_policy_of_its_own_is_a_choice(photos, model):
    """This one keeps what a model needs whose other patches have no effect: no untrained choice does that."""
    model.threshold = 0.5
    names = [choice.name for choice in decision.choices(model, own=True)]
    assert names[0].startswith("its own policy")
    assert len(names) == 6
    rotary = sharp_model(("vit_small_patch16_dinov3", {**SIZE, "patch_size": 8, "global_pool": "token"}))
    names = [choice.name for choice in decision.choices(rotary, own=False)]
    assert names == ["evenly, dropped patches merged", "evenly, dropped patches gone"]


@pytest.mark.parametrize("classes", [7, 0])
def test_minutes_train_the_interpreters_alone(photos, classes, monkeypatch, capsys):
    model = sharp_model((NAME, {**SIZE, "num_classes": classes}), interpreter="attention")
    before = {name: value.clone() for name, value in model.state_dict().items()}
    images = tensor(photos[:60], model)
    trained = train(model, images, (1.0, 0.7, 0.5), True, minutes=0.03)
    assert trained.steps >= 1
    changed = {name.split(".")[0] for name, value in model.state_dict().items() if not torch.equal(value, before[name])}
    assert changed == {"interpreters"}
    first = [name for name in before if name.startswith("interpreters.0.")]
    assert all(torch.equal(model.state_dict()[name], before[name]) for name in first)  # it drops nothing
    assert all(parameter.requires_grad and parameter.grad is None for parameter in model.parameters())


def test_photos_too_few_to_train_on_find_a_decision(photos):
    model = sharp_model((NAME, {**SIZE, "depth": 6}), groups=6, interpreter="attention")
    model.calibrate(tensor(photos[:8], model), keep=(0.95, 0.9, 0.8, 0.7, 0.6, 0.5))
    found = iared2.accelerate(model.backbone, photos[:8], macs=0.7, minutes=1)
    assert any("4 photos are too few to train the policy of" in note for note in found.report.notes)
    assert all(parameter.requires_grad for parameter in found.backbone.parameters())


def test_embeddings_leave_the_classifier_of_the_given_model(photos, model):
    found = iared2.accelerate(model.backbone, photos[:20], macs=0.9, embedding=True)
    assert (found.num_classes, model.backbone.num_classes) == (0, 7)
    assert isinstance(model.backbone.head, torch.nn.Linear)


@pytest.mark.parametrize("better", [True, False])
def test_a_trained_policy_is_kept_if_it_is_better(photos, model, monkeypatch, better):
    def spoil(model, images, shares, equal_counts, minutes):
        with torch.no_grad():
            for parameter in model.interpreters.parameters():
                parameter += 1
        return policy.Training(30, (0.1, 0.2), 60 * minutes, False)

    monkeypatch.setattr(module, "train", spoil)
    monkeypatch.setattr(decision.Target, "better", lambda target, one, other: better)
    found = iared2.accelerate(model.backbone, photos, macs=0.7, minutes=2)
    untrained = next(c.model for c in decision.choices(model, own=False) if found.report.choice.startswith(c.name))
    same = all(map(torch.equal, found.interpreters.parameters(), untrained.interpreters.parameters()))
    assert same == (not better)
    assert ("then trained: 30 steps in 2.0 minutes" in found.report.choice) == better
    assert any("found no better policy" in note for note in found.report.notes) == (not better)


def test_training_stops_where_the_reward_stops_rising():
    assert not stopped_rising([])
    assert not stopped_rising([0.3, 0.1, 0.1])
    assert stopped_rising([0.3, 0.1, 0.1, 0.2])
    assert not stopped_rising([0.1, 0.3, 0.1, 0.31])
    assert stopped_rising([0.1, 0.5, 0.2, 0.3, 0.4])


def test_the_command(tmp_path, capsys, model):
    for number in range(16):
        (tmp_path / "photos").mkdir(exist_ok=True)
        (tmp_path / "photos" / f"{number}.jpg").write_bytes(jpeg(number, 64))
    (tmp_path / "photos" / "broken.jpg").write_bytes(b"nothing")
    model.save(tmp_path / "mine.safetensors")
    command = ["accelerate", str(tmp_path / "photos"), "-m", str(tmp_path / "mine.safetensors")]
    command += ["-o", str(tmp_path / "fast.safetensors"), "--json", str(tmp_path / "report.json"), "--workers", "0"]
    assert main([*command, "--macs", "0.7", "--embedding"]) == 0
    fast = iared2.load(tmp_path / "fast.safetensors")
    told = json.loads((tmp_path / "report.json").read_text())
    assert fast.num_classes == 0
    assert told["macs"] == pytest.approx(0.7, abs=0.03)
    assert told["notes"] == ["1 photos could not be read and are left out"]
    assert told["reported"]["photos"] == 8
    images = torch.randn(3, 3, 64, 64)
    with torch.inference_mode():
        cost = fast.trace(images).macs.double().mean().item() / fast.dense_macs
    assert cost == pytest.approx(told["macs"], abs=0.05)
    assert "iared2.load" in capsys.readouterr().out

    for output in (str(tmp_path), str(tmp_path / "new" / "m.safetensors")):
        assert main([*command, "--macs", "0.7", "-o", output]) == 1
        assert "give the name of a file, in a folder that is there" in capsys.readouterr().err
    assert main([*command, "--macs", "0.7", "--json", str(tmp_path / "fast.safetensors")]) == 1
    assert "-o and --json are both" in capsys.readouterr().err
    assert main([*command]) == 1
    assert "598" in capsys.readouterr().err
    assert main([*command[:-4], "--json", command[1] + "/0.jpg", "--macs", "0.7", "-o", command[3]]) == 1
    assert "is read" in capsys.readouterr().err


def test_the_saved_model_is_the_one_that_was_measured(photos, model, tmp_path):
    found = iared2.accelerate(model.backbone, photos[:60], macs=0.6)
    found.save(tmp_path / "model.safetensors")
    again = iared2.load(tmp_path / "model.safetensors")
    images = tensor(photos[:8], model)
    with torch.inference_mode():
        torch.testing.assert_close(again(images), found(images), atol=1e-4, rtol=1e-4)
        assert (F.cosine_similarity(again(images), found(images, keep_all)) < 1).any()
    assert again.num_keep == found.num_keep
    assert again.decision == found.decision
