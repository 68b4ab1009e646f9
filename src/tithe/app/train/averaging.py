"""How a run ends with an average: the mean of its history on a fresh model, which some more steps train."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import tithe
from tithe.app.train.course import AverageCourse, Course, OwnCourse
from tithe.app.train.data import Batches
from tithe.app.train.models import Loss, Network
from tithe.app.train.recipe import Recipe
from tithe.app.train.recording import FOLDER
from tithe.app.train.setup import make_lean
from tithe.delta import write_network
from tithe.errors import TitheError

NARROW = "narrow.safetensors"


def courses(recipe: Recipe, sizes: Mapping[str, int], share: tuple[int, int]) -> list[Course]:
    """The run's own steps, and those of its average where it ends with one.

    Args:
        recipe: the run.
        sizes: samples in each split.
        share: this process's number, and how many there are.

    Raises:
        TitheError: less is recorded than the average needs.
    """
    own = OwnCourse(recipe, sizes["train"], share)
    if recipe.history is None:
        return [own]
    count = sum(own.records(step) for step in range(own.total_steps + 1))
    needed = 1 if recipe.average is None else 2
    if count < needed:
        steps = f"{own.total_steps} steps" + (f", widths fixed at {own.fixed_from}" if own.fixed_from else "")
        raise TitheError(
            recipe.place("history"),
            found=f"{count} checkpoint{'s' * (count != 1)} in a run of {steps}",
            expected=f"at least {needed}",
            remedy="record more often (every), or earlier (start)",
        )
    if recipe.average is None:
        return [own]
    rows = sizes["train" if recipe.average.on == "train" else "average"]
    return [own, AverageCourse(recipe, rows, share, recipe.average, own.total_steps)]


def leave(trainee: tithe.Plan, folder: Path, *, is_main: bool) -> dict[str, dict[str, int]] | None:
    """Let the run's own method go.

    Of a network that got narrower, the main process writes what it is now, `narrow.safetensors`: a fresh model has full
    width, and the average is one of narrow networks.

    Args:
        trainee: the method.
        folder: of the run.
        is_main: whether this is the main process.

    Returns:
        Module path → attribute → number, of every number that follows a width; None where all widths are full.
    """
    widths = trainee.widths()
    if widths is not None and is_main:
        trainee.save(folder / NARROW)
    trainee.release()
    return widths


def attach_average(
    recipe: Recipe,
    network: Network,
    loss: Loss,
    data: Batches,
    state: Mapping[str, Any] | None,
    *,
    narrow: bool,
) -> tithe.Plan:
    """Make the average of the run's history ready to train.

    Args:
        recipe: the run.
        network: its model, freshly loaded, on its device.
        loss: mean loss of a batch.
        data: for the statistics of norms.
        state: a `state_dict` of the same average, to go on from.
        narrow: whether the run left a narrow network.

    Raises:
        TitheError: the history is damaged, or is not one of this model.
    """
    section, model = recipe.average, network.model
    assert section is not None
    if narrow:
        tithe.apply(model, recipe.output / NARROW)
    make_lean(recipe, network)
    with recipe.blamed("average"):
        return tithe.attach(
            model,
            section.make(recipe.output / FOLDER),
            loss=loss,
            data=data,
            where=recipe.method.moves(network.head),
            seed=recipe.run.seed,
            state=None if state is None else dict(state),
        )


def save(
    trainee: tithe.Plan, path: Path, widths: Mapping[str, Mapping[str, int]] | None, *, metadata: Mapping[str, str]
) -> None:
    """Write what is trained; of the average of narrow networks, a narrow network.

    Args:
        trainee: with its last step in the weights.
        path: the file.
        widths: what `leave` returned.
        metadata: for the file's header.
    """
    if widths is None:
        trainee.save(path, metadata=metadata)
    else:
        told = {"method": tithe.TWA.__name__, "steps": str(trainee.num_steps), **metadata}
        write_network(path, trainee.model, widths, metadata=told)
