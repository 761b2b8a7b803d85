"""Algorithm 1: for each group, train its interpreter, then the blocks that follow it.

Deviations from the paper (all of them are listed in docs/method.md):

1. Order, augmentation, Bernoulli draws and stochastic depth are functions of (seed, epoch, sample), mixup and dropout
   of (seed, stage, step, process). On a CPU, a run that is killed and resumed therefore ends with bit-identical
   weights.
2. An optional first stage trains the dense backbone, for runs that do not start from pretrained weights.
"""

from __future__ import annotations

import copy
import dataclasses
import json
import os
import shutil
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, Literal

import torch
from accelerate import Accelerator
from accelerate.state import AcceleratorState
from torch import nn

from ..data.batches import clip_length, steps_per_epoch
from ..data.cluttered import open_cluttered
from ..data.device_dataset import DeviceDataset, ResidentImages
from ..data.videos import open_for
from ..device import has_fast_bf16
from ..errors import InputError
from ..model.backbone import pools_patches
from ..model.baselines import KINDS as BASELINES
from ..model.baselines import baseline_scores
from ..model.decide import by_share
from ..model.file import config_of
from ..model.reduced import ReducedVisionTransformer
from ..model.restore import load_strictly
from ..pretrained.build import from_timm
from ..pretrained.checkpoint import load_backbone_weights
from .finetune import FinetuneStage
from .gumbel import GumbelStage
from .log import RunLog
from .optimizer import make_optimizer
from .policy_gradient import PolicyGradientStage, dropping
from .recipe import RENAMED, Recipe, check
from .state import Position, State, load_state
from .stop import Stop
from .trainer import STATE, Images, Stage, Trainer

SPLITS: tuple[Literal["train", "eval"], ...] = ("train", "eval")
MAX_PARAMETERS = 10**10
DISTILL = ("distill", "distill_features")
"""Settings of fine-tuning that need the dense model."""


def stages_of(recipe: Recipe, model: ReducedVisionTransformer, teacher: nn.Module | None = None) -> list[Stage]:
    """The stages in order, without stages of 0 epochs and groups that drop nothing."""
    policy, learns = recipe.policy, recipe.policy.decisions not in BASELINES
    dense = partial(FinetuneStage, model, None, patch_drop=recipe.backbone.patch_drop)
    stages = [Stage("backbone", None, recipe.backbone, dense, model.backbone, policy=False)]
    decide = None if learns else by_share(policy.keep, model.decision.standing)
    learn: type[PolicyGradientStage] = GumbelStage if policy.decisions == "gumbel" else PolicyGradientStage
    drop = dropping(policy.keep) if policy.keep else range(model.num_groups)
    for groups in [drop] if policy.joint else [[i] for i in drop]:
        first, last, number = groups[0], groups[-1], "" if policy.joint else f" {groups[0] + 1}"
        if learns:
            step = partial(learn, model, groups, recipe.reward, policy, teacher if recipe.reward.needs_dense else None)
            trained = nn.ModuleList(model.interpreters[i] for i in groups)
            budget = _budget(policy.keep, last if policy.joint else first - 1)
            stages.append(
                Stage(f"policy_gradient{number}", last, recipe.policy_gradient, step, trained, True, budget=budget)
            )
        settings = {name: getattr(recipe.finetune, name) for name in (*DISTILL, "vectors_only")}
        tune = partial(FinetuneStage, model, first, decide=decide, teacher=teacher, **settings, last=last)
        budget = _budget(policy.keep, last) if learns else ()
        stages.append(Stage(f"finetune{number}", last, recipe.finetune, tune, model.backbone, False, decide, budget))
    return [stage for stage in stages if stage.config.epochs > 0]


def _budget(keep: tuple[float, ...], last: int) -> tuple[float, ...]:
    """The shares up to group ``last``; later groups, which are not trained yet, drop nothing more."""
    return tuple(keep[min(i, last)] if last >= 0 else 1.0 for i in range(len(keep)))


def build_model(recipe: Recipe, num_classes: int, weights: bool = True) -> ReducedVisionTransformer:
    """The model of a recipe with a head of ``num_classes``, before any training.

    Args:
        weights: load the pretrained weights of the recipe; a resumed run has its own.
    """
    torch.manual_seed(recipe.seed)
    config = recipe.model
    pretrained = config.pretrained and weights
    model = from_timm(
        config.backbone,
        groups=config.groups,
        pretrained=pretrained,
        interpreter=config.interpreter,
        dropped=config.dropped,
        num_classes=num_classes,
        **config.timm,
    )
    model.spread = recipe.policy.spread
    if config.checkpoint and weights:
        load_backbone_weights(model.backbone, config.checkpoint)
        model.start_interpreters()
    if recipe.policy.decisions in BASELINES:
        for group in range(model.num_groups):
            model.interpreters[group] = baseline_scores(recipe.policy.decisions, model, group)
    cfg = model.pretrained_cfg
    mean, std = config.mean or cfg["mean"], config.std or cfg["std"]
    if cfg["input_size"][0] == 1 and not config.mean:  # grey uses the mean of the colours
        mean, std = (sum(mean) / len(mean),), (sum(std) / len(std),)
    if (mean, std) != (cfg["mean"], cfg["std"]):
        model.backbone.pretrained_cfg = {**cfg, "mean": mean, "std": std}
    return model


