"""A tiny language model, its rows, and the runs of Trainers that are compared."""

from __future__ import annotations

import contextlib
import io
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from transformers import BertConfig, BertForSequenceClassification, Trainer, TrainerCallback, TrainingArguments

import tithe
from tithe.integrations.transformers import with_tithe

HEAD = ("classifier.*",)
ROWS, BATCH = 12, 4
FISH = tithe.FISH(density=0.05, samples=ROWS)


def bert(**settings: Any) -> BertForSequenceClassification:
    torch.manual_seed(0)
    shape = dict(vocab_size=40, hidden_size=16, num_hidden_layers=1, num_attention_heads=2, intermediate_size=32)
    return BertForSequenceClassification(BertConfig(**shape, max_position_embeddings=16, **settings))


def rows(num: int = ROWS, *, seed: int = 1) -> list[dict[str, Any]]:
    """Rows of several lengths, in an order that no sampler would give by chance."""
    generator = torch.Generator().manual_seed(seed)
    lengths = [3 + 5 * index % 9 for index in range(num)]
    return [
        {"input_ids": torch.randint(1, 40, (length,), generator=generator).tolist(), "labels": length % 2}
        for length in lengths
    ]


def collate(items: Sequence[dict[str, Any]]) -> dict[str, Tensor]:
    longest = max(len(item["input_ids"]) for item in items)
    ids = [item["input_ids"] + [0] * (longest - len(item["input_ids"])) for item in items]
    mask = [[1] * len(item["input_ids"]) + [0] * (longest - len(item["input_ids"])) for item in items]
    found = {"input_ids": torch.tensor(ids), "attention_mask": torch.tensor(mask)}
    return found | {"labels": torch.tensor([item["labels"] for item in items])}


def arguments(folder: Path, kind: type[TrainingArguments] = TrainingArguments, **settings: Any) -> Any:
    given: dict[str, Any] = dict(
        per_device_train_batch_size=BATCH,
        per_device_eval_batch_size=BATCH,
        num_train_epochs=2,
        learning_rate=0.01,
        use_cpu=True,
        report_to=[],
        disable_tqdm=True,
        logging_strategy="no",
        save_strategy="no",
        seed=0,
        dataloader_pin_memory=False,
    )
    return kind(str(folder), **{**given, **settings})


def loss_fn(model: nn.Module, batch: dict[str, Tensor]) -> Tensor:
    return model(**batch).loss


class EndEpoch(TrainerCallback):
    """What someone writes who attaches before a stock Trainer."""

    def __init__(self, plan: tithe.Plan) -> None:
        self.plan = plan

    def on_epoch_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self.plan.end_epoch()


def quietly(work: Callable[[], Any]) -> Any:
    with contextlib.redirect_stdout(io.StringIO()):
        return work()


def ours(folder: Path, *, method: Any = FISH, trainer: type = Trainer, train: Any = None, **given: Any) -> Any:
    """A Trainer of `with_tithe`; `given` are its arguments beside the usual, `settings` its TrainingArguments'."""
    settings = given.pop("settings", {})
    usual: dict[str, Any] = dict(
        args=arguments(folder, **settings), train_dataset=rows() if train is None else train, data_collator=collate
    )
    if "model_init" not in given:
        usual["model"] = bert()
    usual |= dict(tithe=method, tithe_head=HEAD)
    return with_tithe(trainer)(**{**usual, **given})


def stock(folder: Path, *, method: Any = FISH, model: Any = None, train: Any = None, **given: Any) -> Any:
    """A stock Trainer over a model that was attached before; the plan is its `tithe_plan`."""
    settings = given.pop("settings", {})
    model = bert() if model is None else model
    data = given.pop("data", [collate(rows()[start : start + BATCH]) for start in range(0, ROWS, BATCH)])
    plan = tithe.attach(model, method, loss=given.pop("loss", loss_fn), data=data, head=HEAD)
    made = Trainer(
        model=model,
        args=arguments(folder, **settings),
        train_dataset=rows() if train is None else train,
        data_collator=collate,
        callbacks=[EndEpoch(plan)],
        **given,
    )
    made.tithe_plan = plan
    return made


def weights(trainer: Any) -> dict[str, Tensor]:
    return {name: value.clone() for name, value in trainer.model.state_dict().items()}


def same(one: dict[str, Tensor], other: dict[str, Tensor]) -> bool:
    return list(one) == list(other) and all(torch.equal(value, other[name]) for name, value in one.items())
