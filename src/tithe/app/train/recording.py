"""What a run records of itself: whole checkpoints, or deltas where the rest is frozen, in one folder."""

from __future__ import annotations

import warnings
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from torch import nn

import tithe
from tithe.app.train.recipe import Recipe
from tithe.errors import TitheError, TitheWarning
from tithe.files import NotWrittenError, is_full, writing

FOLDER = "history"


def recorded_steps(recipe: Recipe) -> dict[int, list[Path]]:
    """The step of every checkpoint in a run's history, with its file or, of moving averages, files; in order.

    Raises:
        TitheError: a file is damaged, or something else wrote it.
    """
    folder = recipe.output / FOLDER
    if recipe.method.records_deltas:
        return {int(path.stem): [path] for path in sorted(folder.glob("[0-9]*.safetensors"))}
    history, found = tithe.History(folder), dict[int, list[Path]]()
    for step, path in zip(history.steps, history.rows.paths if len(history) else (), strict=True):
        found.setdefault(step, []).append(path)
    return found


class Recording:
    """The history of one run, as its main process writes it.

    Args:
        recipe: the run.
        step: that the run goes on from: what was recorded after it is recorded again.
        steps: that its checkpoint says were recorded.

    Raises:
        TitheError: the folder holds other checkpoints than the run recorded.
    """

    def __init__(self, recipe: Recipe, step: int, steps: Sequence[int]) -> None:
        self.folder, self._full = recipe.output / FOLDER, False
        found = recorded_steps(recipe)
        lost = [at for at in found if at >= step and at not in steps]
        for later in reversed(lost):  # the last first: a kill leaves a history without a gap
            for path in reversed(found.pop(later)):
                path.unlink()
        if list(found) != list(steps):
            raise TitheError(
                str(self.folder),
                found=f"checkpoints of steps {_listed(list(found))}",
                expected=f"those that the run recorded: {_listed(steps)}",
                remedy="restore the folder, or start anew in another output folder",
            )
        section = recipe.history
        bits, ema = (None, None) if section is None else (section.bits, section.ema)
        self._history = None if recipe.method.records_deltas else tithe.History(self.folder, bits, ema=ema)

    def follow(self, model: nn.Module, step: int) -> None:
        """Take the present weights into the moving averages.

        Raises:
            TitheError: the model is another.
        """
        assert self._history is not None
        self._history.update(model, step)

    def state_dict(self) -> dict[str, Any]:
        """What a run resumes from besides the files: the moving averages."""
        return {} if self._history is None else self._history.state_dict()

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Go on from a `state_dict`."""
        if self._history is not None and state:
            self._history.load_state_dict(state)

    def record(self, trainee: tithe.Plan, model: nn.Module, step: int) -> bool:
        """Append the present weights; returns whether they were written: a full disk only warns.

        Args:
            trainee: what is trained in the model, with its last step in it.
            model: the model.
            step: of the run.

        Raises:
            TitheError: a weight is not finite, or another run writes here.
        """
        if self._history is not None:
            return self._history.record(model, step)
        try:
            with writing(self.folder):
                self.folder.mkdir(parents=True, exist_ok=True)
            trainee.save(self.folder / f"{step:08d}.safetensors", metadata={})
        except NotWrittenError as error:
            if not is_full(error):
                raise
            if not self._full:
                warnings.warn(
                    f"{self.folder}: no room for the delta of step {step}; those before it are readable."
                    " Make room, and recording goes on with the next.",
                    TitheWarning,
                    stacklevel=2,
                )
            self._full = True
            return False
        self._full = False
        return True


def _listed(steps: Sequence[int]) -> str:
    shown = [str(step) for step in steps]
    return ", ".join(shown if len(shown) < 7 else [*shown[:3], "…", *shown[-2:]]) or "none"
