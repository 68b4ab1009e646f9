"""The page on sparse training: accuracy at equal seconds, seconds to an accuracy, and the rates that were tried."""

from __future__ import annotations

import statistics
from collections import defaultdict
from collections.abc import Sequence
from pathlib import Path

from benchmarks import narrow_plots
from benchmarks.markdown import origin, table, with_spread
from benchmarks.records import Record, lines, mean_and_spread
from benchmarks.sparse import AGAIN, CUTS, EVEN, NETWORKS, PACE, RATIOS, SEEDS
from benchmarks.sparse_methods import METHODS

LEVEL = 0.95  # of the dense network's validation accuracy: to be reached in the fewest seconds
WITHIN = 0.5  # points of the dense network's test accuracy, at the first ratio
BESIDE = {0.36: 0.5, 0.1: 1.5}  # points of a uniformly narrow network's test accuracy, for cuts
ABOVE = 3.0  # points that cuts are to have more than the estimator


class Runs:
    """The records of the page, by what they are: at the rate that won on the validation images."""

    def __init__(self, records: Sequence[Record]) -> None:
        self.records = records
        best: dict[tuple[str, float, str], Record] = {}
        for r in records:
            if r["seed"] == SEEDS[0]:
                key = r["network"], r["ratio"], r["method"]
                best[key] = max(best.get(key, r), r, key=lambda run: run["validation"])
        self._rates = {key: r["rate"] for key, r in best.items()}

    def of(self, network: str, ratio: float, method: str) -> list[Record]:
        """A method's runs, one a seed."""
        key = network, 1.0 if method == "dense" else ratio, method
        found = [r for r in self.records if (r["network"], r["ratio"], r["method"]) == key]
        return sorted((r for r in found if r["rate"] == self._rates[key]), key=lambda r: r["seed"])


def sparse(results: Path, docs: Path) -> str:
    """Everything that is there."""
    records = list(lines(results / "sparse.jsonl"))
    if not records:
        return ""
    runs = Runs([r for r in records if r["end"] != AGAIN and r["method"] != CUTS.name])
    settings = [(network, ratio) for network in NETWORKS for ratio in RATIOS if runs.of(network, ratio, PACE.name)]
    parts = [part for setting in settings for part in (_title(*setting), accuracy_table(runs, *setting))]
    panels = {
        _title(*setting).removeprefix("## "): {m: curve(runs.of(*setting, m)) for m in METHODS if m != CUTS.name}
        for setting in settings
    }
    narrow_plots.curves(panels, docs / "sparse.png")
    parts += ["## Accuracy against seconds", "![Accuracy against seconds](sparse.png)"]
    parts += ["## To reach", reach_table(runs, settings), "## Rates tried: validation accuracy"]
    parts += [rates_table(runs.records)]
    mine = [r for r in records if r["method"] == CUTS.name]
    if mine:
        beside = [r for r in records if r["end"] == AGAIN]
        parts += ["## Cuts", cuts_table(Runs(mine), beside, runs), rates_table(mine), origin(mine)]
        parts += ["## All other tables"]
    return "\n\n".join([*parts, origin(runs.records)])


def _title(network: str, ratio: float) -> str:
    return f"## {network}, {100 * ratio:g} % of the FLOPs"


def curve(runs: Sequence[Record]) -> list[tuple[float, float]]:
    """Means over the seeds of seconds and validation accuracy, point by point."""
    if not runs:
        return []
    points = zip(*(r["curve"] for r in runs), strict=False)
    return [tuple(map(statistics.fmean, zip(*point, strict=True))) for point in points]  # type: ignore[misc]


def accuracy_table(runs: Runs, network: str, ratio: float) -> str:
    """One row a method."""
    dense = runs.of(network, ratio, "dense")
    level = LEVEL * statistics.fmean(r["validation"] for r in dense) if dense else 100.0
    chosen = [(name, runs.of(network, ratio, name)) for name in METHODS if name != CUTS.name]
    rows = [
        [
            name,
            f"{found[0]['rate']:g}",
            f"{100 * statistics.fmean(r['flops'] for r in found):.1f}",
            f"{statistics.fmean(r['seconds'] for r in found):.0f}",
            f"{statistics.fmean(r['steps'] for r in found):.0f}",
            with_spread([r["test"] for r in found]),
            difference(found, dense),
            seconds_to(curve(found), level),
        ]
        for name, found in chosen
        if found
    ]
    header = ["", "rate", "FLOPs, %", "CPU s", "steps", "test accuracy", "against dense", f"CPU s to {level:.1f} %"]
    return table(header, rows)


