"""What people see of a race: the table, what it does and does not show, the figure, and the numbers as JSON."""

from __future__ import annotations

import platform
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, final

import torch
from rich.table import Table
from rich.text import Text

from tithe.app import terminal
from tithe.app.demo.averaged import AVERAGE_RATE, BITS, num_checkpoints
from tithe.app.demo.contestants import BUDGET, DENSITY, KEEP
from tithe.app.demo.race import Length, Result
from tithe.app.demo.trainee import BATCH_SIZE
from tithe.app.methods import METHODS
from tithe.app.terminal import human


def table(results: Sequence[Result]) -> Table:
    """The one table, under 80 columns: a row for each contestant, and one for the second part of a run of two."""
    heads = ("held-out\naccuracy", "trainable\nweights", "peak of\na step", "optimizer\nstate", "seconds\na step")
    shown = terminal.table(["", *heads, "file"])
    shown.show_edge = False
    for row, run in zip(results, whole_runs(results), strict=True):
        cells = f"{run.trained:,}", human(run.peak), human(run.optimizer), f"{run.seconds:.4f}"
        shown.add_row(row.contestant.name, f"{row.accuracy:.1%}", *cells, human(row.size))
        if row.opening:
            cells = f"{row.trained:,}", human(row.peak), human(row.optimizer), f"{row.seconds:.4f}"
            shown.add_row("  its TWA steps", "", *cells, "")
    return shown


@final
@dataclass(frozen=True)
class Run:
    """A row as a whole: of one that begins as the first row does, the first row's steps too.

    Args:
        trained: weights that the optimizer moves at most.
        peak: bytes, highest sum of everything alive beyond the weights during a training step.
        optimizer: bytes of the optimizer's state at most.
        seconds: of a training step, the mean over all.
        steps: how many.
    """

    trained: int
    peak: int
    optimizer: int
    seconds: float
    steps: int


def whole_runs(results: Sequence[Result]) -> list[Run]:
    """Each row as a whole, in order."""
    runs: list[Run] = []
    for row in results:
        parts = [(results[0], row.opening), (row, row.steps)] if row.opening else [(row, row.steps)]
        steps = sum(count for _, count in parts)
        runs.append(
            Run(
                trained=max(part.trained for part, _ in parts),
                peak=max(part.peak for part, _ in parts),
                optimizer=max(part.optimizer for part, _ in parts),
                seconds=sum(count * part.seconds for part, count in parts) / steps,
                steps=steps,
            )
        )
    return runs


def remarks(results: Sequence[Result], length: Length) -> Table:
    """Sentences that say how the numbers came about and how far they carry, computed from the results."""
    shown = Table.grid(padding=(0, 1, 0, 0))
    for sentence in _sentences(results, length):
        shown.add_row("·", Text(sentence))
    return shown


def figure(results: Sequence[Result], path: Path) -> None:
    """Write a PNG of two panels: bars of accuracy, and bars of bytes on a logarithmic axis."""
    names, runs = [row.contestant.name for row in results], whole_runs(results)
    drawn = terminal.figure(9.0, 1.4 + 0.6 * len(results))
    left, right = drawn.subplots(1, 2, sharey=True)
    places = list(range(len(results)))
    bars = left.barh(places, [100 * row.accuracy for row in results], color=terminal.COLOURS[0])
    left.bar_label(bars, fmt="%.1f", padding=3)
    left.set(title="held-out accuracy, %", xlim=(0, 112), yticks=places, yticklabels=names)
    left.invert_yaxis()
    kinds = (
        ("peak, without weights", [run.peak for run in runs]),
        ("optimizer state", [run.optimizer for run in runs]),
        ("file", [row.size for row in results]),
    )
    for place, (kind, sizes) in enumerate(kinds):
        heights = [at + 0.27 * (place - 1) for at in places]
        bars = right.barh(heights, sizes, height=0.25, color=terminal.COLOURS[place], label=kind)
        right.bar_label(bars, labels=[human(size) for size in sizes], padding=3, fontsize=8)
    largest = max(size for _, sizes in kinds for size in sizes)
    right.set(title="bytes (logarithmic)", xscale="log", xlim=(1e3, largest * 8), xticks=[1e3, 1e4, 1e5, 1e6, 1e7])
    drawn.legend(loc="outside lower center", ncols=3, frameon=False, fontsize=8)
    terminal.save_figure(drawn, path)


def as_json(results: Sequence[Result], *, length: Length, seed: int, seconds: float) -> dict[str, Any]:
    """The results and where they were measured, of plain types."""
    return {
        "format": 1,
        "seed": seed,
        "batch_size": BATCH_SIZE,
        "density": DENSITY,
        "budget": BUDGET,
        "keep": KEEP,
        "checkpoints": num_checkpoints(length.tuning),
        "pretraining_steps": length.pretraining,
        "tuning_steps": length.tuning,
        "rates": list(length.rates),
        "timed_steps": length.rounds,
        "test_images": results[0].correct.numel(),
        "machine": {
            "platform": platform.platform(),
            "python": platform.python_version(),
            "torch": torch.__version__,
            "threads": torch.get_num_threads(),
        },
        "seconds": seconds,
        "rows": [
            {
                "name": row.contestant.name,
                "file": f"{row.contestant.slug}.safetensors",
                "accuracy": row.accuracy,
                "trainable_weights": row.trained,
                "choosing_peak_bytes": row.choosing,
                "peak_bytes": row.peak,
                "kept_bytes_at_peak": row.kept,
                "gradient_bytes_at_peak": row.gradients,
                "optimizer_bytes": row.optimizer,
                "seconds_per_step": row.seconds,
                "opening_steps": row.opening,
                "steps": row.steps,
                "seconds_besides": row.besides,
                "mapped_bytes": row.mapped,
                "file_bytes": row.size,
                "rate": row.rate,
                "validation_accuracy": dict(zip(map(str, length.rates), row.validation, strict=True)),
            }
            for row in results
        ],
    }


