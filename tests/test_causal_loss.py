"""`tithe.causal_loss` is the model's own loss: its value and every gradient, with what a model does to its logits."""

from __future__ import annotations

import copy
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import peft
import pytest
import torch
import torch.nn.functional as F
import transformers as tf
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

import tithe
from ranks import play
from tithe import TitheError
from tithe.ledger import predict
from tithe.scoring import causal

pytestmark = [
    pytest.mark.filterwarnings("ignore:.*should not be instantiated:DeprecationWarning"),  # torch's own capture
    pytest.mark.filterwarnings("ignore:.is_gradient_checkpointing. is deprecated:FutureWarning"),  # transformers' own
]

WORDS = 61
SIZE: dict[str, Any] = {
    "vocab_size": WORDS, "hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 2,
    "num_attention_heads": 2, "num_key_value_heads": 1, "bos_token_id": 1, "eos_token_id": 2, "pad_token_id": 0,
}  # fmt: skip
GPT2 = dict(vocab_size=WORDS, n_positions=16, n_embd=16, n_layer=2, n_head=2, bos_token_id=1, eos_token_id=2)
STILL = dict(resid_pdrop=0.0, embd_pdrop=0.0, attn_pdrop=0.0)
MOE = dict(num_local_experts=4, output_router_logits=True, router_aux_loss_coef=0.5)
KINDS: dict[str, tuple[str, dict[str, Any]]] = {
    "llama": ("Llama", SIZE),
    "tied": ("Llama", {**SIZE, "tie_word_embeddings": True}),
    "gpt2": ("GPT2", {**GPT2, **STILL}),
    "head bias": ("Phi", {**SIZE, "num_key_value_heads": 2}),
    "capped": ("Gemma2", {**SIZE, "head_dim": 8, "final_logit_softcapping": 2.0}),
    "scaled": ("Cohere", {**SIZE, "logit_scale": 0.3}),
    "divided": ("Granite", {**SIZE, "logits_scaling": 2.5}),
    "mixture": ("Mixtral", {**SIZE, **MOE}),
    "decoder inside": ("OPT", {**SIZE, "ffn_dim": 24, "word_embed_proj_dim": 8, "dropout": 0.0}),
    "shifted logits": ("OpenAIGPT", {**GPT2, **STILL}),
}


def build(name: str) -> Any:
    kind, settings = KINDS[name]
    torch.manual_seed(0)
    heads = {"GPT2": "GPT2LMHeadModel", "OpenAIGPT": "OpenAIGPTLMHeadModel"}
    model = getattr(tf, heads.get(kind, f"{kind}ForCausalLM"))(getattr(tf, f"{kind}Config")(**settings))
    for parameter in model.parameters():
        nn.init.normal_(parameter, std=0.3) if parameter.dim() > 1 else None
    return model


def words(size: int = 3, length: int = 7, *, seed: int = 0) -> dict[str, Tensor]:
    """Token ids, with a sequence whose first labels are ignored and one whose end is padding."""
    ids = torch.randint(3, WORDS, (size, length), generator=torch.Generator().manual_seed(seed))
    labels, mask = ids.clone(), torch.ones_like(ids)
    labels[0, :4], labels[-1, 5:], mask[-1, 5:] = -100, -100, 0
    return {"input_ids": ids, "labels": labels, "attention_mask": mask}


def own(model: nn.Module, batch: Any) -> Tensor:
    return model(**batch).loss


def gradients(loss: Tensor, model: nn.Module) -> dict[str, Tensor]:
    for parameter in model.parameters():
        parameter.grad = None
    loss.backward()
    return {name: p.grad for name, p in model.named_parameters() if p.grad is not None}


def check(model: Any, batch: Any, *, rows: int = 5, atol: float = 2e-6, rtol: float = 1e-5) -> None:
    """The loss and its gradients are those of the model's own."""
    whole = {"labels": batch["input_ids"], **batch} if "input_ids" in batch else batch
    loss = own(model, whole)
    expected = gradients(loss, model)
    found = tithe.causal_loss(model, batch, rows=rows)
    assert found.dtype == loss.dtype
    torch.testing.assert_close(found.detach(), loss.detach(), atol=atol, rtol=rtol)
    torch.testing.assert_close(gradients(found, model), expected, atol=atol, rtol=rtol)


