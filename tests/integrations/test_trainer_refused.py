"""What cannot work is a TitheError with a remedy before any time is spent, and the model is plain again."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from copy import deepcopy
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from transformers import Adafactor, Trainer, TrainerCallback

import tithe
from tithe import TitheError
from tithe.integrations.transformers import with_tithe
from tithe.integrations.transformers.checks import _OVERRIDDEN
from trainers import BATCH, FISH, ROWS, arguments, bert, collate, loss_fn, ours, quietly, rows, same, weights


def unlabelled(items: Any) -> dict[str, Tensor]:
    batch = collate(items)
    del batch["labels"]
    return batch


class NoLoss(type(bert())):
    def forward(self, input_ids: Tensor, attention_mask: Tensor, labels: Tensor) -> Any:
        return {"logits": super().forward(input_ids=input_ids, attention_mask=attention_mask).logits}


class Logits(type(bert())):
    def forward(self, input_ids: Tensor, attention_mask: Tensor, labels: Tensor) -> Any:
        return (super().forward(input_ids=input_ids, attention_mask=attention_mask).logits,)


def cast(kind: type) -> nn.Module:
    model = bert()
    model.__class__ = kind
    return model


class Once(torch.utils.data.IterableDataset[Any]):
    def __init__(self) -> None:
        self.left = iter(rows())

    def __iter__(self) -> Iterator[Any]:
        return self.left


class OfModel(torch.optim.SGD):
    def __init__(self, model: nn.Module) -> None:
        super().__init__(model.parameters())


class Early(TrainerCallback):
    pass


class CountsToo(TrainerCallback):
    trainer: Any = None

    def on_epoch_end(self, *args: Any, **kwargs: Any) -> None:
        self.trainer.plan.end_epoch()


def without_callback(trainer: Any) -> None:
    trainer.callback_handler.callbacks = [c for c in trainer.callback_handler.callbacks if "Tithe" not in str(type(c))]


def early(trainer: Any) -> None:
    trainer.callback_handler.callbacks.insert(0, Early())


def with_an_optimizer(trainer: Any) -> None:
    trainer.optimizer = torch.optim.SGD(trainer.model.parameters(), lr=0.1)


def attached(trainer: Any) -> None:
    trainer.tithe_first = tithe.attach(trainer.model, tithe.FISH(k=5, score="random"))


def two_devices(trainer: Any) -> None:
    trainer.args._n_gpu = 2


WARM = tithe.FISH(density=0.05, samples=ROWS, warmup=20)
ADAFACTOR = {"optimizer_cls_and_kwargs": (Adafactor, {"lr": 0.1, "relative_step": False})}
CASES: dict[str, tuple[dict[str, Any], str, str]] = {
    "a collator without labels": ({"data_collator": unlabelled}, "data_collator", "label_names"),
    "a model that returns no loss": ({"model": lambda: cast(NoLoss)}, "NoLoss", "compute_loss"),
    "a model whose first output is no loss": ({"model": lambda: cast(Logits)}, "Logits", "compute_loss"),
    "no callback": ({"then": without_callback}, "callbacks", "leave it in its place"),
    "a callback before it": ({"then": early}, "callbacks", "add_callback"),
    '`optim="adafactor"`': ({"settings": {"optim": "adafactor"}}, "adafactor", "adamw_torch"),
    "a class that is not elementwise": (ADAFACTOR, "Adafactor", "adamw_torch"),
    "an optimizer of a whole model": (
        {"optimizer_cls_and_kwargs": (torch.optim.SGD, {"params": [], "lr": 0.1})},
        "SGD",
        "adamw_torch",
    ),
    "an optimizer that is made over no list": ({"optimizer_cls_and_kwargs": (OfModel, {"lr": 0.1})}, "OfModel", "sgd"),
    "fewer steps than the warm-up": ({"method": WARM}, "max_steps", "warmup="),
    "fewer samples than are scored": ({"method": tithe.FISH(density=0.05)}, "train_dataset", f"samples={ROWS}"),
    "data that can be read only once": ({"train": Once, "settings": {"max_steps": 2}}, "train_dataset", "__iter__"),
    "an optimizer set afterwards": ({"then": with_an_optimizer}, "optimizers", "optimizer_cls_and_kwargs"),
    "a model with a plan": ({"then": attached}, "bert.", "release()"),
    "a glob that matches nothing": ({"tithe_where": "none.*"}, "where", ""),
    "a class for a method": ({"method": tithe.FISH}, "method", ""),
    "a network that gets narrower, and the best of it": (
        {
            "method": tithe.VRPGE(0.6),
            "tithe_head": (),
            "eval_dataset": rows(4),
            "settings": {"load_best_model_at_end": True, "eval_strategy": "epoch", "save_strategy": "epoch"},
        },
        "load_best_model_at_end",
        "tithe.apply",
    ),
}


@pytest.mark.parametrize("case", CASES)
def test_training_is_refused(case: str, tmp_path: Path) -> None:
    given, place, remedy = CASES[case]
    given = {key: value for key, value in given.items() if key != "then"}
    for key in ("model", "train"):
        if callable(given.get(key)):
            given[key] = given[key]()
    trainer = ours(tmp_path, **given)
    CASES[case][0].get("then", lambda trainer: None)(trainer)
    before, states = weights(trainer), torch.get_rng_state()
    with pytest.raises(TitheError) as error:
        quietly(trainer.train)
    assert place in error.value.place
    assert remedy in error.value.remedy
    assert same(weights(trainer), before)
    assert trainer.plan is None
    if case != "a model with a plan":
        assert all(p.requires_grad for p in trainer.model.parameters())
        assert not any("@" in name for name, _ in trainer.model.named_parameters())
    assert torch.equal(torch.get_rng_state(), states)


def sharded(name: str) -> Callable[[Any], Any]:
    def change(args: Any) -> Any:
        object.__setattr__(args, name, "full_shard" if name == "fsdp" else {"zero_optimization": {"stage": 2}})
        return args

    return change


def several(args: Any) -> Any:
    args._n_gpu = 2
    return args


MADE: dict[str, tuple[Callable[[Any], dict[str, Any]], str, str]] = {
    "DeepSpeed": (lambda args: {"args": sharded("deepspeed")(args)}, "deepspeed", "torchrun"),
    "FSDP": (lambda args: {"args": sharded("fsdp")(args)}, "fsdp", "torchrun"),
    "several GPUs in one process": (lambda args: {"args": several(args)}, "TrainingArguments", "torchrun"),
    "`tithe_save` of another name": (lambda args: {"tithe_save": "all"}, "tithe_save", "choose"),
}


@pytest.mark.parametrize("case", MADE)
def test_a_trainer_is_refused(case: str, tmp_path: Path) -> None:
    make, place, remedy = MADE[case]
    given = make(arguments(tmp_path))
    with pytest.raises(TitheError) as error:
        ours(tmp_path, **given)
    assert place in error.value.place
    assert remedy in error.value.remedy


def test_an_optimizer_that_was_made_before_is_refused(tmp_path: Path) -> None:
    model = bert()
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.1)
    with pytest.raises(TitheError, match="optimizer_cls_and_kwargs"):
        ours(tmp_path, model=model, optimizers=(optimizer, None))
    schedule = torch.optim.lr_scheduler.ConstantLR(optimizer)
    with pytest.raises(TitheError, match="optimizer_cls_and_kwargs"):
        ours(tmp_path, model=model, optimizers=(None, schedule))


def test_the_best_of_deltas_alone_is_refused(tmp_path: Path) -> None:
    settings = {"load_best_model_at_end": True, "eval_strategy": "epoch", "save_strategy": "epoch"}
    with pytest.raises(TitheError, match='tithe_save="both"'):
        ours(tmp_path, tithe_save="delta", eval_dataset=rows(4), settings=settings)


def test_what_is_no_trainer_is_refused() -> None:
    for kind in (nn.Module, Trainer(model=bert(), args=arguments(Path("."))), None):
        with pytest.raises(TitheError, match=r"transformers\.Trainer"):
            with_tithe(kind)  # pyright: ignore


def test_a_trainer_of_another_release_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    """Clipping, for one, would then be of the model's parameters, without a word."""

    class Own(Trainer):
        pass

    over = vars(with_tithe(Trainer).__mro__[1])
    assert {name for name in over if callable(over[name]) and name in vars(Trainer)} - {"__init__"} == set(_OVERRIDDEN)
    monkeypatch.delattr(Trainer, "_clip_grad_norm")
    with pytest.raises(TitheError, match="whose Trainer has no _clip_grad_norm"):
        with_tithe(Own)


