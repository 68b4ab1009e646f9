"""Plain DistributedDataParallel over an attached model: two ranks equal one, and only θ travels."""

from __future__ import annotations

import copy
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
import torch.multiprocessing as mp
from torch import nn
from torch.nn.parallel import DistributedDataParallel

import tithe
from models import CASES, Batch, Case
from oracles import sgd
from tithe import FISH

STEPS = 4
SETTINGS = [
    ("mlp", "fisher", "once"),
    ("bert", "gradient", "once"),
    ("mlp", "fisher", "global"),
    ("bert", "fisher", "global"),
    ("bert", "random", "tensor"),
    ("mlp", "fisher", "warm"),
]


def _halves(batch: Batch) -> list[Batch]:
    half = len(next(iter(batch.values()))) // 2
    return [{k: v[:half] for k, v in batch.items()}, {k: v[half:] for k, v in batch.items()}]


def _method(score: str, scope: str) -> FISH:
    """Chooses once; once after two steps of warm-up; or again after every second step, in either scope."""
    if scope == "once":
        return FISH(density=0.2, score=score, samples=16)
    if scope == "warm":
        return FISH(density=0.2, score=score, samples=16, warmup=2)
    return FISH(density=0.2, score=score, scope=scope, samples=16, reselect=tithe.every(2))


def _train(model: nn.Module, forward: nn.Module, plan: tithe.Plan, case: Case, batches: list[Batch]) -> None:
    opt = sgd(plan.parameters())
    plan.bind(opt)
    for batch in batches:
        opt.zero_grad()
        plan.backward(lambda batch=batch: case.loss(forward, batch))
        opt.step()
        plan.step()


def _rank(rank: int, folder: str) -> None:
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{folder}/meet", rank=rank, world_size=2)
    for setting in SETTINGS:
        torch.save(_half(rank, *setting), f"{folder}/{'-'.join(setting)}-{rank}.pt")
    dist.destroy_process_group()


def _half(rank: int, name: str, score: str, scope: str) -> dict[str, object]:
    """What one rank has after training on its half of each batch."""
    case = CASES[name]
    model = case.model(dtype=torch.float64)
    batches = [_halves(batch)[rank] for batch in case.batches(STEPS, 8, dtype=torch.float64)]
    plan = tithe.attach(model, _method(score, scope), loss=case.loss, data=batches[:2], head=case.head, seed=2)
    ddp = DistributedDataParallel(model, find_unused_parameters=scope == "warm")  # θ is not used before it is chosen
    sent: list[int] = []

    def hook(state, bucket):  # annotations would have to be types, and here they are text
        sent.append(bucket.buffer().numel() * bucket.buffer().element_size())
        work = dist.all_reduce(bucket.buffer().div_(2), async_op=True)
        return work.get_future().then(lambda future: future.value()[0])

    ddp.register_comm_hook(None, hook)
    _train(model, ddp, plan, case, batches)
    chosen = {key: plan.selected(key) for key in plan.selections}
    size = sum(p.numel() for p in plan.parameters())
    return {"model": model.state_dict(), "chosen": chosen, "sent": sum(sent), "size": size}


def test_two_ranks_equal_one_with_the_doubled_batch(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Static and reselected under a wrapper made before; the reduced bytes of a step are those of θ and the head."""
    mp.spawn(_rank, (str(tmp_path),), nprocs=2)
    for setting in SETTINGS:
        name, score, scope = setting
        case = CASES[name]
        one = case.model(dtype=torch.float64)
        batches = case.batches(STEPS, 8, dtype=torch.float64)
        plan = tithe.attach(one, _method(score, scope), loss=case.loss, data=batches[:2], head=case.head, seed=2)
        dense = sum(p.numel() for n, p in one.named_parameters() if not n.endswith("@theta"))
        _train(one, one, plan, case, batches)
        ranks = [torch.load(tmp_path / f"{'-'.join(setting)}-{rank}.pt", weights_only=True) for rank in range(2)]
        for found in ranks:
            for key in plan.selections:
                assert torch.equal(found["chosen"][key], plan.selected(key)), (setting, key)
            for key, value in one.state_dict().items():
                torch.testing.assert_close(found["model"][key], value, rtol=1e-9, atol=1e-12)
        assert all(torch.equal(ranks[0]["model"][key], value) for key, value in ranks[1]["model"].items()), setting
        k = ranks[0]["size"]
        assert k == int(0.2 * dense)
        assert ranks[0]["sent"] == ranks[1]["sent"] <= STEPS * k * 8
        assert scope == "warm" or ranks[0]["sent"] == STEPS * k * 8
        with capsys.disabled():
            print(f"\n{name}, {score}, {scope}: {k * 8} bytes reduced a step, 8 for each value; dense {dense * 8}")


def test_a_plan_may_be_attached_before_or_copied_without_a_process_group() -> None:
    case = CASES["mlp"]
    plan = tithe.attach(case.model(), _method("fisher", "once"), loss=case.loss, data=case.batches(2))
    assert copy.deepcopy(plan.model) is not plan.model