# --- the model's own loss


@pytest.mark.parametrize("name", KINDS)
def test_it_is_the_models_own_loss(name: str) -> None:
    """Heads of every kind, and what a mixture's router adds."""
    model = build(name)
    for rows in (4, 1024):
        check(model, words(), rows=rows)
    if name == "mixture":
        without = copy.deepcopy(model)
        without.config.output_router_logits = False
        with torch.no_grad():
            assert abs(tithe.causal_loss(without, words()) - tithe.causal_loss(model, words())) > 0.1


def test_what_the_batch_may_say() -> None:
    """No labels are the input ids; the count of items, positions and embeddings go to the model."""
    model, batch = build("llama"), words()
    check(model, {"input_ids": batch["input_ids"]})
    check(model, {**batch, "num_items_in_batch": torch.tensor(29)})
    check(model, {**batch, "position_ids": torch.arange(7).flip(0).expand(3, 7)})
    inner = {"inputs_embeds": torch.randn(3, 7, 16), "labels": batch["labels"]}
    check(model, inner)
    check(model, tf.BatchEncoding(batch))
    for length in (2, 3):
        for size in (1, 2):
            check(model, {"input_ids": batch["input_ids"][:size, :length]})


def test_labels_that_are_all_ignored_are_nan_with_gradients_of_zero() -> None:
    """As the model's own loss."""
    model, batch = build("tied"), words()
    batch["labels"] = torch.full_like(batch["labels"], -100)
    loss = own(model, batch)
    assert loss.isnan()
    expected = gradients(loss, model)
    found = tithe.causal_loss(model, batch)
    assert found.isnan()
    assert gradients(found, model).keys() == expected.keys()
    assert all(not grad.any() for grad in [*gradients(tithe.causal_loss(model, batch), model).values()])
    assert all(not grad.any() for grad in expected.values())


def test_ignored_rows_do_not_reach_the_head() -> None:
    model, batch = build("llama"), words()
    tithe.causal_loss(model, batch)
    seen: list[int] = []
    model.lm_head.register_forward_hook(lambda module, args, output: seen.append(output.shape[1]))
    tithe.causal_loss(model, batch, rows=4)
    counted = int((batch["labels"][:, 1:] != -100).sum())
    assert seen[0] == 2
    assert sum(seen[1:]) == counted
    assert max(seen[1:]) == 4


@pytest.mark.parametrize("frozen", ["lm_head", "model", "both"])
def test_a_frozen_part_gets_no_gradient(frozen: str) -> None:
    model = build("llama")
    for name, parameter in model.named_parameters():
        parameter.requires_grad_(frozen != "both" and not name.startswith(frozen))
    if frozen == "both":
        assert not tithe.causal_loss(model, words()).requires_grad
        return
    check(model, words())


def test_without_gradients_and_in_evaluation() -> None:
    model = build("capped").eval()
    with torch.no_grad():
        assert not tithe.causal_loss(model, words()).requires_grad
    with torch.inference_mode():
        torch.testing.assert_close(tithe.causal_loss(model, words(), rows=3), own(model, words()))
    check(model, words())


