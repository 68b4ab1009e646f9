"""All ways to average, each tried on a recipe's data; and the one that is written, in the format that came in."""

from __future__ import annotations

import time
from collections.abc import Iterator
from pathlib import Path

import torch
from torch import Tensor

import tithe
from tithe import History
from tithe.app.average.bench import Bench, split_sizes
from tithe.app.average.soup import greedy_soup
from tithe.app.average.trained import Trained, Trainer, rates
from tithe.app.average.ways import METHODS, Comparison, Row, Settings, ema_weights, one_hot
from tithe.app.terminal import Bar
from tithe.app.train.recipe import Recipe
from tithe.averages.average import average, check_output, write_like
from tithe.averages.averageable import check_averageable


def compare(recipe: Recipe, history: History, output: Path, settings: Settings, bar: Bar) -> Comparison:
    """Try every way to average, and write the one that is asked for, or the best on the selection rows.

    Args:
        recipe: model, data and metrics.
        history: the checkpoints.
        output: the new file or folder.
        settings: which way is written, and how TWA trains.
        bar: is told how far this is.

    Returns:
        What each way gave.

    Raises:
        TitheError: when data, model and checkpoints do not fit together, or the output exists.
    """
    history = history.distinct()
    check_output(output, history)
    check_averageable(history.rows, range(len(history)))
    bar.phase("reading data and model")
    bench = Bench(recipe, history, bar.to)
    for note in bench.notes:
        bar.say(note)
    bench.plan(_cost(bench, settings))
    rows: list[Row] = []
    chosen: tuple[Row, dict[str, Tensor]] | None = None
    for row in _rows(bench, settings, bar):
        rows.append(row)
        asked = settings.written in ("auto", row.method)
        if asked and (chosen is None or row.merit > chosen[0].merit):
            chosen = row, bench.snapshot()
    assert chosen is not None
    bar.phase("writing")
    _write(bench, output, *chosen)
    return Comparison(
        checkpoints=tuple(map(str, history.rows.paths)),
        skipped={str(path): why for path, why in history.skipped.items()},
        rows=tuple(rows),
        written=chosen[0].method,
        output=str(output),
        splits=split_sizes(bench),
    )


def _rows(bench: Bench, settings: Settings, bar: Bar) -> Iterator[Row]:
    """A row a way; the model is what the row says while it is looked at."""
    n, scores = len(bench.history), list[float]()
    started = time.monotonic()
    for index in range(n):
        bar.phase(f"checkpoint {index + 1} of {n}")
        bench.put_checkpoint(index)
        scores.append(bench.merit())
    best = max(range(n), key=scores.__getitem__)
    bench.put_checkpoint(best)
    yield _row(bench, "best", bench.history.rows.paths[best].name, started, one_hot(best, n))
    fixed: list[tuple[str, list[float], str]] = [
        ("mean", [1 / n] * n, f"of {n}"),
        ("ema", ema_weights(n, settings.decay), f"decay {settings.decay:g}"),
    ]
    if settings.like is not None:
        told = f"of the last {settings.last}" if settings.last else f"of {n}"
        fixed.append((settings.like, bench.history.weights(settings.like, last=settings.last), told))
    for method, weights, detail in fixed:
        started = time.monotonic()
        bar.phase(METHODS.get(method, method))
        bench.put_average(weights)
        bench.estimate()
        yield _row(bench, method, detail, started, weights)
    started = time.monotonic()
    bar.phase(METHODS["greedy"])
    kept = greedy_soup(bench, scores)
    weights = [(index in kept) / len(kept) for index in range(n)]
    yield _row(bench, "greedy", f"{len(kept)} of {n}", started, weights)
    started = time.monotonic()
    bar.phase("reading the span")
    trainer = Trainer(bench, settings)
    try:
        for method, split, places in (
            ("twa-t", "train", range(len(bench.samples["train"]))),
            ("twa-v", "validation", bench.tuning),
        ):
            bar.phase(METHODS[method])
            point = trainer.train(split, places)
            detail = _told(point, settings)
            found = trainer.plan.coefficients()
            table = {"all": found["span"]} if settings.granularity == "model" else _in_order(bench, found)
            yield _row(bench, method, detail, started, table)
            started = time.monotonic()
    finally:
        trainer.plan.release()


def _in_order(bench: Bench, coefficients: dict[str, Tensor]) -> dict[str, Tensor]:
    """The rows in the order in which the model has its parameters."""
    return {name: coefficients[name] for name, _ in bench.model.named_parameters() if name in coefficients}


def _told(point: Trained, settings: Settings) -> str:
    if point.epoch == 0:
        return "the mean: no epoch was better"
    return f"lr {point.rate:g}, epoch {point.epoch} of {settings.epochs}"


def _row(bench: Bench, method: str, detail: str, started: float, coefficients: object) -> Row:
    table = coefficients if isinstance(coefficients, dict) else {"all": torch.tensor(coefficients, dtype=torch.float64)}
    return Row(
        method=method,
        selection=bench.select(),
        test=bench.test(),
        detail=detail,
        seconds=time.monotonic() - started,
        coefficients=table,
    )


def _cost(bench: Bench, settings: Settings) -> float:
    """What all of it takes, in forward passes of one example."""
    n, look = len(bench.history), bench.estimate_cost + bench.select_cost
    epochs = settings.epochs * len(rates(settings))
    trained = bench.step_cost(len(bench.samples["train"]) + len(bench.tuning)) * epochs + 2 * epochs * look
    named = settings.like is not None
    fixed = n * bench.select_cost + (2 + named) * bench.estimate_cost + (n - 1) * look + bench.estimate_cost + look
    return fixed + trained + (len(METHODS) + named) * (bench.select_cost + bench.test_cost)


def _write(bench: Bench, output: Path, row: Row, state: dict[str, Tensor]) -> None:
    """Write what a row says, in the format of the checkpoints."""
    history, weights = bench.history, row.coefficients.get("all")
    if bench.base is not None:
        told = {"method": METHODS.get(row.method, row.method), "averaged": str(len(history))}
        base = {name: tensor.cpu() for name, tensor in bench.base.items()}
        tithe.diff(base, state, output, metadata=told)
    elif row.method == "best" and history.bits is None:
        average([history.rows.paths[int(row.coefficients["all"].argmax())]], output)
    elif weights is not None and not bench.has_statistics and not row.method.startswith("twa"):
        average(history, output, weights.tolist())
    else:
        write_like(history, output, {name: state[name] for name in history.rows.forms})
