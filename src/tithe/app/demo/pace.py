"""Progress: a bar with the time left on a terminal, one line a phase elsewhere."""

from __future__ import annotations

import time
from types import TracebackType
from typing import final

from rich.console import Console
from rich.progress import BarColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn


@final
class Pace:
    """Counts training steps and says how long the rest will take.

    Args:
        console: where to write.
        total: steps in all.
    """

    def __init__(self, console: Console, total: int) -> None:
        self._console = console
        self._total = total
        self._done = 0
        self._started = time.monotonic()
        self._bar = Progress(
            TextColumn("{task.description}"),
            BarColumn(bar_width=20),
            TimeElapsedColumn(),
            TextColumn("left"),
            TimeRemainingColumn(),
            console=console,
            transient=True,
            disable=not console.is_terminal,
        )
        self._task = self._bar.add_task("", total=total)

    def __enter__(self) -> Pace:
        self._bar.start()
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, at: TracebackType | None) -> None:
        self._bar.stop()

    @property
    def seconds(self) -> float:
        """Seconds since the start."""
        return time.monotonic() - self._started

    def phase(self, what: str) -> None:
        """Say what comes now, with the time left as far as it can be known."""
        self._bar.update(self._task, description=what)
        if not self._console.is_terminal:
            left = f" (about {self.seconds / self._done * (self._total - self._done):.0f} s left)" if self._done else ""
            self.note(what + left)

    def note(self, what: str) -> None:
        """Write a line that stays."""
        self._console.print(what, markup=False, highlight=False)

    def advance(self) -> None:
        """One more step is done."""
        self._done += 1
        self._bar.advance(self._task)