def test_gradients_in_float64() -> None:
    """By finite differences, of the hidden states and of a head that is tied."""
    model = build("gpt2").double().eval()
    x = torch.randn(2, 4, 16, dtype=torch.float64, requires_grad=True)
    batch = {"labels": words()["input_ids"][:2, :4]}
    assert tithe.causal_loss(model, {"inputs_embeds": x, **batch}).dtype == torch.float64
    assert torch.autograd.gradcheck(
        lambda x: tithe.causal_loss(model, {"inputs_embeds": x, **batch}, rows=3), x, fast_mode=True
    )

    class Loss(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.model = model

        def forward(self) -> Tensor:
            return tithe.causal_loss(self.model, {"inputs_embeds": x.detach(), **batch}, rows=3)

    def of_head(weight: Tensor) -> Tensor:
        return torch.func.functional_call(Loss(), {"model.lm_head.weight": weight}, ())

    head = model.lm_head.weight.detach().clone().requires_grad_()
    assert torch.autograd.gradcheck(of_head, head, fast_mode=True)


def test_half_precision() -> None:
    """Within what bf16 resolves; autocast, checkpointed or not, runs the head as the model's own loss does."""
    check(build("tied").bfloat16(), words(), atol=2e-2, rtol=2e-2)
    model = build("llama")
    with torch.autocast("cpu", torch.bfloat16):
        check(model, words(), atol=2e-2, rtol=2e-2)


def test_a_hook_on_a_weight_sees_its_whole_gradient_once() -> None:
    model, seen = build("tied"), []
    model.lm_head.weight.register_hook(lambda grad: seen.append(grad.clone()) or 2 * grad)
    check(model, words())
    torch.testing.assert_close(seen[1], seen[0], atol=2e-6, rtol=1e-5)
    assert len(seen) == 2


def test_a_graph_that_is_retained_runs_backward_again() -> None:
    model = build("llama")
    loss = tithe.causal_loss(model, words())
    loss.backward(retain_graph=True)
    once = model.lm_head.weight.grad.clone()
    (3 * loss).backward()
    torch.testing.assert_close(model.lm_head.weight.grad, 4 * once)


# --- with plans, lean layers, checkpoints, wrappers


def thetas(plan: tithe.Plan) -> dict[str, Tensor]:
    return {name: theta.grad.clone() for name, theta in plan.named_parameters() if theta.grad is not None}


@pytest.mark.parametrize("name", ["llama", "tied", "gpt2", "mixture"])
@pytest.mark.parametrize("again", [False, True])
def test_a_plan_that_selects_in_the_head(name: str, again: bool) -> None:
    model, batch = build(name), words()
    method = tithe.FISH(density=0.2, score="random", reselect=tithe.every(1000) if again else None)
    plan = tithe.attach(model, method)
    own(model, batch).backward()
    expected = thetas(plan)
    for rows in (4, 1024):
        for theta in plan.parameters():
            theta.grad = None
        tithe.causal_loss(model, batch, rows=rows).backward()
        torch.testing.assert_close(thetas(plan), expected, atol=2e-6, rtol=1e-5)
    assert any("lm_head" in n or "embed" in n or "wte" in n for n in plan.selections)


def test_channels_of_the_head() -> None:
    model, batch = build("llama"), words()
    plan = tithe.attach(
        model,
        tithe.TraDy(tithe.Budget(fraction=0.3), lean=False),
        loss=tithe.causal_loss,
        data=[batch],
        where="lm_head*",
    )
    plan.predict(batch)
    own(model, batch).backward()
    expected = thetas(plan)
    for theta in plan.parameters():
        theta.grad = None
    tithe.causal_loss(model, batch, rows=4).backward()
    torch.testing.assert_close(thetas(plan), expected, atol=2e-6, rtol=1e-5)


def test_coefficients_that_all_weights_share(tmp_path: Path) -> None:
    """The head's gradient reaches them through a buffer, which only backward may fill."""
    model, batch = build("tied"), words()
    history = tithe.History(tmp_path / "history")
    for step in range(3):
        with torch.no_grad():
            for parameter in model.parameters():
                parameter.add_(0.05 * torch.randn_like(parameter))
        history.record(model, step)
    plan = tithe.attach(model, tithe.TWA(tmp_path / "history"))
    own(model, batch).backward()
    expected = thetas(plan)
    for theta in plan.parameters():
        theta.grad = None
    tithe.causal_loss(model, batch, rows=4).backward()
    torch.testing.assert_close(thetas(plan), expected, atol=1e-5, rtol=1e-4)


@pytest.mark.parametrize("where", ["*", "*proj*"])
@pytest.mark.parametrize("score", ["fisher", "gradient"])
def test_scores_are_those_of_the_models_own_loss(where: str, score: Any) -> None:
    """In blocks that cut through samples, too; more samples than are scored one by one in any case."""
    batch = {"input_ids": words(20, 6)["input_ids"]}
    batch["labels"] = batch["input_ids"]
    chosen: list[dict[str, Tensor]] = []
    for loss in (own, tithe.causal_loss, partial(tithe.causal_loss, rows=7)):
        model = build("llama")
        plan = tithe.attach(model, tithe.FISH(density=0.1, score=score), loss=loss, data=[batch], where=where)
        chosen.append({name: selection.indices for name, selection in plan.selections.items()})
    for other in chosen[1:]:
        shared = sum(len(set(a.tolist()) & set(other[n].tolist())) for n, a in chosen[0].items())
        assert shared >= 0.99 * sum(map(len, chosen[0].values()))


@pytest.mark.parametrize("bits", [None, 8])
@pytest.mark.parametrize("name", ["tied", "capped"])
def test_lean_layers(name: str, bits: int | None) -> None:
    model = build(name)
    tithe.lean(model, bits)
    check(model, words(), atol=1e-5)


@pytest.mark.parametrize("reentrant", [False, True])
@pytest.mark.parametrize("planned", [False, True])
def test_checkpointed_layers(reentrant: bool, planned: bool) -> None:
    model = build("llama").train()
    model.activation_checkpointing_enable(activation_checkpointing_kwargs={"use_reentrant": reentrant})
    model.enable_input_require_grads()
    plan = tithe.attach(model, tithe.FISH(density=0.3, score="random")) if planned else None
    check(model, words())
    assert plan is None or len(thetas(plan)) > 10


def test_the_loss_itself_in_a_checkpoint() -> None:
    model, batch = build("llama"), words()
    expected = gradients(own(model, batch), model)
    loss: Any = checkpoint(tithe.causal_loss, model, batch, use_reentrant=False)
    torch.testing.assert_close(gradients(loss, model), expected, atol=2e-6, rtol=1e-5)


LORA: list[dict[str, Any]] = [
    {"target_modules": "all-linear"},
    {"target_modules": ["q_proj", "lm_head"]},
    {"target_modules": ["q_proj"], "modules_to_save": ["lm_head"]},
]


@pytest.mark.parametrize("settings", LORA, ids=["linear", "head", "saved"])
def test_adapters(settings: dict[str, Any]) -> None:
    check(peft.get_peft_model(build("llama"), peft.LoraConfig(r=2, init_lora_weights=False, **settings)), words())


def test_prompts_that_are_trained() -> None:
    """They lengthen the sequences, and their labels, inside of the wrapper."""
    config = peft.PromptTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=3)
    check(peft.get_peft_model(build("llama"), config), words())