def _sentences(results: Sequence[Result], length: Length) -> list[str]:
    num_tests = results[0].correct.numel()
    return [
        f"Peak and optimizer state: measured bytes of a step of {BATCH_SIZE} images. Seconds: median of "
        f"{length.rounds} steps, the rows taking turns, on one thread.",
        *(row.contestant.note for row in results if row.contestant.note),
        *(_opened(results, row, length) for row in results if row.opening),
        _rates(results, length),
        f"One of the {num_tests} test images is {1 / num_tests:.2%}, and this is one seed. {_duels(results)}",
        _peaks(results),
        _seconds(results),
        f"Each file was applied to a fresh copy of the base and gave the tuned network's outputs on all {num_tests} "
        "test images, bit for bit.",
    ]


def _opened(results: Sequence[Result], row: Result, length: Length) -> str:
    """A row that begins as the first does: what it does when, and what that takes beside the whole run."""
    full, run = results[0], whole_runs(results)[results.index(row)]
    training = run.steps * run.seconds, length.tuning * full.seconds
    return (
        f"{row.contestant.name} trains as the first row does for {row.opening} of {length.tuning} steps and records "
        f"{_many(num_checkpoints(length.tuning), 'checkpoint')}; {_many(row.steps, 'more step')} then train how much "
        f"of each there is, from their mean, by SGD of rate {AVERAGE_RATE:g}. Its row says what the run takes at most, "
        f"the line below what these steps take; they read {human(row.mapped)} of a mapped file, {BITS} bits a "
        f"weight. Steps times seconds are {training[0] / training[1]:.2f} of the first row's, {training[0]:.2f} s for "
        f"{training[1]:.2f} s; "
        f"recording and preparing took another {row.besides:.2f} s. Accuracy: {_duel(row, full)}. Lengths "
        "and rate were chosen on images that are not tested on."
    )


def _many(count: int, noun: str) -> str:
    return f"{count} {noun}{'' if count == 1 else 's'}"


def _rates(results: Sequence[Result], length: Length) -> str:
    """Which learning rate each row took, and whether the grid may have been too short for it."""
    chosen = ", ".join(f"{row.contestant.name} {row.rate:g}" for row in results)
    if len(length.rates) == 1:
        return f"Learning rate of every row: {length.rates[0]:g}, not chosen in a quick run."
    grid = ", ".join(f"{rate:g}" for rate in length.rates)
    edge = [row.contestant.name for row in results if row.rate in (min(length.rates), max(length.rates))]
    beyond = f" At an end of the grid, so a rate beyond it may do better: {', '.join(edge)}." if edge else ""
    return f"Learning rate by validation accuracy, among {grid}: {chosen}.{beyond}"


def _duels(results: Sequence[Result]) -> str:
    """The first sparse row against each other one, on the same images: difference and its paired standard error."""
    champion = next((row for row in results if row.contestant.slug == METHODS[0].demos[0].slug), results[0])
    verdicts: list[str] = []
    for row in results:
        if row is champion:
            continue
        verdicts.append(_duel(champion, row))
    return f"{champion.contestant.name}, difference ± its standard error: {'; '.join(verdicts)}."


def _duel(champion: Result, row: Result) -> str:
    """One row against another, on the same images."""
    gain = champion.correct.double() - row.correct.double()
    error = gain.std().item() / gain.numel() ** 0.5
    difference = gain.mean().item()
    told = "" if abs(difference) > 2 * error else " (not told apart)"
    return f"{100 * difference:+.1f} ± {100 * error:.1f} points against {row.contestant.name}{told}"


def _peaks(results: Sequence[Result]) -> str:
    """What fills the first row's peak, and what becomes of it in the other rows."""
    full, others = results[0], [row for row in results[1:] if not row.opening]  # whose peak is the first row's
    kept, moved = full.kept / full.peak, (full.gradients + full.optimizer) / full.peak
    rows = "; ".join(
        f"{row.contestant.name} {row.optimizer / full.optimizer:.1%} and {row.peak / full.peak:.0%}" for row in others
    )
    chosen = max(others, key=lambda row: row.choosing)
    said = (
        f"What {full.contestant.name} holds at its peak: {kept:.0%} is kept for backward by the layers, {moved:.0%} is "
        f"gradients and optimizer state. Against it, optimizer state and peak: {rows}."
    )
    if kept > moved:
        said += " So the peak falls far less than the number of trained weights: activations dominate it."
    if chosen.choosing > chosen.peak:
        said += f" Choosing, once before training, had {human(chosen.choosing)} alive ({chosen.contestant.name})."
    return said


def _seconds(results: Sequence[Result]) -> str:
    """How long a step takes beside the first row's."""
    full, others = results[0], [row for row in results[1:] if not row.opening]
    rows = ", ".join(f"{row.contestant.name} {row.seconds / full.seconds:.2f}" for row in others)
    idle = [row.contestant.name for row in others if row.seconds > 0.95 * full.seconds]
    saved = f" At this size {', '.join(idle)} saved no time." if idle else ""
    return f"Time of a step against {full.contestant.name}: {rows}.{saved}"
