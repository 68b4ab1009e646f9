"""Processes that record histories and are killed, find no room, or are watched: run as a script by test_history_crash.

It imports torch once, and forks for each thing that may happen.
"""

from __future__ import annotations

import os
import random
import resource
import signal
import sys
import time
import traceback
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import nn

import tithe
from tithe.averages.history import spans
from tithe.averages.safetensors_ranges import FlatWriter

POINTS: dict[str, tuple[object, str, int, bool]] = {
    "before it begins": (Path, "open", 1, False),
    "before the header": (FlatWriter, "__init__", 1, False),
    "before a tensor": (FlatWriter, "write", 1, False),
    "between tensors": (FlatWriter, "write", 3, True),
    "before it is safe": (os, "fsync", 1, False),
    "when it is safe": (os, "fsync", 1, True),
    "before its name": (os, "link", 1, False),
    "after its name": (os, "link", 1, True),
    "before the folder is safe": (os, "fsync", 2, False),
    "at the end": (os, "fsync", 2, True),
}
"""Where to die: before or after that call of that function, while a checkpoint is written."""

KINDS = ("whole", "coded", "pt")


def network() -> nn.Module:
    return nn.Sequential(nn.Linear(100, 100), nn.BatchNorm1d(100))


def move(model: nn.Module) -> None:
    with torch.no_grad():
        model[0].weight.add_(0.01 * torch.randn(100, 100))


def fork(act: Callable[..., object], *arguments: Any) -> int:
    """Run a function in a process of its own, and return that."""
    sys.stdout.flush()
    process = os.fork()
    if process:
        return process
    status = 0
    try:
        act(*arguments)
        sys.stdout.flush()
    except BaseException:
        traceback.print_exc()
        status = 1
    finally:
        os._exit(status)


def wait(process: int) -> int:
    """How it ended: its status, or minus the signal that killed it."""
    return os.waitstatus_to_exitcode(os.waitpid(process, 0)[1])


def dying(real: Callable[..., object], count: int, after: bool) -> Callable[..., object]:
    """The same function, but that its `count`-th call is the last thing that the process does."""
    calls = 0

    def call(*arguments: Any, **settings: Any) -> object:
        nonlocal calls
        calls += 1
        if calls == count and not after:
            os.kill(os.getpid(), signal.SIGKILL)
        result = real(*arguments, **settings)
        if calls == count:
            os.kill(os.getpid(), signal.SIGKILL)
        return result

    return call


def die_at(point: str, folder: Path, bits: int | None, step: int) -> None:
    """Record checkpoints, and die while that of `step` is written."""
    model, history = network(), tithe.History(folder, bits)
    for number in range(step + 1):
        if number == step:
            owner, name, count, after = POINTS[point]
            setattr(owner, name, dying(getattr(owner, name), count, after))
        move(model)
        history.record(model, number)


def loop(folder: Path) -> None:
    model, history = network(), tithe.History(folder, 8)
    step = history.steps[-1] if len(history) else 0
    while True:
        step += 1
        move(model)
        history.record(model, step)


def anytime(folder: Path) -> None:
    """Kill a process that records without a pause, 25 times; print how many checkpoints there are each time."""
    draw = random.Random(0)
    for number in range(25):
        process = fork(loop, folder)
        # The rounds are to add checkpoints whatever the machine does meanwhile.
        while number % 5 == 0 and not (folder / f"{3 * (number + 5):06d}.safetensors").exists():
            time.sleep(0.002)
        time.sleep(draw.uniform(0, 0.08))
        os.kill(process, signal.SIGKILL)
        assert wait(process) == -signal.SIGKILL
        print(len(tithe.History(folder)))


def points(folder: Path) -> None:
    for point in POINTS:
        for bits in (None, 8):
            print(wait(fork(die_at, point, folder / f"{point}, {bits}", bits, 2)))
    print(wait(fork(die_at, "before its name", folder / "first", 8, 0)))


def starve(folder: Path, bits: int | None) -> None:
    """Train, record each step, and have no room during three of them."""
    signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    model = network()
    history = tithe.History(folder, bits)
    written: list[bool] = []
    with warnings.catch_warnings(record=True) as told:
        warnings.simplefilter("always")
        for step in range(9):
            room = 1000 if 3 <= step < 6 else resource.RLIM_INFINITY
            resource.setrlimit(resource.RLIMIT_FSIZE, (room, resource.RLIM_INFINITY))
            model(torch.randn(4, 100)).square().mean().backward()
            with torch.no_grad():
                for weight in model.parameters():
                    weight.sub_(0.01 * weight.grad)
            written.append(history.record(model, step))
            if 3 <= step < 6:
                again = tithe.History(folder)
                assert len(history) == len(again) == len(list(again)) == 3
    resource.setrlimit(resource.RLIMIT_FSIZE, (resource.RLIM_INFINITY, resource.RLIM_INFINITY))
    print(written, [f"{one.category.__name__}: {one.message}" for one in told], told[0].filename)


def full(folder: Path) -> None:
    for bits in (None, 8, 1):
        assert wait(fork(starve, folder / str(bits), bits)) == 0


def watch(path: Path, what: str) -> None:
    """Print by how many MiB the most memory that was ever in use grows while a history is read."""

    def peak() -> float:
        return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024

    before = peak()
    history = tithe.History(path)
    for name, form in history.rows.forms.items():
        if what == "mean":
            history.average_tensor(name, [1 / len(history)] * len(history))
            continue
        for start, stop in spans(form.numel, len(history)):
            history.columns(name, start, stop)
    print(peak() - before)


def memory(folder: Path) -> None:
    for kind in KINDS:
        for what in ("columns", "mean"):
            assert wait(fork(watch, folder / kind, what)) == 0
    assert wait(fork(files, folder / "many")) == 0


def files(folder: Path) -> None:
    resource.setrlimit(resource.RLIMIT_NOFILE, (40, 40))
    history = tithe.History(folder)
    history.mean()
    assert len(list(history)) == len(history)
    print(len(history))


if __name__ == "__main__":
    torch.set_num_threads(1)
    {"anytime": anytime, "points": points, "full": full, "memory": memory}[sys.argv[1]](Path(sys.argv[2]))
