"""What a run says while it trains: a progress bar or plain lines, a log file, trackers."""

from __future__ import annotations

import contextlib
import json
import os
from pathlib import Path
from types import TracebackType
from typing import Any

import torch
from rich.console import Console

from tithe.app.terminal import Bar
from tithe.app.train.recipe import Recipe
from tithe.app.train.trackers import Trackers
from tithe.files import writing


class Reporter:
    """Shows and logs one run; on all but the main process it does nothing.

    Args:
        recipe: the run: `log.jsonl` goes into its folder, and its trackers are told.
        total: number of steps of the run.
        done: number of steps finished before (of a resumed run).
        lines: of the log that were written before the checkpoint that a run goes on from.
        device: whose memory is shown.
        console: where to; None on other processes.
    """

    def __init__(
        self,
        recipe: Recipe,
        *,
        total: int,
        done: int,
        lines: int,
        device: torch.device,
        console: Console | None,
    ) -> None:
        self._console, self._total, self._every = console, total, recipe.run.log_every
        self._log, self._lines = recipe.output / "log.jsonl", 0
        self._loss, self._metric = 0.0, ""
        self._bar = Bar(console, total, done=done, device=device)
        if console is None:
            return
        with writing(self._log):
            recipe.output.mkdir(parents=True, exist_ok=True)
            self._lines = _cut(self._log, lines)
        self._trackers = Trackers(recipe, done)

    def __enter__(self) -> Reporter:
        self._bar.__enter__()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._bar.__exit__(kind, error, trace)
        if self._console is None:
            return
        # The trackers of a run that ends in an error end too; what they say then is not what went wrong.
        with contextlib.nullcontext() if error is None else contextlib.suppress(Exception):
            self._trackers.close()

    def say(self, text: str) -> None:
        """Print one line that stays."""
        self._bar.say(text)

    def step(self, step: int, values: dict[str, float]) -> None:
        """Show a finished step: `values` holds its loss, learning rate and gradient norm."""
        if self._console is None:
            return
        self._loss = values["loss"]
        status = "  ".join(part for part in (f"loss {self._loss:.4f}", self._metric) if part)
        self._bar.to(step, status=f"{step}/{self._total}  {status}")
        if step % self._every == 0 or step == self._total:
            self._write("train", step, values)
            if not self._console.is_terminal:
                self.say(f"step {step}/{self._total}  {status}  {self._bar.memory}  {self._bar.left}")

    def evaluation(self, step: int, split: str, values: dict[str, float]) -> None:
        """Show and log an evaluation."""
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

    def _write(self, split: str, step: int, values: dict[str, Any]) -> None:
        with writing(self._log), self._log.open("a", encoding="utf-8") as file:
            file.write(json.dumps({"step": step, "split": split, **values}) + "\n")
        self._lines += 1
        self._trackers.log(split, step, values)

    def flushed(self) -> int:
        """Let the log outlive a power cut; return how many lines it has, for a checkpoint to remember."""
        if self._console is None or not self._log.exists():
            return self._lines
        with writing(self._log), self._log.open("rb") as file:
            os.fsync(file.fileno())
        return self._lines


def read_log(folder: Path, split: str) -> list[dict[str, Any]]:
    """The lines of a run's log that belong to one split, in order."""
    file = folder / "log.jsonl"
    lines = file.read_text(encoding="utf-8").splitlines() if file.exists() else []
    return [entry for entry in map(json.loads, lines) if entry["split"] == split]


def _cut(log: Path, lines: int) -> int:
    """Forget what was logged after the checkpoint that a run goes on from; return how many lines are left."""
    if not log.exists():
        return 0
    kept = log.read_bytes().splitlines(keepends=True)[:lines]
    if kept and not kept[-1].endswith(b"\n"):
        kept.pop()
    os.truncate(log, sum(map(len, kept)))
    return len(kept)
