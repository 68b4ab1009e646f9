"""The page on language models: held-out loss of every way, and of half precision against float32."""

from __future__ import annotations

from pathlib import Path

from benchmarks.language import ALL_HALF, FISH, FULL, HALF, LORA, ROWS, SEEDS
from benchmarks.markdown import origin, table
from benchmarks.records import Record, lines, mean_and_spread


def language(results: Path, docs: Path) -> str:
    """Loss on the test rows at each row's rate, what was aimed at, and the rates that were tried."""
    records = list(lines(results / "language.jsonl"))
    scored = {row.name: _scored(records, row.name, row.rate_of or row.name) for row in ROWS}
    if not any(scored.values()):
        return ""
    loaded = next(r for r in records if r["row"] == "as loaded")
    rows = [["as loaded", "—", "0", f"{loaded['test']:.3f}", f"{loaded['validation']:.3f}", "—", "—"]]
    rows += [_row(name, found) for name, found in scored.items() if found]
    header = ["", "rate", "trained", "test, nats a token", "validation", "seeds", "CPU s"]
    missing = [name for name, found in scored.items() if len(found) < len(SEEDS)]
    return "\n\n".join(
        [
            table(header, rows),
            _aims(scored),
            *([f"Not measured with all seeds yet: {', '.join(missing)}."] if missing else []),
            "Validation loss by rate, first seed:",
            _rates(records),
            origin(records),
        ]
    )


def _best(records: list[Record], name: str) -> float | None:
    """The rate of a row: the best on the validation rows with the first seed."""
    tried = {r["rate"]: r["validation"] for r in records if r["row"] == name and r["seed"] == SEEDS[0]}
    return min(tried, key=lambda rate: tried[rate]) if tried else None


def _scored(records: list[Record], name: str, rate_of: str) -> list[Record]:
    rate = _best(records, rate_of)
    return [r for r in records if r["row"] == name and r["rate"] == rate]


def _row(name: str, found: list[Record]) -> list[str]:
    seconds, _ = mean_and_spread([r["seconds"] for r in found])
    tested, validated = (_nats([r[split] for r in found]) for split in ("test", "validation"))
    last = found[-1]
    return [name, f"{last['rate']:g}", f"{last['trained']:,}", tested, validated, str(len(found)), f"{seconds:.0f}"]


def _nats(values: list[float]) -> str:
    mean, spread = mean_and_spread(values)
    return f"{mean:.4f} ± {spread:.4f}" if len(values) > 1 else f"{mean:.4f}"


def _aims(scored: dict[str, list[Record]]) -> str:
    rows: list[list[str]] = []
    tests = {name: [r["test"] for r in found] for name, found in scored.items() if found}
    if {FISH, LORA} <= tests.keys():
        (ours, spread), (theirs, other) = mean_and_spread(tests[FISH]), mean_and_spread(tests[LORA])
        within = max(spread, other)
        reached = "yes" if ours <= theirs + within else "no"
        rows.append(
            ["FISH less LoRA of as many weights", f"{ours - theirs:+.4f}", f"≤ {within:.4f}, the spread", reached]
        )
    if {FISH, FULL} <= tests.keys():
        difference = mean_and_spread(tests[FISH])[0] - mean_and_spread(tests[FULL])[0]
        rows.append(["FISH less full", f"{difference:+.4f}", "", ""])
    for name in (HALF, ALL_HALF):
        if {FISH, name} <= tests.keys():
            seeds = {r["seed"] for r in scored[name]}
            pairs = [r["test"] for r in scored[FISH] if r["seed"] in seeds]
            change = mean_and_spread(tests[name])[0] / mean_and_spread(pairs)[0] - 1
            aim = "within 1 %" if name == HALF else ""
            rows.append(
                [f"{name}, against float32", f"{change:+.2%}", aim, "" if not aim else _said(abs(change) <= 0.01)]
            )
    return table(["", "measured", "to reach", "reached"], rows) if rows else ""


def _said(reached: bool) -> str:
    return "yes" if reached else "no"


def _rates(records: list[Record]) -> str:
    names = [row.name for row in ROWS if row.rate_of is None]
    tried = {
        name: {r["rate"]: r["validation"] for r in records if r["row"] == name and r["seed"] == SEEDS[0]}
        for name in names
    }
    rates = sorted({rate for found in tried.values() for rate in found})
    cells = [
        [name, *(f"{found[rate]:.3f}" if rate in found else "" for rate in rates)] for name, found in tried.items()
    ]
    return table(["", *(f"{rate:g}" for rate in rates)], cells)
