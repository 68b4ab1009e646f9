"""Ranks that differ, fail or run out are told so, all of them; ranks that only start apart become the same."""

from __future__ import annotations

import multiprocessing
import os
import signal
import time
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import FullyShardedDataParallel, fully_shard
from torch.distributed.tensor.parallel import ColwiseParallel, RowwiseParallel, parallelize_module
from torch.nn.parallel import DistributedDataParallel

import tithe
from ranks import meet, play, refused
from tithe import FISH, TWA, VRPGE, TraDy
from workplace import assert_equal

Batch = tuple[Tensor, Tensor]
CPU = torch.device("cpu")


def make(seed: int = 0, *, norm: bool = False) -> nn.Sequential:
    torch.manual_seed(seed)
    inner = [nn.BatchNorm1d(8)] if norm else []
    return nn.Sequential(nn.Linear(6, 8), *inner, nn.ReLU(), nn.Linear(8, 4))


def batches(rank: int, num: int = 3) -> list[Batch]:
    draw = torch.Generator().manual_seed(rank + 10)
    return [(torch.randn(4, 6, generator=draw), torch.randint(4, (4,), generator=draw)) for _ in range(num)]


def loss(model: Any, batch: Batch) -> Tensor:
    return nn.functional.cross_entropy(model(batch[0]), batch[1])


def plain() -> FISH:
    return FISH(k=10, score="magnitude")


def train(
    plan: tithe.Plan, forward: nn.Module, data: Iterable[Any], loss_fn: Any = loss, *, plan_s: bool = True
) -> Any:
    """Steps by `plan.backward`, or by `loss.backward()`; returns the weights."""
    optimizer = torch.optim.SGD(plan.parameters(), lr=0.1)
    plan.bind(optimizer)
    for batch in data:
        if plan_s:
            plan.backward(lambda batch=batch: loss_fn(forward, batch))
        else:
            loss_fn(forward, batch).backward()
        optimizer.step()
        optimizer.zero_grad()
        plan.step()
    return {name: value.clone() for name, value in plan.model.state_dict().items()}


# ------------------------------------------------------------------------------------------- what differs, who fails


def other_seed(rank: int) -> None:
    tithe.attach(make(), plain(), seed=rank)


def other_where(rank: int) -> None:
    tithe.attach(make(), plain(), where=("0.*", "2.*")[rank])


def other_method(rank: int) -> None:
    tithe.attach(make(), FISH(k=10 + rank, score="magnitude"))


def other_model(rank: int) -> None:
    model = make()
    model[2].bias.requires_grad_(rank == 0)
    tithe.attach(model, plain())


def other_state(rank: int) -> None:
    plan = tithe.attach(make(), plain())
    state = plan.state_dict()
    plan.release()
    state["num_steps"] = rank
    tithe.attach(make(), plain(), state=state)


def no_data_on_one(rank: int) -> None:
    tithe.attach(make(), FISH(k=10), loss=loss, data=batches(0) if rank == 0 else [])


def no_method_on_one(rank: int) -> None:
    tithe.attach(make(), FISH if rank else plain())  # pyright: ignore


def loss_fails_on_one(rank: int) -> str:
    def broken(model: Any, batch: Batch) -> Tensor:
        raise ValueError("a loss of its own kind")

    try:
        tithe.attach(make(), FISH(k=10), loss=broken if rank else loss, data=batches(rank))
    except ValueError as error:
        return str(error)
    return "attached"


def closure_fails_on_one(rank: int) -> str:
    model = make()
    plan = tithe.attach(model, VRPGE(keep=0.5), loss=loss, data=batches(rank))

    def broken(model: Any, batch: Batch) -> Tensor:
        if rank == 1 and plan.num_steps == 1:
            raise ValueError("a loss of its own kind")
        return loss(model, batch)

    try:
        train(plan, model, batches(rank), broken)
    except ValueError as error:
        return str(error)
    return "trained"


