"""Loops by accelerate, attached before `prepare` or after it, with its accumulation, clipping, precision and states."""

from __future__ import annotations

import os
import socket
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from accelerate import Accelerator
from accelerate.state import AcceleratorState, GradientState
from torch import Tensor
from torch.utils.data import DataLoader

import loops
import tithe
from loops import BATCHES, EPOCHS, Net, Setting, batches, loss_fn, net

HEAD = ["head.*"]
METHODS: dict[str, Callable[[], Any]] = {
    "FISH": lambda: tithe.FISH(k=100),
    "FISH, again": lambda: tithe.FISH(k=120, reselect=tithe.every(2)),
    "FISH, warm-up": lambda: tithe.FISH(k=120, warmup=2),
    "TraDy": lambda: tithe.TraDy(tithe.Budget(fraction=0.5)),
}


def accelerated(
    method: Any,
    *,
    order: str = "before",
    save_at: tuple[int, Path] | None = None,
    load_at: tuple[int, Path] | None = None,
    **settings: Any,
) -> tuple[Net, tithe.Plan]:
    """A loop of accelerate's own pages; `save_at` and `load_at` say after how many batches a state is written."""
    AcceleratorState._reset_state(True)
    GradientState._reset_state()
    accelerator, model = Accelerator(cpu=True, **settings), net()
    loader = DataLoader(batches(), batch_size=None)  # pyright: ignore[reportArgumentType]
    make: Callable[[Any], torch.optim.Optimizer] = lambda parameters: torch.optim.AdamW(  # noqa: E731
        parameters, lr=0.01, weight_decay=0.1
    )
    if order == "before":
        plan = tithe.attach(model, method, loss=loss_fn, data=batches(), head=HEAD)
        wrapped, optimizer, loader = accelerator.prepare(model, make(plan.parameters()), loader)
    else:
        wrapped, loader = accelerator.prepare(model, loader)
        plan = tithe.attach(accelerator.unwrap_model(wrapped), method, loss=loss_fn, data=batches(), head=HEAD)
        optimizer = accelerator.prepare(make(plan.parameters()))
    number = skipped = 0
    if load_at is not None:
        accelerator.load_state(str(load_at[1]))
        skipped = load_at[0]
    for epoch in range(EPOCHS):
        for batch in loader:
            number += 1
            if number <= skipped:
                continue
            with accelerator.accumulate(wrapped):
                accelerator.backward(loss_fn(wrapped, batch))
                if accelerator.sync_gradients:
                    accelerator.clip_grad_norm_(plan.parameters(), 1e6)
                optimizer.step()
                optimizer.zero_grad()
            if save_at is not None and number == save_at[0]:
                accelerator.save_state(str(save_at[1]))
        if (epoch + 1) * BATCHES >= skipped:
            plan.end_epoch()
    return model, plan


def same(model: torch.nn.Module, expected: dict[str, Tensor]) -> bool:
    found = model.state_dict()
    return list(found) == list(expected) and all(torch.equal(found[name], value) for name, value in expected.items())


@pytest.mark.parametrize("order", ["before", "after"])
@pytest.mark.parametrize("method", METHODS)
def test_a_saved_state_is_loaded_and_trained_on_to_the_same_bits(method: str, order: str, tmp_path: Path) -> None:
    expected = loops.reference(Setting(METHODS[method])).state_dict()
    for number in (4, 5):  # at an epoch's end, with plan.end_epoch() still to come, and in the middle of one
        folder = tmp_path / str(number)
        model, _ = accelerated(METHODS[method](), order=order, save_at=(number, folder))
        assert same(model, expected)
        resumed, plan = accelerated(METHODS[method](), order=order, load_at=(number, folder))
        assert same(resumed, expected), number
        assert (plan.num_steps, plan.num_epochs) == (EPOCHS * BATCHES, EPOCHS)


@pytest.mark.parametrize("method", ["FISH, again", "TraDy"])
def test_accumulated_batches_count_once(method: str) -> None:
    model, plan = accelerated(METHODS[method](), gradient_accumulation_steps=2)
    assert plan.num_steps == EPOCHS * BATCHES // 2
    reference = net()
    plan = tithe.attach(reference, METHODS[method](), loss=loss_fn, data=batches(), head=HEAD)
    optimizer = torch.optim.AdamW(plan.parameters(), lr=0.01, weight_decay=0.1)
    for _ in range(EPOCHS):
        for number, batch in enumerate(batches()):
            (loss_fn(reference, batch) / 2).backward()
            if number % 2:
                optimizer.step()
                optimizer.zero_grad()
        plan.end_epoch()
    assert same(model, reference.state_dict())


