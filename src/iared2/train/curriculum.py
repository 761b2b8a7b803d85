"""Algorithm 1: for each group, train its interpreter, then the blocks that follow it.

Deviations from the paper (all of them are listed in docs/method.md):

1. Order, augmentation, Bernoulli draws and stochastic depth are functions of (seed, epoch, sample), mixup and dropout
   of (seed, stage, step, process), so that a run which is killed and resumed ends with the same weights, bit for bit,
   on a CPU.
2. An optional first stage trains the dense backbone, for those who do not start from pretrained weights.
"""

from __future__ import annotations

import copy
import dataclasses
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from itertools import pairwise
from pathlib import Path
from typing import Any, Literal

import torch
from accelerate import Accelerator
from torch import Tensor, nn

from ..data.batches import clip_length, steps_per_epoch
from ..data.cluttered import open_cluttered
from ..data.device_dataset import DeviceDataset, ResidentImages
from ..data.videos import open_for
from ..errors import InputError
from ..model.backbone import pools_patches
from ..model.baselines import KINDS as RIVALS
from ..model.baselines import baseline_scores
from ..model.decide import by_share
from ..model.file import config_of
from ..model.reduced import ReducedVisionTransformer
from ..pretrained.build import from_timm
from ..pretrained.checkpoint import load_backbone_weights, load_strictly
from .finetune import FinetuneStage
from .gumbel import GumbelStage
from .log import RunLog
from .policy_gradient import PolicyGradientStage
from .recipe import Recipe
from .state import Position, load_state
from .trainer import Images, Run, Stage

SPLITS: tuple[Literal["train", "eval"], ...] = ("train", "eval")


def stages_of(recipe: Recipe, model: ReducedVisionTransformer, teacher: nn.Module | None = None) -> list[Stage]:
    """The stages in the order in which they run; those of 0 epochs, and of groups that drop nothing, are left out."""
    policy, learns = recipe.policy, recipe.policy.decisions not in RIVALS
    dense = partial(FinetuneStage, model, None, patch_drop=recipe.backbone.patch_drop)
    stages = [Stage("backbone", None, recipe.backbone, dense, model.backbone, policy=False)]
    decide = None if learns else by_share(policy.keep)
    learn: type[PolicyGradientStage] = GumbelStage if policy.decisions == "gumbel" else PolicyGradientStage
    for i, interpreter in enumerate(model.interpreters):
        if policy.keep and policy.keep[i] == (1, *policy.keep)[i]:
            continue
        if learns:
            step = partial(learn, model, i, recipe.reward, policy, teacher)
            budget = _budget(policy.keep, i - 1)
            stages.append(
                Stage(f"policy_gradient {i + 1}", i, recipe.policy_gradient, step, interpreter, True, budget=budget)
            )
        tune = partial(FinetuneStage, model, i, decide=decide, teacher=teacher, distill=recipe.finetune.distill)
        budget = _budget(policy.keep, i) if learns else ()
        stages.append(Stage(f"finetune {i + 1}", i, recipe.finetune, tune, model.backbone, False, decide, budget))
    return [stage for stage in stages if stage.config.epochs > 0]


def _budget(keep: tuple[float, ...], last: int) -> tuple[float, ...]:
    """The shares up to group ``last``; the groups after it, which have not learned yet, drop nothing more."""
    return tuple(keep[min(i, last)] if last >= 0 else 1.0 for i in range(len(keep)))


