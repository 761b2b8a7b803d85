"""The device a model runs on: whether it is there, and time on it, since it may run ahead of Python."""

from __future__ import annotations

import time
from collections.abc import Callable
from typing import Any

import torch

from .errors import InputError


def usable_device(name: str | torch.device) -> torch.device:
    """The device, after a first number was computed on it.

    Raises:
        InputError: there is no such device here.
    """
    try:
        device = torch.device(name)
        torch.ones(1, device=device).item()
    except (RuntimeError, AssertionError, ImportError) as error:  # by the kind of device
        reason = str(error).split("\n")[0]
        raise InputError(f"device {name} cannot be used here ({reason}); try cpu") from None
    return device


def timed(device: torch.device | str, run: Callable[..., Any], *args: Any) -> tuple[Any, float]:
    """The result of ``run(*args)`` and its seconds, from an idle device to an idle device."""
    _wait(device)
    start = time.perf_counter()
    result = run(*args)
    _wait(device)
    return result, time.perf_counter() - start


def _wait(device: torch.device | str) -> None:
    if torch.device(device).type != "cpu":  # a CPU has always done what it was asked to
        torch.accelerator.synchronize(device)
