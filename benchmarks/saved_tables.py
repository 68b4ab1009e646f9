"""The page on what lean layers save."""

from __future__ import annotations

from pathlib import Path

from benchmarks.markdown import megabytes, origin, table
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
    """Bytes kept, peak and CPU time of a step of each network by method, with ratios to LoRA."""
    records = list(lines(results / "saved.jsonl"))
    parts: list[str] = []
    for network in dict.fromkeys(r["network"] for r in records):
        for dropout in (0.0, 0.1):
            rows = {r["method"]: r for r in reversed(records) if r["network"] == network and r["dropout"] == dropout}
            if "full" in rows:
                parts += [f"## {network}, dropout {dropout:g}", _table(rows, rows[PEER])]
    return "\n\n".join([*parts, origin(records)]) if parts else ""


def _table(rows: dict[str, Record], peer: Record) -> str:
    timed = len(peer["cpu_ms_all"]) > 1
    header = ["", "trained", "saved MB", "of LoRA", "to reach", "peak MB", "of LoRA"]
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
