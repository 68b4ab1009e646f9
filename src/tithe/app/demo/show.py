"""`run`: the demonstration from start to end."""

from __future__ import annotations

import json
import os
from collections.abc import Generator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from rich.console import Console

from tithe.app import terminal
from tithe.app.demo import report
from tithe.app.demo.contestants import CONTESTANTS
from tithe.app.demo.race import FULL, QUICK, race
from tithe.files import staging, writing


def run(output: Path, *, seed: int = 0, quick: bool = False, console: Console | None = None) -> dict[str, Any]:
    """Pretrain a small network on the digits 0 to 4, fine-tune it to 5 to 9 by each method, and compare.

    Args:
        output: folder for `demo.png`, `result.json`, the base and each method's file; made if missing. Its files are
            replaced at the end, each at once: an interrupted run leaves them as they were.
        seed: of weights, batches and choices; the same seed gives the same accuracies on the same machine.
        quick: a few steps of everything, to see that it runs; the accuracies then mean nothing.
        console: where to write; a new one on standard output if None.

    Returns:
        What `result.json` holds: the settings, the machine, and under "rows" one dictionary for each method.

    Raises:
        TitheError: `output` cannot be a folder, the embedded images were changed, or a saved file does not give the
            tuned network again.
    """
    console = terminal.console() if console is None else console
    length = QUICK if quick else FULL
    with writing(output):
        output.mkdir(parents=True, exist_ok=True)
    with writing(output), staging(output / "demo") as folder, torch.random.fork_rng(devices=()), _one_thread():
        with terminal.Bar(console, length.steps(CONTESTANTS)) as bar:
            results = race(CONTESTANTS, folder, length=length, seed=seed, bar=bar)
        report.figure(results, folder / "demo.png")
        outcome = report.as_json(results, length=length, seed=seed, seconds=bar.seconds)
        (folder / "result.json").write_text(json.dumps(outcome, indent=2) + "\n", encoding="utf-8")
        for path in sorted(folder.iterdir()):
            os.replace(path, output / path.name)
    if quick:
        console.print("A quick run: a few steps of everything. The accuracies below mean nothing.", highlight=False)
    console.print()
    console.print(report.table(results))
    console.print()
    console.print(report.remarks(results, length))
    console.print(f"{bar.seconds:.0f} seconds. Figure, numbers and files: {output}", markup=False, highlight=False)
    return outcome


@contextmanager
def _one_thread() -> Generator[None, None, None]:
    """Compute on one thread: a second one wins a third at this size, and loses tenfold where the machine is busy."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(before)