def test_an_epoch_that_is_ended_twice_is_refused(tmp_path: Path) -> None:
    trainer = ours(tmp_path, callbacks=[CountsToo()])
    CountsToo.trainer = trainer
    with pytest.raises(TitheError, match="leave the call out"):
        quietly(trainer.train)


def test_scores_are_not_taken_for_an_optimizer_that_is_refused(tmp_path: Path) -> None:
    def loss(model: nn.Module, batch: Any) -> Tensor:
        raise AssertionError("scored")

    with pytest.raises(TitheError, match="adafactor"):
        quietly(ours(tmp_path, tithe_loss=loss, settings={"optim": "adafactor"}).train)


def test_decay_that_cannot_be_told_apart_is_said(tmp_path: Path) -> None:
    again = tithe.FISH(density=0.3, samples=ROWS, reselect=tithe.every(2))
    trainer = ours(tmp_path, method=again, settings={"weight_decay": 0.1})
    with pytest.warns(tithe.TitheWarning, match="bias.*decay with the rest"):
        quietly(trainer.train)
    apart = ours(tmp_path, method=again, tithe_where=["*", "!*bias", "!*Norm*"], settings={"weight_decay": 0.1})
    quietly(apart.train)
    assert [group["weight_decay"] for group in apart.optimizer.param_groups] == [0.1, 0.0]