def runs_out_before_settle(rank: int) -> None:
    model = make()
    plan = tithe.attach(model, VRPGE(keep=0.5), loss=loss, data=batches(rank))
    train(plan, model, batches(rank, 3 - rank))
    plan.settle()


def joins(rank: int) -> Any:
    """Ranks may run out one by one where torch itself sees to it."""
    model = make()
    plan = tithe.attach(model, plain())
    forward = DistributedDataParallel(model)
    with forward.join():
        train(plan, forward, batches(rank, 5 - 3 * rank))
    return "trained"


def still_able(rank: int) -> Any:
    model = make()
    plan = tithe.attach(model, plain())
    return train(plan, DistributedDataParallel(model), batches(rank, 9))


def test_ranks_that_differ_or_fail_all_raise_and_can_go_on(tmp_path: Path) -> None:
    found = play(
        tmp_path,
        *(other_seed, other_where, other_method, other_model, other_state, no_data_on_one, no_method_on_one),
        *(loss_fails_on_one, closure_fails_on_one, runs_out_before_settle, joins, still_able),
    )
    refused(found["other_seed"], "attach, seed:", "0 on rank 0, 1 on rank 1", "the same seed")
    refused(found["other_where"], "attach, where:", "'0.*' on rank 0", "'2.*' on rank 1")
    refused(found["other_method"], "attach, method.k:", "10 on rank 0, 11 on rank 1")
    refused(found["other_model"], "attach, model.2.bias:", "trained on rank 0", "frozen on rank 1")
    refused(found["other_state"], "attach, state.num_steps: ", "0 on rank 0, 1 on rank 1")
    refused(found["no_data_on_one"], "no samples")
    assert "rank 1: data: found no samples" in str(found["no_data_on_one"][0])
    refused(found["no_method_on_one"], "a SparseMethod")
    for scene in ("loss_fails_on_one", "closure_fails_on_one"):
        assert "(rank 1: ValueError: a loss of its own kind)" in str(found[scene][0])
        assert found[scene][1] == "a loss of its own kind"
    refused(found["runs_out_before_settle"], "backward of step 3 on rank 0", "rank 1 ran out of batches", "drop_last")
    assert found["joins"] == ("trained", "trained")
    assert_equal(*found["still_able"])


# --------------------------------------------------------------------------------------------- wrappers and shards


def wrapped_given(rank: int) -> None:
    tithe.attach(DistributedDataParallel(make()), plain())


def wrapped_inside(rank: int) -> None:
    model = make()
    tithe.attach(nn.Sequential(DistributedDataParallel(model), nn.Linear(4, 2)), plain())


def wrapped_before(rank: int) -> Any:
    model = make()
    forward = DistributedDataParallel(model)
    return train(tithe.attach(model, plain()), forward, batches(rank))


def wrapped_before_flat(rank: int) -> Any:
    model = make()
    forward = DistributedDataParallel(model, find_unused_parameters=True)
    method = FISH(k=10, score="magnitude", reselect=tithe.every(2))
    return train(tithe.attach(model, method), forward, batches(rank))


def forgotten(rank: int) -> Any:
    model = make()
    return train(tithe.attach(model, plain()), model, batches(rank))


def forgotten_while_the_rate_is_zero(rank: int) -> None:
    model = make()
    plan = tithe.attach(model, plain())
    optimizer = torch.optim.SGD(plan.parameters(), lr=0.0)  # as a schedule begins that warms up
    plan.bind(optimizer)
    plan.backward(lambda: loss(model, batches(rank)[0]))
    optimizer.step()


def wrapped_and_not_called(rank: int) -> Any:
    model = make()
    plan = tithe.attach(model, plain())
    forward = DistributedDataParallel(model)
    assert forward.module is model
    return train(plan, model, batches(rank), plan_s=False)


