"""What benchmarks/gpu.py compares: a model on a batch, run in every way, and what each way spends its time on."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import asdict, dataclass
from functools import cached_property, partial
from itertools import cycle
from typing import Any
from unittest import mock

import torch
from torch import Tensor
from torch.nn import attention as torch_attention
from torch.nn.attention import SDPBackend, sdpa_kernel, varlen
from torch.profiler import ProfilerActivity, profile

import iared2
from iared2.device import synchronize, timed
from iared2.evaluate.speed import inference as speed
from iared2.evaluate.speed.inference import Way, Ways
from iared2.evaluate.speed.workload import Workload, drawn
from iared2.model import attention

KEEP, SPREAD = (0.85, 0.6, 0.35), 0.12
PADDED_COMPILED, MASKED_COMPILED = f"{speed.PADDED}, compiled", f"{speed.MASKED}, compiled"
FLASH, CUDNN, CHOICE, BUCKETS = "flash", "cudnn", "torch's choice", "one call per length"
OTHER_COUNTS = ", other counts every time"
TINY = {"patch_size": 8, "embed_dim": 48, "num_heads": 3, "depth": 3, "num_classes": 5}
SLOW = 0.5
"""Seconds of a call that is not repeated: such as cuDNN where it plans every call anew."""


@dataclass(frozen=True)
class Bench:
    """Where and how long to measure."""

    device: torch.device
    seconds: float
    """Per row."""
    tiny: bool


@dataclass(frozen=True)
class Case:
    """One model on one batch, and the compiled dense model, which the rows of this case share."""

    bench: Bench
    name: str
    batch_size: int
    img_size: tuple[int, int]
    keep: tuple[float, ...] = KEEP
    dropped: str = "gone"

    @cached_property
    def model(self) -> Any:
        torch.manual_seed(0)
        tiny = self.bench.tiny
        img_size = (32, 64) if tiny and self.img_size[0] != self.img_size[1] else (32, 32) if tiny else self.img_size
        model = iared2.from_timm(self.name, img_size=img_size, dropped=self.dropped, **(TINY if tiny else {})).eval()
        return model.to(self.bench.device, torch.bfloat16)

    @cached_property
    def workload(self) -> Workload:
        size = 4 if self.bench.tiny else self.batch_size
        generator = torch.Generator().manual_seed(0)
        images = torch.randn(size, *self.model.pretrained_cfg["input_size"], generator=generator)
        return drawn(self.model, images.to(self.bench.device, torch.bfloat16), self.keep, SPREAD)

    @cached_property
    def dense(self) -> Ways:
        """timm's model, eager and compiled."""
        compiled = speed.compiled_ways(self.model, self.workload)[speed.DENSE_COMPILED]
        return {**speed.dense_ways(self.model, self.workload), speed.DENSE_COMPILED: compiled}

    @cached_property
    def ours(self) -> Ways:
        """Our ways, eager and with compiled blocks."""
        model, eager = self.model, speed.our_ways(self.model, self.workload)
        ways = {**eager, speed.OURS_COMPILED: speed.compiled_ways(model, self.workload)[speed.OURS_COMPILED]}
        for name, compiled in ((speed.MASKED, MASKED_COMPILED), (speed.PADDED, PADDED_COMPILED)):
            if name in eager:
                ways[compiled] = speed.with_engine(model, "compiled", eager[name][0]), eager[name][1]
        return ways

    def compare(self, ours: list[str], more: Ways | None = None, reference: str | None = None) -> dict[str, Any]:
        """Time the dense model, the ``ours`` of these names and ``more``.

        Args:
            ours: names in `ours`.
            more: further ways.
            reference: of these ways; the logits of the others are compared with its, unless their counts differ.

        Returns:
            ``ways``, one `speed.Row` each as JSON types with the seconds of its first call and the difference from the
            reference (relative, in the 2-norm), and ``skipped``: name -> why it did not run.
        """
        images, ready, about, skipped = self.workload.images, {}, {}, {}
        ways = {**self.dense, **{name: self.ours[name] for name in ours}, **(more or {})}
        with torch.inference_mode():
            want = None if reference is None else ways[reference][0](images).float()
            for name, (run, gmacs) in ways.items():
                try:
                    logits, first = timed(images.device, run, images)
                    seconds = timed(images.device, run, images)[1]
                except Exception as error:  # a backend or compiler that this version or device does not have
                    skipped[name] = reason(error)
                    continue
                if seconds > SLOW and not self.bench.tiny:
                    skipped[name] = f"{seconds:.2f} s for a batch, measured once"
                    continue
                ready[name], about[name] = (run, gmacs), {"first_call_s": round(first, 2)}
                if want is not None and not name.endswith(OTHER_COUNTS):
                    about[name]["difference"] = float((logits.float() - want).norm() / want.norm())
            rows = speed.compare(ready, images, self.model.dense_macs / 1e9, self.bench.seconds)
        return {"ways": [asdict(row) | about[row.name] for row in rows], "skipped": skipped}

    @cached_property
    def other_counts(self) -> Way:
        """Ours, compiled, as it is deployed: no batch has the lengths of the one before; the same MACs in the mean."""
        shifts = [0.01 * i for i in (-3, 3, -2, 2, -1, 1)]
        images, model = self.workload.images, self.model
        decides = [drawn(model, images, [k + shift for k in self.keep], SPREAD).decide for shift in shifts]
        turn = cycle(decides)
        return speed.with_engine(model, "compiled", lambda x: model(x, next(turn)))


