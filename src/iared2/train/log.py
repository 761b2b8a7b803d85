"""Logs the metrics of a run: a JSON-lines file, TensorBoard, and a progress bar."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.progress import BarColumn, Progress, TaskID, TextColumn, TimeRemainingColumn

from ..atomic import to_json, write
from ..errors import printable

SHOWN = ("loss", "reward", "reward_greedy", "keep_ratio_sampled", "keep_ratio_greedy", "top1", "top1_greedy")


class RunLog:
    """Writes ``metrics.jsonl`` and TensorBoard events under ``directory``, and shows a progress bar.

    Args:
        directory: the run's folder.
        total_steps: lines of later steps, which a killed run wrote after its last checkpoint, are removed.
        main: whether this process writes the files and shows the bar.
    """

    def __init__(self, directory: Path, total_steps: int, main: bool) -> None:
        self.main = main
        if not main:
            return
        from torch.utils.tensorboard import SummaryWriter

        path = directory / "metrics.jsonl"
        self.console = Console(stderr=True)
        lines = path.read_text(errors="replace").splitlines() if path.exists() else []
        kept = []
        for number, line in enumerate(lines, start=1):
            try:
                record = json.loads(line)
                if record["total_steps"] <= total_steps:
                    kept.append(to_json(record) + "\n")
            except (ValueError, KeyError, TypeError, RecursionError):  # the run was killed while writing it
                self.say(f"{path}: line {number} is broken and is dropped")
        write(path, "".join(kept))
        self.file = path.open("a", buffering=1)
        self.tensorboard = SummaryWriter(str(directory / "tensorboard"), purge_step=total_steps + 1)
        self.progress = Progress(
            TextColumn("{task.description}"),
            BarColumn(),
            TextColumn("{task.completed}/{task.total}"),
            TimeRemainingColumn(),
            TextColumn("{task.fields[shown]}"),
            console=self.console,
        )
        self.progress.start()
        self.task: TaskID | None = None

    def start_stage(self, name: str, steps: int, done: int, epoch_steps: int) -> None:
        """Start a stage of ``steps``, of which ``done`` are done: a progress bar, and a line where there is none."""
        self.steps, self.done, self.epoch_steps = steps, done, epoch_steps
        if self.main:
            if self.task is not None:
                self.progress.remove_task(self.task)
            self.task = self.progress.add_task(f"{name}, {self.place}", total=steps, completed=done, shown="")
            if not self.console.is_terminal:
                self.say(f"{name}: starts, {self.place}")

    @property
    def place(self) -> str:
        """Where the stage is: ``epoch 1.5 of 20, 8 % of the stage``."""
        epoch, epochs = (round(number / self.epoch_steps, 2) for number in (self.done, self.steps))
        return f"epoch {epoch:g} of {epochs:g}, {100 * self.done / self.steps:.0f} % of the stage"

    def step(self, stage: str, epoch: int, step: int, total_steps: int, metrics: dict[str, float]) -> None:
        """Record one optimiser step. Metrics are explained in docs/metrics.md."""
        self.done = step
        if not self.main:
            return
        self._write(
            {"kind": "step", "stage": stage, "epoch": epoch, "step": step, "total_steps": total_steps, **metrics}
        )
        for name, value in metrics.items():
            self.tensorboard.add_scalar(f"{stage.split()[0]}/{name}", value, total_steps)
        shown = " ".join(f"{name} {metrics[name]:.3f}" for name in SHOWN if name in metrics)
        if self.task is not None:
            self.progress.update(self.task, description=f"{stage}, {self.place}", completed=step, shown=shown)

    def evaluation(self, stage: str, total_steps: int, metrics: dict[str, Any]) -> None:
        """Record one evaluation on held-out images, and print it."""
        if not self.main:
            return
        self._write({"kind": "evaluation", "stage": stage, "total_steps": total_steps, **metrics})
        for name, value in metrics.items():
            for i, number in enumerate(value if isinstance(value, list) else [value], start=1):
                tag = f"{name}_{i}" if isinstance(value, list) else name
                self.tensorboard.add_scalar(f"evaluation/{tag}", number, total_steps)
        shown = "  ".join(f"{k} {v:.4g}" if isinstance(v, float) else f"{k} {v}" for k, v in metrics.items())
        self.say(f"{stage}, {self.place}: {shown}")

    def say(self, line: str) -> None:
        """Print one line above the progress bar."""
        if self.main:
            self.console.print(printable(line), highlight=False, markup=False, soft_wrap=True)

    def warn(self, line: str) -> None:
        """Print one line, from any process."""
        if self.main:
            self.say(line)
        else:
            print(printable(line), file=sys.stderr)

    def close(self) -> None:
        """Flush and stop the progress bar."""
        if self.main:
            self.progress.stop()
            self.file.close()
            self.tensorboard.close()

    def _write(self, record: dict[str, Any]) -> None:
        self.file.write(to_json(record) + "\n")
