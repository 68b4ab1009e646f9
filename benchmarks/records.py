"""Where results go: one JSON line a finished run, appended at once, skipped when it is already there."""

from __future__ import annotations

import argparse
import datetime
import importlib.metadata
import json
import os
import platform
import statistics
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch

Record = dict[str, Any]

RESULTS = Path(__file__).parent / "results"
DATA = Path(__file__).parents[2] / "shared" / "data"


def parse(description: str, *, tasks: bool = False, scores: bool = False, threads: int = 1) -> argparse.Namespace:
    """The options every benchmark has: where the data lie, where the results go, how many threads."""
    parser = argparse.ArgumentParser(description=description, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=Path, default=DATA, help="folder that holds text/sst2_sentences, text/mrpc …")
    parser.add_argument("--results", type=Path, default=RESULTS, help="folder of the JSON lines")
    parser.add_argument("--threads", type=int, default=threads, help="threads of torch")
    if tasks:
        parser.add_argument("--tasks", nargs="*", help="only these of sst2, mrpc, cola (to share them among processes)")
    if scores:
        parser.add_argument("--scores", nargs="*", help="only these of fisher, gradient, magnitude, random (likewise)")
    return parser.parse_args()


def processor() -> str:
    """The processor's model name, as the kernel gives it."""
    info = Path("/proc/cpuinfo")
    if info.exists():
        for line in info.read_text().splitlines():
            if line.startswith("model name"):
                return line.split(":", 1)[1].strip()
    return platform.processor() or platform.machine()


def environment() -> Record:
    """Date, machine and versions: what a number needs beside it to mean something."""
    versions = {"python": platform.python_version()}
    for name in ("torch", "transformers", "peft", "tithe"):
        versions[name] = importlib.metadata.version(name)
    return {
        "date": datetime.datetime.now(datetime.UTC).strftime("%Y-%m-%d %H:%M"),
        "machine": {"processor": processor(), "cores": os.cpu_count(), "threads": torch.get_num_threads()},
        "versions": versions,
    }


class Store:
    """A file of JSON lines, one a run; the key of a run says whether it has been done.

    Args:
        path: the file; its folder is made.
        key: names of the fields that tell runs apart.
    """

    def __init__(self, path: Path, *, key: Sequence[str]) -> None:
        path.parent.mkdir(parents=True, exist_ok=True)
        self.path = path
        self.key = tuple(key)
        self._runs: dict[tuple[Any, ...], Record] = {}
        for record in lines(path):
            self._runs[self._of(record)] = record

    def find(self, **fields: Any) -> Record | None:
        """The finished run with these key fields, or None."""
        return self._runs.get(self._of(fields))

    def add(self, record: Mapping[str, Any]) -> Record:
        """Append a finished run, with date and versions, and give it back."""
        full = {**record, **environment()}
        with self.path.open("a") as file:
            file.write(json.dumps(full) + "\n")
        self._runs[self._of(full)] = full
        print(" ".join(f"{k}={_short(v)}" for k, v in record.items() if not isinstance(v, dict | list)), flush=True)
        return full

    def _of(self, fields: Mapping[str, Any]) -> tuple[Any, ...]:
        return tuple(fields[name] for name in self.key)


def lines(path: Path) -> Iterator[Record]:
    """The records of a file of JSON lines; none when there is no file."""
    if path.exists():
        for line in path.read_text().splitlines():
            if line.strip():
                yield json.loads(line)


def mean_and_spread(values: Sequence[float]) -> tuple[float, float]:
    """Mean and sample standard deviation (0 for a single value)."""
    return statistics.fmean(values), statistics.stdev(values) if len(values) > 1 else 0.0


def _short(value: Any) -> str:
    return f"{value:.4g}" if isinstance(value, float) else str(value)
