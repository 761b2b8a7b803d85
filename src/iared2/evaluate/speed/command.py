"""``iared2 bench``: the speed of a model against dense, masked, padded and random baselines, as a table."""

from __future__ import annotations

import argparse
import platform
import re
import sys
from collections.abc import Callable
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from torch import Tensor

from ...data.batches import eval_batches, model_transform
from ...data.images import DataConfig, open_samples
from ...device import usable_device
from ...errors import InputError, missing
from ...model.reduced import ReducedVisionTransformer
from ...model.video_transformer import default_cfgs as video
from ...predict.output import check_outputs, console, write_json
from ...pretrained.build import from_timm
from ...pretrained.checkpoint import BOX, load
from ...runtime import BACKENDS
from . import inference as speed
from .workload import Workload, by_the_policy, drawn

MODEL = "deit_small_patch16_224"
PRECISIONS = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}


def run(arguments: argparse.Namespace, more: Callable[[ReducedVisionTransformer, Workload], Any] | None = None) -> int:
    """Run the benchmark; see `arguments.commands.bench`. ``more`` adds baselines (`speed.measure`) per workload."""
    if arguments.model and arguments.checkpoint:
        raise InputError(f"{arguments.model} and --checkpoint {arguments.checkpoint}: give one of the two")
    if arguments.model and (arguments.model == BOX or Path(arguments.model).exists()):
        arguments.model, arguments.checkpoint = None, arguments.model
        print("note: iared2 bench CHECKPOINT is now iared2 bench -c CHECKPOINT", file=sys.stderr)
    elif not arguments.checkpoint:
        arguments.model = arguments.model or MODEL
    _check(arguments)
    if arguments.threads:
        torch.set_num_threads(arguments.threads)
    device = usable_device(arguments.device or ("cpu" if arguments.rivals else None))
    arguments.device = str(device)
    model = _model(arguments).to(device, PRECISIONS[arguments.precision])
    if arguments.merge:
        model.dropped = "merged"
    screen, tables = Console(stderr=True), console(arguments.json)
    name = arguments.checkpoint or arguments.model
    title = f"{name}, {device}, {arguments.precision}, {torch.get_num_threads()} threads"
    if model.dropped == "merged":
        title += ", dropped patches merge"
    if arguments.train:
        title += f"; group 1 keeps {arguments.keep[0]:g}"
    elif not arguments.data:
        shares = " ".join(f"{share:g}" for share in arguments.keep)
        title += f"; scores drawn, not a trained policy's: keep {shares} ± {arguments.keep_std:g}"
    given = {name: value for name, value in vars(arguments).items() if name != "run"}
    result: dict[str, Any] = {"title": title, "arguments": given, "machine": machine(device)}
    if arguments.train:
        result["training"] = [_train(model, size, arguments).to_dict() for size in arguments.batch_size]
        for row in result["training"]:
            tables.print({k: round(v, 3) if isinstance(v, float) else v for k, v in row.items()})
    else:
        model.pack_weights()
        speeds = []
        for size in arguments.batch_size:
            workload = _workload(model, size, arguments)
            with screen.status(f"batches of {size}"):
                others = dict(more(model, workload)) if more else {}
                if arguments.rivals:
                    from .runtimes import ways

                    for precision in (arguments.precision, *["int8"] * arguments.int8):
                        others |= ways(model, workload, arguments.rivals, precision, torch.get_num_threads())
                measured = speed.measure(
                    model, workload, seconds=arguments.seconds, compiled=not arguments.no_compile, more=others
                )
            speeds.append(measured)
        tables.print(speed.table(speeds, title))
        for size, measured in zip(arguments.batch_size, speeds, strict=True):
            tables.print(
                f"batch {size}: against our own engine when nothing is dropped, efficiency"
                f" {measured.efficiency_within:.2f}; interpreters {100 * measured.interpreters:.2f} % of the time",
                highlight=False,
            )
        result["speed"] = [measured.to_dict() for measured in speeds]
    write_json(arguments.json, result)
    return 0


