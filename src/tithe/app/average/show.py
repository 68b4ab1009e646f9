"""What was averaged, as a table of at most 80 columns."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Final, get_args

from rich.console import Console

from tithe.app import terminal
from tithe.app.average.ways import METHODS, Comparison, Fixed
from tithe.averages.task_vectors import MergeMethod

_WIDTH: Final = 44
"""Characters of names on a line of 80."""


def show(found: Fixed | Comparison, console: Console) -> None:
    """Print what each way gave, and what was written."""
    for line in _lines(found):
        console.print(line, markup=False, highlight=False, soft_wrap=True)
    if isinstance(found, Fixed):
        console.print(f"written: {found.output}", markup=False, soft_wrap=True)
        return
    metric = next(iter(found.rows[0].selection))
    table = terminal.table(["", f"{metric}\nselection", f"{metric}\ntest"])
    table.add_column("\nchosen", overflow="fold", max_width=34)
    table.add_column("\nseconds", justify="right", no_wrap=True)
    for row in found.rows:
        mark = "*" if row.method == found.written else " "
        test = f"{row.test[metric]:.4f}" if row.test else "–"
        table.add_row(
            f"{mark} {METHODS.get(row.method, row.method)}", f"{row.score:.4f}", test, row.detail, f"{row.seconds:.1f}"
        )
    console.print(table)
    sizes = found.splits
    told = f"chosen by {sizes['selection']:,} validation examples; TWA-v trained on {sizes['tuning']:,} others"
    console.print(told + (f"; test has {sizes['test']:,}" if "test" in sizes else "; no test split"), markup=False)
    console.print(f"* written: {found.output}", markup=False, soft_wrap=True)


def _lines(found: Fixed | Comparison) -> list[str]:
    """Say in a few lines what counts, what was kept, and what does not count."""
    names = [Path(path).name for path in found.checkpoints]
    count = f"{len(names)} checkpoint" + "s" * (len(names) != 1)
    if isinstance(found, Comparison):
        lines = [f"averaged {count}: {_list(names)}"]
    else:
        done, base = ("merged", "base") if found.method in get_args(MergeMethod) else ("averaged", "last")
        lines = [f"{done} {count}: {_list(names)}"]
        lines += [f"other models in them, {done} too: {_list(found.models)}"] * bool(found.models)
        lines += [f"kept from the {base}: {_list(found.kept)}"] * bool(found.kept)
        lines += [f"copied from the first: {_list(found.copied)}"] * bool(found.copied)
    return lines + [f"left out: {Path(path).name} ({why})" for path, why in found.skipped.items()]


def _list(names: Sequence[str]) -> str:
    """As many names as fit, and how many more there are."""
    shown = 1
    while shown < len(names) and len(", ".join(names[: shown + 1])) <= _WIDTH:
        shown += 1
    more = len(names) - shown
    return ", ".join(names[:shown]) + (f" and {more} more" if more else "")
