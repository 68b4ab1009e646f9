"""The pages on cost: a training step, scoring, deltas, growth."""

from __future__ import annotations

from pathlib import Path

from benchmarks.markdown import megabytes, origin, table
from benchmarks.methods import DENSITY
from benchmarks.plots import growth_of_cost
from benchmarks.records import Record, lines


def step(results: Path, docs: Path) -> str:
    """Time and bytes of one step for every method, with ratios, one table a dropout."""
    records = list(lines(results / "step.jsonl"))
    parts: list[str] = []
    for dropout in (0.0, 0.1):
        rows = {r["method"]: r for r in reversed(records) if r["dropout"] == dropout}
        if "full" not in rows:
            continue
        full, lora = rows["full"], rows["lora r4"]
        parts += [f"## Dropout {dropout:g}", _step_table(rows, full, lora), _reach(rows, full, lora)]
    return "\n\n".join([*parts, origin(records)]) if parts else ""


def _step_table(rows: dict[str, Record], full: Record, lora: Record) -> str:
    header = ["", "trained", "CPU ms", "of full", "of LoRA", "peak MB", "of full", "of LoRA", "kept MB", "gradient MB"]
    cells = [
        [
            name,
            f"{r['trained']:,}",
            f"{r['cpu_ms']:.0f}",
            f"{r['cpu_ms'] / full['cpu_ms']:.2f}",
            f"{r['cpu_ms'] / lora['cpu_ms']:.2f}",
            megabytes(r["peak_bytes"]),
            f"{r['peak_bytes'] / full['peak_bytes']:.2f}",
            f"{r['peak_bytes'] / lora['peak_bytes']:.2f}",
            megabytes(r["saved_bytes"]),
            megabytes(r["gradient_bytes"]),
            megabytes(r["optimizer_bytes"]),
        ]
        for name, r in rows.items()
    ]
    return table([*header, "optimizer MB"], cells)


def _reach(rows: dict[str, Record], full: Record, lora: Record) -> str:
    mask = rows["tithe fisher global"]
    kept = mask["gradient_bytes"] + mask["optimizer_bytes"] - mask["head_bytes"]
    share = kept / (full["gradient_bytes"] + full["optimizer_bytes"] - full["head_bytes"])
    figures = (
        ("CPU time against full", mask["cpu_ms"] / full["cpu_ms"], 0.75),
        ("CPU time against LoRA r4", mask["cpu_ms"] / lora["cpu_ms"], 0.95),
        ("peak against full", mask["peak_bytes"] / full["peak_bytes"], 0.75),
        ("peak against LoRA r4", mask["peak_bytes"] / lora["peak_bytes"], 0.75),
        (f"gradients and optimizer against full, in units of the density {DENSITY:g}", share / DENSITY, 1.05),
    )
    return _against(figures)


def _against(figures: tuple[tuple[str, float, float], ...]) -> str:
    rows = [[what, f"{value:.3g}", f"≤ {reach:g}", "yes" if value <= reach else "no"] for what, value, reach in figures]
    return table(["Fisher mask, global", "measured", "to reach", "reached"], rows)


def scoring(results: Path, docs: Path) -> str:
    """Batched scores against the loop."""
    records = list(lines(results / "scoring.jsonl"))
    if not records:
        return ""
    r = records[-1]
    rows = [
        ["loop of single samples, CPU seconds", f"{r['loop_seconds']:.1f}", ""],
        ["batched, CPU seconds", f"{r['batched_seconds']:.1f}", ""],
        ["times faster", f"{r['loop_seconds'] / r['batched_seconds']:.1f}", "≥ 8"],
        ["largest relative difference of scores", f"{r['relative_difference']:.1e}", "≤ 1e-5"],
        ["peak of choosing, MB", megabytes(r["choosing_peak_bytes"]), ""],
        ["peak of a step with this mask, MB", megabytes(r["step_peak_bytes"]), ""],
        ["peak of a step of full fine-tuning, MB", megabytes(r["full_step_peak_bytes"]), ""],
    ]
    return "\n\n".join([table([f"{r['samples']} samples of SST-2", "measured", "to reach"], rows), origin(records)])


def delta(results: Path, docs: Path) -> str:
    """File sizes."""
    records = list(lines(results / "delta.jsonl"))
    rows = [
        [
            r["method"],
            f"{r['trained']:,}",
            f"{r['delta_bytes']:,}",
            f"{r['dense_bytes']:,}",
            f"{100 * r['delta_bytes'] / r['dense_bytes']:.3f} %",
            "≤ 1.05 %",
            "yes" if r["applied_is_equal"] else "no",
        ]
        for r in records
    ]
    header = ["", "trained", "delta, bytes", "dense checkpoint, bytes", "ratio", "to reach", "applied, bit-identical"]
    return "\n\n".join([table(header, rows), origin(records)]) if records else ""


def growth(results: Path, docs: Path) -> str:
    """Time and bytes by hidden size and density."""
    records = list(lines(results / "growth.jsonl"))
    if not records:
        return ""
    growth_of_cost(records, docs / "growth.png")
    rows = []
    for r in sorted(records, key=lambda r: (r["hidden"], r["density"])):
        full = next(f for f in records if f["hidden"] == r["hidden"] and f["density"] == 1.0)
        rows.append(
            [
                r["hidden"],
                "full" if r["density"] == 1.0 else f"{100 * r['density']:g} %",
                f"{r['cpu_ms']:.0f}",
                f"{r['cpu_ms'] / full['cpu_ms']:.2f}",
                megabytes(r["peak_bytes"]),
                f"{r['peak_bytes'] / full['peak_bytes']:.2f}",
                megabytes(r["gradient_bytes"] + r["optimizer_bytes"]),
            ]
        )
    header = ["hidden size", "density", "CPU ms", "of full", "peak MB", "of full", "gradient + optimizer MB"]
    return "\n\n".join([table(header, rows), "![Cost of a step by density](growth.png)", origin(records)])
