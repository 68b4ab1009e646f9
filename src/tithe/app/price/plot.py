"""Quotes as stacked bars."""

from __future__ import annotations

from pathlib import Path

from tithe.app import terminal
from tithe.app.price.quote import Quotes

_PARTS = ("kept", "gradients", "optimizer", "theta", "transient", "batch", "weights")
_LABELS = {"theta": "θ and its index", "kept": "kept for backward", "transient": "working set"}


def plot(quotes: Quotes, path: Path) -> None:
    """Draw each method's peak as one bar, its parts on top of each other, and the memory to fit into as a line.

    Raises:
        TitheError: the file cannot be written, or its ending names no format.
    """
    figure = terminal.figure(7.2, 1.2 + 0.5 * len(quotes.rows))
    axes = figure.add_subplot()
    names = [row.method for row in quotes.rows]
    scale, unit = (1e9, "GB") if max(row.peak for row in quotes.rows) >= 1e9 else (1e6, "MB")
    starts = [0.0] * len(names)
    for part, colour in reversed(list(zip(_PARTS, terminal.COLOURS, strict=True))):
        sizes = [row.parts[part] / scale for row in quotes.rows]
        axes.barh(names, sizes, left=starts, color=colour, label=_LABELS.get(part, part), height=0.7)
        starts = [start + size for start, size in zip(starts, sizes, strict=True)]
    for place, end in enumerate(starts):
        axes.annotate(f"{end:,.1f}", (end, place), xytext=(3, 0), textcoords="offset points", va="center", fontsize=8)
    if quotes.memory is not None:
        axes.axvline(quotes.memory / scale, color="black", linestyle="--", linewidth=1, label="memory")
    axes.invert_yaxis()
    axes.margins(x=0.12)
    axes.set_xlim(left=0)
    axes.set_xlabel(f"{unit} at the highest moment of a step")
    axes.set_title(f"{quotes.subject}, batch {quotes.batch}, {quotes.dtype}, {quotes.optimizer}", fontsize=10)
    figure.legend(loc="outside right upper", fontsize=8, frameon=False)
    terminal.save_figure(figure, path)
