"""The pages on accuracy: which mask, and the masks beside the peers."""

from __future__ import annotations

import itertools
from collections import defaultdict
from pathlib import Path

from benchmarks.accuracy import SEEDS
from benchmarks.markdown import origin, table, with_spread
from benchmarks.methods import DENSITY, PEERS, Mask
from benchmarks.plots import validation_by_variant
from benchmarks.records import Record, lines, mean_and_spread
from benchmarks.text import TASKS
from benchmarks.which_mask import FOLLOW_UP, PAPER, SCOPES, SCORES

VARIANTS = [
    Mask(score, scope, warm=warm, reselect=again)
    for score, scope, warm, again in itertools.product(SCORES, SCOPES, (False, True), (False, True))
]
NAMES = {"sst2": "SST-2 sentences", "cola": "CoLA (Matthews)", "mrpc": "MRPC"}
GROUPS = {
    "embeddings": ("embeddings",),
    "attention": ("attention",),
    "feed-forward": ("feed-forward in", "feed-forward out"),
    "pooler": ("pooler",),
}


def which_mask(results: Path, docs: Path) -> str:
    """All variants on the validation examples, the mean of each choice, the finalists on the tests, where k lands."""
    records = list(lines(results / "which_mask.jsonl"))
    first = {r["method"]: r for r in screened(records)}
    if not first:
        return ""
    validation_by_variant(first, VARIANTS, docs / "which-mask.png")
    parts = [
        "## Every variant, one seed, SST-2 validation examples (accuracy)",
        _grid(first),
        "![Validation accuracy of every variant](which-mask.png)",
        "## What each choice does on average",
        _effects(first),
        "## Learning rates tried (SST-2 validation accuracy, as loaded and static)",
        _rates(records),
        "## Finalists, test sets",
        _finalists(records),
        "## Where the budget lands (SST-2, first seed; percent of the selected weights)",
        _landing(first),
        "Reselected: the mask of the second epoch. Per tensor, every score has the shares of random, per tensor.",
        origin(records),
    ]
    return "\n\n".join(parts)


def screened(records: list[Record]) -> list[Record]:
    """Of each variant the best run with the first seed on SST-2: all others took a rate that such a climb chose."""
    best: dict[str, Record] = {}
    for record in records:
        if record["task"] == "sst2" and record["seed"] == SEEDS[0]:
            held = best.get(record["method"])
            if held is None or _quality(record) > _quality(held):
                best[record["method"]] = record
    return list(best.values())


def _quality(record: Record) -> tuple[float, float]:
    return record["validation"], -record["validation_loss"]


def _grid(first: dict[str, Record]) -> str:
    def cell(mask: Mask) -> str:
        record = first.get(mask.name)
        return f"{record['validation']:.1f}" if record else "—"

    header = ["score, scope", "rate", "loaded, static", "loaded, reselected", "warmed, static", "warmed, reselected"]
    rows = []
    for score, scope in itertools.product(SCORES, SCOPES):
        four = [Mask(score, scope, warm=w, reselect=r) for w in (False, True) for r in (False, True)]
        base = first.get(four[0].name)
        rows.append([f"{score}, {scope}", f"{base['rate']:g}" if base else "—", *map(cell, four)])
    return table(header, rows)


def _effects(first: dict[str, Record]) -> str:
    levels: dict[str, list[float]] = defaultdict(list)
    for mask in VARIANTS:
        if mask.name in first:
            for level in mask.name.split():
                levels[level].append(first[mask.name]["validation"])
    order = (*SCORES, *SCOPES, "loaded", "warmed", "static", "reselected")
    rows = [[name, with_spread(levels[name]), len(levels[name])] for name in order]
    return table(["choice", "mean ± spread over the variants", "variants"], rows)


def _rates(records: list[Record]) -> str:
    tried = {
        (r["method"], r["rate"]): r["validation"] for r in records if r["task"] == "sst2" and r["seed"] == SEEDS[0]
    }
    rates = sorted({rate for method, rate in tried if "loaded static" in method})
    rows = []
    for mask in (*itertools.starmap(Mask, itertools.product(SCORES, SCOPES)), *FOLLOW_UP):
        name = mask.name
        rows.append(
            [
                name.replace(" loaded static", ""),
                *(f"{tried[name, r]:.1f}" if (name, r) in tried else "" for r in rates),
            ]
        )
    return table(["score, scope", *(f"{rate:g}" for rate in rates)], rows)


