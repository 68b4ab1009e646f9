"""Benchmarks whose runs fall into cells that do not depend on each other: one process each, one thread a process."""

from __future__ import annotations

import argparse
import multiprocessing
from collections.abc import Iterable
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path
from typing import Protocol

from benchmarks.records import DATA, RESULTS


class Cell(Protocol):
    """Runs that depend on each other's choices."""

    def work(self) -> None:
        """Run what is missing."""
        ...


def options(description: str) -> argparse.ArgumentParser:
    """Where the data lie, where the results go, how many processes."""
    parser = argparse.ArgumentParser(description=description, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=Path, default=DATA, help="folder that holds cifar10/ and cifar100/")
    parser.add_argument("--results", type=Path, default=RESULTS, help="folder of the JSON lines")
    parser.add_argument("--workers", type=int, default=1, help="processes of one thread each")
    return parser


def run(cells: Iterable[Cell], workers: int) -> None:
    """Run what is missing of every cell, in this order."""
    if workers == 1:
        for cell in cells:
            cell.work()
        return
    with ProcessPoolExecutor(workers, mp_context=multiprocessing.get_context("spawn")) as pool:
        for _ in pool.map(_work, cells):
            pass


def _work(cell: Cell) -> None:
    cell.work()
