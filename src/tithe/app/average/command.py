"""What `tithe average` does: fixed weights without data, or every way with a recipe."""

from __future__ import annotations

import contextlib
import json
import warnings
from collections.abc import Generator, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import torch
from rich.console import Console

from tithe import History, TitheError, TitheWarning
from tithe.app.average.plot import plot
from tithe.app.average.ways import WITHOUT_DATA, Comparison, Fixed, Settings, fixed_weights
from tithe.app.terminal import Bar
from tithe.averages.average import Averaged, average

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
    with Bar(console, patience=5.0) as bar:
        if recipe is None:
            found = _fixed(checkpoints, output, weights, settings, console, bar, skip_damaged=skip_damaged)
            coefficients = {"all": torch.tensor(found.weights)}
        else:
            from tithe.app.average.compare import compare
            from tithe.app.train import read_recipe

            with warnings_to(console):
                history = History(checkpoints, skip_damaged=skip_damaged)
            folder = [] if data is None else [f"data.folder={json.dumps(str(data.resolve()))}"]
            found = compare(read_recipe(recipe, folder), history, output, settings, bar)
            coefficients = found.winner.coefficients
    if figure is not None:
        plot(coefficients, found.checkpoints, figure)
    return found


def _fixed(
    checkpoints: Sequence[Path],
    output: Path,
    weights: str | None,
    settings: Settings,
    console: Console,
    bar: Bar,
    *,
    skip_damaged: bool,
) -> Fixed:
    method = "mean" if settings.method == "auto" else settings.method
    if method not in WITHOUT_DATA:
        fixed_weights(method, 1, decay=settings.decay)  # says what it needs
    told: list[Averaged] = []
    bar.phase("averaging")
    given = None
    if settings.like is None:
        given = partial(fixed_weights, method, decay=settings.decay) if weights is None else parse_weights(weights)
    with warnings_to(console):
        average(
            list(checkpoints),
            output,
            given,
            like=settings.like,
            last=settings.last,
            skip_damaged=skip_damaged,
            progress=bar.to,
            report=told.append,
        )
    return Fixed(
        checkpoints=tuple(map(str, told[0].checkpoints)),
        method=settings.like or (method if weights is None else "weights"),
        weights=told[0].weights,
        output=str(output),
        models=told[0].models,
        kept=told[0].kept,
        copied=told[0].copied,
        skipped=told[0].skipped,
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


@contextlib.contextmanager
def warnings_to(console: Console) -> Generator[None]:
    """Print warnings of what is opened meanwhile, a line each."""
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always", TitheWarning)
        yield
    for warning in caught:
        console.print(f"warning: {warning.message}", markup=False, highlight=False, soft_wrap=True)
