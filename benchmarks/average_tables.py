"""The page on averages: the head and the tail of a run, soups, and what a step in the span and a stream cost."""

from __future__ import annotations

import statistics
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path

from benchmarks import plots
from benchmarks.average_decay import COURSE, EACH, GRIDS, WINDOWS
from benchmarks.markdown import origin, table, with_spread
from benchmarks.records import Record, lines

Key = Callable[[Record], object]
CODED = {8: 0.1, 4: 0.2, 1: 0.5}  # bits → points of accuracy that may be lost


def average(results: Path, docs: Path) -> str:
    """Everything that is there."""
    parts: list[str] = []
    decays = [r for r in lines(results / "average_head.jsonl") if (r["method"], r["epochs"]) == ("SGD", COURSE.epochs)]
    for name, title, section in (
        ("average_decay", "In the place of a decay", lambda records: decay(records, decays)),
        ("average_head", "The second half of a run", head),
        ("average_tail", "After a constant rate", tail),
        ("average_soup", "Soups", soup),
        ("span_step", "A step", step),
        ("span_memory", "What a step holds", memory),
        ("average_streams", "A stream", streams),
        ("merge_tasks", "Merging tasks", merging),
    ):
        records = list(lines(results / f"{name}.jsonl"))
        if records:
            parts += [f"## {title}", section(records), origin(records)]
    records = list(lines(results / "average_head.jsonl"))
    if records:
        plots.accuracy_against_seconds(panels(records), docs / "average.png")
        at = parts.index("## The second half of a run") + 2
        parts.insert(at, "![Test accuracy against CPU seconds](average.png)")
    return "\n\n".join(parts)


def chosen(records: Sequence[Record], method: str, setting: str) -> list[Record]:
    """A method's runs at the setting that has the most seeds: the one that was chosen."""
    runs = [r for r in records if r["method"] == method]
    by_setting: dict[object, list[Record]] = {}
    for run in runs:
        by_setting.setdefault((run[setting], run.get("rate")), []).append(run)
    most = max(by_setting.values(), key=len, default=[])
    return sorted(most, key=lambda r: r["seed"])


def gaps(runs: Sequence[Record], others: Sequence[Record]) -> str:
    """Points of test score, seed by seed, that runs have more than others."""
    theirs = {r["seed"]: r["test"] for r in others}
    found = [r["test"] - theirs[r["seed"]] for r in runs if r["seed"] in theirs]
    if not found:
        return "—"
    spread = f" ± {statistics.stdev(found):.1f}" if len(found) > 1 else ""
    return f"{statistics.fmean(found):+.1f}{spread}"


def decay(records: Sequence[Record], decays: Sequence[Record]) -> str:
    """Two tables for each set of images: what each end gives, and how the choices were made."""
    parts: list[str] = []
    for images in dict.fromkeys(r["set"] for r in records):
        mine = [r for r in records if r["set"] == images]
        tried = [r for r in mine if r["stage"] == "choice"]
        rate = max((r for r in tried if r["method"] != "last"), key=lambda r: r["validation"])["rate"]
        full = [r for r in decays if r["set"] == images]
        first = max((r for r in full if r["seed"] == 0), key=lambda r: r["validation"])
        full = [r for r in full if r["rate"] == first["rate"]]
        rows = [["decay", f"{first['rate']:g}", "—", with_spread([r["test"] for r in full]), "", "", ""]]
        for method in GRIDS:
            runs = [r for r in mine if (r["method"], r["rate"], r["stage"]) == (method, rate, "chosen")]
            if not runs:
                continue
            setting, part = runs[0]["setting"], _window(method, runs[0]["setting"])
            rows.append(
                [
                    method if method == "last" else f"like {method}" if method != "EMA" else f"like ema:{setting:g}",
                    f"{rate:g}",
                    f"{part:.0%}" if part else "—",
                    with_spread([r["test"] for r in runs]),
                    gaps(runs, full),
                    f"{statistics.fmean(r['beyond s'] for r in runs):.1f}",
                    f"{part * statistics.fmean(r['steps s'] for r in runs):.0f}" if part else "",
                ]
            )
        header = ["", "rate", "window", "test accuracy", "less decay", "averaging, CPU s", "steps of the window, CPU s"]
        parts += [f"### {_shown(images)}", table(header, rows), _choices(tried)]
    return "\n\n".join(parts)


