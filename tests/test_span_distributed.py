"""Ranks share the columns of all checkpoints out: together they take the step that one process takes."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
import torch.distributed as dist
import torch.multiprocessing as mp
from torch import Tensor

import tithe
from histories import checkpoints, flat, recorded
from models import CASES, Batch

STEPS = 3
NAMES = ("bert", "resnet_basic", "tied_mlp")
GRANULARITIES = ("model", "tensor")


def _shares(batch: Batch, world: int) -> list[Batch]:
    return [{key: value[rank::world] for key, value in batch.items()} for rank in range(world)]


def _train(name: str, granularity: str, bits: int | None, folder: Path, world: int, rank: int) -> dict[str, Tensor]:
    case = CASES[name]
    model = case.model(dtype=torch.float64)
    if name == "resnet_basic":  # batch statistics of a share are not those of the batch
        model.eval()
    method = tithe.TWA(folder / name, granularity=granularity, bits=bits)
    plan = tithe.attach(model, method, loss=case.loss, head=case.head if name == "bert" else ())
    optimizer = torch.optim.SGD(plan.parameters(), lr=0.1, momentum=0.9)
    plan.bind(optimizer)
    for batch in case.batches(STEPS, 8, dtype=torch.float64):
        for part in _shares(_shares(batch, world)[rank], 2):  # two micro-batches a step
            plan.backward(lambda part=part: case.loss(model, part) / 2)
        optimizer.step()
        optimizer.zero_grad()
        plan.step()
    assert isinstance(plan, tithe.SubspacePlan)
    return {
        "weights": flat(model),
        "theta": next(plan.parameters()).detach().double(),
        "held": torch.tensor(float(plan.basis.nbytes)),
    }


def _settings() -> list[tuple[str, str, int | None]]:
    return [(name, granularity, bits) for name in NAMES for granularity in GRANULARITIES for bits in (None, 8)]


def _rank(rank: int, world: int, folder: str) -> None:
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{folder}/meet{world}", rank=rank, world_size=world)
    found = [_train(*setting, Path(folder), world, rank) for setting in _settings()]
    torch.save(found, f"{folder}/{world}-{rank}.pt")
    dist.destroy_process_group()


@pytest.mark.parametrize("world", [2, 4])
def test_ranks_take_the_step_of_one_process_and_share_the_columns(world: int, tmp_path: Path) -> None:
    for name in NAMES:
        recorded(tmp_path / name, checkpoints(CASES[name].model(dtype=torch.float64), 4))
    mp.start_processes(_rank, (world, str(tmp_path)), nprocs=world, start_method="fork")
    alone = [_train(*setting, tmp_path, 1, 0) for setting in _settings()]
    ranks = [torch.load(tmp_path / f"{world}-{rank}.pt") for rank in range(world)]
    for index, setting in enumerate(_settings()):
        exact = setting[2] is None
        for rank in ranks:
            found, expected = rank[index], alone[index]
            assert torch.allclose(found["theta"].abs(), expected["theta"].abs(), atol=1e-9 if exact else 1e-5), setting
            assert torch.allclose(found["weights"], expected["weights"], rtol=0, atol=1e-8 if exact else 1e-5), setting
            assert found["held"] <= 1.1 * expected["held"] / world + 4096, setting
