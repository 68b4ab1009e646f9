"""Training runs from a recipe: what `tithe train` does, callable from Python.

    recipe, sections, terms   the TOML file, checked; what each task lets it say
    tasks    one file a task: how cells become rows, rows batches, a batch a loss, outputs metrics
    data     rows, labels, samples         models   the network and its head      encoders   its inputs
    setup    the method on the model       loop     steps, saves, resumes         report     the result
    checkpoints  what a run is resumed from       lock   one run a folder
    course   which rows a step sees        lr_schedule  its learning rate         signals    Ctrl-C
    tables, delimited, cells, documents  texts and labels     images, pictures, arrays  images
    hub, sources  models and data by name         fitting  whether model and data go together
    paths, decoding, slips    what a recipe may say wrongly
    average_section  [history], [average]  recording, averaging                   how a run ends with an average

Importing this package loads pydantic alone; `train` loads the rest.
"""

from __future__ import annotations

import contextlib
import os
from typing import TYPE_CHECKING, Any

from tithe.app.train.recipe import Recipe, parse_recipe, read_recipe
from tithe.app.train.signals import Interrupted
from tithe.files import NotWrittenError

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
        TitheError: something is not as the recipe says, the loss was not finite, another run writes into the output
            folder, or a file cannot be written.
        Interrupted: SIGINT or SIGTERM came, and the state is saved; or a second one came, and an earlier state is.
        KeyboardInterrupt: SIGINT stopped it at once, and no step is saved.
    """
    from rich.console import Console

    from tithe import distributed
    from tithe.app.train.checkpoints import Checkpoints
    from tithe.app.train.lock import RunLock
    from tithe.app.train.loop import Run
    from tithe.app.train.report import finish
    from tithe.app.train.setup import check_writable

    check_writable(recipe)
    is_main = os.environ.get("RANK", "0") == "0"
    with RunLock(recipe.output, recipe.place("run", "output")) if is_main else contextlib.nullcontext():
        try:
            run = Run(recipe, resume=resume, console=console or Console(stderr=True))
            with distributed.telling("the run"):
                run.fit()
                return finish(run)
        except KeyboardInterrupt:
            saved = Checkpoints(recipe.output / "checkpoints").steps()
            if not saved:
                raise
            raise Interrupted(f"stopped at once: step {saved[-1]} is saved") from None
        except NotWrittenError as error:
            saved = Checkpoints(recipe.output / "checkpoints").steps()
            if not saved:
                raise
            remedy = f"{error.remedy}; then go on from step {saved[-1]} with --resume"
            raise NotWrittenError(
                error.place, found=error.found, expected=error.expected, remedy=remedy, number=error.number
            ) from error
