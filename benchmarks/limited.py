"""The smallest memory limit under which each method finishes a short epoch: MobileNetV2, 224² images, batch 32.

Every trial is a process of its own whose data (heap and private mappings, libraries' included) the kernel limits to M
megabytes from its first instruction: `setrlimit(RLIMIT_DATA)`. The epoch is two batches, drawn when they are needed.
M is bisected to two percent. "Imports alone" is a process that imports torch and tithe and makes
an optimizer, which imports more of torch.
"""

from __future__ import annotations

import argparse
import json
import resource
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import torch
from torch import nn

from benchmarks.memory_methods import RANK, budget_for, images, prepared, ranking
from benchmarks.records import Record, Store, parse

SIDE, SIZE, STEPS, SHARE = 224, 32, 2, 0.01
MEGA = 10**6
AMPLE, STRIDE = 8000, 150  # megabytes: of the first trial, and between the first limits tried
IMPORTS = "imports alone"
TRADY = f"TraDy, {100 * SHARE:g} %"
METHODS = (
    IMPORTS,
    "full",
    f"LoRA r{RANK}",
    f"{TRADY}, micro-batches of 1",
    TRADY,
    "full, frozen norms, micro-batches of 1",
    f"LoRA r{RANK}, frozen norms, micro-batches of 1",
    f"LoRA r{RANK}, tithe.lean",
    "head only",
)


def status(*names: str) -> dict[str, int]:
    """Lines of the kernel's account of this process, in bytes."""
    found = dict(line.split(":", 1) for line in Path("/proc/self/status").read_text().splitlines())
    return {name: int(found[name].split()[0]) * 1024 for name in names}


def child(method: str, elements: int) -> None:
    """One short epoch in this process; prints what it took."""
    torch.set_num_threads(1)
    torch.optim.SGD([nn.Parameter(torch.zeros(1))])  # making the first optimizer imports a third of torch
    start = status("VmData")["VmData"]
    if method != IMPORTS:
        trainee = prepared(SIZE, SIDE, {SHARE: elements})[method]()
        for seed in range(STEPS):
            trainee.step(images(SIZE, SIDE, seed=seed))
            if trainee.plan is not None:
                trainee.plan.step()
        if trainee.plan is not None:
            trainee.plan.end_epoch()
    print(json.dumps({"imported_bytes": start, "resident_bytes": status("VmHWM")["VmHWM"]}))


def trial(method: str, elements: int, megabytes: int) -> tuple[Record | None, str]:
    """What the process printed, or None, and its last words.

    Args:
        method: one of METHODS.
        elements: TraDy's budget.
        megabytes: the limit, M.
    """

    def limit() -> None:
        resource.setrlimit(resource.RLIMIT_DATA, (megabytes * MEGA,) * 2)

    code = f"from benchmarks.limited import child; child({method!r}, {elements})"
    done = subprocess.run(
        [sys.executable, "-c", code],
        capture_output=True,
        text=True,
        preexec_fn=limit,  # no threads here
        cwd=Path(__file__).parents[1],
        check=False,
    )
    said = done.stderr.strip().splitlines()
    words = said[-1] if said else f"exit status {done.returncode}"
    print(f"  {method}: {megabytes} MB {'finished' if done.returncode == 0 else words[:160]}", flush=True)
    return (json.loads(done.stdout.splitlines()[-1]) if done.returncode == 0 else None), words


def smallest(run: Callable[[int], tuple[Record | None, str]]) -> tuple[int, Record, str]:
    """The smallest limit that was enough, to two percent; its record; how the process just below it ended.

    Args:
        run: a trial under a limit in megabytes.
    """
    record, words = run(AMPLE)
    assert record is not None, words
    first = record
    high = record["resident_bytes"] // MEGA + 1  # counts the libraries' files too, so it should be enough
    low = high - STRIDE
    while (tried := run(low))[0] is not None:
        low, high, record = low - STRIDE, low, tried[0]
    words = tried[1]
    while high - low > max(high // 50, 1):
        middle = (low + high) // 2
        found, said = run(middle)
        if found is None:
            low, words = middle, said
        else:
            high, record = middle, found
    while record is first and run(high)[0] is None:  # reserved and never touched, so not resident: more is needed
        high += high // 50
    return high, record, words


def main(args: argparse.Namespace) -> None:
    """Bisect for each method and append the rows."""
    torch.set_num_threads(args.threads)
    store = Store(args.results / "limited.jsonl", key=("method",))
    missing = [method for method in METHODS if store.find(method=method) is None]
    if not missing:
        return
    ranking()
    elements = budget_for(SHARE, SIDE)
    for method in missing:
        start = time.perf_counter()
        found, record, words = smallest(lambda m, method=method: trial(method, elements, m))
        row = {"method": method, "batch": SIZE, "side": SIDE, "steps": STEPS, "smallest_megabytes": found}
        store.add({**row, **record, "below": words[:300], "seconds": round(time.perf_counter() - start)})


if __name__ == "__main__":
    main(parse(__doc__ or ""))
