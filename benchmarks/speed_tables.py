"""The page on narrow steps: their seconds, their bytes, and how both fall."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path

from benchmarks import narrow_plots
from benchmarks.markdown import megabytes, origin, table
from benchmarks.records import Record, lines
from benchmarks.speed import CASES, PLOTTED, SUBJECTS, Case

OVERHEAD = 0.1  # of the step, at most
PEAK = 0.35  # of the dense step's, at most


def speed(results: Path, docs: Path) -> str:
    """Everything that is there."""
    rows = {(r["network"], r["cost"], r["keep"]): r for r in lines(results / "speed.jsonl")}
    if not rows:
        return ""
    found = [(case, rows[key]) for case in CASES if (key := (case.network, case.cost, case.keep)) in rows]
    parts = ["## A step", step_table(found), "### To reach", reach_table(found)]
    plotted = {n: [r for case, r in found if case.network == n and case.cost == "flops"] for n in PLOTTED}
    narrow_plots.speed(plotted, docs / "speed.png")
    parts += ["## Speed-up against FLOPs", "![Measured speed-up and the ideal](speed.png)"]
    bytes_of = list(lines(results / "narrow_memory.jsonl"))
    if bytes_of:
        parts += ["## Bytes of a step", memory_table(bytes_of)]
    shrinking = list(lines(results / "shrinking.jsonl"))
    if shrinking:
        narrow_plots.shrinking(shrinking, docs / "shrinking.png")
        parts += ["## Bytes as channels die", "![Bytes over a run](shrinking.png)", shrinking_table(shrinking)]
    return "\n\n".join([*parts, origin([*rows.values(), *bytes_of, *shrinking])])


def speed_up(row: Record) -> float:
    """Stock dense over narrow, wall-clock."""
    return row["stock ms"] / row["tithe ms"]


def overhead(row: Record) -> float:
    """Part of the step that the same narrow network, trained with two forward passes, does not take."""
    return 1 - row["alone twice ms"] / row["tithe ms"]


def kept(row: Record) -> float:
    """FLOPs of a forward pass of the network that is exported, as a part of the dense one's."""
    return row["keep"] if row["cost"] == "flops" else row["alone flops"] / row["dense flops"]


def run(row: Record) -> float:
    """Mean FLOPs of the forward passes that were run, whatever was added to suit the kernels included."""
    return row["tithe flops"] / row["dense flops"]


def _subject(case: Case) -> str:
    return f"{case.network}, batch {SUBJECTS[case.network].batch}, {100 * case.keep:g} % of {_counted(case)}"


def _counted(case: Case) -> str:
    return "FLOPs" if case.cost == "flops" else case.cost


def step_table(found: Sequence[tuple[Case, Record]]) -> str:
    """Milliseconds and speed-ups of each case."""
    cells = [
        [
            _subject(case),
            *(f"{r[f'{name} ms']:.1f}" for name in ("stock", "dense", "tithe", "alone twice", "alone")),
            f"{100 * kept(r):.1f}",
            f"{100 * run(r):.1f}",
            f"{speed_up(r):.2f}×",
            f"{r['dense ms'] / r['tithe ms']:.2f}×",
            f"{r['stock ms'] / r['alone twice ms']:.2f}×",
            f"{0.75 / kept(r):.2f}×",
            f"{100 * overhead(r):.1f}",
        ]
        for case, r in found
    ]
    times = ["stock ms", "dense ms", "Tithe ms", "alone, two forwards", "alone, one"]
    ratios = ["FLOPs kept, %", "run, %", "speed-up", "against dense", "alone", "ideal", "overhead, %"]
    return table(["", *times, *ratios], cells)


def reach_table(found: Sequence[tuple[Case, Record]]) -> str:
    """The figures to reach."""
    rows = [
        [f"{_subject(case)}: speed-up", f"{speed_up(r):.2f}×", f"≥ {case.reach:g}×", _yes(speed_up(r) >= case.reach)]
        for case, r in found
        if case.reach is not None
    ]
    rows += [
        [
            f"{_subject(case)}: overhead",
            f"{100 * overhead(r):.1f} %",
            f"≤ {100 * OVERHEAD:g} %",
            _yes(overhead(r) <= OVERHEAD),
        ]
        for case, r in found
        if case.reach is not None
    ]
    return table(["", "measured", "to reach", "reached"], rows)


def _yes(reached: bool) -> str:
    return "yes" if reached else "no"


def memory_table(records: Sequence[Record]) -> str:
    """Peak and standing bytes compared with the dense step's."""
    dense = {r["network"]: r for r in records if r["keep"] == 1}
    cells: list[list[str]] = []
    for r in records:
        full = dense[r["network"]]
        share = _total(r) / _total(full)
        cells.append(
            [
                f"{r['network']}, batch {r['batch']}, "
                + ("dense" if r is full else f"{100 * r['keep']:g} % of channels"),
                megabytes(r["standing_bytes"]),
                megabytes(r["peak_bytes"]),
                f"{r['peak_bytes'] / full['peak_bytes']:.2f}",
                megabytes(_total(r)),
                f"{share:.2f}",
                "" if r is full else _yes(share <= PEAK),
            ]
        )
    header = ["", "standing MB", "peak of the step MB", "of dense", "both MB", "of dense", f"≤ {PEAK}"]
    return table(header, cells)


def _total(row: Mapping[str, int]) -> int:
    return row["standing_bytes"] + row["peak_bytes"]


def shrinking_table(records: Sequence[Record]) -> str:
    """Channels and bytes, epoch by epoch."""
    cells = [
        [
            r["when"],
            f"{r['alive']} of {r['units']}",
            megabytes(r["weight_bytes"]),
            megabytes(r["optimizer_bytes"]),
            megabytes(r["peak_bytes"]),
        ]
        for r in records
    ]
    return table(["", "channels alive", "weights MB", "optimizer MB", "peak of a step MB"], cells)
