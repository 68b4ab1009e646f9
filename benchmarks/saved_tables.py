"""The page on what lean layers save, and what they cost in accuracy."""

from __future__ import annotations

import statistics
from pathlib import Path

from benchmarks.lean_accuracy import METHODS, WITHOUT
from benchmarks.markdown import megabytes, origin, table, with_spread
from benchmarks.records import Record, lines

PEER = "LoRA"
REACH = {
    "LoRA, lean": 0.75,
    "FISH, lean": 0.45,
    "TraDy, lean": 0.45,
    "FISH, lean, 8 bits": 0.25,
    "TraDy, lean, 8 bits": 0.25,
}


def saved(results: Path, docs: Path) -> str:
    """Bytes kept, peak and CPU time of a step of each network by method; then lean layers alone."""
    records = list(lines(results / "saved.jsonl"))
    parts: list[str] = []
    for network in dict.fromkeys(r["network"] for r in records):
        for dropout in (0.0, 0.1):
            rows = {r["method"]: r for r in reversed(records) if r["network"] == network and r["dropout"] == dropout}
            if "full" in rows:
                parts += [f"## {network}, dropout {dropout:g}", _table(rows, rows[PEER])]
    if parts:
        parts.append(origin(records))
    alone = list(lines(results / "lean_alone.jsonl"))
    if alone:
        parts += ["## Lean layers alone, everything trained: BERT of 4 layers", _alone(alone), origin(alone)]
    trained = list(lines(results / "lean_accuracy.jsonl"))
    if trained:
        parts += ["## Accuracy of FISH with and without lean layers, SST-2", _accuracy(trained), origin(trained)]
    return "\n\n".join(parts)


def _table(rows: dict[str, Record], peer: Record) -> str:
    timed = len(peer["cpu_ms_all"]) > 1
    header = ["", "trained", "kept MB", "of LoRA", "to reach", "peak MB", "of LoRA"]
    header += ["CPU ms", "of LoRA"] if timed else []
    cells = [
        [
            name,
            f"{r['trained']:,}",
            megabytes(r["saved_bytes"]),
            f"{r['saved_bytes'] / peer['saved_bytes']:.3f}",
            f"≤ {REACH[name]:g}" if name in REACH else "",
            megabytes(r["peak_bytes"]),
            f"{r['peak_bytes'] / peer['peak_bytes']:.3f}",
            *([f"{r['cpu_ms']:.0f}", f"{r['cpu_ms'] / peer['cpu_ms']:.2f}"] if timed else []),
        ]
        for name, r in rows.items()
    ]
    return table(header, cells)


def _alone(records: list[Record]) -> str:
    """The stock model and the lean ones, by dropout; the gap is the largest difference to the stock loss in a run."""
    cells = [
        [
            f"dropout {r['dropout']:g}, {r['way']}",
            megabytes(r["saved_bytes"]),
            megabytes(r["peak_bytes"]),
            f"{r['cpu_ms']:.0f}",
            f"{r['time_of_stock']:.2f}",
            f"{r['first_loss_gap']:.0e}" if r["first_loss_gap"] else "0",
            f"{r['largest_loss_gap']:.0e}" if r["largest_loss_gap"] else "0",
        ]
        for r in reversed(records)
    ]
    header = ["", "kept MB", "peak MB", "CPU ms", "of stock", "gap of the first loss", "largest gap of a loss"]
    return table(header, cells)


def _accuracy(records: list[Record]) -> str:
    """Test accuracy seed by seed, and the mean difference to the same seed without lean layers."""
    runs = {(r["method"], r["seed"]): r for r in records}
    seeds = sorted({seed for _, seed in runs})
    rows = []
    for method in METHODS:
        own = {seed: runs[method.name, seed] for seed in seeds if (method.name, seed) in runs}
        if not own:
            continue
        gaps = [r["test"] - runs[WITHOUT.name, seed]["test"] for seed, r in own.items()]
        rows.append(
            [
                method.name.replace(WITHOUT.name, "FISH"),
                *(f"{own[seed]['test']:.1f}" if seed in own else "—" for seed in seeds),
                with_spread([r["test"] for r in own.values()]),
                with_spread(gaps),
                with_spread([r["validation"] for r in own.values()]),
                f"{statistics.fmean(r['validation_loss'] for r in own.values()):.4f}",
            ]
        )
    seed_names = [f"test, seed {seed}" for seed in seeds]
    return table(["", *seed_names, "mean", "against FISH", "validation", "validation loss"], rows)
