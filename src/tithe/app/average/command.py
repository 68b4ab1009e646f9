"""What `tithe average` does: fixed weights without data, or every way with a recipe."""

from __future__ import annotations

import json
import warnings
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from rich.console import Console

from tithe import History, TitheError, TitheWarning
from tithe.app.average.plot import plot
from tithe.app.average.ways import Comparison, Fixed, Settings, fixed_weights
from tithe.app.terminal import Bar
from tithe.averages.average import average, check_output, check_weights

_WITH_DATA = ("bits", "granularity", "epochs", "lr")


def run(
    checkpoints: Sequence[Path],
    output: Path,
    *,
    recipe: Path | None,
    data: Path | None,
    weights: str | None,
    told: Mapping[str, Any],
    skip_damaged: bool,
    figure: Path | None,
    console: Console,
) -> Fixed | Comparison:
    """Average checkpoints as the command line says.

    Args:
        checkpoints: files or folders.
        output: the new file or folder.
        recipe: of `tithe train`, or None.
        data: the folder of its data, or None.
        weights: numbers with commas between them, or None.
        told: keys of `Settings` with their values, as far as they are given.
        skip_damaged: leave out checkpoints that cannot be read.
        figure: where to draw the coefficients, or None.
        console: where progress is shown.

    Raises:
        TitheError: when options do not go together, or something is not as they say.
    """
    settings = Settings(**told)
    _check(recipe, data, weights, told, settings)
    history = _opened(checkpoints, console, skip_damaged=skip_damaged)
    check_output(output, history.rows.paths[0])
    with Bar(console, patience=5.0) as bar:
        if recipe is None:
            found = _fixed(history, output, weights, settings, bar)
            coefficients = {"all": torch.tensor(found.weights)}
        else:
            from tithe.app.average.compare import compare
            from tithe.app.train import read_recipe

            folder = [] if data is None else [f"data.folder={json.dumps(str(data.resolve()))}"]
            found = compare(read_recipe(recipe, folder), history, output, settings, bar)
            coefficients = found.winner.coefficients
    if figure is not None:
        plot(coefficients, found.checkpoints, figure)
    return found


def _fixed(history: History, output: Path, weights: str | None, settings: Settings, bar: Bar) -> Fixed:
    method = "mean" if settings.method == "auto" else settings.method
    given = fixed_weights(method, len(history), settings.decay) if weights is None else parse_weights(weights)
    factors = check_weights(given, len(history))
    bar.phase("averaging")
    average(history, output, factors, progress=bar.to)
    return Fixed(
        checkpoints=tuple(map(str, history.rows.paths)),
        method=method if weights is None else "weights",
        weights=tuple(factors),
        output=str(output),
    )


def parse_weights(text: str) -> list[float]:
    """Numbers with commas between them.

    Raises:
        TitheError: when something else stands there.

    Example:
        >>> parse_weights("0.2, 0.8")
        [0.2, 0.8]
    """
    try:
        return [float(part) for part in text.split(",")]
    except ValueError as error:
        raise TitheError(
            "--weights", found=repr(text), expected="numbers with commas between them", remedy="as in 0.2,0.8"
        ) from error


def _check(
    recipe: Path | None, data: Path | None, weights: str | None, told: Mapping[str, Any], settings: Settings
) -> None:
    """Refuse options that would have no effect."""
    if weights is not None:
        odd = ["--recipe"] * (recipe is not None) + ["--data"] * (data is not None)
        odd += [f"--{key}" for key in told if key != "method" or settings.method != "auto"]
        remedy = "leave out one of the two"
    elif recipe is None:
        odd = ["--data"] * (data is not None) + [f"--{key}" for key in told if key in _WITH_DATA]
        odd += ["--decay"] * ("decay" in told and settings.method != "ema")
        remedy = "add --method ema" if odd == ["--decay"] else "add --recipe RECIPE.toml"
    else:
        return
    if odd:
        place = "--weights" if weights is not None else odd[0]
        found = f"{odd[0]} beside it" if weights is not None else "nothing that it would be used for"
        raise TitheError(place, found=found, expected="options that go together", remedy=remedy)


def _opened(checkpoints: Sequence[Path], console: Console, *, skip_damaged: bool) -> History:
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always", TitheWarning)
        history = History(checkpoints, skip_damaged=skip_damaged)
    for warning in caught:
        console.print(f"warning: {warning.message}", markup=False, highlight=False, soft_wrap=True)
    return history
