"""Where a run is logged besides its own files: the trackers that accelerate knows, TensorBoard among them."""

from __future__ import annotations

import difflib
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from tithe.app.train.recipe import Recipe
from tithe.errors import TitheError
from tithe.files import writing

BOARD = "tensorboard"
"""The tracker that needs no account: it writes into the run's folder."""

_PATIENCE = 30.0
"""Seconds until TensorBoard sees what was logged."""

_NEVER = 10**9
"""Seconds until the board's own thread would write: what goes wrong there could not be told."""

_ALIKE = {"comet": "comet_ml", "weights and biases": "wandb", "tensorboardx": BOARD}


def find_trackers(recipe: Recipe) -> None:
    """Check that the trackers of a recipe are installed, without starting them.

    Raises:
        TitheError: accelerate knows none of this name, or its package is missing.
    """
    from accelerate.tracking import LOGGER_TYPE_TO_CLASS, get_available_trackers

    known = sorted(LOGGER_TYPE_TO_CLASS)
    place = recipe.place("log", "trackers")
    for name in recipe.log.trackers:
        if name not in known:
            close = [_ALIKE[name.casefold()]] if name.casefold() in _ALIKE else []
            close = close or difflib.get_close_matches(name.casefold(), known, n=1)
            raise TitheError(
                place,
                found=repr(name),
                expected=f"trackers that accelerate knows: {', '.join(known)}",
                remedy=f'write "{close[0]}"' if close else "correct the name",
            )
        if name not in {str(one) for one in get_available_trackers()}:
            package = name.replace("_", "-")
            raise TitheError(
                place,
                found=f"{name}, whose package is not installed",
                expected="it installed",
                remedy=f"pip install {package}, or remove {name!r}",
            )


class Trackers:
    """The trackers of one run, on its main process.

    Args:
        recipe: names them.
        done: steps that were finished before.

    Raises:
        TitheError: a tracker does not start, such as one without its account.
        NotWrittenError: the run's folder cannot be written to.
    """

    def __init__(self, recipe: Recipe, done: int) -> None:
        self._board: Any = None
        self._others: dict[str, Any] = {}
        self._folder, self._shown = recipe.output / BOARD, time.monotonic()
        for name in dict.fromkeys(recipe.log.trackers):
            if name == BOARD:
                with writing(self._folder):
                    _check_room(self._folder)
                    settings = {"purge_step": done + 1 if done else None, "flush_secs": _NEVER}
                    self._board = _start(name, BOARD, recipe.output, settings).tracker
                continue
            try:
                tracker = _start(name, recipe.log.project, recipe.output, {})
                tracker.store_init_configuration(_flat(recipe.settings()))
            # Each tracker's own errors: no account, no network, a server that says no.
            except Exception as error:
                self.close()
                raise TitheError(
                    recipe.place("log", "trackers"),
                    found=f"{name} does not start: {(str(error).strip().splitlines() or [type(error).__name__])[0]}",
                    expected="a tracker that takes what is logged",
                    remedy=f"log in to {name} or set it to work offline, or remove {name!r}",
                ) from error
            self._others[name] = tracker

    def log(self, split: str, step: int, values: Mapping[str, Any]) -> None:
        """Hand the numbers among some values on.

        Raises:
            NotWrittenError: TensorBoard's files cannot be written.
        """
        numbers = {f"{split}/{name}": value for name, value in values.items() if isinstance(value, int | float)}
        for tracker in self._others.values():
            tracker.log(numbers, step=step)
        if self._board is None:
            return
        with writing(self._folder):
            for name, value in numbers.items():
                self._board.add_scalar(name, value, step)
            if time.monotonic() - self._shown > _PATIENCE:
                self._board.flush()
                self._shown = time.monotonic()

    def close(self) -> None:
        """End all of them.

        Raises:
            NotWrittenError: TensorBoard's files cannot be written.
        """
        for tracker in self._others.values():
            tracker.finish()
        if self._board is not None:
            with writing(self._folder):
                self._board.close()


def _start(name: str, project: str, folder: Path, settings: Mapping[str, Any]) -> Any:
    from accelerate.tracking import LOGGER_TYPE_TO_CLASS

    kind: Any = LOGGER_TYPE_TO_CLASS[name]
    told: Sequence[Any] = (project, str(folder)) if kind.requires_logging_directory else (project,)
    tracker = kind(*told, **settings)
    tracker.start()
    return tracker


def _flat(settings: Mapping[str, Any]) -> dict[str, Any]:
    """The keys of a recipe with their sections, as numbers and texts."""
    return {
        f"{section}.{key}": value if isinstance(value, bool | int | float | str) else str(value)
        for section, values in settings.items()
        for key, value in values.items()
    }


def _check_room(folder: Path) -> None:
    """Write a little and remove it: the board's own thread writes its first lines, and cannot say what went wrong."""
    folder.mkdir(exist_ok=True)
    room = folder / ".room"
    try:
        room.write_bytes(bytes(4096))
    finally:
        room.unlink(missing_ok=True)
