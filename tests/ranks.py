"""Run scenes on two real processes, one after another in one process group, and see what each rank has to say."""

from __future__ import annotations

import os
from collections.abc import Callable, Sequence
from datetime import timedelta
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
import torch.multiprocessing as mp

from tithe import TitheError

Scene = Callable[[int], Any]


def play(folder: Path, *scenes: Scene, seconds: float = 60, init: bool = True) -> dict[str, tuple[Any, Any]]:
    """Return what each scene gave on ranks 0 and 1: its result, or the TitheError that it raised.

    A scene that fails leaves its ranks able to go on with the next: all of them were told.

    Args:
        folder: to meet in.
        scenes: run one after another, by rank.
        seconds: the timeout of the process group.
        init: whether there is a process group; scenes may make their own.
    """
    mp.start_processes(_rank, (str(folder), scenes, seconds, init), nprocs=2, start_method="fork")
    found = [torch.load(folder / f"played-{rank}.pt", weights_only=False) for rank in range(2)]
    return {scene.__name__: (found[0][index], found[1][index]) for index, scene in enumerate(scenes)}


def meet(rank: int, file: str, seconds: float = 60) -> None:
    """Make the process group of two ranks, over a file."""
    dist.init_process_group(
        "gloo", init_method=f"file://{file}", rank=rank, world_size=2, timeout=timedelta(seconds=seconds)
    )


def _rank(rank: int, folder: str, scenes: Sequence[Scene], seconds: float, init: bool) -> None:
    torch.set_num_threads(1)
    os.environ.pop("WORLD_SIZE", None)
    if init:
        meet(rank, f"{folder}/meet", seconds)
    results: list[Any] = []
    for scene in scenes:
        torch.manual_seed(0)
        try:
            results.append(scene(rank))
        except TitheError as error:
            results.append(error)
    torch.save(results, f"{folder}/played-{rank}.pt")
    if dist.is_initialized():
        dist.destroy_process_group()


def refused(found: tuple[Any, Any], *words: str) -> None:
    """Assert that both ranks refused, in these words."""
    for rank, error in enumerate(found):
        assert isinstance(error, TitheError), (rank, error)
        for word in words:
            assert word in str(error), (rank, word, str(error))
