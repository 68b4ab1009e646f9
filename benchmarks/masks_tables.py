"""The page on which mask to take: every mask over its rates, the finalists on the tests, what a step costs."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Sequence
from pathlib import Path

from benchmarks import masks_images
from benchmarks.markdown import megabytes, origin, table, with_spread
from benchmarks.masks import SCREEN, SEEDS, TASKS
from benchmarks.masks_costs import PEER
from benchmarks.masks_methods import FINALISTS, METHODS
from benchmarks.plots import accuracy_against_rate
from benchmarks.records import Record, lines, mean_and_spread

NAMES = {SCREEN.name: "SST-2", "sst2-full": "SST-2", "mrpc-full": "MRPC", "cola-full": "CoLA (Matthews)"}
POOLINGS = {"mean": "mean pooling", "pooler": "the pooler"}
PARTS = ("embeddings", "attention", "feed-forward in", "feed-forward out", "pooler")
DRAWN = (
    "full",
    "lora",
    "fisher global, embeddings too",
    "fisher tensor",
    "fisher columns tensor, ×4",
    "magnitude global",
    "snr global",
    "random tensor",
)


def masks(results: Path, docs: Path) -> str:
    """Tests of the finalists, the screening with its figure, the cost of a step, where the budget lands, images."""
    records = list(lines(results / "masks.jsonl"))
    if not records:
        return ""
    parts: list[str] = []
    for pooling, words in POOLINGS.items():
        own = [r for r in records if r["pooling"] == pooling]
        finals = [r for r in own if r["task"] in TASKS]
        if finals:
            parts += [f"## Whole training sets, test scores, {words}", _finals(finals, list(TASKS))]
        small = [r for r in own if r["task"] == SCREEN.name and r["method"] in FINALISTS]
        if any(r["tested"] for r in small):
            parts += [f"## 1,600 sentences of SST-2, test scores, {words}", _finals(small, [SCREEN.name])]
    costs = list(lines(results / "masks_costs.jsonl"))
    if costs:
        parts += ["## What a step costs", _costs(costs), origin(costs)]
    for pooling, words in POOLINGS.items():
        screened = [r for r in records if r["pooling"] == pooling and r["task"] == SCREEN.name]
        if screened:
            title = f"## Each mask at each rate, {words}: SST-2 validation accuracy after 1,600 sentences"
            parts += [title, _rates(screened)]
        if screened and pooling == "mean":
            accuracy_against_rate(curves(screened, DRAWN), docs / "masks.png")
            parts.append("![Validation accuracy against the learning rate, one line a mask](masks.png)")
        if screened:
            parts += [f"## Where the weights of a mask lie, {words} (percent)", _landing(screened)]
    parts.append(origin(records))
    images = list(lines(results / "masks_images.jsonl"))
    if images:
        parts += ["## MobileNetV2-w0.35 on CIFAR-100", _images(images), origin(images)]
    return "\n\n".join(parts)


def curves(records: Sequence[Record], methods: Sequence[str]) -> dict[str, list[tuple[float, float]]]:
    """Of each method its rates, rising, and the validation score at each."""
    found: dict[str, list[tuple[float, float]]] = {name: [] for name in methods}
    for record in records:
        if record["method"] in found and record["seed"] == SEEDS[0]:
            found[record["method"]].append((record["rate"], record["validation"]))
    return {name: sorted(points) for name, points in found.items() if points}


def _rates(records: Sequence[Record]) -> str:
    tried = curves(records, list(METHODS))
    rates = sorted({rate for points in tried.values() for rate, _ in points})
    trained = {r["method"]: r["trained"] for r in records}
    rows = []
    for name, points in sorted(tried.items(), key=lambda item: -max(score for _, score in item[1])):
        scores = dict(points)
        cells = [f"{scores[rate]:.1f}" if rate in scores else "" for rate in rates]
        rows.append([name, f"{trained[name]:,}", f"{max(scores.values()):.1f}", *cells])
    return table(["", "trained", "best", *(f"{rate:g}" for rate in rates)], rows)


def _finals(records: Sequence[Record], among: Sequence[str]) -> str:
    """Methods by tasks: test scores, each at the rate that it chose for the task."""
    runs: dict[str, dict[str, list[Record]]] = defaultdict(lambda: defaultdict(list))
    for record in records:
        runs[record["method"]][record["task"]].append(record)
    tasks = [task for task in among if any(task in by_task for by_task in runs.values())]
    rows = []
    for name in (name for name in FINALISTS if name in runs):
        found = [_at_chosen_rate(runs[name][task]) for task in tasks]
        if not any(found):
            continue
        cells = [cell for each in found for cell in (_scores(each), f"{each[0]['rate']:g}" if each else "—")]
        means = [mean_and_spread([r["test"] for r in each])[0] for each in found if each]
        trained = next(r["trained"] for each in found for r in each)
        mean = [f"{sum(means) / len(means):.1f}" if len(means) == len(tasks) else "—"] if len(tasks) > 1 else []
        rows.append([name, f"{trained:,}", *cells, *mean])
    header = ["", "trained", *(title for task in tasks for title in (NAMES[task], "rate"))]
    return table([*header, "mean"] if len(tasks) > 1 else header, rows)


def _at_chosen_rate(records: Sequence[Record]) -> list[Record]:
    """Tested runs at the rate of highest validation score with the first seed; the higher one when both are as good."""
    first = [r for r in records if r["seed"] == SEEDS[0]]
    if not first:
        return []
    rate = max(first, key=lambda r: (r["validation"], r["rate"]))["rate"]
    return [r for r in records if r["tested"] and r["rate"] == rate]


def _scores(records: Sequence[Record]) -> str:
    return _seeds([r["test"] for r in records])


def _seeds(values: list[float]) -> str:
    short = "" if len(values) in (0, len(SEEDS)) else f" ({len(values)} of {len(SEEDS)} seeds)"
    return with_spread(values) + short


def _costs(records: Sequence[Record]) -> str:
    rows = {r["method"]: r for r in reversed(records)}
    peer = rows[PEER]
    timed = len(peer["cpu_ms_all"]) > 1
    cells = [
        [
            name,
            f"{r['trained']:,}",
            megabytes(r["saved_bytes"]),
            f"{r['saved_bytes'] / peer['saved_bytes']:.2f}",
            megabytes(r["peak_bytes"]),
            f"{r['peak_bytes'] / peer['peak_bytes']:.2f}",
            *([f"{r['cpu_ms']:.0f}", f"{r['cpu_ms'] / peer['cpu_ms']:.2f}"] if timed else []),
        ]
        for name, r in rows.items()
    ]
    header = ["", "trained", "kept MB", "of LoRA", "peak MB", "of LoRA", *(["CPU ms", "of LoRA"] if timed else [])]
    return table(header, cells)


def _landing(records: Sequence[Record]) -> str:
    chosen = {r["method"]: r["selected"] for r in records if "selected" in r}
    rows = []
    for name in (name for name in METHODS if name in chosen):
        sizes: dict[str, int] = chosen[name]
        total = sum(sizes.get(part, 0) for part in PARTS)
        shares = [f"{100 * sizes.get(part, 0) / total:.1f}" for part in (*PARTS, "biases and norms")]
        rows.append([name, *shares, sizes["tensors"]])
    return table(["", *PARTS, "of it biases and norms", "tensors touched"], rows)


def _images(records: Sequence[Record]) -> str:
    tested: dict[str, list[Record]] = defaultdict(list)
    for record in records:
        if record["tested"]:
            tested[record["method"]].append(record)
    rows = []
    for name in (masks_images.HEAD_ONLY.name, *masks_images.METHODS):
        if name in tested:
            held, test = ([r[part] for r in tested[name]] for part in ("validation", "test"))
            rows.append([name, f"{tested[name][0]['rate']:g}", with_spread(held), _seeds(test)])
    return table(["", "rate", "validation", "test"], rows)
