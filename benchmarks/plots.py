"""The plots of docs/benchmarks."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import matplotlib

from benchmarks.methods import Mask
from benchmarks.records import Record

matplotlib.use("Agg")

import matplotlib.pyplot as plt

COLOURS = ("#0f6b6b", "#d08c2e", "#7b5ea7", "#8a8f98")
MORE_COLOURS = (*COLOURS, "#b03a48", "#4a7ab5", "#5c8a3a", "#222222")


def validation_by_variant(first: Mapping[str, Record], variants: Sequence[Mask], path: Path) -> None:
    """One dot a variant: score along x, scope by marker, head warm-up filled, reselected to the right."""
    figure, axes = _axes(1, (7.0, 3.6))
    scores = list(dict.fromkeys(mask.score for mask in variants))
    for mask in variants:
        if mask.name not in first:
            continue
        i = scores.index(mask.score)
        x = i + (0.12 if mask.reselect else -0.12) + (0.05 if mask.scope == "tensor" else -0.05)
        axes[0].plot(
            x,
            first[mask.name]["validation"],
            "o" if mask.scope == "global" else "s",
            color=COLOURS[i],
            markerfacecolor=COLOURS[i] if mask.warm else "white",
            markersize=7,
        )
    axes[0].set_xticks(range(len(scores)), scores)
    axes[0].set_ylabel("SST-2 validation accuracy")
    axes[0].set_title("circle: global, square: per tensor · filled: after head warm-up · right: reselected", fontsize=8)
    _save(figure, path)


def rates_against_best(pairs: Sequence[tuple[str, float, float, bool]], factor: float, path: Path) -> None:
    """One dot a pair (score, best rate, suggested rate, whether something was decided on it), both axes by decades."""
    figure, axes = _axes(1, (5.2, 4.2))
    scores = list(dict.fromkeys(score for score, *_ in pairs))
    ends = [rate for _, best, suggested, _ in pairs for rate in (best, suggested)]
    line = [min(ends) / 2, max(ends) * 2]
    axes[0].fill_between(line, [x / factor for x in line], [x * factor for x in line], color="#eef1f3")
    axes[0].plot(line, line, color="#c8ccd2", linewidth=1)
    for i, score in enumerate(scores):
        label: str | None = score
        for _, best, suggested, chosen_on in (pair for pair in pairs if pair[0] == score):
            colour = COLOURS[i % len(COLOURS)]
            face = "white" if chosen_on else colour
            axes[0].plot(best, suggested, "o", color=colour, markerfacecolor=face, markersize=7, label=label)
            label = None
    axes[0].set_xscale("log")
    axes[0].set_yscale("log")
    axes[0].set_xlabel("best learning rate of a grid")
    axes[0].set_ylabel("suggested learning rate")
    axes[0].set_title(f"band: within a factor of {factor} · open: pairs of the development", fontsize=8)
    axes[0].legend(frameon=False, fontsize=8)
    _save(figure, path)


def growth_of_cost(records: Sequence[Record], path: Path) -> None:
    """CPU time and peak, as parts of full fine-tuning, over density; one line a hidden size."""
    figure, axes = _axes(2, (8.0, 3.4))
    for i, hidden in enumerate(sorted({r["hidden"] for r in records})):
        rows = sorted((r for r in records if r["hidden"] == hidden), key=lambda r: r["density"])
        for axis, field in zip(axes, ("cpu_ms", "peak_bytes"), strict=True):
            ratios = [r[field] / rows[-1][field] for r in rows[:-1]]
            axis.plot([100 * r["density"] for r in rows[:-1]], ratios, "o-", color=COLOURS[i], label=f"{hidden} wide")
    for axis, title in zip(axes, ("CPU time of a step", "peak bytes without the weights"), strict=True):
        axis.set_xscale("log")
        axis.set_ylim(bottom=0)
        axis.axhline(1, color="#c8ccd2", linewidth=1)
        axis.set_xlabel("density, %")
        axis.set_title(f"{title}, full = 1", fontsize=9)
    axes[0].legend(frameon=False, fontsize=8)
    _save(figure, path)


def accuracy_against_seconds(panels: Mapping[str, Mapping[str, Sequence[tuple[float, float]]]], path: Path) -> None:
    """One dot a run, a panel a set of images, a colour a method."""
    figure, axes = _axes(len(panels), (4.0 * len(panels), 3.4))
    for axis, (title, methods) in zip(axes, panels.items(), strict=True):
        for colour, (method, points) in zip(COLOURS, methods.items(), strict=False):
            axis.plot(*zip(*points, strict=True), "o", color=colour, label=method, markersize=6)
        axis.set_xlim(left=0)
        axis.set_xlabel("CPU seconds")
        axis.set_title(title, fontsize=9)
    axes[0].set_ylabel("test accuracy, %")
    axes[0].legend(frameon=False, fontsize=8)
    _save(figure, path)


def accuracy_against_rate(curves: Mapping[str, Sequence[tuple[float, float]]], path: Path) -> None:
    """One line a method: validation accuracy over the learning rate."""
    figure, axes = _axes(1, (7.0, 3.8))
    for colour, (method, points) in zip(MORE_COLOURS, curves.items(), strict=False):
        axes[0].plot(*zip(*points, strict=True), "o-", color=colour, label=method, markersize=5)
    axes[0].set_xscale("log")
    axes[0].set_xlabel("learning rate")
    axes[0].set_ylabel("validation accuracy, %")
    axes[0].legend(frameon=False, fontsize=8)
    _save(figure, path)


def _axes(count: int, size: tuple[float, float]) -> tuple[Any, list[Any]]:
    figure, grid = plt.subplots(1, count, figsize=size, squeeze=False)
    axes = list(grid[0])
    for axis in axes:
        axis.spines[["top", "right"]].set_visible(False)
    return figure, axes


def _save(figure: Any, path: Path) -> None:
    figure.tight_layout()
    figure.savefig(path, dpi=150, metadata={"Software": None})
    plt.close(figure)
