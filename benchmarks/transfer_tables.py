"""The page on transfer under a memory budget: accuracy, dynamic against static, what is kept, the ranking of layers."""

from __future__ import annotations

import itertools
import math
from collections import defaultdict
from collections.abc import Mapping, Sequence
from pathlib import Path

import torch

from benchmarks.images import TASKS
from benchmarks.markdown import megabytes, origin, table, with_spread
from benchmarks.records import Record, lines, mean_and_spread
from benchmarks.transfer import CHOICE, SEEDS
from benchmarks.transfer_methods import METHODS, TWINS
from benchmarks.vision import NETWORKS, Network

NAMES = {"cifar10": "CIFAR-10", "cifar100": "CIFAR-100", "clothing10": "clothing10"}
Scores = Mapping[str, Mapping[tuple[str, int], float]]  # method -> (task, seed) -> test accuracy


def transfer(results: Path, docs: Path) -> str:
    """All tables of the page."""
    records = chosen(list(lines(results / "transfer.jsonl")))
    if not records:
        return ""
    parts: list[str] = []
    for network in NETWORKS.values():
        parts += [f"## {network.name}, {network.budgets['tight']:,} elements: test accuracy"]
        parts += [_accuracy(records, network)]
    parts += ["## Dynamic less static, same rule (points of test accuracy)", _twins(records)]
    parts += ["## TraDy less the others (points of test accuracy)", _against(records)]
    parts += ["## Learning rates tried: cross-entropy on validation images of CIFAR-10", _rates(results)]
    curved = list(lines(results / "curvature.jsonl"))
    if curved:
        parts += ["## Curvature of the loss along each convolution's weights", _curvature(curved)]
    sparse = list(lines(results / "sparsity.jsonl"))
    if sparse:
        parts += ["## What is left out: counted, and measured in a step of 32 images", _sparsity(sparse)]
        parts += ["## Bytes of that step", _bytes(sparse)]
    ranked = list(lines(results / "ranking.jsonl"))
    if ranked:
        parts += ["## Rankings of layers, measured on different tasks", _rankings(ranked)]
    sizes = " · ".join(
        f"{NAMES[t.name]}: {t.num_train} training, {t.num_validation} validation and {t.num_test} test images, "
        f"{t.num_epochs} epochs"
        for t in TASKS.values()
    )
    return "\n\n".join([*parts, sizes, origin(records)])


def chosen(records: Sequence[Record]) -> list[Record]:
    """Runs at the rates that won on the validation images, scored on the test images."""
    best: dict[tuple[str, str], Record] = {}
    for record in sorted(records, key=lambda r: (math.isnan(r["validation_loss"]), r["validation_loss"])):
        if record["seed"] == SEEDS[0] and record["task"] == CHOICE:
            best.setdefault((record["network"], record["method"]), record)
    kept: list[Record] = []
    for record in records:
        winner = best.get((record["network"], record["method"]))
        if record["tested"] and winner is not None and _rates_of(winner) == _rates_of(record):
            kept.append(record)
    return kept


def _rates_of(record: Record) -> tuple[float, float]:
    return record["head_rate"], record["rate"]


def scores(records: Sequence[Record], network: Network) -> Scores:
    """Test accuracies of a network."""
    found: dict[str, dict[tuple[str, int], float]] = defaultdict(dict)
    for record in records:
        if record["network"] == network.name:
            found[record["method"]][record["task"], record["seed"]] = record["test"]
    return found


def _accuracy(records: Sequence[Record], network: Network) -> str:
    found = scores(records, network)
    rates = {r["method"]: f"{r['rate'] or r['head_rate']:g}" for r in records if r["network"] == network.name}
    rows: list[list[str]] = []
    for method in METHODS:
        runs = found.get(method)
        if runs is None:
            continue
        each = [with_spread([v for (name, _), v in sorted(runs.items()) if name == task]) for task in TASKS]
        gap = difference(found, method, "full")
        rows.append([method, rates[method], *each, with_spread(means(runs)), _signed(gap)])
    header = ["", "rate", *(NAMES[task] for task in TASKS), "mean", "against full"]
    short = [method for method in METHODS if len(found.get(method, {})) < len(SEEDS) * len(TASKS)]
    note = (
        f"Mean ± standard deviation over seeds {SEEDS}; the mean is over the three tasks, by seed. Rate: of the body "
        "(of the head where it is alone)."
    )
    if short:
        note += " Not finished: " + ", ".join(f"{m} ({len(found.get(m, {}))} of 9 runs)" for m in short) + "."
    return table(header, rows) + "\n\n" + note


def means(runs: Mapping[tuple[str, int], float]) -> list[float]:
    """Mean over the tasks, of each seed that has all of them."""
    seeds = [seed for seed in SEEDS if all((task, seed) in runs for task in TASKS)]
    return [sum(runs[task, seed] for task in TASKS) / len(TASKS) for seed in seeds]


def difference(found: Scores, method: str, other: str) -> list[float]:
    """Mean over the tasks, method less other, of each seed that both have finished."""
    ours, theirs = found.get(method, {}), found.get(other, {})
    both = [seed for seed in SEEDS if all((task, seed) in ours and (task, seed) in theirs for task in TASKS)]
    return [sum(ours[task, seed] - theirs[task, seed] for task in TASKS) / len(TASKS) for seed in both]


def _signed(values: Sequence[float]) -> str:
    if not values:
        return "—"
    mean, spread = mean_and_spread(values)
    return f"{mean:+.1f}" + (f" ± {spread:.1f}" if len(values) > 1 else "")