def _wrapped(rank: int, find: bool) -> dict[str, Tensor]:
    model = build("tied")
    plan = tithe.attach(model, tithe.FISH(density=0.3, score="random"))
    wrapped = nn.parallel.DistributedDataParallel(model, find_unused_parameters=find)
    tithe.causal_loss(wrapped, words(2, 6, seed=rank), rows=4).backward()
    return thetas(plan)


def plain(rank: int) -> dict[str, Tensor]:
    return _wrapped(rank, False)


def that_looks_for_unused(rank: int) -> dict[str, Tensor]:
    return _wrapped(rank, True)


def test_two_ranks_average_their_gradients(tmp_path: Path) -> None:
    alone: list[dict[str, Tensor]] = []
    for rank in range(2):
        model = build("tied")
        plan = tithe.attach(model, tithe.FISH(density=0.3, score="random"))
        own(model, words(2, 6, seed=rank)).backward()
        alone.append(thetas(plan))
    mean = {name: (alone[0][name] + alone[1][name]) / 2 for name in alone[0]}
    for ranks in play(tmp_path, plain, that_looks_for_unused).values():
        for found in ranks:
            torch.testing.assert_close(found, mean, atol=2e-6, rtol=1e-5)


@pytest.mark.parametrize("how", ["model", "loss", "in place"])
def test_compiled_models(how: str) -> None:
    """Of a compiled model the trunk is captured; the loss is no part of a graph."""
    torch._dynamo.reset()
    graphs: list[Any] = []

    def backend(graph: Any, inputs: Any) -> Any:
        graphs.append(graph)
        return graph.forward

    model, batch = build("llama"), words()
    expected = gradients(own(model, batch), model)
    run: Callable[..., Tensor] = tithe.causal_loss
    compiled: Any = model
    if how == "model":
        compiled = torch.compile(model, backend=backend)
    elif how == "loss":
        run = torch.compile(tithe.causal_loss, backend=backend)
    else:
        model.model.compile(backend=backend)
    for _ in range(2):
        torch.testing.assert_close(gradients(run(compiled, batch, rows=5), model), expected, atol=2e-6, rtol=1e-5)
    assert len(graphs) == (how != "loss")
    torch._dynamo.reset()


