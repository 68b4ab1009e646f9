"""What was averaged, as a table of at most 80 columns."""

from __future__ import annotations

from rich.console import Console

from tithe.app import terminal
from tithe.app.average.ways import METHODS, Comparison, Fixed


def show(found: Fixed | Comparison, console: Console) -> None:
    """Print what each way gave, and what was written."""
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
        table.add_row(f"{mark} {METHODS[row.method]}", f"{row.score:.4f}", test, row.detail, f"{row.seconds:.1f}")
    console.print(table)
    sizes = found.splits
    told = f"chosen by {sizes['selection']:,} validation examples; TWA-v trained on {sizes['tuning']:,} others"
    console.print(told + (f"; test has {sizes['test']:,}" if "test" in sizes else "; no test split"), markup=False)
    console.print(f"* written: {found.output}", markup=False, soft_wrap=True)
