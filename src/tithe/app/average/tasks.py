"""What `tithe merge-tasks` does: fine-tunings of one base merged into one model."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import get_args

from rich.console import Console

from tithe.app.average.command import parse_weights, warnings_to
from tithe.app.average.ways import Fixed
from tithe.app.terminal import Bar
from tithe.averages.average import Averaged
from tithe.averages.task_vectors import MergeMethod, merge_tasks
from tithe.errors import TitheError


def merge(
    base: Path,
    checkpoints: Sequence[Path],
    output: Path,
    *,
    method: str,
    weights: str | None,
    density: float | None,
    scale: float,
    console: Console,
) -> Fixed:
    """Merge fine-tunings as the command line says.

    Args:
        base: the model that all were fine-tuned from.
        checkpoints: files or folders.
        output: the new file or folder.
        method: "ties" or "iso-c".
        weights: numbers with commas between them, or None.
        density: of TIES; None for its default.
        scale: of the merged change.
        console: where progress is shown.

    Raises:
        TitheError: when options do not go together, or something is not as they say.
    """
    known = {str(name): name for name in get_args(MergeMethod)}
    if method not in known:
        raise TitheError("--method", found=method, expected=" or ".join(known), remedy="change it")
    if density is not None and method != "ties":
        raise TitheError(
            "--density", found=f"it with --method {method}", expected="it with --method ties", remedy="leave it out"
        )
    told: list[Averaged] = []
    with Bar(console, patience=5.0) as bar, warnings_to(console):
        bar.phase("merging")
        merge_tasks(
            base,
            list(checkpoints),
            output,
            known[method],
            weights=None if weights is None else parse_weights(weights),
            density=0.2 if density is None else density,
            scale=scale,
            progress=bar.to,
            report=told.append,
        )
    return Fixed(
        checkpoints=tuple(map(str, told[0].checkpoints)),
        method=method,
        weights=told[0].weights,
        output=str(output),
        models=told[0].models,
        kept=told[0].kept,
        copied=told[0].copied,
        skipped=told[0].skipped,
    )
