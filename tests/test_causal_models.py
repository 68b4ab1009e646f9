"""`tithe.causal_loss` of models of many kinds, in mixed precision, and of labels that a loss cannot be taken of."""

from __future__ import annotations

import copy
from functools import partial
from typing import Any

import pytest
import torch
import transformers as tf
from torch import Tensor, nn

import tithe
from tithe import TitheError
from tithe.ledger import predict

WORDS = 61
SIZE: dict[str, Any] = {
    "vocab_size": WORDS, "hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 2, "num_attention_heads": 2,
    "num_key_value_heads": 1, "bos_token_id": 1, "eos_token_id": 2, "pad_token_id": 0, "max_position_embeddings": 32,
}  # fmt: skip
EXPERTS = dict(num_experts=4, num_experts_per_tok=2, moe_intermediate_size=8, output_router_logits=True)
LOCAL = dict(num_local_experts=4, num_experts_per_tok=2)
LATENT = dict(q_lora_rank=8, kv_lora_rank=8, qk_nope_head_dim=4, qk_rope_head_dim=4, v_head_dim=8, n_group=1)
ROUTED = dict(n_routed_experts=4, num_experts_per_tok=2, moe_intermediate_size=8, topk_group=1, n_shared_experts=1)
BLOCKS = dict(block_types=["recurrent", "attention"])
WINDOWS = dict(head_dim=8, sliding_window=3, layer_types=["sliding_attention", "full_attention"])
KINDS: dict[str, tuple[str, dict[str, Any]]] = {
    "experts": ("Qwen2Moe", {**SIZE, **EXPERTS, "shared_expert_intermediate_size": 8}),
    "latent attention": ("DeepseekV3", {**SIZE, **LATENT, **ROUTED, "num_key_value_heads": 2}),
    "windows": ("Gemma3", {**SIZE, **WINDOWS, "final_logit_softcapping": 2.0}),
    "sinks": ("GptOss", {**SIZE, "head_dim": 8, "sliding_window": 4, **LOCAL}),
    "no positions": ("Bloom", dict(vocab_size=WORDS, hidden_size=16, n_layer=2, n_head=2)),
    "state space": ("Mamba", dict(vocab_size=WORDS, hidden_size=16, num_hidden_layers=2, state_size=4)),
    "recurrent": ("RecurrentGemma", {**SIZE, "lru_width": 16, "attention_window_size": 4, **BLOCKS}),
}


def build(name: str, **settings: Any) -> Any:
    kind, given = KINDS[name]
    torch.manual_seed(0)
    kind_of = getattr(tf, f"{kind}ForCausalLM")
    model = kind_of(kind_of.config_class(**given, **settings))
    for parameter in model.parameters():
        nn.init.normal_(parameter, std=0.2) if parameter.dim() > 1 else None
    return model


def words(padded: str = "left") -> dict[str, Tensor]:
    """Token ids with padding at one end of a row, or a row without labels."""
    ids = torch.randint(3, WORDS, (3, 7), generator=torch.Generator().manual_seed(0))
    labels, mask = ids.clone(), torch.ones_like(ids)
    where = {"left": slice(0, 3), "right": slice(4, None), "whole row": slice(None)}[padded]
    labels[-1, where] = -100
    if padded != "whole row":
        mask[-1, where] = 0
    return {"input_ids": ids, "labels": labels, "attention_mask": mask}


def gradients(loss: Tensor, model: nn.Module) -> dict[str, Tensor]:
    for parameter in model.parameters():
        parameter.grad = None
    loss.backward()
    return {name: p.grad for name, p in model.named_parameters() if p.grad is not None}


def check(model: Any, batch: Any, *, bound: float = 1e-5) -> None:
    """The loss and its gradients are those of the model's own."""
    loss = model(**batch).loss
    expected = gradients(loss, model)
    found = tithe.causal_loss(model, batch, rows=5)
    assert found.dtype == loss.dtype
    torch.testing.assert_close(found.detach(), loss.detach(), atol=bound, rtol=bound)
    torch.testing.assert_close(gradients(found, model), expected, atol=bound, rtol=bound)


