"""The page on the estimator of the structure step."""

from __future__ import annotations

from pathlib import Path

from benchmarks.markdown import origin, table
from benchmarks.records import Record, lines


def estimator(results: Path, docs: Path) -> str:
    """Its mean, its variance as a probability goes to 0 or 1, and its variance while a network trains."""
    records = list(lines(results / "estimator.jsonl"))
    if not records:
        return ""
    kinds = ("mean", "limit", "trained", "control")
    means, limits, trained, control = ([r for r in records if r["table"] == name] for name in kinds)
    parts = [
        "## The mean",
        _means(means),
        "## The variance of one unit as s goes to 0 and 1",
        _limits(limits),
        "## The variance while the network trains",
        _trained(trained),
        "## With the control variate",
        _controlled(control),
        origin(records),
    ]
    return "\n\n".join(parts)


def _means(records: list[Record]) -> str:
    header = ["α", "pairs", "largest error, standard errors", "error of the vector", "its standard error"]
    rows = [
        [
            f"{r['alpha']:g}, floor" if r["floor"] else f"{r['alpha']:g}",
            f"{r['pairs']:,}",
            f"{r['standard_errors']:.1f}",
            f"{100 * r['relative_error']:.1f} %",
            f"{100 * r['relative_standard_error']:.1f} %",
        ]
        for r in records
    ]
    return table(header, rows)


def _limits(records: list[Record]) -> str:
    header = ["s of the unit", "ours", "its bound", "REINFORCE, preconditioned", "REINFORCE", "of ours"]
    rows = [
        [
            f"{r['s']:g}",
            f"{r['ours']:.3g}",
            f"{r['bound']:.3g}",
            f"{r['preconditioned']:.3g}",
            f"{r['plain']:.3g}",
            _times(r["plain"] / r["ours"]),
        ]
        for r in sorted(records, key=lambda r: r["s"])
    ]
    return table(header, rows)


def _trained(records: list[Record]) -> str:
    header = ["steps, seed", "E L", "σ of L", "uncertain", "ours", "REINFORCE, preconditioned", "of ours", "REINFORCE"]
    rows = [
        [
            f"{r['steps']}, {r['seed']}",
            f"{r['mean_loss']:.3g}",
            f"{r['deviation_of_loss']:.3g}",
            r["uncertain"],
            f"{r['ours']:.3g}",
            f"{r['preconditioned']:.3g}",
            _times(r["preconditioned"] / r["ours"]),
            f"{r['plain']:.3g}",
            _times(r["plain"] / r["ours"]),
            _times(r["plain"] / r["squared_mean_plain"] / (r["ours"] / r["squared_mean"])),
        ]
        for r in sorted(records, key=lambda r: (r["steps"], r["seed"]))
    ]
    return table([*header, "of ours", "of ours, mean² = 1"], rows)


def _controlled(records: list[Record]) -> str:
    header = [
        "steps",
        "variance of ours, by seed",
        "controlled, of ours",
        "mean",
        "β",
        "largest error of the mean (without)",
    ]
    rows: list[list[str]] = []
    for steps in sorted({r["steps"] for r in records}):
        here = sorted((r for r in records if r["steps"] == steps), key=lambda r: r["seed"])
        ratios = [r["controlled"] / r["ours"] for r in here]
        rows.append(
            [
                f"{steps}",
                ", ".join(f"{r['ours']:.2g}" for r in here),
                ", ".join(f"{ratio:.2f}" for ratio in ratios),
                f"{sum(ratios) / len(ratios):.2f}",
                ", ".join(f"{r['scale']:.1f}" for r in here),
                ", ".join(
                    f"{r['standard_errors']:.1f} ({r['standard_errors_without']:.1f})"
                    for r in here
                    if "standard_errors" in r
                ),
            ]
        )
    return table(header, rows)


def _times(ratio: float) -> str:
    return f"{ratio:.1f}×" if ratio < 10 else f"{float(f'{ratio:.2g}'):,.0f}×"
