"""What a run says while it trains: a progress bar or plain lines, a log file, TensorBoard."""

from __future__ import annotations

import json
import time
from pathlib import Path
from types import TracebackType
from typing import Any

import psutil
import torch
from rich.console import Console
from rich.progress import BarColumn, Progress, TextColumn, TimeRemainingColumn


def live_memory(device: torch.device) -> int:
    """Bytes in use now: of the GPU's allocator, or of this process."""
    if device.type == "cuda":
        return torch.cuda.memory_allocated(device)
    return int(psutil.Process().memory_info().rss)


class Reporter:
    """Shows and logs one run; on all but the main process it does nothing.

    Args:
        folder: the run's folder: `log.jsonl` and `tensorboard/` go there.
        total: number of steps of the run.
        done: number of steps finished before (of a resumed run).
        every: steps between two lines of the log.
        device: whose memory is shown.
        console: where to; None on other processes.
    """

    def __init__(
        self, folder: Path, *, total: int, done: int, every: int, device: torch.device, console: Console | None
    ) -> None:
        self._console, self._total, self._every, self._device = console, total, every, device
        self._log = folder / "log.jsonl"
        self._started, self._first, self._latest = time.monotonic(), done, done
        self._loss, self._metric = 0.0, ""
        if console is None:
            return
        from torch.utils.tensorboard.writer import SummaryWriter

        folder.mkdir(parents=True, exist_ok=True)
        _cut(self._log, done)
        self._board = SummaryWriter(str(folder / "tensorboard"), purge_step=done + 1 if done else None)
        self._bar = Progress(
            BarColumn(bar_width=12),
            TextColumn("{task.completed}/{task.total}"),
            TextColumn("{task.fields[status]}"),
            TimeRemainingColumn(compact=True),
            console=console,
            disable=not console.is_terminal,
        )
        self._task = self._bar.add_task("train", total=total, completed=done, status="")

    def __enter__(self) -> Reporter:
        if self._console is not None:
            self._bar.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self._console is not None:
            self._bar.stop()
            self._board.close()

    def say(self, text: str) -> None:
        """Print one line."""
        if self._console is not None:
            self._console.print(text, highlight=False, markup=False)

    def step(self, step: int, values: dict[str, float]) -> None:
        """Show a finished step: `values` holds its loss, learning rate and gradient norm."""
        if self._console is None:
            return
        self._loss, self._latest = values["loss"], step
        self._bar.update(self._task, completed=step, status=self._status())
        if step % self._every == 0 or step == self._total:
            self._write("train", step, values)
            if not self._console.is_terminal:
                spent = time.monotonic() - self._started
                left = spent / (step - self._first) * (self._total - step)
                self.say(f"step {step}/{self._total}  {self._status()}  {left:.0f} s left")

    def evaluation(self, step: int, split: str, values: dict[str, float]) -> None:
        """Show an evaluation."""
        if self._console is None:
            return
        name, value = next(iter(values.items()))
        self._metric = f"{name} {value:.4f}"
        self._write(split, step, values)
        shown = "  ".join(f"{name} {value:.4f}" for name, value in values.items())
        self.say(f"step {step}/{self._total}  {split}: {shown}")

    def log(self, kind: str, step: int, values: dict[str, Any]) -> None:
        """Log what a method did after `step` steps.

        A "draw" under a budget, the "widths" of a network that gets narrower, the "mean" of what was recorded.
        """
        if self._console is not None:
            self._write(kind, step, {name: value for name, value in values.items() if not isinstance(value, str)})

    def _status(self) -> str:
        memory = f"{live_memory(self._device) / 1e6:,.0f} MB"
        return "  ".join(part for part in (f"loss {self._loss:.4f}", self._metric, memory) if part)

    def _write(self, split: str, step: int, values: dict[str, Any]) -> None:
        with self._log.open("a", encoding="utf-8") as file:
            file.write(json.dumps({"step": step, "split": split, **values}) + "\n")
        for name, value in values.items():
            if isinstance(value, int | float):
                self._board.add_scalar(f"{split}/{name}", value, step)


def read_log(folder: Path, split: str) -> list[dict[str, Any]]:
    """The lines of a run's log that belong to one split, in order."""
    file = folder / "log.jsonl"
    lines = file.read_text(encoding="utf-8").splitlines() if file.exists() else []
    return [entry for entry in map(json.loads, lines) if entry["split"] == split]


def _cut(log: Path, done: int) -> None:
    """Forget what was logged after the checkpoint that a run goes on from, and a line that a crash cut short."""
    kept: list[str] = []
    for line in log.read_text(encoding="utf-8").splitlines() if log.exists() else []:
        try:
            if json.loads(line)["step"] <= done:
                kept.append(line + "\n")
        except json.JSONDecodeError:
            break
    log.write_text("".join(kept), encoding="utf-8")