@pytest.mark.parametrize("name", KINDS)
def test_models_of_many_kinds(name: str) -> None:
    model = build(name)
    check(model, words("left"))
    model.eval()
    check(model, words("whole row"))


@pytest.mark.parametrize("attention", ["eager", "sdpa"])
def test_padding_on_either_side_with_either_attention(attention: str) -> None:
    model = build("windows", attn_implementation=attention)
    for padded in ("left", "right"):
        check(model, words(padded))


def test_labels_that_are_shifted_already_and_counted() -> None:
    model, batch = build("windows"), words()
    shifted = nn.functional.pad(batch["labels"][:, 1:], (0, 1), value=-100)
    check(model, {**batch, "shift_labels": shifted})
    for count in (29, torch.tensor(29)):
        check(model, {**batch, "num_items_in_batch": count})
    model.resize_token_embeddings(WORDS + 9)
    check(model, {**batch, "labels": batch["labels"].where(batch["labels"] != 5, WORDS + 8)})


def test_a_gradient_of_embeddings_that_are_given() -> None:
    model, x = build("windows"), torch.randn(3, 7, 16, requires_grad=True)
    batch = {"inputs_embeds": x, "labels": words()["labels"]}
    for frozen in (False, True):
        model.requires_grad_(not frozen)
        (expected,) = torch.autograd.grad(model(**batch).loss, x)
        (found,) = torch.autograd.grad(tithe.causal_loss(model, batch, rows=5), x)
        torch.testing.assert_close(found, expected, atol=1e-6, rtol=1e-5)


class InFloat(nn.Module):
    """A head that is kept in float32 in a model of half precision."""

    def __init__(self, head: nn.Linear) -> None:
        super().__init__()
        self.head = head.float()

    def forward(self, x: Tensor) -> Tensor:
        return self.head(x.float())


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_mixed_precision(dtype: torch.dtype) -> None:
    """Norms in float32 among weights in half precision, and a head in float32 behind them."""
    model = build("windows").to(dtype)
    for name, parameter in model.named_parameters():
        if "norm" in name:
            parameter.data = parameter.data.float()
    check(model, words(), bound=3e-2)
    model.lm_head = InFloat(copy.deepcopy(model.lm_head))
    check(model, words(), bound=3e-2)


def test_it_costs_in_half_precision_what_a_prediction_says() -> None:
    model, batch = build("windows").bfloat16(), words()
    plan = tithe.attach(model, tithe.FISH(density=0.1, score="random"), loss=partial(tithe.causal_loss, rows=4))
    tithe.lean(model)

    def step() -> None:
        tithe.causal_loss(model, batch, rows=4).backward()

    step()
    for theta in plan.parameters():
        theta.grad = None
    predicted = predict(model, lambda batch: tithe.causal_loss(model, batch, rows=4), batch)
    measured = tithe.measure(step, model=model)
    assert (predicted.kept, predicted.peak) == (measured.kept, measured.peak)
    assert plan.predict(batch).kept == measured.kept
    assert all(theta.dtype == torch.float32 for theta in plan.parameters())


@pytest.mark.parametrize("label", [WORDS, -1])
def test_labels_that_are_no_words_are_refused(label: int) -> None:
    model, batch = build("windows"), words()
    batch["labels"][1, 3] = label
    with pytest.raises(IndexError):
        model(**batch)
    with pytest.raises(TitheError, match=f"a label of {label}; expected labels from 0 to {WORDS - 1}"):
        tithe.causal_loss(model, batch)


def test_labels_of_another_dtype_are_refused() -> None:
    """As the model's own loss does."""
    model, batch = build("windows"), words()
    batch["labels"] = batch["labels"].int()
    with pytest.raises(RuntimeError):
        model(**batch)
    with pytest.raises(TitheError, match=r"torch\.int32 labels"):
        tithe.causal_loss(model, batch)


def test_an_encoder_is_refused() -> None:
    sizes = dict(vocab_size=WORDS, d_model=16, d_kv=8, d_ff=24, num_layers=1, num_heads=2, decoder_start_token_id=0)
    with pytest.raises(TitheError, match="an encoder besides"):
        tithe.causal_loss(tf.T5ForConditionalGeneration(tf.T5Config(**sizes)), words())
