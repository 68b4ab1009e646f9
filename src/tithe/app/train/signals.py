"""What Ctrl-C and SIGTERM do to a run: the step is finished, a checkpoint is written, and the run says how to resume.

The loop asks for `StopSignals.received` after each step, writes the checkpoint and raises `Interrupted`; the command
line prints the command that resumes and exits with status 130. A second signal acts at once, as if none were caught;
the run then says which step was saved before.
"""

from __future__ import annotations

import contextlib
import signal
from collections.abc import Generator
from typing import Any


class Interrupted(Exception):
    """A run that was asked to stop, has a checkpoint, and can be resumed."""


class StopSignals:
    """Remembers SIGINT or SIGTERM until the step is finished; a second one acts at once."""

    def __init__(self) -> None:
        self.received: signal.Signals | None = None

    @contextlib.contextmanager
    def caught(self) -> Generator[None]:
        """Catch both signals inside the block."""
        previous: dict[int, Any] = {}

        def remember(number: int, _: object) -> None:
            self.received = signal.Signals(number)
            signal.signal(number, previous[number])

        for number in (signal.SIGINT, signal.SIGTERM):
            # Only the main thread may set handlers: in others (a notebook's worker) signals keep their meaning.
            with contextlib.suppress(ValueError):
                previous[number] = signal.getsignal(number)
                signal.signal(number, remember)
        try:
            yield
        finally:
            for number, handler in previous.items():
                with contextlib.suppress(ValueError):
                    signal.signal(number, handler)
