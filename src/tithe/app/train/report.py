"""The end of a run: the delta, the test score, one table, `result.json` and a figure of the loss."""

from __future__ import annotations

import json
import math
import platform
from collections.abc import Mapping, Sequence
from datetime import UTC, datetime
from importlib import metadata
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.markup import escape

from tithe.app import terminal
from tithe.app.terminal import human
from tithe.app.train.averaging import save
from tithe.app.train.loop import Run
from tithe.app.train.merging import describe
from tithe.app.train.position import bill, drawn
from tithe.app.train.progress import read_log
from tithe.app.train.recording import recorded_steps
from tithe.app.train.setup import PACKAGES
from tithe.app.train.sharing import write_card
from tithe.files import replacing


def finish(run: Run) -> dict[str, Any]:
    """Evaluate on the test split once, and write the delta and the results; every process calls it.

    Returns:
        What `result.json` holds; sizes in bytes, times in seconds.
    """
    folder, at = run.recipe.output, run.position
    delta = folder / ("network.safetensors" if at.widths else "delta.safetensors")
    if run.accelerator.is_main_process:
        task, labels = run.recipe.data.task, run.examples.labels
        num_labels = run.task.num_outputs(run.recipe, labels)
        widths = None if at.average is None else at.average["narrow"]
        save(run.trainee, delta, widths, metadata=describe(task, num_labels, labels))
        with replacing(folder / "model", folder=True, overwrite=True) as extras:
            if run.recipe.model.scratch is False or at.widths:
                run.network.save_extras(extras)
            else:
                run.network.save(extras)  # nobody else has the weights that it began with
    run.accelerator.wait_for_everyone()
    scores = run.scores(required=())  # whatever becomes of it, the weights are written
    result = _result(run, scores, delta)
    if run.accelerator.is_main_process:
        with replacing(folder / "result.json") as file:
            file.write_text(json.dumps(result, indent=2) + "\n", encoding="utf-8")
        write_card(folder, result)
        _draw(folder)
    return result


def _result(run: Run, scores: dict[str, dict[str, float]], delta: Path) -> dict[str, Any]:
    at = run.position
    own = run.accounts() if at.average is None else at.average["own"]
    return {
        "metrics": scores,
        "failed": run.failed,
        "notes": list(run.notes),
        "best_step": at.best_step,
        "steps": at.step,
        "stopped": at.stopped,
        "epochs": at.epoch,
        "evaluations": at.evaluations,
        "learning_rate": {"highest": run.recipe.optimizer.lr or at.lr, "suggested": run.recipe.optimizer.lr is None},
        "labels": list(run.examples.labels),
        "rows": {name: len(samples) for name, samples in run.samples.items()},
        "trainable": own["trainable"],
        "bytes": {
            "peak": None if at.ledger is None else at.ledger["peak"],
            "kept_for_backward": None if at.ledger is None else at.ledger["kept"],
            "optimizer": own["optimizer"],
            "delta": delta.stat().st_size,
            "history": sum(path.stat().st_size for paths in recorded_steps(run.recipe).values() for path in paths)
            if at.recorded
            else 0,
        },
        "ledger": at.ledger,
        "draws": at.draws,
        "widths": at.widths,
        "history": at.recorded,
        "average": None if at.average is None else _average(run, at.average),
        "seconds": {"training": at.seconds, "per_step": at.seconds / max(1, at.step)},
        "seeds": {"run": run.recipe.run.seed, "split": run.recipe.data.split_seed},
        "device": str(run.accelerator.device),
        "processes": run.accelerator.num_processes,
        "versions": {"python": platform.python_version(), **{name: metadata.version(name) for name in PACKAGES}},
        "date": datetime.now(UTC).isoformat(timespec="seconds"),
        "data": run.examples.fingerprint(),
        "recipe": run.recipe.settings(),
        "told": {"recipe": run.recipe.told(), "folder": str(run.recipe.folder)},
        "inputs": run.network.encoder.statistics(),
        "files": {"delta": str(delta), "result": str(run.recipe.output / "result.json")},
    }


def _average(run: Run, began: Mapping[str, Any]) -> dict[str, Any]:
    """What averaging gave: metrics of the run's last weights, of their mean, and (`metrics` of the result) trained.

    "mean" has the metrics of what "name" says, which need not be the mean.
    """
    assert run.recipe.average is not None
    return {
        "name": run.recipe.average.name,
        "step": began["step"],
        "checkpoints": began["checkpoints"],
        "coefficients": sum(parameter.numel() for parameter in run.trainee.parameters()),
        "last": began["last"],
        "mean": began["mean"],
        "seconds": run.position.seconds - began["seconds"],
    }


