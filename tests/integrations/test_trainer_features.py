"""What a Trainer offers goes on under `with_tithe`: as in a stock Trainer whose model was attached before."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from transformers import Trainer

import tithe
from tithe.integrations.transformers.data import TrainerLoss
from trainers import BATCH, FISH, HEAD, ROWS, bert, collate, loss_fn, ours, quietly, rows, same, stock, weights

REENTRANT = {"activation_checkpointing": True, "activation_checkpointing_kwargs": {"use_reentrant": True}}
FEATURES: dict[str, dict[str, Any]] = {
    "learning-rate schedules, weight decay": {"lr_scheduler_type": "cosine", "warmup_steps": 1, "weight_decay": 0.1},
    "gradient accumulation": {"gradient_accumulation_steps": 2},
    "gradient clipping": {"max_grad_norm": 0.05},
    "bf16": {"bf16": True},
    "activation checkpointing": {"activation_checkpointing": True},
    "activation checkpointing, reentrant": REENTRANT,
    "label smoothing": {"label_smoothing_factor": 0.2},
    "group by length": {"train_sampling_strategy": "group_by_length"},
    "NEFTune": {"neftune_noise_alpha": 5.0},
    "`max_steps`": {"max_steps": 4},
    '`optim="sgd"`': {"optim": "sgd", "learning_rate": 1.0},
    '`optim="rmsprop"`': {"optim": "rmsprop"},
    '`optim="adagrad"`': {"optim": "adagrad"},
    "workers": {"dataloader_num_workers": 1},
    "`torch_compile`": {"torch_compile": True, "torch_compile_backend": "aot_eager", "max_steps": 2},
}
EQUAL_TO_NONE = {"activation checkpointing", "activation checkpointing, reentrant"}
"""Features that do not change what is trained."""
SLOW = {"`torch_compile`", "workers"}


@pytest.fixture(scope="module")
def without(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Tensor]:
    """The weights after a run without any of the features."""
    trainer = ours(tmp_path_factory.mktemp("without"))
    quietly(trainer.train)
    return weights(trainer)


def by_hand(**settings: Any) -> Callable[[nn.Module, Any], Tensor]:
    """The loss that the Trainer takes with these settings, written by hand."""

    def loss(model: nn.Module, batch: dict[str, Tensor]) -> Tensor:
        with torch.autocast("cpu", torch.bfloat16, enabled=bool(settings.get("bf16"))):
            logits = model(**batch).logits
        smoothing = settings.get("label_smoothing_factor", 0.0)
        return nn.functional.cross_entropy(logits.float(), batch["labels"], label_smoothing=smoothing)

    return loss


@pytest.mark.parametrize(
    "feature", [pytest.param(name, marks=[pytest.mark.slow] if name in SLOW else []) for name in FEATURES]
)
def test_a_feature_is_that_of_a_stock_trainer(feature: str, without: dict[str, Tensor], tmp_path: Path) -> None:
    settings = FEATURES[feature]
    if feature in SLOW:
        warnings.filterwarnings("ignore", category=DeprecationWarning)
    found = ours(tmp_path, settings=settings)
    quietly(found.train)
    expected = stock(tmp_path, loss=by_hand(**settings), settings=settings)
    quietly(expected.train)
    assert same(weights(found), weights(expected))
    if feature not in SLOW:
        assert same(weights(found), without) == (feature in EQUAL_TO_NONE)


def test_evaluation_and_prediction_before_and_after(tmp_path: Path) -> None:
    found, expected = [], []
    for make, told in ((ours, found), (stock, expected)):
        trainer = make(tmp_path, eval_dataset=rows(8, seed=2))
        told.append(quietly(trainer.evaluate)["eval_loss"])
        quietly(trainer.train)
        told.append(quietly(trainer.evaluate)["eval_loss"])
        told.append(
            torch.tensor(quietly(lambda trainer=trainer: trainer.predict(rows(4, seed=3))).predictions).tolist()
        )
    assert found == expected
    assert found[0] != found[1]


def test_training_twice_goes_on_with_the_same_plan(tmp_path: Path) -> None:
    found, expected = ours(tmp_path), stock(tmp_path)
    trained = []
    for trainer in (found, expected):
        torch.manual_seed(1)
        quietly(trainer.train)
        trained.append(trainer is found and trainer.plan)
        quietly(trainer.train)
    assert found.plan is trained[0]
    assert found.plan.num_epochs == 4
    assert same(weights(found), weights(expected))


def test_a_model_made_anew_for_each_run_gets_a_plan_of_its_own(tmp_path: Path) -> None:
    trainer = ours(tmp_path, model_init=lambda: bert())
    quietly(trainer.train)
    plan, first = trainer.plan, weights(trainer)
    quietly(trainer.train)
    assert same(weights(trainer), first)
    assert plan.released
    assert trainer.plan is not plan
    assert trainer.plan.model is trainer.model


def test_hyper_parameters_are_searched(tmp_path: Path) -> None:
    optuna = pytest.importorskip("optuna", reason="the search is optuna's")
    optuna.logging.set_verbosity(optuna.logging.ERROR)
    settings = {"eval_strategy": "epoch", "num_train_epochs": 1}
    trainer = ours(tmp_path, model_init=lambda: bert(), eval_dataset=rows(8, seed=2), settings=settings)
    rates = iter((1e-6, 0.05))
    best = quietly(
        lambda: trainer.hyperparameter_search(
            hp_space=lambda trial: (
                {"learning_rate": trial.suggest_categorical(str(rate := next(rates)), [rate])}
                and {"learning_rate": rate}
            ),
            compute_objective=lambda metrics: metrics["eval_loss"],
            n_trials=2,
            backend="optuna",
        )
    )
    losses = []
    for rate in (1e-6, 0.05):
        alone = ours(tmp_path, eval_dataset=rows(8, seed=2), settings={**settings, "learning_rate": rate})
        quietly(alone.train)
        losses.append(alone.state.log_history[0]["eval_loss"])
    assert best.objective == pytest.approx(min(losses), abs=1e-2)


class Stream(torch.utils.data.IterableDataset[Any]):
    """Rows without a length, from the first each time."""

    def __iter__(self) -> Iterator[Any]:
        return iter(rows())


@pytest.mark.parametrize("method", [FISH, tithe.FISH(density=0.05, samples=ROWS, reselect=tithe.every(1, "epochs"))])
def test_a_stream_is_scored_and_then_trained_from_its_first_row(method: Any, tmp_path: Path) -> None:
    settings = {"max_steps": 5, "learning_rate": 0.05}
    found, expected = (make(tmp_path, method=method, train=Stream(), settings=settings) for make in (ours, stock))
    for trainer in (found, expected):
        torch.manual_seed(1)
        quietly(trainer.train)
    assert same(weights(found), weights(expected))
    assert found.plan.num_epochs == 1  # the second was stopped within


@pytest.mark.parametrize("lazy", [False, True])
def test_columns_that_the_model_does_not_take_are_removed(lazy: bool, tmp_path: Path) -> None:
    import datasets

    data = datasets.Dataset.from_list([{**row, "note": "a"} for row in rows()])
    data = data.to_iterable_dataset() if lazy else data
    trainer = ours(tmp_path, train=data, settings={"max_steps": 2})
    quietly(trainer.train)
    assert trainer.plan.num_steps == 2


def test_a_batch_that_does_not_fit_is_halved(tmp_path: Path) -> None:
    class Small(type(bert())):
        def forward(self, input_ids: Tensor, attention_mask: Tensor, labels: Tensor | None = None) -> Any:
            if self.training and len(input_ids) > 2:
                raise RuntimeError("CUDA out of memory. Tried to allocate")
            return super().forward(input_ids=input_ids, attention_mask=attention_mask, labels=labels)

    trained = []
    for make in (ours, stock):
        model = bert()
        model.__class__ = Small
        trainer = make(tmp_path, model=model, settings={"auto_find_batch_size": True})
        torch.manual_seed(1)
        quietly(trainer.train)
        assert trainer._train_batch_size == 2
        trained.append(weights(trainer))
    assert same(*trained)


def test_the_loss_to_choose_by_may_be_another(tmp_path: Path) -> None:
    seen: list[int] = []

    def loss(model: nn.Module, batch: dict[str, Tensor]) -> Tensor:
        seen.append(len(batch["labels"]))
        return -loss_fn(model, batch).square()

    trainer = ours(tmp_path, tithe_loss=loss)
    quietly(trainer.train)
    assert seen
    expected = stock(tmp_path, loss=loss)
    assert {n: s.tolist() for n in trainer.plan.selections for s in [trainer.plan.selected(n)]} == {
        n: s.tolist() for n in expected.tithe_plan.selections for s in [expected.tithe_plan.selected(n)]
    }


def test_a_loss_function_is_handed_the_number_of_labels_that_it_divides_by(tmp_path: Path) -> None:
    def compute(outputs: Any, labels: Tensor, num_items_in_batch: Any = None) -> Tensor:
        return nn.functional.cross_entropy(outputs["logits"], labels, reduction="sum") / num_items_in_batch

    trainer, plain = ours(tmp_path, compute_loss_func=compute), ours(tmp_path)
    for each in (trainer, plain):
        torch.manual_seed(1)
        quietly(each.train)
    for name, value in weights(plain).items():
        torch.testing.assert_close(weights(trainer)[name], value, rtol=0, atol=1e-4)


def test_scoring_writes_nothing_down(tmp_path: Path) -> None:
    class Counting(Trainer):
        def __init__(self, *args: Any, **kwargs: Any) -> None:
            super().__init__(*args, **kwargs)
            self.metrics: dict[str, list[int]] = {"rows": []}
            self.calls = 0

        def compute_loss(self, model: Any, inputs: Any, **kwargs: Any) -> Any:
            self.metrics["rows"].append(len(inputs["labels"]))
            self.calls += 1
            return super().compute_loss(model, inputs, **kwargs)

    trainer = ours(tmp_path, trainer=Counting, method=tithe.FISH(density=0.05, samples=ROWS, reselect=tithe.every(2)))
    held = trainer.metrics["rows"]
    quietly(trainer.train)
    assert trainer.calls == 2 * ROWS // BATCH
    assert held is trainer.metrics["rows"]
    assert held == [BATCH] * trainer.calls
    batch = collate(rows()[:BATCH])
    assert TrainerLoss(trainer)(trainer.model, batch) > 0
    assert "labels" in batch


def test_what_is_logged(tmp_path: Path) -> None:
    budget = tithe.TraDy(tithe.Budget(fraction=0.05), samples=ROWS)
    settings = {"logging_strategy": "epoch", "eval_strategy": "epoch"}
    trainer = ours(tmp_path, method=budget, eval_dataset=rows(4), settings=settings)
    quietly(trainer.train)
    trained = [logs for logs in trainer.state.log_history if "loss" in logs or "train_loss" in logs]
    assert [logs["tithe_draws"] for logs in trained] == [2, 3, 3]
    share = sum(p.numel() for p in trainer.plan.parameters()) / bert().num_parameters()
    assert {logs["tithe_trained"] for logs in trained} == {share}
    assert all(0 < logs["tithe_spent"] <= 1 for logs in trained)
    (peak,) = {logs["tithe_peak"] for logs in trained}
    ledger = tithe.measure(lambda: trainer.training_step(trainer.model, collate(rows()[:BATCH])))
    assert 0.5 < ledger.peak / peak < 2
    assert not any(key.startswith("tithe") for logs in trainer.state.log_history if "eval_loss" in logs for key in logs)


def test_generation_in_evaluation(tmp_path: Path) -> None:
    from transformers import Seq2SeqTrainer, Seq2SeqTrainingArguments, T5Config, T5ForConditionalGeneration

    from trainers import arguments

    torch.manual_seed(0)
    shape = dict(vocab_size=40, d_model=8, d_kv=4, d_ff=16, num_layers=1, num_heads=2, decoder_start_token_id=0)
    data = [{"input_ids": row["input_ids"][:3], "labels": row["input_ids"][:3]} for row in rows()]
    trainer = ours(
        tmp_path,
        trainer=Seq2SeqTrainer,
        model=T5ForConditionalGeneration(T5Config(**shape)),
        args=arguments(tmp_path, Seq2SeqTrainingArguments, predict_with_generate=True),
        train=data,
        eval_dataset=data[:4],
        data_collator=None,
        tithe_head=(),
    )
    before = quietly(trainer.evaluate)["eval_loss"]
    quietly(trainer.train)
    assert quietly(trainer.evaluate)["eval_loss"] < before
    assert len(quietly(lambda: trainer.predict(data[:4], max_new_tokens=3)).predictions) == 4


def test_a_class_of_ones_own(tmp_path: Path) -> None:
    from tithe.integrations.transformers import with_tithe

    class Mine(with_tithe(Trainer)):
        def __init__(self, factor: float, **kwargs: Any) -> None:
            super().__init__(**kwargs)
            self.factor = factor

        def compute_loss(self, *args: Any, **kwargs: Any) -> Any:
            return super().compute_loss(*args, **kwargs) * self.factor

    assert with_tithe(Mine) is Mine
    made = ours(tmp_path, trainer=Mine, factor=2.0)
    quietly(made.train)
    assert made.plan.num_steps == 2 * ROWS // BATCH


def test_head_and_where_reach_the_plan(tmp_path: Path) -> None:
    trainer = ours(tmp_path, tithe_head="classifier.bias", tithe_where="*query*")
    quietly(trainer.train)
    assert trainer.plan.head == ("classifier.bias",)
    assert all("query" in name for name in trainer.plan.selections)
    assert trainer.plan.seed == 0
    assert HEAD == ("classifier.*",)


PAGE = Path(__file__).parents[2] / "docs" / "trainer.md"
OTHERS = {
    "evaluation, prediction": "equal, before and after training",
    "`train()` twice": "equal; the plan goes on",
    "resuming; `load_best_model_at_end`": "equal; the plan is that of the checkpoint",
    "`auto_find_batch_size`": "equal",
    "a dataset without a length": "equal; scored, and then trained from its first row",
    "`model_init`, `hyperparameter_search`": "a new plan in each run",
    "`Seq2SeqTrainer` with `predict_with_generate`": "trained and evaluated",
    "`SFTTrainer`: packing, padding-free, label smoothing, DFT loss": "equal",
    "`DPOTrainer`, with and without `precompute_ref_log_probs`": "equal",
    "PEFT": "a part of the adapter is trained, saved and resumed",
    "two ranks by torchrun": "equal to one, up to the order of sums; resumed bit for bit",
}


def page() -> str:
    """The table of the docs."""
    lines = ["| feature | weights |", "|---|---|"]
    lines += [f"| {name} | equal |" for name in FEATURES]
    lines += [f"| {name} | {told} |" for name, told in OTHERS.items()]
    return "\n".join(lines)


def test_the_page_shows_what_is_tested() -> None:
    text = PAGE.read_text("utf-8")
    begin, end = "<!-- table -->\n", "\n<!-- end -->"
    assert text[text.index(begin) + len(begin) : text.index(end)] == page()


if __name__ == "__main__":
    text = PAGE.read_text("utf-8")
    begin, end = "<!-- table -->\n", "<!-- end -->"
    PAGE.write_text(text[: text.index(begin) + len(begin)] + page() + "\n" + text[text.index(end) :], "utf-8")