@dataclass(frozen=True)
class RunData:
    """The data that a run trains and evaluates on.

    Attributes:
        class_names: in the order of the model's outputs.
        number: number of training samples.
        on_device: whether they are augmented in batches, on the device of the model.
        read: device -> the samples to train on and those to evaluate on.
    """

    class_names: tuple[str, ...]
    number: int
    on_device: bool
    read: Callable[[torch.device], tuple[Images, Images]]


def open_data(recipe: Recipe) -> RunData:
    """Open the data of a recipe.

    Raises:
        InputError: says which file or setting is wrong.
    """
    config = recipe.data
    size = input_size(recipe)
    frames = clip_length({"input_size": size})
    on_device = config.resident or bool(config.clutter)
    if frames and on_device:
        raise InputError("recipe: data.resident and data.clutter are for images; set them to false and 0")
    if config.clutter and tuple(size[1:]) != (config.clutter,) * 2:
        raise InputError(f"recipe: data.clutter = {config.clutter} is the side of the canvas; set img_size to it")
    opened = {split: open_for(frames, config, split, recipe.clips) for split in SPLITS}

    def read(device: torch.device) -> tuple[Images, Images]:
        def one(split: Literal["train", "eval"]) -> Images:
            if config.clutter:
                return open_cluttered(config, split, config.clutter, device=device)
            if config.resident:
                return ResidentImages.read(opened[split], (size[1], size[2]), device, config.workers)
            return opened[split]

        return one("train"), one("eval")

    return RunData(opened["train"].class_names, len(opened["train"]), on_device, read)


def input_size(recipe: Recipe) -> tuple[int, ...]:
    """``(channels, H, W)`` of images or ``(channels, T, H, W)`` of clips, from a model without weights.

    Raises:
        InputError: there is no such model, it is too large, or the data do not have its channels.
    """
    config = recipe.model
    with torch.device("meta"):
        model = from_timm(config.backbone, groups=config.groups, **config.timm)
    size: tuple[int, ...] = model.pretrained_cfg["input_size"]
    parameters = sum(p.numel() for p in model.parameters())
    if parameters > MAX_PARAMETERS:
        raise InputError(f"recipe: the model would have {parameters:.0e} parameters; make model.timm smaller")
    if size[0] not in ((1, 3) if len(size) == 3 else (3,)):
        what = "photos have 3 channels, or 1 as grey" if len(size) == 3 else "clips have 3 channels"
        raise InputError(f"recipe: model.timm.in_chans = {size[0]}, but {what}")
    if len(config.mean) not in (0, size[0]):
        raise InputError(f"recipe: model.mean and model.std need {size[0]} numbers, one per channel")
    try:
        model.backbone(torch.zeros(1, *size, device="meta"))
    except Exception as error:  # by the layers that model.timm asked for
        raise InputError(f"recipe: no image passes such a model.timm: {str(error).splitlines()[0]}") from None
    return size


def train(recipe: Recipe, output: Path, data: RunData | None = None) -> Path:
    """Run a recipe, or resume a killed run of it. In its process, the precision of accelerate is then the recipe's.

    Args:
        recipe: the recipe.
        output: the run's folder: ``state.safetensors`` (resume), ``model.safetensors`` (result), ``metrics.jsonl`` and
            ``tensorboard/``; with a frozen backbone also ``policy.safetensors``, the policy alone.
        data: replaces the data of the recipe.

    Returns:
        The path of the finished model.

    Raises:
        InputError: the data or the recipe is wrong, or ``output`` contains a run of another recipe; raised before
            training. Or the loss is not finite.
        Stopped: by SIGINT or SIGTERM. The same call resumes the run.
    """
    check(recipe)
    with Stop() as stop:
        data = data or open_data(recipe)
        accelerator = _accelerator(recipe)
        identity = {
            **_comparable(recipe),
            "number of processes": accelerator.num_processes,
            "number of images": data.number,
            "class names": list(data.class_names),
        }
        state = _saved(output, identity)
        parts = state.parts if state else {}
        model = build_model(recipe, len(data.class_names), weights=not state)
        model.class_names = data.class_names
        model.backbone.pretrained_cfg = {**model.pretrained_cfg, "holdout": recipe.data.holdout}  # for `evaluate`
        if state:
            load_strictly(model, parts["model"], output / STATE)
            model.decision = state.decision
        teacher = None
        if recipe.reward.needs_dense or any(getattr(recipe.finetune, name) for name in DISTILL):
            teacher = copy.deepcopy(model.backbone).eval().requires_grad_(False)
            if state:
                load_strictly(teacher, parts["teacher"], output / STATE)
            teacher.to(accelerator.device)
        if recipe.compile:
            model.compile()
        stages = stages_of(recipe, model, teacher)
        _check_stages(recipe, stages, model, data, accelerator.num_processes)
        position = state.position if state else Position()
        log = _open_output(output, position, accelerator)
        if accelerator.mixed_precision != recipe.precision:
            log.warn(f'precision = "{recipe.precision}" is slow on this processor: float32 is used')
        try:
            images = data.read(accelerator.device)
            for resident in images:
                for name, reason in resident.skipped if isinstance(resident, DeviceDataset) else ():
                    log.warn(f"skipped {name}: {reason}")
            trainer = Trainer(output, identity, recipe, accelerator, model, *images, teacher, log, stop, position)
            trainer.run(stages, parts)
            path = _finish(trainer)
            skipped = trainer.position.skipped
            log.say(f"done: {path}" + f"  ({skipped} times an image could not be read)" * (skipped > 0))
        finally:
            with stop.whole():
                log.close()
                accelerator.end_training()
        return path