def difference(runs: Sequence[Record], others: Sequence[Record]) -> str:
    """Points of test accuracy, seed by seed, that runs have more than others."""
    theirs = {r["seed"]: r["test"] for r in others}
    gaps = [r["test"] - theirs[r["seed"]] for r in runs if r["seed"] in theirs]
    if not gaps:
        return "—"
    mean, spread = mean_and_spread(gaps)
    return f"{mean:+.1f}" + (f" ± {spread:.1f}" if len(gaps) > 1 else "")


def seconds_to(points: Sequence[tuple[float, float]], level: float) -> str:
    """Seconds at the first point of the curve whose validation accuracy is that high."""
    return next((f"{seconds:.0f}" for seconds, accuracy in points if accuracy >= level), "—")


def reach_table(runs: Runs, settings: Sequence[tuple[str, float]]) -> str:
    """The figures to reach."""
    rows: list[list[str]] = []
    for network, ratio in settings:
        means = {m: runs.of(network, ratio, m) for m in METHODS if m != CUTS.name}
        scores = {m: statistics.fmean(r["test"] for r in found) for m, found in means.items() if found}
        dense, mine = scores.pop("dense", None), scores.pop(PACE.name)
        title = _title(network, ratio).removeprefix("## ")
        if scores:
            peer = max(scores, key=lambda name: scores[name])
            gap = mine - scores[peer]
            rows.append([f"{title}: less the best other ({peer})", f"{gap:+.1f}", "≥ 0", "yes" if gap >= 0 else "no"])
        if ratio == RATIOS[0] and dense is not None:
            gap = mine - dense
            rows.append([f"{title}: less dense", f"{gap:+.1f}", f"≥ −{WITHIN}", "yes" if gap >= -WITHIN else "no"])
    return table(["points of test accuracy", "measured", "to reach", "reached"], rows)


def cuts_table(mine: Runs, beside: Sequence[Record], runs: Runs) -> str:
    """Cuts and a uniformly narrow network in turn, as many seconds each, and the estimator of the tables above."""
    rows: list[list[str]] = []
    for network in NETWORKS:
        for ratio in RATIOS:
            cuts = mine.of(network, ratio, CUTS.name)
            even = [r for r in beside if (r["network"], r["ratio"]) == (network, ratio)]
            if not cuts:
                continue
            learned = statistics.fmean(r["test"] for r in runs.of(network, ratio, PACE.name))
            rows.append(
                [
                    f"{network}, {100 * ratio:g} %",
                    f"{cuts[0]['rate']:g}",
                    f"{100 * statistics.fmean(r['flops'] for r in cuts):.1f}",
                    f"{statistics.fmean(r['seconds'] for r in cuts):.0f}",
                    str(len(cuts)),
                    with_spread([r["test"] for r in cuts]),
                    with_spread([r["test"] for r in even]) if even else "—",
                    f"{difference(cuts, even)} (≥ −{BESIDE[ratio]})",
                    f"{statistics.fmean(r['test'] for r in cuts) - learned:+.1f} (≥ +{ABOVE:g})",
                ]
            )
    header = ["", "rate", "FLOPs, %", "CPU s", "seeds", "cuts", EVEN.name]
    return table([*header, "cuts less that (to reach)", "less Tithe (to reach)"], rows)


def rates_table(records: Sequence[Record]) -> str:
    """Validation accuracy of each rate, first seed."""
    tried: dict[tuple[str, float, str], dict[float, float]] = defaultdict(dict)
    for r in records:
        if r["seed"] == SEEDS[0]:
            tried[r["network"], r["ratio"], r["method"]][r["rate"]] = r["validation"]
    rates = sorted({rate for scores in tried.values() for rate in scores})
    rows = [
        [f"{network}, {100 * ratio:g} %", method, *(f"{scores[q]:.1f}" if q in scores else "" for q in rates)]
        for (network, ratio, method), scores in sorted(tried.items())
    ]
    return table(["", "method", *(f"{rate:g}" for rate in rates)], rows)