def show(result: dict[str, Any], console: Console) -> None:
    """Print a result as one table of at most 80 columns."""
    table = terminal.facts()
    for split, values in result["metrics"].items():
        table.add_row(split, "  ".join(f"{name} {value:.4f}" for name, value in values.items()))
    for split, reason in result["failed"].items():
        table.add_row(split, escape(f"not scored: {reason}"))
    for note in result["notes"]:
        table.add_row("data", escape(note))
    trainable, sizes, seconds = result["trainable"], result["bytes"], result["seconds"]
    rows = {
        "best of": f"step {result['best_step']} of {result['steps']}, chosen on validation"
        + ("; ended early" if result["stopped"] is not None else ""),
        "trained": f"{trainable['total']:,} of {trainable['model']:,} weights ({trainable['fraction']:.2%})",
        **({"of it head": f"{trainable['head']:,}"} if trainable["head"] else {}),
        "peak of a step": "not measured" if sizes["peak"] is None else f"{human(sizes['peak'])} beyond the model",
        "optimizer": human(sizes["optimizer"]),
        "network" if result["widths"] else "delta": human(sizes["delta"]),
        "time": f"{seconds['training']:.1f} s, {seconds['per_step'] * 1e3:.0f} ms a step",
    }
    if result["learning_rate"]["suggested"]:
        rows["learning rate"] = f"{result['learning_rate']['highest']:.2g} at most, suggested"
    method = result["recipe"]["method"]
    if method["lean"]:
        kept = ["8 bits"] if method["lean_bits"] else []
        kept += ["exact"] if method["lean_exact"] else []
        rows["other layers"] = ", ".join(["lean", *kept])
    rows = {**rows, **_budget_rows(result["draws"]), **_width_rows(result["widths"])}
    if result["history"]:
        rows["history"] = f"{len(result['history'])} checkpoints, {human(sizes['history'])}"
    rows = {**rows, **_average_rows(result["average"])}
    rows["written"] = result["files"]["delta"]
    for name, value in rows.items():
        table.add_row(name, value)
    console.print(table)


def _budget_rows(draws: Sequence[Mapping[str, Any]]) -> dict[str, str]:
    """What the draws under a budget cost at most, and what the last one was."""
    if not draws:
        return {}
    dearest = max(draws, key=lambda draw: draw["spent"])
    return {
        "budget": f"{bill(dearest)} at most, {len(draws)} draw{'s' * (len(draws) > 1)}",
        "last draw": drawn(draws[-1]),
        "predicted": f"{human(max(draw['peak'] for draw in draws))} peak of a step, θ and state included",
    }


def _width_rows(widths: Sequence[Mapping[str, Any]]) -> dict[str, str]:
    """What is left of a network that got narrower."""
    if not widths:
        return {}
    first, last = widths[0], widths[-1]
    return {"cost": f"{last['spent']:.3f} of the {last['cost']}", "units": f"{last['units']:,} of {first['units']:,}"}


def _average_rows(average: Mapping[str, Any] | None) -> dict[str, str]:
    """What the run's last weights gave, and their mean: the rows above are those of the result."""
    if average is None:
        return {}
    rows = {
        "averaged": f"{average['checkpoints']} checkpoints after step {average['step']}, {average['seconds']:.1f} s"
    }
    start = "their mean" if average["name"] == "mean" else f"like {average['name']}"
    for label, key in (("last weights", "last"), (start, "mean")):
        told = [
            f"{split} " + "  ".join(f"{name} {value:.4f}" for name, value in values.items())
            for split, values in average[key].items()
        ]
        rows[label] = ", ".join(told)
    return rows


def _draw(folder: Path) -> None:
    train, validation = read_log(folder, "train"), read_log(folder, "validation")
    figure = terminal.figure(6.4, 3.6)
    axes = figure.add_subplot()
    losses = [entry["loss"] for entry in train]
    axes.plot([entry["step"] for entry in train], losses, color=terminal.COLOURS[0], alpha=0.35, linewidth=0.8)
    axes.plot([entry["step"] for entry in train], _smooth(losses), color=terminal.COLOURS[0], label="training loss")
    axes.set_xlabel("step")
    axes.set_ylabel("training loss")
    if validation:
        name = next(key for key in validation[0] if key not in {"step", "split"})
        other = axes.twinx()
        other.plot(
            [e["step"] for e in validation],
            [e[name] for e in validation],
            "o-",
            color=terminal.COLOURS[1],
            markersize=3,
        )
        other.set_ylabel(f"validation {name}", color=terminal.COLOURS[1])
    terminal.save_figure(figure, folder / "loss.png")


def _smooth(values: list[float]) -> list[float]:
    """An exponential mean whose weights sum to one from the first value on."""
    keep = math.exp(-1 / max(1.0, len(values) / 20))
    total, weight, smooth = 0.0, 0.0, list[float]()
    for value in values:
        total, weight = keep * total + value, keep * weight + 1
        smooth.append(total / weight)
    return smooth
