"""Markdown tables, and the line under a table that says where its numbers come from."""

from __future__ import annotations

from collections.abc import Iterable, Sequence

from benchmarks.records import Record, mean_and_spread


def table(header: Sequence[str], rows: Iterable[Sequence[object]]) -> str:
    """A Markdown table; all columns but the first are numbers and lean right."""
    lines = ["| " + " | ".join(header) + " |", "|---|" + "---:|" * (len(header) - 1)]
    return "\n".join([*lines, *("| " + " | ".join(map(str, row)) + " |" for row in rows)])


def with_spread(values: Sequence[float]) -> str:
    """Mean ± sample standard deviation; one value stands alone."""
    if not values:
        return "—"
    mean, spread = mean_and_spread(values)
    return f"{mean:.1f} ± {spread:.1f}" if len(values) > 1 else f"{mean:.1f}"


def origin(records: Sequence[Record]) -> str:
    """Dates, machines and versions of these records."""
    dates = sorted({record["date"][:10] for record in records})
    machines = dict.fromkeys(f"{r['machine']['processor']}, {r['machine']['cores']} cores" for r in records)
    versions = " · ".join(f"{name} {version}" for name, version in records[-1]["versions"].items())
    threads = sorted({record["machine"]["threads"] for record in records})
    span = dates[0] if len(dates) == 1 else f"{dates[0]} to {dates[-1]}"
    thread = "/".join(map(str, threads)) + (" thread" if threads == [1] else " threads")
    return f"*{span} · {' and '.join(machines)}, {thread} · {versions}*"


def megabytes(num_bytes: float) -> str:
    """Bytes as MB with one decimal."""
    return f"{num_bytes / 1e6:.1f}"
