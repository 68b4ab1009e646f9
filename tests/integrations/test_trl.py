"""with_tithe over TRL's trainers: as the stock ones over a model that was attached before, their own metrics too."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

import tithe
from tithe.integrations.transformers import with_tithe
from tithe.integrations.transformers.data import Example, TrainerBatches, TrainerLoss
from trainers import arguments, quietly, same, weights

datasets = pytest.importorskip("datasets", reason="TRL trains on its datasets")
trl = pytest.importorskip("trl", reason="what is tested here")

# trl 1.16 under transformers 5.23: a name that transformers calls deprecated, and an option that trl does.
pytestmark = [
    pytest.mark.filterwarnings("ignore:.is_gradient_checkpointing. is deprecated:FutureWarning"),
    pytest.mark.filterwarnings("ignore:.label_smoothing_factor. is deprecated:FutureWarning"),
]

TEXTS = [line for line in Path(tithe.__file__).read_text("utf-8").splitlines() if len(line) > 20][:8]
FISH = tithe.FISH(density=0.05, samples=8)


def tokenizer() -> PreTrainedTokenizerFast:
    from tokenizers import Tokenizer, models, pre_tokenizers

    words = ["<pad>", "<eos>", *sorted(pre_tokenizers.ByteLevel.alphabet())]
    made = Tokenizer(models.BPE(vocab={word: number for number, word in enumerate(words)}, merges=[]))
    made.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    return PreTrainedTokenizerFast(tokenizer_object=made, pad_token="<pad>", eos_token="<eos>")


def llama() -> LlamaForCausalLM:
    torch.manual_seed(0)
    shape = dict(hidden_size=8, intermediate_size=16, num_hidden_layers=1, num_attention_heads=2)
    return LlamaForCausalLM(
        LlamaConfig(vocab_size=258, max_position_embeddings=64, pad_token_id=0, bos_token_id=1, eos_token_id=1, **shape)
    )


def made(kind: str, folder: Path, *, tithed: bool, method: Any = FISH, **settings: Any) -> Any:
    """A trainer of TRL's, by `with_tithe` or stock."""
    given: dict[str, Any] = {"model": llama(), "processing_class": tokenizer()}
    usual = dict(bf16=False, gradient_checkpointing=None, max_length=32, logging_strategy="steps", logging_steps=1)
    usual |= dict(num_train_epochs=1, **settings)
    if kind == "SFT":
        config, trainer = trl.SFTConfig, trl.SFTTrainer
        given["train_dataset"] = datasets.Dataset.from_dict({"text": TEXTS})
    else:
        config, trainer = trl.DPOConfig, trl.DPOTrainer
        pairs = [{"prompt": text[:8], "chosen": text[8:20], "rejected": text[20:5:-1]} for text in TEXTS]
        given |= {"train_dataset": datasets.Dataset.from_list(pairs), "ref_model": llama()}
    given["args"] = arguments(folder, config, **usual)
    return with_tithe(trainer)(**given, tithe=method) if tithed else trainer(**given)


def attached(trainer: Any) -> Any:
    """A stock trainer, attached before it trains, on the losses of the examples one by one."""
    loss = TrainerLoss(trainer)
    batches = [batch if isinstance(batch, list) else dict(batch) for batch in TrainerBatches(trainer)]
    tithe.attach(trainer.model, FISH, loss=loss, data=batches)
    return trainer


KINDS: dict[str, tuple[str, dict[str, Any]]] = {
    "SFT": ("SFT", {}),
    "SFT, packing": ("SFT", {"packing": True, "packing_strategy": "wrapped"}),
    "SFT, padding-free": ("SFT", {"padding_free": True, "max_length": None}),
    "SFT, label smoothing": ("SFT", {"label_smoothing_factor": 0.1}),
    "SFT, DFT loss": ("SFT", {"loss_type": "dft"}),
    "SFT, accumulation": ("SFT", {"gradient_accumulation_steps": 2}),
    "DPO": ("DPO", {}),
    "DPO, reference before": ("DPO", {"precompute_ref_log_probs": True}),
}
SLOW = {"SFT, label smoothing", "SFT, DFT loss", "SFT, accumulation", "DPO, reference before"}


@pytest.mark.parametrize("name", [pytest.param(n, marks=[pytest.mark.slow] if n in SLOW else []) for n in KINDS])
def test_a_run_is_that_of_the_stock_trainer_attached_before(name: str, tmp_path: Path) -> None:
    kind, settings = KINDS[name]
    found = quietly(lambda: made(kind, tmp_path / "found", tithed=True, **settings))
    quietly(found.train)
    expected = attached(quietly(lambda: made(kind, tmp_path / "expected", tithed=False, **settings)))
    quietly(expected.train)
    assert same(weights(found), weights(expected))
    told = [[log for log in trainer.state.log_history if "loss" in log] for trainer in (found, expected)]
    own = [{key: value for key, value in log.items() if not key.startswith("tithe_")} for log in told[0]]
    assert own == told[1]
    assert len(own) > 0


@pytest.mark.parametrize("kind", ["SFT", "DPO"])
def test_a_resumed_run_equals_one_that_never_stopped(kind: str, tmp_path: Path) -> None:
    again = tithe.FISH(density=0.05, samples=8, reselect=tithe.every(1))
    settings: dict[str, Any] = dict(save_strategy="steps", save_steps=1)
    whole = quietly(lambda: made(kind, tmp_path, tithed=True, method=again, **settings))
    quietly(whole.train)
    resumed = quietly(lambda: made(kind, tmp_path, tithed=True, method=again, **settings))
    quietly(lambda: resumed.train(resume_from_checkpoint=str(tmp_path / "checkpoint-1")))
    assert same(weights(resumed), weights(whole))
    assert "## Trained in part" in (tmp_path / "README.md").read_text("utf-8")


def test_pairs_are_scored_as_pairs(tmp_path: Path) -> None:
    trainer = quietly(lambda: made("DPO", tmp_path, tithed=True))
    batch = next(iter(TrainerBatches(trainer)))
    assert [type(each) for each in batch] == [Example] * 4
    loss = TrainerLoss(trainer)
    trainer.model.eval()
    with torch.no_grad():
        apart = torch.stack([loss(trainer.model, [each]) for each in batch])
        torch.testing.assert_close(loss(trainer.model, batch), apart.mean(), rtol=1e-4, atol=1e-6)


def test_two_forward_passes_write_metrics_once(tmp_path: Path) -> None:
    trainer = quietly(lambda: made("SFT", tmp_path, tithed=True, method=tithe.VRPGE(0.6)))
    quietly(trainer.train)
    plain = quietly(lambda: made("SFT", tmp_path, tithed=False))
    quietly(plain.train)
    counts = [[log["num_tokens"] for log in t.state.log_history if "num_tokens" in log] for t in (trainer, plain)]
    assert counts[0] == counts[1]
    assert trainer.plan.num_steps == 2