def build_model(recipe: Recipe, num_classes: int, weights: bool = True) -> ReducedVisionTransformer:
    """The model of a recipe with a head of ``num_classes``, before any training.

    Args:
        weights: load the pretrained ones that the recipe names; a run that goes on has its own.
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
    if config.checkpoint and weights:
        load_backbone_weights(model.backbone, config.checkpoint)
        model.start_interpreters()
    if recipe.policy.decisions in RIVALS:
        for group in range(model.num_groups):
            model.interpreters[group] = baseline_scores(recipe.policy.decisions, model, group)
    if config.mean or config.std:
        model.backbone.pretrained_cfg = {**model.pretrained_cfg, "mean": config.mean, "std": config.std}
    return model


@dataclass(frozen=True)
class RunData:
    """What a run learns from and is measured on.

    Attributes:
        class_names: in the order of the model's outputs.
        number: of samples to train on.
        on_device: whether they are changed in batches, on the device of the model.
        read: device -> the samples to train on and those to measure on.
    """

    class_names: tuple[str, ...]
    number: int
    on_device: bool
    read: Callable[[torch.device], tuple[Images, Images]]


def open_data(recipe: Recipe) -> RunData:
    """The data that a recipe names.

    Raises:
        InputError: says which file or setting is wrong.
    """
    config = recipe.data
    with torch.device("meta"):  # is it a model of images or of videos?
        model = from_timm(recipe.model.backbone, groups=recipe.model.groups, **recipe.model.timm)
    size, frames = model.pretrained_cfg["input_size"], clip_length(model.pretrained_cfg)
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


def train(recipe: Recipe, output: Path, data: RunData | None = None) -> Path:
    """Run a recipe, or go on with it where it was killed.

    Args:
        recipe: what to do.
        output: the run's folder: ``state.safetensors`` (resume), ``model.safetensors`` (result), ``metrics.jsonl`` and
            ``tensorboard/``.
        data: other data than the recipe names.

    Returns:
        The path of the finished model.

    Raises:
        InputError: the data or the recipe is wrong, or ``output`` holds a run of another recipe; before any training.
    """
    check(recipe)
    data = data or open_data(recipe)
    accelerator = Accelerator(mixed_precision=recipe.precision)
    identity = {
        **_comparable(recipe),
        "number of processes": accelerator.num_processes,
        "number of images": data.number,
        "class names": list(data.class_names),
    }
    state, position = output / "state.safetensors", Position()
    parts: dict[str, dict[str, Tensor]] = {}
    if state.exists():
        position, saved_identity, parts = load_state(state)
        if saved_identity != identity:
            differing = ", ".join(key for key in identity if saved_identity.get(key) != identity[key])
            raise InputError(f"{output} holds a run of another recipe (other {differing}); give another --output")
    model = build_model(recipe, len(data.class_names), weights=not parts)
    model.class_names = data.class_names
    model.backbone.pretrained_cfg = {**model.pretrained_cfg, "holdout": recipe.data.holdout}  # `evaluate` looks it up
    if parts:
        load_strictly(model, parts["model"], state)
        model.threshold = parts["decision"]["threshold"].tolist()
        if "num_keep" in parts["decision"]:
            model.num_keep = parts["decision"]["num_keep"].tolist()
    teacher = None
    if recipe.reward.label == "dense" or recipe.finetune.distill:
        teacher = copy.deepcopy(model.backbone).eval().requires_grad_(False)
        if parts:
            load_strictly(teacher, parts["teacher"], state)
        teacher.to(accelerator.device)
    if recipe.compile:
        model.compile()
    is_rival = recipe.policy.decisions in RIVALS
    if not is_rival:
        config_of(model)  # a model that could not be saved is refused now, not at the end
    if recipe.policy.decisions == "gumbel" and pools_patches(model.backbone):
        raise InputError('recipe: policy.decisions = "gumbel" needs a head that reads the class token alone')
    stages = stages_of(recipe, model, teacher)
    for stage in stages:  # and so is a batch that cannot be filled
        steps_per_epoch(range(data.number), stage.config.batch_size, accelerator.num_processes)
        (stage.config.augment.on_device if data.on_device else stage.config.augment.transform)(model)
    try:
        output.mkdir(parents=True, exist_ok=True)
        log = RunLog(output, position.total_steps, accelerator.is_main_process)
    except OSError as error:
        raise InputError(f"cannot write into the folder {output}: {error.strerror}; give another --output") from None
    try:
        samples, held_out = data.read(accelerator.device)
        for images in (samples, held_out):
            for name, reason in images.skipped if isinstance(images, DeviceDataset) else ():
                log.warn(f"skipped {name}: {reason}")
        run = Run(
            output=output,
            identity=identity,
            accelerator=accelerator,
            model=model,
            samples=samples,
            held_out=held_out,
            teacher=teacher,
            log=log,
            seed=recipe.seed,
            workers=recipe.data.workers,
            checkpoint_minutes=recipe.checkpoint_minutes,
            eval_epochs=recipe.eval_epochs,
            equal_counts=recipe.policy.equal_counts,
        )
        for index in range(position.stage, len(stages)):
            position = run.stage(index, stages[index], position, parts)
            parts = {}
        if recipe.policy.keep and not is_rival:
            run.calibrate(recipe.policy.keep)
        path = output / ("state.safetensors" if is_rival else "model.safetensors")
        if accelerator.is_main_process and not is_rival:  # a rival's scores are no weights; its state has all there is
            model.eval().requires_grad_(True)
            model.save(path)
        log.say(f"done: {path}" + (f"  ({position.skipped} times an image could not be read)" * (position.skipped > 0)))
    finally:
        log.close()
        accelerator.end_training()
    return path


def check(recipe: Recipe) -> None:
    """Refuse settings that cannot be meant.

    Raises:
        InputError: says which setting and what to give instead.
    """
    if recipe.precision not in ("no", "bf16"):
        raise InputError(f'recipe: precision = {recipe.precision!r} should be "no" or "bf16"')
    model = recipe.model
    if not 0 <= recipe.seed < 2**31:
        raise InputError(f"recipe: seed = {recipe.seed} should be in 0…{2**31 - 1}")
    if len(model.mean) != len(model.std):
        raise InputError("recipe: model.mean and model.std go together, one number a channel each")
    if not (model.pretrained or model.checkpoint or recipe.backbone.epochs > 0):
        raise InputError(
            "recipe: Algorithm 1 needs a trained backbone; set model.pretrained, model.checkpoint or backbone.epochs"
        )
    _check_policy(recipe)
    for name in ("backbone", "policy_gradient", "finetune"):
        stage = getattr(recipe, name)
        if stage.epochs < 0 or stage.lr < 0:
            raise InputError(f"recipe: [{name}] epochs and lr must not be negative")
        if not 1 <= stage.accumulate <= stage.batch_size:
            raise InputError(f"recipe: [{name}] accumulate must be in 1…batch_size")
        if (stage.mixup or stage.cutmix) and stage.batch_size % 2:
            raise InputError(f"recipe: [{name}] mixes pairs of images; give an even batch_size")


def _check_policy(recipe: Recipe) -> None:
    policy, groups = recipe.policy, recipe.model.groups
    decisions = ("learned", "gumbel", *RIVALS)
    if policy.decisions not in decisions:
        raise InputError(f"recipe: policy.decisions = {policy.decisions!r} should be one of {', '.join(decisions)}")
    if recipe.reward.label not in ("true", "dense"):
        raise InputError(f'recipe: reward.label = {recipe.reward.label!r} should be "true" or "dense"')
    shares = (1.0, *policy.keep)
    falls = all(0 < b <= a for a, b in pairwise(shares))
    if not falls or len(policy.keep) not in (0, groups):
        raise InputError(
            f"recipe: policy.keep = {list(policy.keep)} should be {groups} shares in (0, 1] that do not rise"
        )
    if policy.equal_counts and not policy.keep:
        raise InputError(f"recipe: policy.equal_counts needs policy.keep, {groups} shares")
    if policy.decisions == "gumbel" and (recipe.model.dropped != "gone" or policy.equal_counts):
        raise InputError(
            'recipe: policy.decisions = "gumbel" masks patches of a batch; set model.dropped = "gone" and'
            " policy.equal_counts = false"
        )
    if policy.decisions != "learned" and not policy.keep:
        raise InputError(f"recipe: policy.decisions = {policy.decisions!r} needs policy.keep, {groups} shares")
    if policy.samples < 1 + policy.leave_one_out:
        raise InputError(f"recipe: policy.samples = {policy.samples} should be at least 1, and 2 to leave one out")
    if not 0 < policy.temperature <= 1:
        raise InputError(f"recipe: policy.temperature = {policy.temperature} should be in (0, 1]")
    if not 0 <= recipe.finetune.distill <= 1 or not 0 <= recipe.backbone.patch_drop < 1:
        raise InputError("recipe: finetune.distill should be in [0, 1], backbone.patch_drop in [0, 1)")


def _comparable(recipe: Recipe) -> dict[str, Any]:
    """What must agree for a run to be resumed: all of the recipe but where the data lie and how fast they are read."""
    tree = dataclasses.asdict(recipe)
    tree.pop("checkpoint_minutes")
    tree["data"] = {k: v for k, v in tree["data"].items() if k not in ("path", "workers")}
    return _plain(tree)


def _plain(value: Any) -> Any:
    """As JSON gives it back: tuples become lists."""
    if isinstance(value, dict):
        return {k: _plain(v) for k, v in value.items()}
    return [_plain(v) for v in value] if isinstance(value, (list, tuple)) else value