def _choices(tried: Sequence[Record]) -> str:
    """Validation accuracy by rate, kind of average and length, with the first seed."""
    rows: list[list[str]] = []
    for method, grid in GRIDS.items():
        for rate in sorted({r["rate"] for r in tried}):
            found = {r["setting"]: r["validation"] for r in tried if (r["method"], r["rate"]) == (method, rate)}
            cells = [f"{found[setting]:.1f}" for setting in grid if setting in found]
            rows.append([method, f"{rate:g}", *cells, *[""] * (len(WINDOWS) - len(cells))])
    lengths = [f"{_window('linear', n):.0%} / {width:g}" for n, width in zip(WINDOWS, GRIDS["EMA"], strict=True)]
    return table(["validation, first seed", "rate", *lengths], rows)


def _window(method: str, setting: float) -> float:
    """The part of the run that an average reaches over; of a moving average that of a uniform one as wide."""
    return 12**0.5 * setting if method == "EMA" else setting * EACH / COURSE.epochs


HEAD = ("SGD", "mean", "TWA", "8 bits", "4 bits", "1 bits")


def head_runs(records: Sequence[Record]) -> Mapping[str, Mapping[str, list[Record]]]:
    """The runs of each method, by set of images and length of the course."""
    out: dict[str, Mapping[str, list[Record]]] = {}
    for images, epochs in dict.fromkeys((r["set"], r["epochs"]) for r in records):
        mine = [r for r in records if (r["set"], r["epochs"]) == (images, epochs)]
        found = {method: runs for method in HEAD if (runs := chosen(mine, method, "span rate"))}
        out[f"{_shown(images)}, E = {epochs}"] = found
    return out


def head(records: Sequence[Record]) -> str:
    """One table for each set of images and length of the course."""
    parts: list[str] = []
    for title, found in head_runs(records).items():
        sgd = statistics.fmean(r["seconds"] for r in found["SGD"])
        rows = [
            [
                method if "bits" not in method else f"TWA, {method}",
                f"{runs[0]['rate']:g}",
                f"{runs[0]['span rate']:g}" if runs[0]["span rate"] else "—",
                with_spread([r["test"] for r in runs]),
                gaps(runs, found["SGD"]),
                gaps(runs, found["TWA"]) if "bits" in method and "TWA" in found else "",
                f"{statistics.fmean(r['seconds'] for r in runs):.0f}",
                f"{statistics.fmean(r['seconds'] for r in runs) / sgd:.2f}",
            ]
            for method, runs in found.items()
        ]
        header = ["", "rate", "of θ", "test accuracy", "less SGD", "less exact", "CPU s", "of SGD's"]
        parts += [f"### {title}", table(header, rows)]
    return "\n\n".join(parts)


def panels(records: Sequence[Record]) -> dict[str, dict[str, list[tuple[float, float]]]]:
    """Seconds and test accuracy of each run, by course and method."""
    return {
        title: {
            method: [(r["seconds"], r["test"]) for r in runs] for method, runs in found.items() if "bits" not in method
        }
        for title, found in head_runs(records).items()
    }


def _shown(images: str) -> str:
    return images.upper().replace("CIFAR", "CIFAR-")


def tail(records: Sequence[Record]) -> str:
    """One row a method, a column for each rate of the tail."""
    parts: list[str] = []
    for images in dict.fromkeys(r["set"] for r in records):
        for rate in sorted({r["rate"] for r in records}):
            mine = [r for r in records if (r["set"], r["rate"]) == (images, rate)]
            names = list(dict.fromkeys(r["method"] for r in mine))
            found = {name: chosen(mine, name, "setting") for name in names}
            rows = [
                [
                    name,
                    f"{runs[0]['setting']:g}" if runs[0]["setting"] else "—",
                    with_spread([r["test"] for r in runs]),
                    gaps(found["TWA"], runs) if name != "TWA" and "TWA" in found else "",
                    f"{statistics.fmean(r['seconds'] for r in runs):.0f}",
                ]
                for name, runs in found.items()
            ]
            title = f"### {_shown(images)}, rate {rate:g}"
            parts += [title, table(["", "setting", "test accuracy", "TWA is above it by", "CPU s"], rows)]
    return "\n\n".join(parts)


