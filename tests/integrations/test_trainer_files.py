"""Saving, resuming and the best checkpoint: plain weights, the delta and its card, and the plan that goes with them."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from transformers import ViTConfig, ViTForImageClassification

import tithe
from tithe import TitheError
from trainers import FISH, HEAD, ROWS, bert, ours, quietly, rows, same, stock, weights

AGAIN = tithe.FISH(density=0.05, samples=ROWS, reselect=tithe.every(2))
TRADY = tithe.TraDy(tithe.Budget(fraction=0.05), samples=ROWS)
EACH_STEP = {"save_strategy": "steps", "save_steps": 1}
BEST: dict[str, Any] = {
    "num_train_epochs": 3,
    "learning_rate": 0.05,
    "eval_strategy": "epoch",
    "save_strategy": "epoch",
    "load_best_model_at_end": True,
    "metric_for_best_model": "loss",
    "greater_is_better": True,  # so that the best is not the last
}


@pytest.mark.parametrize("method", [FISH, AGAIN, TRADY], ids=["FISH", "FISH, again", "TraDy"])
def test_what_is_saved_is_plain_and_the_delta_makes_it_from_the_base(method: Any, tmp_path: Path) -> None:
    trainer = ours(tmp_path, method=method)
    quietly(trainer.train)
    quietly(lambda: trainer.save_model(str(tmp_path / "out")))
    assert set(load_file(tmp_path / "out" / "model.safetensors")) == set(bert().state_dict())
    assert same(weights(trainer), dict(type(trainer.model).from_pretrained(tmp_path / "out").state_dict()))
    assert same(weights(trainer), dict(tithe.apply(bert(), tmp_path / "out" / "delta.safetensors").state_dict()))
    trainer.plan.release()
    quietly(lambda: trainer.save_model(str(tmp_path / "released")))
    assert not (tmp_path / "released" / "delta.safetensors").exists()
    assert same(weights(trainer), dict(type(trainer.model).from_pretrained(tmp_path / "released").state_dict()))


def test_the_card_carries_what_was_measured(tmp_path: Path) -> None:
    trainer = ours(tmp_path, method=TRADY)
    quietly(trainer.train)
    out = tmp_path / "out"
    out.mkdir()
    (out / "README.md").write_text("---\ntags: [mine]\n---\nWritten by hand.\n", "utf-8")
    quietly(lambda: trainer.save_model(str(out)))
    quietly(lambda: trainer.save_model(str(out)))
    card = (out / "README.md").read_text("utf-8")
    assert card.startswith("---\ntags: [mine]\n---\nWritten by hand.\n")
    assert card.count("## Trained in part") == 1
    figures, size = trainer._figures(), (out / "delta.safetensors").stat().st_size
    for line in (
        f"| trained | {figures['tithe_trained']:.3%} of {bert().num_parameters():,} weights |",
        f"| steps | {trainer.plan.num_steps} |",
        f"| choices made | {figures['tithe_draws']} |",
        f"| budget spent | {figures['tithe_spent']:.1%} |",
        f"| `delta.safetensors` | {size:,} bytes |",
        f"{figures['tithe_peak']:,} bytes",
    ):
        assert line in card
    quietly(lambda: trainer.create_model_card(model_name="a model"))
    card = (tmp_path / "README.md").read_text("utf-8")
    assert "a model" in card
    assert card.count("## Trained in part") == 1


def test_nothing_is_added_before_training(tmp_path: Path) -> None:
    trainer = ours(tmp_path)
    quietly(lambda: trainer.save_model(str(tmp_path / "out")))
    assert not (tmp_path / "out" / "delta.safetensors").exists()
    assert trainer.plan is None


@pytest.mark.parametrize("method", [FISH, AGAIN], ids=["FISH", "FISH, again"])
def test_deltas_alone(method: Any, tmp_path: Path) -> None:
    whole = ours(tmp_path, method=method, tithe_save="delta", settings=EACH_STEP)
    quietly(whole.train)
    checkpoint = str(tmp_path / "checkpoint-2")
    assert not [name for name in os.listdir(checkpoint) if name.startswith(("model", "pytorch_model"))]
    assert {"config.json", "delta.safetensors", "optimizer.pt", "README.md"} <= set(os.listdir(checkpoint))
    resumed = ours(tmp_path, method=method, tithe_save="delta")
    quietly(lambda: resumed.train(resume_from_checkpoint=checkpoint))
    assert same(weights(resumed), weights(whole))

    other = bert()
    with torch.no_grad():
        other.bert.embeddings.word_embeddings.weight.add_(1)
    wrong = ours(tmp_path, method=method, model=other, tithe_save="delta")
    with pytest.raises(TitheError, match="base"):
        quietly(lambda: wrong.train(resume_from_checkpoint=checkpoint))


def test_the_narrow_network_goes_on_from_its_state_alone(tmp_path: Path) -> None:
    given: dict[str, Any] = {"method": tithe.VRPGE(0.4, structure_lr=0.5), "tithe_head": (), "tithe_save": "delta"}
    whole = ours(tmp_path, settings={**EACH_STEP, "num_train_epochs": 3}, **given)
    quietly(whole.train)
    assert sum(p.numel() for p in whole.model.parameters()) < bert().num_parameters()  # units went for good
    resumed = ours(tmp_path, settings={"num_train_epochs": 3}, **given)
    quietly(lambda: resumed.train(resume_from_checkpoint=str(tmp_path / "checkpoint-7")))
    assert same(weights(resumed), weights(whole))


def test_a_trainer_goes_back_to_its_own_checkpoint(tmp_path: Path) -> None:
    trainer = ours(tmp_path, method=AGAIN, settings=EACH_STEP)
    quietly(trainer.train)
    plan, first = trainer.plan, weights(trainer)
    quietly(lambda: trainer.train(resume_from_checkpoint=str(tmp_path / "checkpoint-2")))
    assert same(weights(trainer), first)
    assert trainer.plan is not plan
    assert plan.released


@pytest.mark.parametrize("method", [FISH, AGAIN], ids=["FISH", "FISH, again"])
def test_the_best_model_is_that_of_a_stock_trainer(method: Any, tmp_path: Path) -> None:
    given: dict[str, Any] = {"method": method, "settings": BEST, "eval_dataset": rows(8, seed=2)}
    found = ours(tmp_path / "found", **given)
    quietly(found.train)
    expected = stock(tmp_path / "expected", **given)
    quietly(expected.train)
    assert same(weights(found), weights(expected))
    assert found.plan.num_steps == found.state.best_global_step < found.state.global_step
    quietly(lambda: found.save_model(str(tmp_path / "out")))
    assert same(weights(found), dict(tithe.apply(bert(), tmp_path / "out" / "delta.safetensors").state_dict()))
    best = found.state.best_global_step
    quietly(found.train)  # a plan of the best checkpoint, and an optimizer of its own
    assert found.plan.num_steps == best + found.state.best_global_step


def test_the_best_model_of_a_checkpoint_without_an_optimizer(tmp_path: Path) -> None:
    settings = {**BEST, "save_only_model": True}
    given: dict[str, Any] = {"method": AGAIN, "settings": settings, "eval_dataset": rows(8, seed=2)}
    found = ours(tmp_path / "found", **given)
    quietly(found.train)
    best = type(found.model).from_pretrained(found.state.best_model_checkpoint)
    assert same(weights(found), dict(best.state_dict()))
    quietly(lambda: found.save_model(str(tmp_path / "out")))
    assert same(weights(found), dict(tithe.apply(bert(), tmp_path / "out" / "delta.safetensors").state_dict()))


def test_a_model_whose_names_change_when_it_is_saved(tmp_path: Path) -> None:
    def vit() -> Any:
        torch.manual_seed(0)
        shape = dict(hidden_size=8, intermediate_size=16, num_hidden_layers=1, num_attention_heads=2)
        return ViTForImageClassification(ViTConfig(image_size=4, patch_size=2, num_channels=1, **shape))

    data = [{"pixel_values": torch.randn(1, 4, 4), "labels": torch.tensor(n % 2)} for n in range(ROWS)]
    given: dict[str, Any] = {"method": AGAIN, "train": data, "data_collator": None, "eval_dataset": data[:4]}
    trainer = ours(tmp_path, model=vit(), settings=BEST, **given)
    quietly(trainer.train)
    best = trainer.state.best_model_checkpoint
    assert not set(load_file(Path(best) / "model.safetensors")) <= set(trainer.model.state_dict())
    assert same(weights(trainer), dict(type(trainer.model).from_pretrained(best).state_dict()))
    other = vit()
    with torch.no_grad():  # resuming brings all weights, not only those of the plan
        other.vit.embeddings.cls_token.add_(1)
    checkpoint = str(tmp_path / "checkpoint-3")
    resumed = ours(tmp_path / "resumed", model=other, settings={**BEST, "load_best_model_at_end": False}, **given)
    whole = ours(tmp_path / "whole", model=vit(), settings={**BEST, "load_best_model_at_end": False}, **given)
    quietly(lambda: resumed.train(resume_from_checkpoint=checkpoint))
    quietly(whole.train)
    assert same(weights(resumed), weights(whole))


def test_a_part_of_an_adapter(tmp_path: Path) -> None:
    from peft import LoraConfig, get_peft_model

    def adapted() -> Any:
        model = bert()
        torch.manual_seed(0)
        return get_peft_model(model, LoraConfig(r=4, target_modules=["query", "value"], task_type="SEQ_CLS"))

    given: dict[str, Any] = {"method": tithe.FISH(k=40, samples=ROWS), "tithe_head": ()}
    with pytest.warns(FutureWarning, match="gradient_checkpointing"):  # peft's use of an old name of transformers'
        models = [adapted(), adapted()]
    whole = ours(tmp_path, model=models[0], settings=EACH_STEP, **given)
    quietly(whole.train)
    assert all("lora" in name or "modules_to_save" in name for name in whole.plan.selections)
    assert (tmp_path / "checkpoint-2" / "adapter_model.safetensors").is_file()
    resumed = ours(tmp_path, model=models[1], **given)
    quietly(lambda: resumed.train(resume_from_checkpoint=str(tmp_path / "checkpoint-2")))
    assert same(weights(resumed), weights(whole))


def test_the_counts_of_callbacks_that_are_restored(tmp_path: Path) -> None:
    settings = {**EACH_STEP, "restore_callback_states_from_checkpoint": True}
    whole = ours(tmp_path, method=AGAIN, settings=settings)
    quietly(whole.train)
    resumed = ours(tmp_path, method=AGAIN, settings=settings)
    quietly(lambda: resumed.train(resume_from_checkpoint=str(tmp_path / "checkpoint-3")))
    assert resumed._figures() == whole._figures()
    assert same(weights(resumed), weights(whole))
    assert HEAD