def wrapped_though_it_averages(rank: int) -> Any:
    model = make()
    plan = tithe.attach(model, VRPGE(keep=0.5), loss=loss, data=batches(rank))
    return train(plan, DistributedDataParallel(model), batches(rank))


def data_parallel(rank: int) -> None:
    tithe.attach(nn.DataParallel(make()), plain())


def replicated(rank: int) -> None:
    model = make()
    tithe.attach(model, plain())
    model._replicate_for_data_parallel()(torch.randn(2, 6))  # as DataParallel does for each GPU


def _mesh() -> Any:
    return init_device_mesh("cpu", (2,))


def _shard(model: nn.Module) -> None:
    fully_shard(model, mesh=_mesh())


def _shard_part(model: Any) -> None:
    fully_shard(model[2], mesh=_mesh())


def _split(model: nn.Module) -> None:
    parallelize_module(model, _mesh(), {"0": ColwiseParallel(), "2": RowwiseParallel()})


def _old_shard(model: nn.Module) -> None:
    FullyShardedDataParallel(model, device_id=CPU, use_orig_params=True)


def _before(change: Callable[[Any], None]) -> Callable[[int], None]:
    def scene(rank: int) -> None:
        model = make()
        change(model)
        tithe.attach(model, plain())

    scene.__name__ = f"before{change.__name__}"
    return scene


def _after(change: Callable[[Any], None], *, head: str | tuple[str, ...] = ()) -> Callable[[int], None]:
    def scene(rank: int) -> None:
        model = make()
        plan = tithe.attach(model, plain(), head=head)
        change(model)
        train(plan, model, batches(rank), plan_s=False)

    scene.__name__ = f"after{change.__name__}{'_head' * bool(head)}"
    return scene


def test_wrappers_and_shards_are_refused_by_name_and_the_remedy_trains(tmp_path: Path) -> None:
    shards = [_before(change) for change in (_shard, _shard_part, _split, _old_shard)]
    shards += [_after(change) for change in (_shard, _shard_part, _split, _old_shard)]
    shards += [_after(change, head="2.*") for change in (_shard, _shard_part, _split)]
    found = play(
        tmp_path,
        *(wrapped_given, wrapped_inside, wrapped_before, wrapped_before_flat, forgotten, wrapped_and_not_called),
        forgotten_while_the_rate_is_zero,
        *(wrapped_though_it_averages, data_parallel, replicated, *shards, still_able),
    )
    for scene in ("wrapped_given", "wrapped_inside", "wrapped_before", "wrapped_before_flat"):
        refused(found[scene], "DistributedDataParallel", "tithe.attach(model, …)")
    refused(found["forgotten"], "the first step", "no DistributedDataParallel averages", "wrap the model")
    refused(found["forgotten_while_the_rate_is_zero"], "the first step, gradient of", "wrap the model")
    refused(found["wrapped_and_not_called"], "the first step", "did not average all", "call the wrapped model")
    refused(found["wrapped_though_it_averages"], "averages gradients itself", "call the model itself")
    refused(found["data_parallel"], "DataParallel", "one process for each device")
    refused(found["replicated"], "DataParallel")
    for scene in shards:
        name = scene.__name__
        words = {"_shard": ("fully_shard", "DTensor"), "_split": ("DTensor",), "_old": ("FullyShardedDataParallel",)}
        (kinds,) = [kinds for part, kinds in words.items() if part in name.replace("_old_shard", "_old")]
        refused(found[name], "DistributedDataParallel")  # the remedy
        assert any(kind in error.found for error in found[name] for kind in kinds), (name, found[name])
    assert_equal(*found["still_able"])  # the remedy of all of them: attach, wrap, call the wrapped model


# ------------------------------------------------------------------------------------------------ right on every rank


def other_start(rank: int) -> Any:
    model = make(rank, norm=True)
    model.register_buffer("scale", torch.tensor(float(rank), dtype=torch.bfloat16))
    tithe.attach(model, plain())
    return dict(model.state_dict())