def _accelerator(recipe: Recipe) -> Accelerator:
    cpu = not torch.accelerator.is_available()
    precision = recipe.precision if has_fast_bf16("cpu" if cpu else "cuda") else "no"
    AcceleratorState._reset_state()  # it would hold the next run of a process to the precision of the first
    accelerator = Accelerator(mixed_precision=precision, cpu=cpu)
    launched = int(os.environ.get("WORLD_SIZE", 1))
    if accelerator.num_processes != launched:
        raise InputError(f"{launched} processes cannot work together on {accelerator.device}; start a single one")
    return accelerator


def _saved(output: Path, identity: dict[str, Any]) -> State | None:
    """The checkpoint in a run's folder, if there is one.

    Raises:
        InputError: it belongs to another recipe.
    """
    if not (output / STATE).exists():
        return None
    state = load_state(output / STATE)
    saved = _completed(state.identity, _comparable(Recipe()))
    if differing := ", ".join(key for key in identity if saved.get(key) != identity[key]):
        raise InputError(f"{output} holds a run of another recipe (other {differing}); give another --output")
    return state


def _check_stages(
    recipe: Recipe, stages: list[Stage], model: ReducedVisionTransformer, data: RunData, processes: int
) -> None:
    """Refuse now what would fail in a later stage or at the end."""
    if recipe.policy.decisions not in BASELINES:
        config_of(model)  # can it be saved?
    if recipe.policy.decisions == "gumbel" and pools_patches(model.backbone):
        raise InputError('recipe: policy.decisions = "gumbel" needs a head that reads the class token alone')
    for stage in stages:
        config, groups = stage.config, len([*stage.trained.children()])
        part = -(-config.batch_size // config.grad_accum_steps)  # the last one may be smaller
        if stage.policy and min(part, config.batch_size % part or part) < groups:
            raise InputError(
                f"recipe: policy.joint divides every part of a batch over {groups} groups; set a larger"
                f" {stage.section}.batch_size or a smaller {stage.section}.grad_accum_steps"
            )
        steps_per_epoch(range(data.number), config.batch_size, processes)
        (config.augment.on_device if data.on_device else config.augment.transform)(model)
        make_optimizer(stage.trained, config, stage.section)


def _open_output(output: Path, position: Position, accelerator: Accelerator) -> RunLog:
    try:
        output.mkdir(parents=True, exist_ok=True)
        if accelerator.is_main_process:
            for leftover in output.glob(".iared2-????????"):  # of a run that was killed while it wrote
                shutil.rmtree(leftover, ignore_errors=True)
            for leftover in output.glob(".*.safetensors.*.tmp"):  # of one of an earlier version
                leftover.unlink(missing_ok=True)
        return RunLog(output, position.total_steps, accelerator.is_main_process)
    except OSError as error:
        raise InputError(f"cannot write into the folder {output}: {error.strerror}; give another --output") from None


def _finish(trainer: Trainer) -> Path:
    """Calibrate and write the model. For a baseline, the scores are no weights, so only the checkpoint is written."""
    policy, model = trainer.recipe.policy, trainer.model
    if policy.decisions in BASELINES:
        return trainer.output / STATE
    if policy.keep:
        trainer.calibrate(policy.keep)
    path = trainer.output / "model.safetensors"
    if trainer.accelerator.is_main_process:
        model.eval().requires_grad_(True)
        model.save(path)
        if not trainer.recipe.backbone.epochs and not trainer.recipe.finetune.epochs:
            model.save_policy(trainer.output / "policy.safetensors")
    return path


def _comparable(recipe: Recipe) -> dict[str, Any]:
    """What must agree to resume a run: the recipe, except for the location of the data and how fast they are read."""
    tree = dataclasses.asdict(recipe)
    tree.pop("checkpoint_minutes")
    tree["data"] = {k: v for k, v in tree["data"].items() if k not in ("path", "workers")}
    return json.loads(json.dumps(tree))


def _completed(tree: Any, defaults: Any) -> Any:
    """The identity that an earlier version saved, with the current names and the defaults of later settings."""
    if not isinstance(tree, dict) or not isinstance(defaults, dict):
        return tree
    return defaults | {(k := RENAMED.get(old, old)): _completed(v, defaults.get(k, {})) for old, v in tree.items()}
