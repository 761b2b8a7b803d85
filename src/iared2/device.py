"""The device a model runs on: availability, precision, memory, and timing of asynchronous work."""

from __future__ import annotations

import ctypes
import platform
import time
from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from pathlib import Path
from typing import Any

import torch

from .errors import InputError


def usable_device(name: str | torch.device | None) -> torch.device:
    """The device, checked by a first computation; None: cuda if there is one, else cpu.

    Raises:
        InputError: the device is not available.
    """
    if name is None:
        name = "cuda" if torch.cuda.is_available() else "cpu"
    try:
        device = torch.device(name)
        torch.ones(1, device=device).item()
    except (RuntimeError, AssertionError, ImportError) as error:  # by the kind of device
        reason = str(error).split("\n")[0]
        raise InputError(f"device {name} cannot be used here ({reason}); try cpu") from None
    return device


def has_fast_bf16(device: torch.device | str) -> bool:
    """Whether bfloat16 saves time on the device; on an x86 processor without AVX-512, it takes tens of times longer."""
    if torch.device(device).type != "cpu" or platform.machine().lower() not in ("x86_64", "amd64"):
        return True
    return torch.backends.cpu.get_cpu_capability().startswith("AVX512")


def widest_float(device: torch.device | str) -> torch.dtype:
    """For sums and shares: float64 on a CPU and on CUDA, float32 elsewhere, since MPS has no float64."""
    return torch.float64 if torch.device(device).type in ("cpu", "cuda") else torch.float32


def timed(device: torch.device | str, run: Callable[..., Any], *args: Any) -> tuple[Any, float]:
    """The result of ``run(*args)`` and its seconds, from an idle device to an idle device."""
    synchronize(device)
    start = time.perf_counter()
    result = run(*args)
    synchronize(device)
    return result, time.perf_counter() - start


def peak_memory(device: torch.device | str, run: Callable[..., Any], *args: Any) -> int | None:
    """Peak memory of ``run(*args)`` in bytes, beyond what was held before it; None where it cannot be measured.

    On CUDA those of torch's allocator. On a CPU the growth of the process' resident set, to a megabyte or two, buffers
    of libraries included: before the run, free memory is given back and the high-water mark reset, which Linux with
    glibc can do. What a library has kept from earlier runs is not counted.
    """
    if torch.device(device).type == "cuda":
        synchronize(device)
        torch.cuda.reset_peak_memory_stats(device)
        before = torch.cuda.memory_allocated(device)
        run(*args)
        synchronize(device)
        return torch.cuda.max_memory_allocated(device) - before
    try:
        ctypes.CDLL(None).malloc_trim(0)
        Path("/proc/self/clear_refs").write_text("5")
        before = _resident("VmRSS")
        run(*args)
        return max(_resident("VmHWM") - before, 0)
    except (OSError, AttributeError, TypeError):  # not Linux, not glibc, or a container that forbids it
        return None


def _resident(field: str) -> int:
    """Bytes, of ``/proc/self/status``."""
    lines = Path("/proc/self/status").read_text().splitlines()
    return 1024 * next(int(line.split()[1]) for line in lines if line.startswith(field))


def synchronize(device: torch.device | str) -> None:
    """Wait until the device has finished its work."""
    if torch.device(device).type != "cpu":  # a CPU works synchronously
        torch.accelerator.synchronize(device)


def without_autocast(device: torch.device) -> AbstractContextManager[Any]:
    """Disable autocast, for computations that must run in float32."""
    on = torch.is_autocast_enabled(device.type)
    return torch.autocast(device.type, enabled=False) if on else nullcontext()