# --- what it keeps


@pytest.mark.parametrize("name", ["llama", "gpt2"])
@pytest.mark.parametrize("lean", [False, True])
def test_it_costs_what_a_prediction_says(name: str, lean: bool) -> None:
    model, batch = build(name), words()
    plan = tithe.attach(model, tithe.FISH(density=0.1, score="random"))
    if lean:
        tithe.lean(model, 8)
    loss = partial(tithe.causal_loss, rows=4)
    predicted = predict(model, lambda batch: loss(model, batch), batch)
    loss(model, batch).backward()
    for theta in plan.parameters():
        theta.grad = None
    measured = tithe.measure(lambda: loss(model, batch).backward(), model=model)
    assert (predicted.kept, predicted.peak) == (measured.kept, measured.peak)
    assert predicted.by_kind == measured.by_kind


def test_a_plan_predicts_it() -> None:
    model, batch = build("llama"), words()
    plan = tithe.attach(model, tithe.FISH(density=0.1, score="random"), loss=tithe.causal_loss)
    assert plan.predict(batch).kept == predict(model, lambda batch: tithe.causal_loss(model, batch), batch).kept


def test_the_logits_never_stand_whole() -> None:
    """Of 512 rows by 3,000 words the peak is a tenth of stock's, and nothing of the vocabulary's size is kept."""
    torch.manual_seed(0)
    model = tf.LlamaForCausalLM(tf.LlamaConfig(**{**SIZE, "vocab_size": 3000, "num_hidden_layers": 0}))
    model.requires_grad_(False)
    labels = torch.randint(3000, (1, 512))

    def work(loss: Callable[..., Tensor]) -> tithe.Ledger:
        states = torch.randn(1, 512, 16, requires_grad=True)
        return tithe.measure(lambda: loss(model, {"inputs_embeds": states, "labels": labels}).backward(), model=model)

    stock, blocks = work(own), work(partial(tithe.causal_loss, rows=16))
    assert blocks.peak <= 0.1 * stock.peak
    assert blocks.kept < 4 * 512 * 16 * 4 + 50_000


# --- refused


def odd(change: Callable[[Tensor, Tensor], Tensor], *, name: str = "llama") -> Any:
    """A model whose own loss is computed by `change(logits, labels)`."""
    model = build(name)
    model.loss_function = lambda logits, labels, vocab_size, **kwargs: change(logits.float(), labels)
    return model


def _mean(logits: Tensor, labels: Tensor) -> Tensor:
    return F.cross_entropy(logits.flatten(0, 1), F.pad(labels, (0, 1), value=-100)[:, 1:].flatten())


def _by_hand(logits: Tensor, labels: Tensor) -> Tensor:
    return -logits.log_softmax(-1).mean()


def _with_a_penalty(logits: Tensor, labels: Tensor) -> Tensor:
    return _mean(logits, labels) + 1e-4 * logits.logsumexp(-1).square().mean()


def _of_each_row(logits: Tensor, labels: Tensor) -> Tensor:
    target = F.pad(labels, (0, 1), value=-100)[:, 1:].flatten()
    return F.cross_entropy(logits.flatten(0, 1), target, reduction="none").mean()


def _scaled(logits: Tensor, labels: Tensor) -> Tensor:
    return _mean(2 * logits, labels)


