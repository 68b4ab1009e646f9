"""The page on a training step of a causal language model, and on its loss alone."""

from __future__ import annotations

import statistics
from pathlib import Path

from benchmarks.markdown import megabytes, origin, table
from benchmarks.records import Record, lines

PEER, CHECKPOINTED, STOCK = "LoRA", "LoRA, checkpointing", "stock"
REACH = {  # of LoRA's peak, bytes kept and CPU time; of the peak and CPU time of LoRA with checkpointing
    "FISH, lean, causal_loss": (0.35, 0.30, 1.0, 1.0, 0.75),
    "FISH, lean 8 bits, causal_loss": (0.35, 0.30, 1.0, 1.0, 0.75),
}
ALONE = 0.1


def causal(results: Path, docs: Path) -> str:
    """A step of every method, what was to be reached, and the loss alone."""
    records = list(lines(results / "causal.jsonl"))
    runs: dict[str, list[Record]] = {}
    for record in records:
        if record["what"] == "step":
            runs.setdefault(record["method"], []).append(record)
    parts: list[str] = []
    if PEER in runs and CHECKPOINTED in runs:
        rows = {name: _row(found) for name, found in runs.items()}
        parts += ["## One step", _steps(rows), _reached(rows), _note(runs)]
    for head in ("frozen", "trained"):
        alone = {r["method"]: r for r in records if r["what"] == f"loss, head {head}"}
        if STOCK in alone:
            parts += [f"## The loss alone, head {head}", _alone(alone)]
    return "\n\n".join([*parts, origin(records)]) if parts else ""


def _row(found: list[Record]) -> Record:
    """A method's bytes, from its last step, and its median seconds."""
    return {**found[-1], "cpu_s": statistics.median(record["cpu_s"] for record in found)}


def _steps(rows: dict[str, Record]) -> str:
    peer, other = rows[PEER], rows[CHECKPOINTED]
    header = ["", "trained", "peak MB", "of LoRA", "of checkpointing", "kept MB", "of LoRA"]
    header += ["CPU s", "of LoRA", "of checkpointing"]
    return table(
        header,
        [
            [
                name,
                f"{r['trained']:,}",
                megabytes(r["peak_bytes"]),
                f"{r['peak_bytes'] / peer['peak_bytes']:.3f}",
                f"{r['peak_bytes'] / other['peak_bytes']:.3f}",
                megabytes(r["saved_bytes"]),
                f"{r['saved_bytes'] / peer['saved_bytes']:.3f}",
                f"{r['cpu_s']:.1f}",
                f"{r['cpu_s'] / peer['cpu_s']:.2f}",
                f"{r['cpu_s'] / other['cpu_s']:.2f}",
            ]
            for name, r in rows.items()
        ],
    )


def _reached(rows: dict[str, Record]) -> str:
    peer, other = rows[PEER], rows[CHECKPOINTED]
    cells: list[list[str]] = []
    for name, reach in REACH.items():
        if name not in rows:
            continue
        r = rows[name]
        found = {
            "peak against LoRA": r["peak_bytes"] / peer["peak_bytes"],
            "bytes kept against LoRA": r["saved_bytes"] / peer["saved_bytes"],
            "CPU time against LoRA": r["cpu_s"] / peer["cpu_s"],
            "peak against LoRA with checkpointing": r["peak_bytes"] / other["peak_bytes"],
            "CPU time against LoRA with checkpointing": r["cpu_s"] / other["cpu_s"],
        }
        cells += [
            [f"{name}: {what}", f"{value:.3f}", f"≤ {aim:g}", "yes" if value <= aim else "no"]
            for (what, value), aim in zip(found.items(), reach, strict=True)
        ]
    return table(["", "measured", "to reach", "reached"], cells)


def _note(runs: dict[str, list[Record]]) -> str:
    counts = sorted({len(found) for found in runs.values()})
    steps = str(counts[0]) if len(counts) == 1 else f"{counts[0]} to {counts[-1]}"
    return f"Medians of {steps} step{'s' * (counts[-1] > 1)} of each method."


def _alone(rows: dict[str, Record]) -> str:
    stock = rows[STOCK]
    return table(
        ["", "peak MB", "of stock", "to reach", "kept MB", "of stock", "CPU s", "of stock"],
        [
            [
                name,
                megabytes(r["peak_bytes"]),
                f"{r['peak_bytes'] / stock['peak_bytes']:.3f}",
                f"≤ {ALONE:g}" if name != STOCK and r["what"].endswith("frozen") else "",
                megabytes(r["saved_bytes"]),
                f"{r['saved_bytes'] / stock['saved_bytes']:.3f}",
                f"{r['cpu_s']:.2f}",
                f"{r['cpu_s'] / stock['cpu_s']:.2f}",
            ]
            for name, r in rows.items()
        ],
    )
