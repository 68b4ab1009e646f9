"""The page on pruning an encoder while it is fine-tuned: accuracy and seconds, what was kept, the rates tried."""

from __future__ import annotations

import statistics
from collections.abc import Mapping, Sequence
from pathlib import Path

from benchmarks.markdown import origin, table, with_spread
from benchmarks.prune_text import RATES, SEEDS, WAYS, quality
from benchmarks.records import Record, lines, mean_and_spread

Row = tuple[str, float]  # method, share of the operations that is kept
FULL: Row = (WAYS[0].name, WAYS[0].keeps[0])
HEAD_SIZE = 32  # of the encoder


def prune_text(results: Path, docs: Path) -> str:
    """Everything that is there."""
    records = list(lines(results / "prune_text.jsonl"))
    chosen = {row: found for way in WAYS for row in ((way.name, k) for k in way.keeps) if (found := of(records, *row))}
    if not chosen:
        return ""
    parts = ["## Accuracy", accuracy_table(chosen), f"Mean ± standard deviation over seeds {SEEDS}."]
    parts += ["## Seconds", seconds_table(chosen)]
    parts += [f"## Heads · FFN units of each layer, seed {SEEDS[0]}", structure_table(chosen)]
    parts += [f"## Rates tried: validation accuracy, seed {SEEDS[0]}", rates_table(records, list(chosen))]
    return "\n\n".join([*parts, origin(records)])


def of(records: Sequence[Record], method: str, keep: float) -> list[Record]:
    """A row's runs, one a seed, at the rate that won on the validation examples."""
    found = [r for r in records if (r["method"], r["keep"]) == (method, keep)]
    first = [r for r in found if r["seed"] == SEEDS[0]]
    if not first:
        return []
    rate = max(first, key=quality)["rate"]
    return sorted((r for r in found if r["rate"] == rate), key=lambda r: r["seed"])


def accuracy_table(chosen: Mapping[Row, Sequence[Record]]) -> str:
    """One row a method and share."""
    full = {r["seed"]: r["test"] for r in chosen.get(FULL, ())}
    rows = [
        [
            method,
            f"{100 * keep:g}",
            f"{found[0]['rate']:g}",
            f"{100 * statistics.fmean(r['operations'] for r in found):.1f}",
            f"{statistics.fmean(r['parameters'] for r in found) / 1e6:.2f}",
            len(found),
            with_spread([r["validation"] for r in found]),
            with_spread([r["test"] for r in found]),
            _difference([r["test"] - full[r["seed"]] for r in found if r["seed"] in full]),
        ]
        for (method, keep), found in chosen.items()
    ]
    sizes = ["share, %", "rate", "operations, %", "parameters, M"]
    return table(["", *sizes, "seeds", "validation", "test", "test against full"], rows)


def _difference(gaps: Sequence[float]) -> str:
    """Points more than full fine-tuning with the same seed."""
    if not gaps:
        return "—"
    mean, spread = mean_and_spread(gaps)
    return f"{mean:+.1f}" + (f" ± {spread:.1f}" if len(gaps) > 1 else "")


def seconds_table(chosen: Mapping[Row, Sequence[Record]]) -> str:
    """CPU seconds of the whole training and of the steps of its last epoch."""
    means = {
        row: [statistics.fmean(r[name] for r in found) for name in ("train_seconds", "last_epoch_seconds")]
        for row, found in chosen.items()
    }
    full = means.get(FULL)
    rows = [
        [
            method,
            f"{100 * keep:g}",
            *(cell for i in range(2) for cell in (f"{mean[i]:.1f}", f"{mean[i] / full[i]:.2f}" if full else "—")),
        ]
        for (method, keep), mean in means.items()
    ]
    return table(["", "share, %", "training, CPU s", "of full", "last epoch, CPU s", "of full"], rows)


def structure_table(chosen: Mapping[Row, Sequence[Record]]) -> str:
    """Widths of the network that came out, layer by layer, first layer first."""
    layers = max(len(found[0]["units"]) for found in chosen.values())
    rows: list[list[str]] = []
    for (method, keep), found in chosen.items():
        heads, units = found[0]["heads"], found[0]["units"]
        pairs = [f"{width // HEAD_SIZE} · {unit}" for width, unit in zip(heads, units, strict=True)]
        rows.append([method, f"{100 * keep:g}", *pairs])
    return table(["", "share, %", *map(str, range(1, layers + 1))], rows)


def rates_table(records: Sequence[Record], rows: Sequence[Row]) -> str:
    """Validation accuracy of each rate, first seed."""
    tried = {(r["method"], r["keep"], r["rate"]): r["validation"] for r in records if r["seed"] == SEEDS[0]}
    cells = [
        [m, f"{100 * k:g}", *(f"{tried[m, k, q]:.1f}" if (m, k, q) in tried else "—" for q in RATES)] for m, k in rows
    ]
    return table(["", "share, %", *(f"{rate:g}" for rate in RATES)], cells)
