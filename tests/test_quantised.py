"""Bases in 8 and 4 bits by bitsandbytes, and in int8 by torchao: lean layers, LoRA, and FISH on what is float."""

from __future__ import annotations

import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import bitsandbytes as bnb
import peft
import pytest
import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint
from torchao.quantization import Int8WeightOnlyConfig, quantize_
from transformers import BertConfig, BertForSequenceClassification, LlamaConfig, LlamaForCausalLM

import tithe
from tithe.ledger import predict

SIZES = {"vocab_size": 64, "hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 4}
WHOLE = ("lm_head", "classifier", "pooler")
"""Layers that stay in float32, as the libraries' own loaders leave them."""


def llama() -> nn.Module:
    torch.manual_seed(0)
    return LlamaForCausalLM(LlamaConfig(**SIZES, num_key_value_heads=2, max_position_embeddings=32))


def bert() -> nn.Module:
    torch.manual_seed(0)
    dropout = {"hidden_dropout_prob": 0.0, "attention_probs_dropout_prob": 0.0}
    return BertForSequenceClassification(BertConfig(**SIZES, **dropout, max_position_embeddings=32, num_labels=3))


MODELS: dict[str, tuple[Callable[[], nn.Module], list[str]]] = {
    "Llama": (llama, ["q_proj", "v_proj"]),
    "BERT": (bert, ["query", "value"]),
}


def _bnb(layer: nn.Linear, bits: int) -> nn.Module:
    kwargs = {"bias": layer.bias is not None}
    if bits == 8:
        new: Any = bnb.nn.Linear8bitLt(layer.in_features, layer.out_features, has_fp16_weights=False, **kwargs)
        new.weight = bnb.nn.Int8Params(layer.weight.data.clone(), requires_grad=False, has_fp16_weights=False)
    else:
        new = bnb.nn.Linear4bit(layer.in_features, layer.out_features, quant_type="nf4", **kwargs)
        new.weight = bnb.nn.Params4bit(layer.weight.data.clone(), requires_grad=False, quant_type="nf4")
    if layer.bias is not None:
        new.bias = layer.bias
    return new.to("cpu")  # quantises


def quantised(model: nn.Module, kind: str) -> nn.Module:
    """The model with its inner linear layers quantised, as if it was loaded so."""
    layers = {
        name: module
        for name, module in model.named_modules()
        if isinstance(module, nn.Linear) and not any(part in name for part in WHOLE)
    }
    if kind == "torchao int8":
        quantize_(model, Int8WeightOnlyConfig(), filter_fn=lambda module, name: name in layers)
        return model
    bits = 8 if kind == "bitsandbytes int8" else 4
    for name, layer in layers.items():
        path, _, key = name.rpartition(".")
        setattr(model.get_submodule(path), key, _bnb(layer, bits))
    setattr(model, f"is_loaded_in_{bits}bit", True)  # by which peft knows its adapters' layers
    return model


each_base = pytest.mark.parametrize("kind", ["bitsandbytes int8", "bitsandbytes nf4", "torchao int8"])
each_model = pytest.mark.parametrize("architecture", MODELS)


def batch(architecture: str) -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(1)
    x = torch.randint(64, (4, 16), generator=generator)
    return {"input_ids": x, "labels": x if architecture == "Llama" else torch.randint(3, (4,), generator=generator)}


def loss_fn(model: Any, batch: Any) -> Tensor:
    return model(**batch, **({"use_cache": False} if "Llama" in str(type(model.config)) else {})).loss


def gradients(model: nn.Module, step: Callable[[], None]) -> tuple[dict[str, Tensor], int]:
    """The gradients of a step, and the bytes that it keeps for backward."""
    model.zero_grad()
    kept = tithe.measure(step).kept
    return {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}, kept


@pytest.mark.parametrize("lora", [False, True], ids=["alone", "under LoRA"])
@each_model
@each_base
def test_lean_layers_keep_less_and_the_gradients_stay(kind: str, architecture: str, lora: bool) -> None:
    make, targets = MODELS[architecture]
    model, rows = quantised(make(), kind), batch(architecture)
    if lora:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # of peft's about transformers, and about merging into torchao's codes
            model = peft.get_peft_model(model, peft.LoraConfig(r=2, target_modules=targets))
        names = {type(module).__name__ for name, module in model.named_modules() if name.endswith(targets[0])}
        assert names <= {"Linear8bitLt", "Linear4bit", "TorchaoLoraLinear"}
    step: Callable[[], None] = lambda: loss_fn(model, rows).backward()  # noqa: E731
    stock, before = gradients(model, step)
    handle = tithe.lean(model, exact=True)
    lean, after = gradients(model, step)
    assert after < before
    assert set(lean) == set(stock)
    for name, value in stock.items():
        torch.testing.assert_close(lean[name], value, rtol=1e-4, atol=1e-6, msg=name)
    handle.release()
    handle = tithe.lean(model)
    _, coded = gradients(model, step)
    assert coded < 0.9 * before
    handle.release()
    again, kept = gradients(model, step)
    assert kept == before
    assert all(torch.equal(again[name], value) for name, value in stock.items())


def codes(model: nn.Module) -> dict[str, Tensor]:
    """What is in the state dict, quantised tensors by their codes."""
    return {
        name: value.qdata if "Int8Tensor" in str(type(value)) else torch.as_tensor(value)
        for name, value in model.state_dict().items()
    }


@each_model
@each_base
def test_fish_trains_what_is_float_and_names_what_it_leaves_out(kind: str, architecture: str, tmp_path: Path) -> None:
    make, _ = MODELS[architecture]
    model, rows = quantised(make(), kind), batch(architecture)
    before = {name: value.clone() for name, value in codes(model).items()}
    floats = {n for n, p in model.named_parameters() if p.dtype == torch.float32 and type(p) is nn.Parameter}
    head = "*classifier*" if architecture == "BERT" else ()
    with pytest.warns(tithe.TitheWarning, match="left out: .* and 1[12] more|left out: .* and 9 more"):
        plan = tithe.attach(model, tithe.FISH(k=40), loss=loss_fn, data=[rows], head=head)
    assert {name for name, _ in plan.named_parameters()} <= floats
    assert "left out" in str(plan)
    optimizer = torch.optim.AdamW(plan.parameters(), lr=0.01, weight_decay=0.1)
    start = float(loss_fn(model, rows).detach())
    for _ in range(4):
        loss_fn(model, rows).backward()
        optimizer.step()
        optimizer.zero_grad()
    assert float(loss_fn(model, rows).detach()) < start
    plan.save(tmp_path / "delta.safetensors")
    plan.release()
    after = codes(model)
    moved = {name for name, value in after.items() if not torch.equal(value, before[name])}
    assert moved <= floats
    assert len(moved) > 0
    fresh = quantised(make(), kind)
    tithe.apply(fresh, tmp_path / "delta.safetensors")
    assert all(torch.equal(value, after[name]) for name, value in codes(fresh).items())


@each_base
def test_where_that_names_quantised_weights_alone_is_refused(kind: str) -> None:
    model = quantised(llama(), kind)
    with pytest.raises(tithe.TitheError) as error:
        tithe.attach(model, tithe.FISH(k=40), loss=loss_fn, data=[batch("Llama")], where="*q_proj.weight")
    assert "q_proj.weight" in str(error.value)
    assert all(type(p).__name__ != "Carrier" for module in model.modules() for p in vars(module).values())


# --- the float copy that a dequantised weight has


def tower() -> nn.Module:
    """Linear maps of torchao's weights, with biases that are trained, of which nothing but the copies would be kept."""
    torch.manual_seed(0)
    layers = [nn.Linear(8, 64), *(layer for _ in range(3) for layer in (nn.Linear(64, 64), nn.Tanh()))]
    model = nn.Sequential(*layers)
    quantize_(model, Int8WeightOnlyConfig(), filter_fn=lambda module, name: name in ("1", "3", "5"))
    return model


ROWS = torch.randn(6, 8, generator=torch.Generator().manual_seed(2))


def squares(model: nn.Module) -> Tensor:
    return model(ROWS).square().mean()


def test_a_lean_layer_keeps_no_float_copy_of_a_quantised_weight() -> None:
    """It keeps what the layer of floats keeps, which is nothing; the copy made again has the same bits."""
    model = tower()
    stock, before = gradients(model, lambda: squares(model).backward())
    tithe.lean(model, exact=True)
    lean, after = gradients(model, lambda: squares(model).backward())
    assert before - after == 3 * 4 * 64 * 64
    assert all(torch.equal(lean[name], value) for name, value in stock.items())
    assert lean.keys() == stock.keys()
    model.zero_grad()
    predicted = predict(model, lambda _: squares(model), ROWS)
    measured = tithe.measure(lambda: squares(model).backward(), model=model)
    assert (predicted.kept, predicted.peak) == (measured.kept, measured.peak)
    assert measured.kept < 4 * 64 * 64


@pytest.mark.parametrize("reentrant", [False, True, None])
def test_copies_are_made_again_in_checkpoints_and_under_autocast(reentrant: bool | None) -> None:
    model = tower()
    inner = model[1:]  # pyright: ignore

    def run() -> dict[str, Tensor]:
        model.zero_grad()
        with torch.autocast("cpu", torch.bfloat16):
            x = model[0](ROWS)  # pyright: ignore
            y = inner(x) if reentrant is None else checkpoint(inner, x, use_reentrant=reentrant)
        y.float().square().mean().backward()
        return {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}

    stock = run()
    tithe.lean(inner, exact=True)
    lean = run()
    assert all(torch.equal(lean[name], value) for name, value in stock.items())
    assert lean.keys() == stock.keys()


def test_codes_that_are_written_before_backward_are_refused() -> None:
    model = tower()
    tithe.lean(model, exact=True)
    loss = squares(model)
    model.load_state_dict({name: value.clone() for name, value in model.state_dict().items()})
    with pytest.raises(tithe.TitheError, match="a graph recorded before the weights were last updated"):
        loss.backward()
    squares(model).backward()