@pytest.mark.parametrize("method", ["FISH", "TraDy"])
def test_mixed_precision_trains_and_keeps_the_weights_own_type(method: str) -> None:
    model, plan = accelerated(METHODS[method](), mixed_precision="bf16")
    assert {parameter.dtype for parameter in plan.parameters()} == {torch.float32}
    assert not same(model, loops.reference(Setting(METHODS[method])).state_dict())
    reference = net()
    plan = tithe.attach(reference, METHODS[method](), loss=loss_fn, data=batches(), head=HEAD)
    optimizer = torch.optim.AdamW(plan.parameters(), lr=0.01, weight_decay=0.1)
    for _ in range(EPOCHS):
        for batch in batches():
            with torch.autocast("cpu", torch.bfloat16):
                loss = loss_fn(reference, batch)
            loss.backward()
            optimizer.step()
            optimizer.zero_grad()
        plan.end_epoch()
    for name, value in reference.state_dict().items():  # accelerate casts the loss's inputs to float32
        torch.testing.assert_close(model.state_dict()[name], value, rtol=0.02, atol=0.02)


def test_a_saved_model_has_the_models_own_keys(tmp_path: Path) -> None:
    model, plan = accelerated(METHODS["FISH"](), save_at=(4, tmp_path))
    from safetensors.torch import load_file

    assert set(load_file(tmp_path / "model.safetensors")) == set(net().state_dict())
    plan.save(tmp_path / "delta.safetensors")
    fresh = net()
    tithe.apply(fresh, tmp_path / "delta.safetensors")
    assert same(fresh, model.state_dict())


def _attach_late(accelerator: Accelerator, wrapped: Any, data: Any) -> None:
    """Attach to a model that accelerate has wrapped for several processes, and train a step."""
    plan = tithe.attach(accelerator.unwrap_model(wrapped), METHODS["FISH"](), loss=loss_fn, data=data, head=HEAD)
    optimizer = accelerator.prepare(torch.optim.AdamW(plan.parameters(), lr=0.01))
    accelerator.backward(loss_fn(wrapped, data[0]))
    optimizer.step()


def _rank(rank: int, folder: str, port: int) -> None:
    os.environ.update(MASTER_ADDR="127.0.0.1", MASTER_PORT=str(port), WORLD_SIZE="2", LOCAL_WORLD_SIZE="2")
    os.environ.update(RANK=str(rank), LOCAL_RANK=str(rank))
    torch.set_num_threads(1)
    AcceleratorState._reset_state(True)  # of the process that this one was forked from
    accelerator = Accelerator(cpu=True)
    mine = [{key: value[rank::2] for key, value in batch.items()} for batch in batches()]
    model = net()
    plan = tithe.attach(model, METHODS["FISH, again"](), loss=loss_fn, data=mine, head=HEAD)
    optimizer = torch.optim.AdamW(plan.parameters(), lr=0.01, weight_decay=0.1)
    wrapped, optimizer = accelerator.prepare(model, optimizer)
    for _ in range(EPOCHS):
        for batch in mine:
            accelerator.backward(loss_fn(wrapped, batch))
            optimizer.step()
            optimizer.zero_grad()
    plan.release()
    late = accelerator.prepare(net())
    with pytest.raises(tithe.TitheError) as error:
        _attach_late(accelerator, late, mine)
    assert "first, then DistributedDataParallel" in error.value.remedy
    torch.save(model.state_dict(), f"{folder}/rank-{rank}.pt")
    torch.distributed.destroy_process_group()


def test_two_processes_train_as_one_when_attached_before_prepare(tmp_path: Path) -> None:
    with socket.socket() as server:
        server.bind(("127.0.0.1", 0))
        port = server.getsockname()[1]
    torch.multiprocessing.start_processes(_rank, (str(tmp_path), port), nprocs=2, start_method="fork")
    one, other = (torch.load(tmp_path / f"rank-{rank}.pt", weights_only=True) for rank in range(2))
    for name, value in loops.reference(Setting(METHODS["FISH, again"])).state_dict().items():
        assert torch.equal(one[name], other[name]), name
        torch.testing.assert_close(one[name], value, rtol=1e-4, atol=1e-6)
