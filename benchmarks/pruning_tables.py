"""The page on pruning trained networks: accuracy at equal seconds, what each method chose, where the seconds went."""

from __future__ import annotations

import statistics
from collections.abc import Sequence
from pathlib import Path

from benchmarks.markdown import origin, table, with_spread
from benchmarks.pruning import CHOSEN_AT, SEEDS, quality
from benchmarks.pruning_methods import METHODS, WHOLE
from benchmarks.pruning_networks import NETWORKS
from benchmarks.records import Record, lines

Found = list[Record]  # runs of a method at its chosen setting and rate, one a seed


def pruning(results: Path, docs: Path) -> str:
    """Everything that is there."""
    records = list(lines(results / "pruning.jsonl"))
    parts: list[str] = []
    for network in NETWORKS:
        of = [record for record in records if record["network"] == network]
        if of:
            parts += [f"## {network}", accuracy(of), "### At 50 % of the FLOPs, mean over seeds", costs(of)]
            parts += [f"### Tried: validation accuracy at 50 %, seed {SEEDS[0]}", tried(of)]
    return "\n\n".join([*parts, origin(records)]) if parts else ""


def chosen(records: Sequence[Record], method: str, keep: float) -> Found:
    """The runs that count: at the setting and the rate that won at 50 % with the first seed."""
    at = keep if method == WHOLE.name else CHOSEN_AT
    candidates = [r for r in records if (r["method"], r["keep"], r["seed"]) == (method, at, SEEDS[0])]
    if not candidates:
        return []
    best = max(candidates, key=quality)
    wanted = method, keep, best["setting"], best["rate"]
    found = [r for r in records if (r["method"], r["keep"], r["setting"], r["rate"]) == wanted]
    return sorted(found, key=lambda r: r["seed"])


def rows(records: Sequence[Record]) -> list[tuple[str, float, Found]]:
    """Method, share and runs, the whole network first, then share after share from the widest."""
    keeps = sorted({record["keep"] for record in records}, reverse=True)
    found = [(name, keep, chosen(records, name, keep)) for keep in keeps for name in METHODS]
    return [row for row in found if row[2]]


def accuracy(records: Sequence[Record]) -> str:
    """One row a method and share."""
    cells = [
        [
            name,
            f"{100 * keep:g}",
            f"{100 * mean(found, 'operations'):.1f}",
            f"{mean(found, 'parameters') / 1e6:.2f}",
            len(found),
            with_spread([r["validation"] for r in found]),
            with_spread([r["test"] for r in found]),
        ]
        for name, keep, found in rows(records)
    ]
    return table(["", "share, %", "FLOPs, %", "parameters, M", "seeds", "validation", "test"], cells)


def costs(records: Sequence[Record]) -> str:
    """What each method chose at 50 %, its seconds and its steps of fine-tuning."""
    cells = [
        [
            name,
            shown(found[0]["setting"]),
            f"{found[0]['rate']:g}",
            f"{mean(found, 'prune_seconds'):.1f}",
            f"{mean(found, 'seconds'):.1f}",
            f"{mean(found, 'steps'):.0f}",
        ]
        for name, keep, found in rows(records)
        if keep in (CHOSEN_AT, 1)
    ]
    return table(["", "setting", "rate", "pruning, CPU s", "in all, CPU s", "steps of fine-tuning"], cells)


def tried(records: Sequence[Record]) -> str:
    """Validation accuracy of every setting and rate that a choice was made from."""
    first = [r for r in records if r["seed"] == SEEDS[0] and r["keep"] in (CHOSEN_AT, 1)]
    rates = sorted({r["rate"] for r in first})
    by_setting = {(r["method"], r["setting"]): {} for r in first}
    for r in first:
        by_setting[r["method"], r["setting"]][r["rate"]] = f"{r['validation']:.1f}"
    cells = [[m, shown(s), *(found.get(rate, "—") for rate in rates)] for (m, s), found in by_setting.items()]
    return table(["", "setting", *(f"{rate:g}" for rate in rates)], cells)


def mean(found: Found, name: str) -> float:
    """Over the seeds."""
    return statistics.fmean(r[name] for r in found)


def shown(setting: str | float | None) -> str:
    """A setting as the page says it."""
    return "—" if setting is None else str(setting)
