"""What averaging says while it runs: a bar on a terminal, else a line now and then."""

from __future__ import annotations

import time
from types import TracebackType

from rich.console import Console
from rich.progress import BarColumn, Progress, TaskProgressColumn, TextColumn

_EVERY = 5.0
"""Seconds between two lines, and before the first."""


class Watch:
    """Shows what is being done, how much of all is done, and about how long the rest takes.

    Args:
        console: where to.
    """

    def __init__(self, console: Console) -> None:
        self._console, self._label = console, ""
        self._started = self._said = time.monotonic()
        self._bar = Progress(
            TextColumn("{task.description}"),
            BarColumn(bar_width=20),
            TaskProgressColumn(),
            TextColumn("{task.fields[left]}"),
            console=console,
            disable=not console.is_terminal,
            transient=True,
        )
        self._task = self._bar.add_task("", left="", total=1.0)

    def __enter__(self) -> Watch:
        self._bar.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._bar.stop()

    def label(self, text: str) -> None:
        """What is done from now on."""
        self._label = text

    def say(self, text: str) -> None:
        """Print one line."""
        self._console.print(text, markup=False, highlight=False)

    def __call__(self, done: float, total: float) -> None:
        """How much is done of how much."""
        now, part = time.monotonic(), min(1.0, done / max(total, 1))
        left = f"about {(now - self._started) * (1 / part - 1):.0f} s left" if part else ""
        self._bar.update(self._task, description=self._label, completed=part, left=left)
        if not self._console.is_terminal and now - self._said >= _EVERY and part < 1:
            self._said = now
            self.say(f"{self._label}: {part:.0%}, {left}")