def reason(error: BaseException) -> str:
    """One line."""
    lines = str(error).strip().splitlines() or [""]
    return f"{type(error).__name__}: {lines[0]}"[:300]


def kernels(run: Callable[[], Any], device: torch.device) -> dict[str, Any]:
    """What one run spends its time on, by the profiler: the names of its attention kernels and the ten longest."""
    on_gpu = device.type == "cuda"
    with profile(activities=[ProfilerActivity.CUDA if on_gpu else ProfilerActivity.CPU]) as profiler:
        run()
        synchronize(device)
    field = "self_device_time_total" if on_gpu else "self_cpu_time_total"
    ms = {event.key: getattr(event, field) / 1000 for event in profiler.key_averages()}
    longest = sorted(ms, key=ms.__getitem__, reverse=True)
    attends = [name for name in longest if re.search("flash|fmha|cudnn|attention|attn", name, re.IGNORECASE)]
    return {
        "attention": [name[:160] for name in attends[:6]],
        "total_ms": sum(ms.values()),
        "longest_ms": {name[:160]: round(ms[name], 4) for name in longest[:10]},
    }


def profiled(case: Case, ways: Ways) -> dict[str, Any]:
    """`kernels` of each way that runs."""
    found: dict[str, Any] = {}
    with torch.inference_mode():
        for name, (run, _) in ways.items():
            try:
                found[name] = kernels(partial(run, case.workload.images), case.bench.device)
            except Exception as error:  # also a profiler that may not look at this device
                found[name] = reason(error)
    return found


@contextmanager
def backend(name: str) -> Iterator[None]:
    """A backend of ragged attention; what really runs is read off its kernels.

    `FLASH` and `CUDNN` go through ``sdpa_kernel``, which ``varlen_attn`` obeys in the newest versions of torch alone,
    and through its private choice in the others. `CHOICE` lets torch choose. `BUCKETS` calls
    ``scaled_dot_product_attention`` once per length.
    """
    with ExitStack() as stack:
        if name == BUCKETS:
            stack.enter_context(mock.patch.object(attention, "_has_varlen_kernel", return_value=False))
        else:
            stack.enter_context(mock.patch.object(attention, "FLASH_ONLY", name == FLASH, create=True))
        if name in (FLASH, CUDNN):
            kinds = [SDPBackend.FLASH_ATTENTION, SDPBackend.MATH]
            if name == CUDNN:  # flash takes what cuDNN refuses: images of up to 128 tokens
                kinds.insert(0, SDPBackend.CUDNN_ATTENTION)
            stack.enter_context(sdpa_kernel(kinds, set_priority=True))
            choice = mock.patch.object(varlen, "_should_use_cudnn", return_value=name == CUDNN, create=True)
            stack.enter_context(choice)
        yield


@contextmanager
def flash_impl(name: str) -> Iterator[None]:
    """Another implementation of flash attention that torch knows, such as FA3; it is a package of its own."""
    restore = torch_attention.restore_flash_attention_impl  # before: a version without it would stay with this one
    torch_attention.activate_flash_attention_impl(name)
    try:
        yield
    finally:
        restore()


def flash_impls() -> list[str]:
    """The names that `flash_impl` takes."""
    return getattr(torch_attention, "list_flash_attention_impls", list)()


def under(context: Callable[[], Any], run: Way) -> Way:
    """``run`` within a context."""

    def inside(images: Tensor) -> Tensor:
        with context():
            return run(images)

    return inside


def graphed(run: Way) -> Way:
    """Replays of a CUDA graph of ``run``, captured on the first call for the batch of that call."""
    captured: list[tuple[Any, Tensor]] = []

    def replay(images: Tensor) -> Tensor:
        if images.device.type != "cuda":
            raise RuntimeError("CUDA graphs need CUDA")
        if not captured:
            stream = torch.cuda.Stream()
            stream.wait_stream(torch.cuda.current_stream())
            with torch.cuda.stream(stream):  # libraries allocate their workspaces, compilers compile
                for _ in range(3):
                    run(images)
            torch.cuda.current_stream().wait_stream(stream)
            graph = torch.cuda.CUDAGraph()
            with torch.cuda.graph(graph):
                logits = run(images)
            captured.append((graph, logits))
        graph, logits = captured[0]
        graph.replay()
        return logits

    return replay
