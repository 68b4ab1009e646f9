"""The plots on narrow training: speed-up against FLOPs, bytes over a run, accuracy against seconds."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path

import matplotlib

from benchmarks.memory_plots import save
from benchmarks.records import Record

matplotlib.use("Agg")

import matplotlib.pyplot as plt
from matplotlib.ticker import NullFormatter

# Okabe and Ito's colours, told apart by colour-blind readers too.
COLOURS = ("#3b3b3b", "#56b4e9", "#009e73", "#e69f00", "#cc79a7", "#d55e00")
MARKS = "os^"


def speed(rows: Mapping[str, Sequence[Record]], path: Path) -> None:
    """Dense over narrow step, measured, against the FLOPs that were drawn, beside the ideal.

    Args:
        rows: network → records of `benchmarks.speed` whose FLOPs are bounded.
        path: the PNG.
    """
    figure, axis = plt.subplots(figsize=(6.4, 4.0))
    ratios = [step / 100 for step in range(4, 101)]
    axis.plot(
        [100 * r for r in ratios], [0.75 / r for r in ratios], "--", color="#8a8f98", label="ideal: 1 / (4/3 · ratio)"
    )
    for (network, records), colour, mark in zip(rows.items(), ("#d55e00", "#0072b2"), MARKS, strict=False):
        points = sorted(records, key=lambda r: r["keep"])
        places = [100 * r["keep"] for r in points]
        for name, style in (("tithe", "-"), ("alone twice", ":")):
            speed_ups = [r["stock ms"] / r[f"{name} ms"] for r in points]
            label = network if name == "tithe" else f"{network}: the narrow network alone, two forwards"
            axis.plot(places, speed_ups, style + mark, color=colour, markersize=5, label=label)
    axis.axhline(1, color="#c8ccd2", linewidth=1)
    for scale, ticks in ((axis.set_xscale, (5, 10, 20, 36, 50, 70, 100)), (axis.set_yscale, (0.5, 1, 2, 4, 8, 16))):
        scale("log")
        set_ticks = axis.set_xticks if scale == axis.set_xscale else axis.set_yticks
        set_ticks(ticks, [f"{t:g}" for t in ticks])
    axis.minorticks_off()
    axis.set_xlabel("FLOPs kept of a forward pass, %")
    axis.set_ylabel("stock dense step / narrow step, seconds")
    axis.spines[["top", "right"]].set_visible(False)
    axis.legend(frameon=False, fontsize=8)
    figure.tight_layout()
    save(figure, path)


def shrinking(records: Sequence[Record], path: Path) -> None:
    """Bytes of weights, optimizer and peak of a step, over the epochs of a run.

    Args:
        records: of `benchmarks.narrow_memory`, in the order of the run.
        path: the PNG.
    """
    figure, axis = plt.subplots(figsize=(6.4, 3.4))
    kinds = {"peak of a step": "peak_bytes", "weights": "weight_bytes", "optimizer": "optimizer_bytes"}
    for (label, field), colour, mark in zip(kinds.items(), ("#0072b2", "#3b3b3b", "#d55e00"), MARKS, strict=True):
        values = [r[field] / records[0][field] for r in records]
        axis.plot(range(len(records)), values, "-" + mark, color=colour, markersize=5, label=label)
    axis.set_ylim(bottom=0)
    axis.set_xticks(range(len(records)), [r["when"] for r in records], fontsize=8, rotation=30, ha="right")
    axis.set_ylabel("bytes, part of what they were at first", fontsize=9)
    axis.spines[["top", "right"]].set_visible(False)
    axis.legend(frameon=False, fontsize=9)
    figure.tight_layout()
    save(figure, path)


def curves(panels: Mapping[str, Mapping[str, Sequence[tuple[float, float]]]], path: Path) -> None:
    """Validation accuracy against CPU seconds, one panel a network and ratio, one line a method.

    Args:
        panels: title → method → (seconds, accuracy), means over the seeds.
        path: the PNG.
    """
    figure, grid = plt.subplots(2, 2, figsize=(9.0, 6.4), squeeze=False)
    for axis, (title, methods) in zip(grid.flat, panels.items(), strict=False):
        for (method, points), colour in zip(methods.items(), COLOURS, strict=True):
            seconds, accuracies = zip(*points, strict=True) if points else ((), ())
            wide = 2.4 if method == "Tithe" else 1.4
            axis.plot(seconds, accuracies, "-", color=colour, linewidth=wide, label=method)
        axis.set_title(title, fontsize=10)
        axis.set_xscale("log")
        axis.xaxis.set_major_formatter("{x:g}")
        axis.xaxis.set_minor_formatter(NullFormatter())
        axis.grid(axis="y", color="#e3e6ea", linewidth=0.6)
        axis.spines[["top", "right"]].set_visible(False)
    for axis in grid[-1]:
        axis.set_xlabel("CPU seconds of one thread", fontsize=9)
    for row in grid:
        row[0].set_ylabel("validation accuracy, %", fontsize=9)
    handles, labels = grid[0][0].get_legend_handles_labels()
    figure.legend(handles, labels, loc="upper center", ncols=len(labels), frameon=False, fontsize=8)
    figure.tight_layout(rect=(0, 0, 1, 0.95))
    save(figure, path)