def test_a_checkpoint_without_a_plan_is_refused(tmp_path: Path) -> None:
    saving = {"save_strategy": "steps", "save_steps": 2}
    stock = Trainer(
        model=bert(), args=arguments(tmp_path / "stock", **saving), train_dataset=rows(), data_collator=collate
    )
    quietly(stock.train)
    only = ours(tmp_path / "only", settings={**saving, "save_only_model": True})
    quietly(only.train)
    for folder, found in (("stock", "without a plan's"), ("only", "no optimizer.pt")):
        trainer = ours(tmp_path)
        with pytest.raises(TitheError, match=found):
            quietly(lambda t=trainer, f=folder: t.train(resume_from_checkpoint=str(tmp_path / f / "checkpoint-2")))


def test_another_method_does_not_take_a_checkpoint_over(tmp_path: Path) -> None:
    quietly(ours(tmp_path, settings={"save_strategy": "steps", "save_steps": 2}).train)
    other = ours(tmp_path, tithe_where="*query*")
    with pytest.raises(TitheError, match="where="):
        quietly(lambda: other.train(resume_from_checkpoint=str(tmp_path / "checkpoint-2")))


def test_a_checkpoint_of_other_settings_goes_on_and_says_so(tmp_path: Path) -> None:
    quietly(ours(tmp_path, settings={"save_strategy": "steps", "save_steps": 2}).train)
    folder = str(tmp_path / "checkpoint-2")
    other = ours(tmp_path, method=tithe.FISH(density=0.1, samples=ROWS))
    with pytest.warns(tithe.TitheWarning, match=r"made by FISH\(density=0.05.*goes on; FISH\(density=0.1"):
        quietly(lambda: other.train(resume_from_checkpoint=folder))
    again = ours(tmp_path, method=tithe.FISH(density=0.05, samples=ROWS, reselect=tithe.every(2)))
    with pytest.raises(TitheError, match="chooses once"):
        quietly(lambda: again.train(resume_from_checkpoint=folder))
    sgd = ours(tmp_path, settings={"optim": "sgd"})
    with pytest.raises(TitheError, match="another optimizer"):
        quietly(lambda: sgd.train(resume_from_checkpoint=folder))


def test_a_trainer_is_copied_before_training_and_after_release(tmp_path: Path) -> None:
    trainer = ours(tmp_path)
    copied = deepcopy(trainer)
    assert type(copied) is type(trainer)
    quietly(trainer.train)
    with pytest.raises(TitheError, match="release"):
        deepcopy(trainer)
    trainer.plan.release()
    copied = deepcopy(trainer)
    quietly(copied.train)
    assert copied.plan.num_steps == 2 * ROWS // BATCH
    assert trainer.plan.released


def test_what_goes_wrong_in_the_model_is_told_as_it_is(tmp_path: Path) -> None:
    class Broken(type(bert())):
        def forward(self, input_ids: Tensor, attention_mask: Tensor, labels: Tensor) -> Any:
            raise ValueError("of its own")

    with pytest.raises(ValueError, match="of its own"):
        quietly(ours(tmp_path, model=cast(Broken)).train)


def test_attaching_before_a_stock_trainer_stays_right(tmp_path: Path) -> None:
    model = bert()
    plan = tithe.attach(model, FISH, loss=loss_fn, data=[collate(rows())])
    trainer = Trainer(model=model, args=arguments(tmp_path), train_dataset=rows(), data_collator=collate)
    quietly(trainer.train)
    assert plan.num_steps == 2 * ROWS // BATCH
