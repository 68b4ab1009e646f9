"""The plots on memory: the bar of one network, and how bytes and seconds grow."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import matplotlib

from benchmarks.records import Record

matplotlib.use("Agg")

import matplotlib.pyplot as plt

# Okabe and Ito's colours, told apart by colour-blind readers too; from dark to light, so that they print in grey.
PARTS = {
    "weights": "#3b3b3b",
    "gradients and optimizer": "#d55e00",
    "kept for backward": "#0072b2",
    "transient": "#56b4e9",
}
LINES = ("#d55e00", "#e69f00", "#0072b2", "#56b4e9")


def memory_bar(rows: Sequence[tuple[str, dict[str, float]]], path: Path) -> None:
    """One stacked bar a method, its total at the end.

    Args:
        rows: label and megabytes of each of PARTS, from top to bottom.
        path: the PNG.
    """
    figure, axis = plt.subplots(figsize=(8.0, 0.62 * len(rows) + 1.0))
    widest = max(sum(parts.values()) for _, parts in rows)
    for i, (_, parts) in enumerate(rows):
        left = 0.0
        for part, colour in PARTS.items():
            axis.barh(i, parts[part], left=left, color=colour, height=0.6, label=part if i == 0 else None)
            left += parts[part]
        axis.text(left + 0.012 * widest, i, f"{left:.0f} MB", va="center", fontsize=10)
    axis.set_yticks(range(len(rows)), [label for label, _ in rows], fontsize=10)
    axis.invert_yaxis()
    axis.set_xlim(0, 1.1 * widest)
    axis.tick_params(left=False, labelsize=10)
    axis.spines[["top", "right", "left"]].set_visible(False)
    axis.set_xlabel("MB at the peak of one training step: MobileNetV2, 8 images of 224², float32", fontsize=9)
    axis.xaxis.set_tick_params(labelsize=9)
    figure.legend(loc="upper center", ncols=len(PARTS), frameon=False, fontsize=9, handlelength=1.2)
    figure.tight_layout(rect=(0, 0, 1, 0.93))
    save(figure, path)


def growth(records: Sequence[Record], methods: Sequence[str], weights: int, path: Path) -> None:
    """Peak bytes beyond the weights and CPU seconds, over the batch size and over the resolution.

    Args:
        records: of `benchmarks.memory_growth`.
        methods: their names, in the order of the legend.
        weights: bytes of the network's own weights.
        path: the PNG.
    """
    figure, grid = plt.subplots(2, 2, figsize=(8.0, 5.6), sharex="col", sharey="row")
    for column, (axis_name, fixed) in enumerate((("batch", {"side": 224}), ("side", {"batch": 8}))):
        chosen = [r for r in records if all(r[key] == value for key, value in fixed.items())]
        for colour, method in zip(LINES, methods, strict=True):
            rows = sorted((r for r in chosen if r["method"] == method), key=lambda r: r[axis_name])
            peaks = [(r["peak_bytes"] + r["standing_bytes"] - weights) / 1e6 for r in rows]
            places = [r[axis_name] for r in rows]
            grid[0][column].plot(places, peaks, "-", color=colour, label=method)
            for x, y, r in zip(places, peaks, rows, strict=True):
                face = colour if r["measured"] else "white"
                grid[0][column].plot(x, y, "o", color=colour, markerfacecolor=face, markersize=5)
            timed = [r for r in rows if r["measured"]]
            seconds = [r["cpu_ms"] / 1e3 for r in timed]
            grid[1][column].plot([r[axis_name] for r in timed], seconds, "o-", color=colour, markersize=5)
        for row, label in enumerate(("peak without the weights, MB", "CPU seconds of a step")):
            axis: Any = grid[row][column]
            axis.spines[["top", "right"]].set_visible(False)
            axis.set_xscale("log", base=2)
            axis.set_yscale("log")
            ticks = sorted({r[axis_name] for r in chosen})
            axis.set_xticks(ticks, [f"{t}" for t in ticks], fontsize=8)
            axis.minorticks_off()
            axis.yaxis.set_major_formatter("{x:g}")
            axis.grid(axis="y", color="#e3e6ea", linewidth=0.6)
            if column == 0:
                axis.set_ylabel(label, fontsize=9)
    grid[1][0].set_xlabel("batch size, images of 224²", fontsize=9)
    grid[1][1].set_xlabel("image side in pixels, batch 8", fontsize=9)
    figure.legend(*grid[0][0].get_legend_handles_labels(), loc="upper center", ncols=4, frameon=False, fontsize=9)
    figure.tight_layout(rect=(0, 0, 1, 0.95))
    save(figure, path)


def save(figure: Any, path: Path) -> None:
    """Write the PNG and let go of the figure."""
    figure.savefig(path, dpi=150, metadata={"Software": None})
    plt.close(figure)
