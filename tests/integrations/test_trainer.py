"""with_tithe over a Trainer: each method equals the plain loop, and a resumed run equals one that never stopped."""

from __future__ import annotations

import functools
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import Trainer, TrainingArguments

import loops
import tithe
from tithe.integrations.transformers import with_tithe
from trainers import quietly, same, weights

EPOCHS = 2

METHODS: dict[str, Callable[[tithe.History], Any]] = {
    "FISH": lambda history: tithe.FISH(k=100, samples=32),
    "FISH, again": lambda history: tithe.FISH(k=120, samples=32, reselect=tithe.every(2)),
    "FISH, again each epoch": lambda history: tithe.FISH(k=120, samples=32, reselect=tithe.every(1, "epochs")),
    "FISH, warm-up": lambda history: tithe.FISH(k=120, samples=32, warmup=2),
    "TraDy": lambda history: tithe.TraDy(tithe.Budget(fraction=0.5), samples=32),
    "VR-PGE": lambda history: tithe.VRPGE(0.6),
    "cuts": lambda history: tithe.TaylorPruning(0.6, stop=6, cuts=3),
    "TWA": lambda history: tithe.TWA(history),
}
each_method = pytest.mark.parametrize("name", METHODS)


@pytest.fixture(scope="module")
def history(tmp_path_factory: pytest.TempPathFactory) -> tithe.History:
    return loops.record(tmp_path_factory.mktemp("history"))


def head(name: str) -> tuple[str, ...]:
    return () if name in ("VR-PGE", "cuts", "TWA") else ("head.*",)


def train(name: str, history: tithe.History, folder: Path, *, resume: int | None = None, **settings: Any) -> Any:
    rows = [{key: value[index] for key, value in batch.items()} for batch in loops.batches() for index in range(8)]
    given: dict[str, Any] = dict(
        per_device_train_batch_size=8,
        num_train_epochs=EPOCHS,
        lr_scheduler_type="constant",
        learning_rate=0.01,
        use_cpu=True,
        report_to=[],
        disable_tqdm=True,
        logging_strategy="no",
        save_strategy="steps",
        save_steps=1,
        seed=0,
        dataloader_pin_memory=False,
    )
    trainer = with_tithe(Trainer)(
        model=loops.net(),
        args=TrainingArguments(str(folder), **{**given, **settings}),
        train_dataset=rows,
        tithe=METHODS[name](history),
        tithe_head=head(name),
    )
    checkpoint = None if resume is None else str(folder / f"checkpoint-{resume}")
    quietly(functools.partial(trainer.train, resume_from_checkpoint=checkpoint))
    return trainer


@each_method
def test_a_run_equals_the_plain_loop(name: str, history: tithe.History, tmp_path: Path) -> None:
    trainer = train(name, history, tmp_path, train_sampling_strategy="sequential", save_strategy="no")
    model = loops.net()
    plan = tithe.attach(
        model, METHODS[name](history), loss=loops.loss_fn, data=loops.batches(), head=head(name), seed=0
    )
    optimizer = torch.optim.AdamW(plan.parameters(), lr=0.01, weight_decay=0.0, fused=True)
    for _ in range(EPOCHS):
        for batch in loops.batches():
            plan.backward(lambda batch=batch: loops.loss_fn(model, batch))
            torch.nn.utils.clip_grad_norm_(plan.parameters(), 1.0)
            optimizer.step()
            optimizer.zero_grad()
        plan.end_epoch()
    assert trainer.plan.selections.keys() == plan.selections.keys()
    plan.release()
    trainer.plan.release()
    for key, value in model.state_dict().items():
        torch.testing.assert_close(trainer.model.state_dict()[key], value, rtol=0, atol=1e-6)


@each_method
def test_a_resumed_run_equals_one_that_never_stopped(name: str, history: tithe.History, tmp_path: Path) -> None:
    whole = train(name, history, tmp_path)
    for step in (3, 4):  # the middle of an epoch, and its end
        resumed = train(name, history, tmp_path, resume=step)
        assert same(weights(resumed), weights(whole)), step
        assert resumed.plan.num_epochs == whole.plan.num_epochs == EPOCHS
        assert resumed._figures() == whole._figures()
