"""What one training step of MobileNetV2 keeps, peaks at and takes, for every method: 224² images, batch 8.

Random weights and images, SGD without momentum; CPU seconds are medians of steps taken in turn, one of each method.
TraDy is given the budget of elements for which its draw holds 1 % or 5 % of the network's input channels; "every
layer" trains the same share of the channels of each convolution, the case in which backward cannot stop early.
`benchmarks.memory_growth` has the same figures over batch sizes and resolutions.
"""

from __future__ import annotations

import argparse
import statistics
from collections import Counter

import torch
from torch import Tensor, nn

import tithe
from benchmarks.memory_methods import Batch, Trainee, attached, budget_for, images, prepared, ranking, trady
from benchmarks.records import Record, Store, parse
from benchmarks.timing import cpu_seconds

SIDE, SIZE, ROUNDS = 224, 8, 9
SHARES = (0.01, 0.05)


def figures(trainee: Trainee, batch: Batch) -> Record:
    """Bytes of one step, measured; saved bytes by the kind of layer that keeps them; what a prediction says."""
    trainee.step(batch)
    ledger = tithe.measure(lambda: trainee.step(batch), model=trainee.model)
    predicted = None if trainee.micro else trainee.predict(batch)  # of a step that starts without gradients
    kinds = {path: type(module).__name__ for path, module in trainee.model.named_modules()}
    by_layer: Counter[str] = Counter()
    for path, num_bytes in ledger.kept_by_module.items():
        by_layer[kinds.get(path, "loss") if path else "loss"] += num_bytes
    selections = trainee.plan.selections if trainee.plan is not None else {}
    return {
        "trained": trainee.num_trained,
        "channels": trainee.num_channels,
        "layers": len(selections) or None,
        "saved_bytes": ledger.kept,
        "peak_bytes": ledger.peak,
        "standing_bytes": trainee.standing_bytes(batch),
        "by_kind": dict(ledger.by_kind),
        "saved_by_layer": dict(by_layer.most_common()),
        "predicted_saved_bytes": None if predicted is None else predicted.kept,
        "predicted_peak_bytes": None if predicted is None else predicted.peak,
    }


@torch.no_grad()
def floor(model: nn.Module, batch: Batch) -> Record:
    """The largest sum of a layer's input and output, which live at once, and the layer: no eager peak is lower."""
    sizes: dict[str, int] = {}

    def note(name: str, x: Tensor, y: Tensor) -> None:
        shared = x.untyped_storage()._cdata == y.untyped_storage()._cdata
        sizes[name] = y.nbytes if shared else x.nbytes + y.nbytes

    leaves = [(name, module) for name, module in model.named_modules() if not list(module.children())]
    handles = [m.register_forward_hook(lambda _, x, y, n=n: note(n, x[0], y)) for n, m in leaves]
    model(batch[0])
    for handle in handles:
        handle.remove()
    largest = max(sizes, key=lambda name: sizes[name])
    return {"floor_bytes": sizes[largest], "floor_layer": largest}


def gradient_difference(elements: int, *, double: bool) -> float:
    """Largest difference of a gradient between the whole batch and micro-batches of 1, relative to its largest value.

    Args:
        elements: of the budget.
        double: compute in float64, where what is left of a difference can only be rounding.
    """
    x, y = images(SIZE, SIDE)
    batch = (x.double() if double else x, y)
    trainee = attached(trady(elements), SIZE, SIDE, double=double)
    whole = trainee.gradients(batch)
    trainee.micro = 1
    parts = trainee.gradients(batch)
    assert whole
    assert len(whole) == len(parts)
    return max(float((a - b).abs().max() / a.abs().max()) for a, b in zip(whole, parts, strict=True))


def main(args: argparse.Namespace) -> None:
    """Measure every method once and append the rows."""
    torch.set_num_threads(args.threads)
    store = Store(args.results / "memory.jsonl", key=("method",))
    if store.find(method="full") is not None:
        return
    ranking()
    budgets = {share: budget_for(share, SIDE) for share in SHARES}
    batch = images(SIZE, SIDE)
    trainees = {name: make() for name, make in prepared(SIZE, SIDE, budgets).items()}
    seconds = cpu_seconds(trainees, batch, rounds=ROUNDS)
    for name, trainee in reversed(trainees.items()):  # "full" last: it says that all are there
        row = {"method": name, "batch": SIZE, "side": SIDE, **figures(trainee, batch)}
        row |= {"cpu_ms": 1e3 * statistics.median(seconds[name])}
        row |= {"cpu_ms_all": [round(1e3 * s, 2) for s in seconds[name]]}
        if name.startswith("TraDy"):
            row["elements"] = elements = budgets[0.05 if "5 %" in name else 0.01]
            if trainee.micro == 1:
                row["gradient_difference"] = gradient_difference(elements, double=False)
                row["gradient_difference_float64"] = gradient_difference(elements, double=True)
                assert row["gradient_difference"] < 1e-4, row
                assert row["gradient_difference_float64"] < 1e-11, row
        if name == "full":
            row |= floor(trainee.model, batch)
        store.add(row)


if __name__ == "__main__":
    main(parse(__doc__ or ""))
