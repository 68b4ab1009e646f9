"""What people see of the command line: the one progress bar, table, byte format and figure style.

Everything fits 80 columns, and is plain text where nobody is looking.
"""

from __future__ import annotations

import time
from collections.abc import Sequence
from pathlib import Path
from types import TracebackType
from typing import Any, final

import psutil
import torch
from rich import box
from rich.console import Console
from rich.progress import BarColumn, Progress, TextColumn
from rich.table import Table

from tithe.errors import TitheError
from tithe.files import replacing
from tithe.ledger import human

WIDTH = 80

COLOURS = ("#2b7bba", "#c8553d", "#e6a03c", "#8c6bb1", "#9ecae1", "#7f8790", "#b0b7bf")
"""The colours of figures, the most telling first."""


def console(*, stderr: bool = False) -> Console:
    """Open a console of at most 80 columns; rich leaves colours and bars out where nobody is looking."""
    made = Console(stderr=stderr, highlight=False)
    made.width = min(made.width, WIDTH)
    return made


def live_memory(device: torch.device | None = None) -> int:
    """Count the bytes in use now: of the GPU's allocator, or of this process."""
    if device is not None and device.type == "cuda":
        return torch.cuda.memory_allocated(device)
    return int(psutil.Process().memory_info().rss)


@final
class Bar:
    """Shows what is being done, how much of all is done, the memory in use and about how long the rest takes.

    On a terminal it is a bar; elsewhere a line for each phase, and within a long one a line now and then.

    Args:
        console: where to; None shows nothing.
        total: of whatever is counted.
        done: of it, before now.
        patience: seconds before anything is shown, and between two plain lines; 0 shows every phase and no more.
        device: whose memory is shown.
    """

    def __init__(
        self,
        console: Console | None,
        total: float = 1.0,
        *,
        done: float = 0.0,
        patience: float = 0.0,
        device: torch.device | None = None,
    ) -> None:
        self._console, self._total, self._patience, self._device = console, total, patience, device
        self._first = self._done = done
        self._label, self._started, self._said, self._shown = "", time.monotonic(), time.monotonic(), False
        self._is_terminal = console is not None and console.is_terminal
        columns = (TextColumn("{task.description}"), BarColumn(bar_width=16), TextColumn("{task.fields[told]}"))
        self._bar = Progress(*columns, console=console, disable=not self._is_terminal, transient=True)
        self._task = self._bar.add_task("", total=total, told="")

    def __enter__(self) -> Bar:
        self._show()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._bar.stop()

    @property
    def seconds(self) -> float:
        """Seconds since the start."""
        return time.monotonic() - self._started

    @property
    def left(self) -> str:
        """About how long the rest takes, as far as it can be known."""
        done = self._done - self._first
        return f"{self.seconds / done * max(self._total - self._done, 0):.0f} s left" if done > 0 else ""

    @property
    def memory(self) -> str:
        """The memory in use now."""
        return human(live_memory(self._device))

    def phase(self, label: str, done: float | None = None, total: float | None = None) -> None:
        """Say what begins now, and how much is done of how much where that has changed."""
        self._label = label
        self._done, self._total = self._done if done is None else done, self._total if total is None else total
        if self._is_terminal:
            self._show()
        elif not self._patience or self._is_due:
            self.say(f"{label} (about {self.left})" if self.left else label)

    def to(self, done: float, total: float | None = None, *, status: str = "") -> None:
        """Say how much is done, of how much where that has changed, and what else there is to tell."""
        self._done, self._total = done, self._total if total is None else total
        if self._is_terminal:
            self._show(status)
        elif self._patience and self._is_due and done < self._total:
            self.say(f"{self._label}: {done / max(self._total, 1e-9):.0%}, about {self.left}")

    def count(self, label: str, done: int, total: int) -> None:
        """Say how many of a number of things are done."""
        self._label = label
        self.to(done, total, status=f"{done:,}/{total:,}")

    def advance(self) -> None:
        """Say that one more is done."""
        self.to(self._done + 1)

    def say(self, text: str) -> None:
        """Print one line that stays."""
        self._said = time.monotonic()
        if self._console is not None:
            self._console.print(text, markup=False, highlight=False)

    @property
    def _is_due(self) -> bool:
        """Whether there is something to say of the time left, and it was silent for long enough."""
        return bool(self.left) and time.monotonic() - self._said >= self._patience

    def _show(self, status: str = "") -> None:
        if not self._is_terminal or self.seconds < self._patience:
            return
        if not self._shown:
            self._bar.start()
            self._shown = True
        told = "  ".join(part for part in (status, self.memory, self.left) if part)
        self._bar.update(self._task, description=self._label, completed=self._done, total=self._total, told=told)


def table(columns: Sequence[str], *, title: str | None = None) -> Table:
    """Make a table: the first column is text, the others numbers on the right."""
    made = Table(title=title, title_justify="left", title_style="bold", box=box.SIMPLE_HEAD, pad_edge=False)
    made.padding = (0, 1, 0, 0)
    made.add_column(columns[0], no_wrap=True)
    for column in columns[1:]:
        made.add_column(column, justify="right", no_wrap=True)
    return made


def facts() -> Table:
    """Make a table without a head: what it is, and a text that may be long."""
    made = Table(show_header=False, box=None, pad_edge=False)
    made.add_column(style="bold", no_wrap=True)
    made.add_column(overflow="fold")
    return made


def megabytes(size: int) -> str:
    """Write bytes as a number of megabytes of at most seven characters, for a column that names the unit.

    Example:
        >>> megabytes(0), megabytes(1_234_567), megabytes(364_250_000)
        ('0', '1.23', '364.2')
    """
    value = size / 1e6
    return "0" if size == 0 else f"{value:.2f}" if value < 10 else f"{value:.1f}" if value < 1000 else f"{value:,.0f}"


def figure(width: float, height: float) -> Any:
    """Make an empty figure on a canvas of its own: no display is needed, and the caller's matplotlib stays as it is."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    made: Any = Figure(figsize=(width, height), layout="constrained")
    FigureCanvasAgg(made)
    return made


def save_figure(made: Any, path: Path) -> None:
    """Write a figure; the ending of the path says the format.

    Raises:
        TitheError: the file cannot be written, or its ending names no format.
    """
    for axes in made.axes:
        axes.spines[["top", "right"]].set_visible(False)
    try:
        with replacing(path) as temporary:
            made.savefig(temporary, dpi=150)
    except ValueError as error:
        raise TitheError(
            str(path), found=str(error), expected="a file to write, such as figure.png", remedy="name another file"
        ) from error