def narrow_from_other_starts(rank: int) -> Any:
    model = make(rank, norm=True)
    plan = tithe.attach(model, VRPGE(keep=0.5, structure_lr=0.1), loss=loss, data=batches(rank))
    train(plan, model, batches(rank, 4))
    plan.end_epoch()
    value = plan.settle(batches(rank, 3 - rank))  # of as many batches as each happens to have
    return train(plan, model, batches(rank, 2)), value, [s.clone() for s in plan.structure_parameters()]


def narrow_with_a_gradient_on_one(rank: int) -> Any:
    class Branches(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.first, self.one, self.two = nn.Linear(6, 8), nn.Linear(8, 4), nn.Linear(8, 4)

        def forward(self, x: Tensor, both: bool) -> Tensor:
            hidden = self.first(x).relu()
            return self.one(hidden) + self.two(hidden) if both else self.one(hidden)

    def squares(model: nn.Module, batch: tuple[Tensor, bool]) -> Tensor:
        return model(*batch).square().mean()

    model = Branches()
    plan = tithe.attach(model, VRPGE(keep=0.5), loss=squares, data=[(torch.ones(4, 6), True)])
    return train(plan, model, [(torch.randn(4, 6), rank == 0) for _ in range(3)], squares)


def of_other_lengths(method: tithe.SparseMethod | tithe.NarrowMethod) -> Callable[[int], Any]:
    def scene(rank: int) -> Any:
        def squares(model: nn.Module, x: Tensor) -> Tensor:
            return model(x).square().mean()

        model, data = make(), [torch.randn(4, 5 + 3 * rank, 6)]
        plan = tithe.attach(model, method, loss=squares, data=data)
        forward = model if plan.averages_gradients else DistributedDataParallel(model)
        train(plan, forward, data * 2, squares)
        plan.end_epoch()
        plan.settle()
        return dict(model.state_dict())

    scene.__name__ = f"lengths_{type(method).__name__}"
    return scene


def span(history: Path) -> list[Callable[[int], Any]]:
    def attached(rank: int, **settings: Any) -> tithe.SubspacePlan:
        plan = tithe.attach(make(norm=True), TWA(history / "0"), loss=loss, data=batches(rank), **settings)
        return plan

    def other_history(rank: int) -> None:
        tithe.attach(make(norm=True), TWA(history / str(rank)), loss=loss, data=batches(rank))

    def longer_history(rank: int) -> None:
        tithe.attach(make(norm=True), TWA(history / ("0", "2")[rank]), loss=loss, data=batches(rank))

    def span_saved_by_one(rank: int) -> Any:
        plan = attached(rank, head="3.bias")
        train(plan, plan.model, batches(rank))
        if rank == 0:  # as the documentation has it
            plan.save(history / "delta.safetensors")
        plan.refresh_statistics()
        return dict(plan.model.state_dict())

    def span_released_by_one(rank: int) -> Any:
        plan = attached(rank)
        weights = train(plan, plan.model, batches(rank), plan_s=False)
        if rank == 0:
            plan.release()
        dist.barrier()
        return {name: value for name, value in weights.items() if "running" not in name}

    def span_saved_too_early(rank: int) -> str:
        plan = attached(rank)
        plan.backward(lambda: loss(plan.model, batches(rank)[0]))
        with torch.no_grad():  # an update by hand, which no optimizer's step tells of
            next(plan.parameters()).add_(0.01)
        told = ""
        if rank == 0:
            with pytest.raises(tithe.TitheError, match=r"plan\.step\(\) on every rank") as caught:
                plan.save(history / "delta.safetensors")
            told = str(caught.value)
        dist.barrier()
        plan.step()  # the remedy
        if rank == 0:
            plan.save(history / "delta.safetensors")
        return told

    def span_resumed_from_its_own_state(rank: int) -> Any:
        plan = attached(rank)
        train(plan, plan.model, batches(rank))  # each rank has statistics of its own batches
        return dict(attached(rank, state=plan.state_dict()).model.state_dict())

    def span_wrapped(rank: int) -> Any:
        plan = attached(rank)
        weights = train(plan, DistributedDataParallel(plan.model), batches(rank))
        return {name: value for name, value in weights.items() if "running" not in name}

    def span_by_plain_backward(rank: int) -> Any:
        plan = attached(rank, head="3.bias")
        return train(plan, plan.model, batches(rank), plan_s=False)

    def span_runs_out(rank: int) -> None:
        plan = attached(rank)
        train(plan, plan.model, batches(rank, 3 - rank))
        plan.refresh_statistics()

    return [
        *(other_history, longer_history, span_saved_by_one, span_released_by_one, span_saved_too_early),
        *(span_resumed_from_its_own_state, span_wrapped, span_by_plain_backward, span_runs_out),
    ]


def _record(folder: Path, seed: int, num: int) -> None:
    history, model = tithe.History(folder), make(seed, norm=True)
    for step in range(num):
        with torch.no_grad():
            for parameter in model.parameters():
                parameter.add_(torch.randn_like(parameter) * 0.1)
        history.record(model, step)


def test_ranks_that_start_apart_or_see_other_batches_are_the_same_network(tmp_path: Path) -> None:
    for number, (seed, num) in enumerate([(0, 4), (1, 4), (0, 5)]):
        _record(tmp_path / str(number), seed, num)
    lengths = [of_other_lengths(TraDy(tithe.Budget(elements=60), layers="all"))]
    lengths += [of_other_lengths(VRPGE(keep=0.5, cost="flops"))]
    right = [other_start, narrow_from_other_starts, narrow_with_a_gradient_on_one, *lengths]
    found = play(tmp_path, *right, *span(tmp_path))
    for name in [
        *(scene.__name__ for scene in right),
        "span_saved_by_one",
        "span_released_by_one",
        "span_wrapped",
        "span_resumed_from_its_own_state",
    ]:
        assert not isinstance(found[name][0], tithe.TitheError), (name, found[name])
        assert_equal(*found[name])
    for name in ("other_history", "longer_history"):
        refused(found[name], "attach, method.history:", "4 checkpoints")
    assert "5 checkpoints" in str(found["longer_history"][0])
    assert "not in the weights yet" in found["span_saved_too_early"][0]
    refused(found["span_by_plain_backward"], "the first step, 3.bias", "plan.backward(")
    refused(found["span_runs_out"], "rank 1 ran out of batches")
    tithe.apply(make(norm=True), tmp_path / "delta.safetensors")


# ------------------------------------------------------------------------------------------------------ who is gone


def test_a_rank_that_ends_or_says_nothing_is_named_in_time(tmp_path: Path) -> None:
    def gone(rank: int) -> Any:
        model = make()
        plan = tithe.attach(model, VRPGE(keep=0.5), loss=loss, data=batches(rank))
        start = time.monotonic()
        train(plan, model, batches(rank, 3 - rank))
        assert rank == 1, "rank 0 has a batch more, and nobody to train it with"
        return start

    def silent(rank: int) -> Any:
        if rank == 0:
            tithe.attach(make(), plain())
        time.sleep(4)

    (tmp_path / "gone").mkdir()
    (tmp_path / "silent").mkdir()
    found = play(tmp_path / "gone", gone)["gone"]
    assert isinstance(found[0], tithe.TitheError)
    assert "rank 1 gone: it ended after 'the end of step 2'" in str(found[0])
    found = play(tmp_path / "silent", silent, seconds=2)["silent"]
    assert isinstance(found[0], tithe.TitheError)
    assert "no word of rank 1 for 2 seconds" in str(found[0])
    assert "init_process_group(timeout=…)" in found[0].remedy


def test_a_rank_that_is_killed_is_named_in_time(tmp_path: Path) -> None:
    def play_alone(rank: int) -> None:
        torch.set_num_threads(1)
        meet(rank, f"{tmp_path}/meet")
        model = make()
        plan = tithe.attach(model, VRPGE(keep=0.5), loss=loss, data=batches(0))
        if rank == 1:
            os.kill(os.getpid(), signal.SIGKILL)
        with pytest.raises(tithe.TitheError, match="rank 1 gone: its process was ended"):
            train(plan, model, batches(0))
        (tmp_path / "told").touch()

    fork = multiprocessing.get_context("fork")
    processes = [fork.Process(target=play_alone, args=(number,)) for number in range(2)]
    for process in processes:
        process.start()
    for process in processes:
        process.join(60)
    assert (tmp_path / "told").exists()


def test_a_wrapped_rank_that_fails_explains_what_broke_on_the_others(tmp_path: Path) -> None:
    def scene(rank: int) -> Any:
        model = make()
        plan = tithe.attach(model, plain())
        forward = DistributedDataParallel(model)
        if rank == 1:
            forward.register_forward_pre_hook(_fail)
            with pytest.raises(ZeroDivisionError):
                train(plan, forward, batches(rank))
            return None
        train(plan, forward, batches(rank))
        return "trained"

    error, _ = play(tmp_path, scene)["scene"]
    assert isinstance(error, tithe.TitheError), error
    assert "(rank 1: ZeroDivisionError: on rank 1 alone)" in str(error)


def _fail(module: nn.Module, args: Any) -> None:
    raise ZeroDivisionError("on rank 1 alone")


# ------------------------------------------------------------------------------------------------- a group made late


def test_a_plan_attached_before_the_group_is_compared_at_its_first_step(tmp_path: Path) -> None:
    def alike(rank: int) -> Any:
        model = make()
        plan = tithe.attach(model, plain())
        meet(rank, f"{tmp_path}/alike")
        weights = train(plan, DistributedDataParallel(model), batches(rank))
        dist.destroy_process_group()
        return weights

    def late(rank: int, seed: int, name: str) -> Any:
        model = make()
        plan = tithe.attach(model, FISH(density=0.2, score="random", scope="tensor"), seed=seed)
        meet(rank, f"{tmp_path}/{name}", 15)  # rank 1 notices; rank 0 waits for it in DDP's own sum
        try:
            return train(plan, DistributedDataParallel(model), batches(rank))
        finally:
            dist.destroy_process_group()

    def other_seed_late(rank: int) -> Any:
        return late(rank, rank, "other")

    def span_late(rank: int) -> Any:
        plan = tithe.attach(make(norm=True), TWA(tmp_path / "history"), loss=loss, data=batches(rank))
        meet(rank, f"{tmp_path}/span")
        try:
            return train(plan, plan.model, batches(rank))
        finally:
            dist.destroy_process_group()

    _record(tmp_path / "history", 0, 4)
    found = play(tmp_path, alike, other_seed_late, span_late, init=False)
    assert_equal(*found["alike"])
    refused(found["other_seed_late"], "both written", "init_process_group() before tithe.attach()")
    refused(found["span_late"], "2 ranks, and a plan attached on 1", "init_process_group() before tithe.attach()")


def test_processes_launched_without_a_group_are_refused_at_the_first_step(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("WORLD_SIZE", "2")
    model = make()
    plan = tithe.attach(model, plain())
    with pytest.raises(tithe.TitheError, match="no process group, where 2 processes were launched"):
        train(plan, model, batches(0))
    monkeypatch.delenv("WORLD_SIZE")  # the remedy, for runs of their own
    plan.release()
    train(tithe.attach(model, plain()), model, batches(0))


def test_a_refusal_can_be_sent_to_another_process() -> None:
    import pickle

    error = tithe.TitheError("a", found="b", expected="c", remedy="d")
    copy = pickle.loads(pickle.dumps(error))
    assert (str(copy), copy.remedy, type(copy)) == (str(error), "d", tithe.TitheError)