def machine(device: torch.device) -> dict[str, Any]:
    """The machine and versions of the measurement."""
    cpuinfo = Path("/proc/cpuinfo")
    cpu = re.search(r"model name\s*: (.*)", cpuinfo.read_text()) if cpuinfo.exists() else None
    return {
        "device": torch.cuda.get_device_name(device) if device.type == "cuda" else device.type,
        "cuda": torch.version.cuda if device.type == "cuda" else None,
        "cpu": cpu[1] if cpu else platform.processor(),
        "cpu_capability": torch.backends.cpu.get_cpu_capability(),
        "threads": torch.get_num_threads(),
        "platform": platform.platform(),
        **{package: _version(package) for package in ("iared2", "torch", "timm")},
    }


def _version(package: str) -> str | None:
    try:
        return version(package)
    except PackageNotFoundError:  # ours, run from its sources
        return None


def _check(arguments: argparse.Namespace) -> None:
    check_outputs({"--json": arguments.json}, arguments.checkpoint, arguments.data)
    if not all(1 <= size <= 1 << 16 for size in arguments.batch_size):
        raise InputError("--batch-size must be 1 or more, and not more than 65536")
    if arguments.threads is not None and arguments.threads < 1:
        raise InputError("--threads must be 1 or more")
    if not 0 <= arguments.keep_std <= 1 or not 0 <= arguments.seconds < 1e6:
        raise InputError("--keep-std is a number from 0 to 1, and --seconds 0 or more")
    if arguments.frames is not None and arguments.frames < 1:
        raise InputError("--frames must be 1 or more")
    if arguments.train and arguments.data:
        raise InputError("--train runs on drawn images: leave --data out")
    if unknown := [name for name in arguments.rivals if name not in BACKENDS]:
        raise InputError(f"--rivals {' '.join(unknown)}: give {' or '.join(BACKENDS)}")
    if arguments.train and arguments.rivals:
        raise InputError("--rivals run no training steps: leave --train or --rivals out")
    if arguments.rivals and (arguments.device not in (None, "cpu") or arguments.precision == "fp16" or arguments.merge):
        raise InputError("--rivals run on a CPU, in fp32 or bf16, without --merge")
    if arguments.train and arguments.int8:
        raise InputError("--int8 runs no training steps: leave --train or --int8 out")
    if arguments.int8 and "onnxruntime" not in arguments.rivals:
        raise InputError("--int8 is of ONNX Runtime: add --rivals onnxruntime")
    if arguments.train and not 0 < arguments.keep[0] <= 1:
        raise InputError("--keep: group 1 keeps a share above 0, up to 1")


def _model(arguments: argparse.Namespace) -> ReducedVisionTransformer:
    name, size, frames = arguments.model, arguments.img_size, arguments.frames
    if arguments.checkpoint:
        if size or frames:
            raise InputError("--img-size and --frames go with a timm name; a checkpoint has its own size")
        return load(arguments.checkpoint)
    if frames:
        if name.split(".")[0] not in video:
            raise InputError(f"--frames goes with one of {', '.join(video)}; not with {name}")
        size = (frames, *(size or (224, 224)))
    timm_kwargs: dict[str, Any] = {"img_size": tuple(size)} if size else {}
    return from_timm(name, **timm_kwargs).eval()


def _workload(model: ReducedVisionTransformer, size: int, arguments: argparse.Namespace) -> Workload:
    parameter = next(model.parameters())
    if not arguments.data:
        generator = torch.Generator().manual_seed(0)
        images = torch.randn(size, *model.pretrained_cfg["input_size"], generator=generator).to(parameter)
        return drawn(model, images, arguments.keep, arguments.keep_std)
    return by_the_policy(model, _read(model, arguments.data, size).to(parameter))


def _read(model: ReducedVisionTransformer, data: str, size: int) -> Tensor:
    if len(model.grid_size) > 2:
        raise InputError("--data holds images, and this model takes clips: leave --data out, and clips are drawn")
    samples = open_samples(DataConfig(path=data), "eval", whole=True).draw(size)
    batch = next(iter(eval_batches(samples, model_transform(model.pretrained_cfg), batch_size=size)))
    if len(batch.images) < size:
        raise InputError(f"{data} has fewer than {size} images that can be read among those chosen")
    return batch.images


def _train(model: ReducedVisionTransformer, size: int, arguments: argparse.Namespace) -> Any:
    try:
        from . import training as train
    except ModuleNotFoundError as error:
        raise missing("training", error.name, "train") from None
    images = torch.randn(size, *model.pretrained_cfg["input_size"]).to(next(model.parameters()))
    return train.measure(model, images, arguments.keep[0], seconds=arguments.seconds)
