"""What pricing says while it runs: nothing, if it is done within seconds."""

from __future__ import annotations

import time
from types import TracebackType

from rich.console import Console
from rich.progress import BarColumn, Progress, TextColumn

_PATIENCE = 5.0


class Watch:
    """Shows progress and the time left from five seconds on; a bar on a terminal, else plain lines.

    Args:
        console: where to.
    """

    def __init__(self, console: Console) -> None:
        self._console, self._started = console, 0.0
        self._bar = Progress(
            TextColumn("{task.description}"), BarColumn(bar_width=20), TextColumn("{task.fields[left]}"),
            console=console, transient=True,
        )  # fmt: skip
        self._task = self._bar.add_task("", left="")
        self._shown = False

    def __enter__(self) -> Watch:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self._shown:
            self._bar.stop()

    def __call__(self, label: str, done: int, total: int) -> None:
        """What begins now, and how many of the steps are done."""
        self._started = self._started or time.monotonic()
        spent = time.monotonic() - self._started
        if spent < _PATIENCE:
            return
        left = f"about {spent / done * (total - done):.0f} s left" if done else ""
        if not self._console.is_terminal:
            self._console.print(f"{label} ({done}/{total})  {left}", markup=False, highlight=False)
            return
        if not self._shown:
            self._bar.start()
            self._shown = True
        self._bar.update(self._task, description=label, completed=done, total=total, left=left)
