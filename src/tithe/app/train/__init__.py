"""Training runs from a recipe: what `tithe train` does, callable from Python.

    recipe   the TOML file, checked        data     rows, labels, batches       models   the network and its head
    setup    the method on the model       loop     steps, saves, resumes       report   the result
    course   which rows a step sees        lr_schedule  its learning rate       signals  Ctrl-C
    average_section  [history], [average]  recording, averaging                 how a run ends with an average

Importing this package loads pydantic alone; `train` loads the rest.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from tithe.app.train.recipe import Recipe, parse_recipe, read_recipe

if TYPE_CHECKING:
    from rich.console import Console

__all__ = ["Recipe", "parse_recipe", "read_recipe", "train"]


def train(recipe: Recipe, *, resume: bool = False, console: Console | None = None) -> dict[str, Any]:
    """Run a recipe from the first step (or the last checkpoint) to the written result.

    Args:
        recipe: what to do.
        resume: go on from the last checkpoint in the output folder, where there is one.
        console: where progress is shown; the default is standard error.

    Returns:
        What `result.json` holds: metrics, counts, sizes in bytes, times in seconds, versions, seeds.

    Raises:
        TitheError: something is not as the recipe says, or the loss was not finite.
        Interrupted: SIGINT or SIGTERM came, and the state is saved.
    """
    from rich.console import Console

    from tithe import distributed
    from tithe.app.train.loop import Run
    from tithe.app.train.report import finish

    run = Run(recipe, resume=resume, console=console or Console(stderr=True))
    with distributed.telling("the run"):
        run.fit()
        return finish(run)