def tested(records: list[Record]) -> dict[tuple[str, float], dict[str, list[Record]]]:
    """The runs that were scored on a test set: method and rate -> task -> one record a seed."""
    found: dict[tuple[str, float], dict[str, list[Record]]] = defaultdict(lambda: defaultdict(list))
    for record in records:
        if record["tested"]:
            found[record["method"], record["rate"]][record["task"]].append(record)
    return found


def _finalists(records: list[Record]) -> str:
    entries = tested(records)
    if not entries:
        return "Not run yet."
    tasks = [task for task in TASKS if any(task in by_task for by_task in entries.values())]

    def validation(key: tuple[str, float]) -> float:
        runs = entries[key]["sst2"]
        return mean_and_spread([r["validation"] for r in runs])[0] if runs else 0.0

    rows = []
    for name, rate in sorted(entries, key=validation, reverse=True):
        by_task = entries[name, rate]
        held = with_spread([r["validation"] for r in by_task["sst2"]])
        tests = [_seeds([r["test"] for r in by_task[task]]) for task in tasks]
        rows.append([name + (" (the paper's)" if name == PAPER.name else ""), f"{rate:g}", held, *tests])
    return table(["mask", "rate", "SST-2 validation", *(f"{NAMES[task]} test" for task in tasks)], rows)


def _seeds(values: list[float]) -> str:
    short = "" if len(values) in (0, len(SEEDS)) else f" ({len(values)} of {len(SEEDS)} seeds)"
    return with_spread(values) + short


def _landing(first: dict[str, Record]) -> str:
    rows = []
    apart = [mask for mask in VARIANTS if mask.scope == "global" or mask.name == Mask("random", "tensor").name]
    for mask in apart:
        record = first.get(mask.name)
        if record is None:
            continue
        selected: dict[str, int] = record["selected"]
        total = sum(selected.get(part, 0) for parts in GROUPS.values() for part in parts)
        groups = [f"{100 * sum(selected.get(p, 0) for p in parts) / total:.1f}" for parts in GROUPS.values()]
        one = 100 * selected.get("biases and norms", 0) / total
        rows.append([mask.name, *groups, f"{one:.1f}", selected["tensors"]])
    return table(["mask", *GROUPS, "of it biases and norms", "tensors touched (of 103)"], rows)


def accuracy(results: Path, docs: Path) -> str:
    """Peers and finalists on the tests, and their distance to full fine-tuning."""
    records = list(lines(results / "accuracy.jsonl")) + list(lines(results / "which_mask.jsonl"))
    entries = tested(records)
    if not entries:
        return ""
    tasks = [task for task in TASKS if any(task in by_task for by_task in entries.values())]
    full = next(by_task for (name, _), by_task in entries.items() if name == "full")
    whole = mean_and_spread([r["test"] for r in full["sst2"]])[0]
    order = [*PEERS, *(mask.name for mask in (*VARIANTS, *FOLLOW_UP))]
    rows = []
    for name, rate in sorted(entries, key=lambda key: (order.index(key[0]), key[1])):
        by_task = entries[name, rate]
        tests = [_seeds([r["test"] for r in by_task[task]]) for task in tasks]
        gap = f"{mean_and_spread([r['test'] for r in by_task['sst2']])[0] - whole:+.1f}" if by_task["sst2"] else "—"
        trained = next(iter(by_task.values()))[0]["trained"]
        rows.append([name, f"{trained:,}", f"{rate:g}", *tests, gap])
    header = ["", "trained", "rate", *(NAMES[task] for task in tasks), "SST-2 against full"]
    sizes = " · ".join(
        f"{NAMES[t.name]}: {t.num_train} training and {t.num_validation} validation examples, "
        f"{t.num_epochs} epochs of {t.batch} a step, {t.max_length} tokens at most"
        for t in TASKS.values()
        if t.name in tasks
    )
    note = (
        f"Test metric, mean ± standard deviation over seeds {SEEDS}; a mask trains {100 * DENSITY:g} %, head included."
    )
    return "\n\n".join([table(header, rows), note, sizes, origin(records)])