def _by_task(found: Scores, method: str, other: str) -> list[str]:
    cells: list[str] = []
    for task in TASKS:
        ours, theirs = found.get(method, {}), found.get(other, {})
        seeds = [seed for seed in SEEDS if (task, seed) in ours and (task, seed) in theirs]
        cells.append(_signed([ours[task, seed] - theirs[task, seed] for seed in seeds]))
    return [*cells, _signed(difference(found, method, other))]


def _compared(records: Sequence[Record], pairs: Sequence[tuple[str, str]]) -> str:
    rows = [
        [f"{method} − {other}", network.name, *_by_task(scores(records, network), method, other)]
        for method, other in pairs
        for network in NETWORKS.values()
    ]
    return table(["", "network", *(NAMES[task] for task in TASKS), "mean"], rows)


def _twins(records: Sequence[Record]) -> str:
    return _compared(records, list(TWINS.items()))


def _against(records: Sequence[Record]) -> str:
    others = [m for m in METHODS if m not in ("TraDy", "TraDy static")]
    return _compared(records, [("TraDy", other) for other in others])


def _rates(results: Path) -> str:
    tried: dict[tuple[str, str], dict[float, float]] = defaultdict(dict)
    for r in lines(results / "transfer.jsonl"):
        if r["seed"] == SEEDS[0] and r["task"] == CHOICE:
            tried[r["method"], r["network"]][r["rate"] or r["head_rate"]] = r["validation_loss"]
    rates = sorted({rate for losses in tried.values() for rate in losses})
    rows = [
        [method, network, *(f"{losses[rate]:.2f}" if rate in losses else "" for rate in rates)]
        for method, network in itertools.product(METHODS, NETWORKS)
        if (losses := tried.get((method, network)))
    ]
    return table(["", "network", *(f"{rate:g}" for rate in rates)], rows)


def _curvature(records: Sequence[Record]) -> str:
    rows: list[list[object]] = []
    for r in records:
        for drawn, label in ((True, "that TraDy draws from"), (False, "that the ranking leaves out")):
            values = sorted(layer["sharpness"] for layer in r["layers"] if layer["drawn"] == drawn)
            middle, largest = values[len(values) // 2], values[-1]
            rows.append([f"{r['network']}, layers {label}", len(values), f"{middle:.0f}", f"{largest:.0f}"])
            rows[-1].append(f"{2 / largest:.4f}")
    note = (
        "λ: the largest eigenvalue in size of the loss's Hessian over one layer's weights, after three epochs of the "
        "head alone on CIFAR-10; gradient descent on that layer is stable below 2/λ."
    )
    return table(["", "layers", "median λ", "largest λ", "2 / largest"], rows) + "\n\n" + note


def _sparsity(records: Sequence[Record]) -> str:
    rows = [
        [
            f"{r['network']} {r['budget']}",
            r["method"],
            f"{r['elements']:,.0f}",
            f"{r['most_elements']:,}",
            *(
                f"{100 * r[f'{what}_{how}']:.1f}"
                for what in ("activation", "weight", "flops")
                for how in ("counted", "measured")
            ),
        ]
        for r in records
        if r["method"] not in ("full", "head only")
    ]
    parts = ("activations", "weight gradients", "their FLOPs")
    header = ["", "method", "elements", "at most", *(f"{p}, {how}" for p in parts for how in ("counted", "measured"))]
    budgets = " · ".join(
        f"{n.name}: " + ", ".join(f"{name} {size:,}" for name, size in n.budgets.items()) for n in NETWORKS.values()
    )
    note = (
        "Percent left out, mean over the draws of eight epochs. Measured: bytes that convolutions kept for backward, "
        "elements of the gradients that the step left (of SU's biases too, the head apart), FLOPs "
        f"of the kernels that ran. Budgets in elements: {budgets}."
    )
    return table(header, rows) + "\n\n" + note


def _bytes(records: Sequence[Record]) -> str:
    full = {r["network"]: r for r in records if r["method"] == "full"}
    rows = [
        [
            f"{r['network']} {r['budget'] if r['method'] not in full else ''}".strip(),
            r["method"],
            megabytes(r["saved"]),
            f"{full[r['network']]['saved'] / r['saved']:.0f}",
            megabytes(r["peak"]),
            f"{full[r['network']]['peak'] / r['peak']:.1f}",
        ]
        for r in records
    ]
    return table(["", "method", "kept MB", "times less than full", "peak MB", "times less than full"], rows)


def _rankings(records: Sequence[Record]) -> str:
    rows: list[list[str]] = []
    for network in NETWORKS:
        runs = [r for r in records if r["network"] == network]
        for one, other in itertools.combinations_with_replacement(dict.fromkeys(r["task"] for r in runs), 2):
            pairs = [
                spearman(list(a["rgn"].values()), list(b["rgn"].values()))
                for a, b in itertools.combinations(runs, 2)
                if {a["task"], b["task"]} == {one, other}
            ]
            if pairs:
                rows.append([network, f"{one}, {other}", f"{min(pairs):.3f}", f"{sum(pairs) / len(pairs):.3f}"])
    counts = " · ".join(
        f"{network}: " + ", ".join(f"{r['task']} {r['layers']}" for r in records if r["network"] == network)
        for network in NETWORKS
    )
    return (
        table(["", "tasks", "lowest Spearman", "mean"], rows)
        + f"\n\nTwo seeds a task at most. Layers that hold 97 % of the RGN, by run: {counts}."
    )


def spearman(a: Sequence[float], b: Sequence[float]) -> float:
    """Correlation of the ranks; ties, which gradients do not make, in order of appearance."""
    ranks = [torch.tensor(values).argsort().argsort().double() for values in (a, b)]
    return float(torch.corrcoef(torch.stack(ranks))[0, 1])