SOUP = ("base", "best single", "uniform", "greedy", "TWA-t", "TWA-v", *(f"TWA-v, {bits} bits" for bits in CODED))


def soup(records: Sequence[Record]) -> str:
    """One table a task."""
    parts: list[str] = []
    for task in dict.fromkeys(r["task"] for r in records):
        mine = [r for r in records if r["task"] == task]
        found = {name: runs for name in SOUP if (runs := chosen(mine, name, "rate"))}
        rows = [
            [
                name,
                f"{runs[0]['rate']:g}" if runs[0]["rate"] else "—",
                with_spread([r["validation"] for r in runs]),
                with_spread([r["test"] for r in runs]),
                gaps(runs, found["greedy"]) if "greedy" in found else "",
                gaps(runs, found["TWA-v"]) if "bits" in name and "TWA-v" in found else "",
            ]
            for name, runs in found.items()
        ]
        header = ["", "rate", "validation", "test", "less greedy", "less exact"]
        parts += [f"### {task.upper()}", table(header, rows)]
    return "\n\n".join(parts)


def step(records: Sequence[Record]) -> str:
    """One row for each width of codes and number of threads."""
    rows = [
        [
            f"{r['bits']} bits",
            f"{r['threads']}",
            f"{r['sgd ms']:.0f}",
            f"{r['twa ms']:.0f}",
            f"{r['ratio']:.2f}",
            f"{r['basis MB']:.0f}",
            f"{r['history MB']:.0f}",
            f"{4e-6 * r['n'] * r['weights']:.0f}",
            f"{r['attach s']:.0f}",
        ]
        for r in records
    ]
    header = [
        "",
        "threads",
        "SGD, ms",
        "TWA, ms",
        "ratio",
        "basis, MB",
        "history, MB",
        "float32 basis, MB",
        "attach, s",
    ]
    return table(header, rows)


def memory(records: Sequence[Record]) -> str:
    """One row for each width of codes."""
    rows = [[f"{r['bits']} bits", f"{r['resident MB']:.0f}", "≤ 300"] for r in records]
    return table(["", "resident, more than a plain step, MB", "to reach"], rows)


def streams(records: Sequence[Record]) -> str:
    """The one run."""
    r = records[-1]
    rows = [
        ["checkpoints", f"{r['copies']} × {r['weights'] / 1e9:.2f} B weights, {r['bytes'] / 1e9:.1f} GB", ""],
        ["read speed of the disk, GB/s", f"{r['read GB/s']:.2f}", ""],
        ["average, GB/s read", f"{r['average GB/s']:.2f}", ""],
        ["share of the read speed", f"{r['share']:.2f}", "≥ 0.70"],
        ["peak resident, GB", f"{r['peak GB']:.2f}", "≤ 1.5"],
        ["largest error, of half a last place", f"{r['error']:.2f}", "≤ 1"],
    ]
    return table(["", "measured", "to reach"], rows)


def merging(records: Sequence[Record]) -> str:
    """One row for each method and whose it is."""
    header = ["", "seconds", "peak resident, GB", "weights that differ"]
    rows = [
        [
            f"{r['method']}, {r['who']}",
            f"{r['seconds']:.1f}",
            f"{r['peak'] / 1e9:.2f}",
            "—" if r["apart"] is None else f"{r['apart']:,}",
        ]
        for r in records
    ]
    first = records[0]
    told = f"{first['tasks']} fine-tunings of a model of {first['weights'] / 1e6:.0f} million float32 weights."
    return f"{told}\n\n{table(header, rows)}"