REFUSED = {
    "by hand": (_by_hand, "without F.cross_entropy"),
    "penalty": (_with_a_penalty, "besides their cross-entropy"),
    "each row": (_of_each_row, "reduction='none'"),
    "scaled in the loss": (_scaled, "its head does not give"),
}


@pytest.mark.parametrize("change", REFUSED)
def test_a_loss_of_another_kind_is_refused(change: str) -> None:
    function, words_of_it = REFUSED[change]
    assert own(odd(function), words()).isfinite()
    with pytest.raises(TitheError, match=words_of_it):
        tithe.causal_loss(odd(function), words())


def test_another_loss_of_the_right_kind_is_taken() -> None:
    """Smoothing and weights of classes are the model's own."""
    weight = torch.rand(WORDS)

    def smooth(logits: Tensor, labels: Tensor) -> Tensor:
        target = F.pad(labels, (0, 1), value=-100)[:, 1:].flatten()
        return F.cross_entropy(logits.flatten(0, 1), target, weight, label_smoothing=0.2)

    check(odd(smooth), words())


def test_what_is_no_causal_model_is_refused() -> None:
    batch = words()
    with pytest.raises(TitheError, match="no model of the transformers package"):
        tithe.causal_loss(nn.Linear(2, 2), batch)
    with pytest.raises(TitheError, match="no trunk"):
        tithe.causal_loss(build("llama").model, batch)
    sizes = dict(d_model=16, encoder_layers=1, decoder_layers=1, encoder_attention_heads=2, decoder_attention_heads=2)
    bart = tf.BartForConditionalGeneration(
        tf.BartConfig(vocab_size=WORDS, encoder_ffn_dim=8, decoder_ffn_dim=8, **sizes)
    )
    with pytest.raises(TitheError, match="an encoder besides"):
        tithe.causal_loss(bart, batch)


def test_wrong_arguments_are_refused() -> None:
    model = build("llama")
    with pytest.raises(TitheError, match="rows=0"):
        tithe.causal_loss(model, words(), rows=0)
    with pytest.raises(TitheError, match="a batch of type Tensor"):
        tithe.causal_loss(model, words()["input_ids"])  # pyright: ignore[reportArgumentType]
    with pytest.raises(TitheError, match="neither labels nor input_ids"):
        tithe.causal_loss(model, {"attention_mask": torch.ones(1, 2)})
    with pytest.raises(TitheError, match="labels for hidden states"):
        tithe.causal_loss(model, {**words(), "logits_to_keep": 1})


def test_a_second_derivative_is_refused() -> None:
    model = build("llama")
    loss = tithe.causal_loss(model, words())
    (grad,) = torch.autograd.grad(loss, model.lm_head.weight, create_graph=True)
    with pytest.raises(TitheError, match="second derivative"):
        grad.square().sum().backward()


def test_a_transform_is_refused() -> None:
    model = build("llama")

    class Loss(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.model = model

        def forward(self) -> Tensor:
            return tithe.causal_loss(self.model, words())

    def run(head: Tensor) -> Tensor:
        return torch.func.functional_call(Loss(), {"model.lm_head.weight": head}, ())

    with pytest.raises(TitheError, match=r"transform of torch\.func"):
        torch.func.grad(run)(model.lm_head.weight.detach())


def test_a_tail_is_compared_once_in_each_mode() -> None:
    """And the model is as it was afterwards, also when its forward fails."""
    model = build("llama")
    before = {**vars(model)}, {**vars(model.model)}
    causal._checked.clear()
    seen: list[int] = []
    model.lm_head.register_forward_hook(lambda *_: seen.append(1))
    counts = []
    for _ in range(2):
        seen.clear()
        tithe.causal_loss(model, words())
        counts.append(len(seen))
    assert counts == [3, 2]
    with pytest.raises(ValueError, match="exactly one"):
        tithe.causal_loss(model, {**words(), "input_ids": None, "nonsense": 1, "labels": 3})
    assert {**vars(model)}.keys() == before[0].keys()
    assert {**vars(model.model)}.keys() == before[1].keys()
    assert model.model._compiled_call_impl is None
