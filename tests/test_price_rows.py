"""Rows beside the plain ones are priced as they run: lean models, gradient checkpointing, bases of four bits."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import nn

import tithe
from models import CASES, Case
from tithe.app.price import USUAL, Quote, Subject, Terms, price
from tithe.ledger import measure
from tithe.ledger.remembered import Remembered

pytest.importorskip("transformers")

pytestmark = pytest.mark.filterwarnings("ignore::FutureWarning")  # peft asks transformers by an older name
TERMS = Terms(rank=2, budget=tithe.Budget(elements=60))
NAMES = ("bert", "vit", "llama")
each_case = pytest.mark.parametrize("case", [CASES[name] for name in NAMES], ids=NAMES)


def subject(case: Case) -> Subject:
    return Subject(name=case.name, build=case.make, batch=case.batch, loss=case.loss, head=case.head)


def quote(case: Case, method: str) -> Quote:
    found = price(subject(case), batch=4, methods=[method], terms=TERMS)
    assert not found.left_out
    return found.rows[0]


def step(case: Case, model: nn.Module) -> tithe.Ledger:
    data = case.batch(4)
    return measure(lambda: case.loss(model, data).backward(), model=model)


def agree(row: Quote, ledger: tithe.Ledger, *, within: float = 0.0) -> None:
    assert row.kept == ledger.kept
    assert row.layers == ledger.kept_by_module
    said = sum(row.at_peak.values())
    if row.moment == "optimizer step":
        assert ledger.peak <= said
    else:
        assert abs(said - ledger.peak) <= within * row.peak


def checkpointed(model: nn.Module) -> nn.Module:
    switch: Any = model
    switch.activation_checkpointing_enable(activation_checkpointing_kwargs={"use_reentrant": False})
    switch.config.use_cache = False
    return model


def heads(case: Case, model: nn.Module) -> set[str]:
    return {name.rpartition(".")[0] for name in case.head}


def adapted(case: Case, model: nn.Module, linear: type[nn.Module] = nn.Linear) -> nn.Module:
    peft = pytest.importorskip("peft")
    head = heads(case, model)
    targets = [n for n, m in model.named_modules() if n not in head and isinstance(m, (nn.Conv2d, nn.Linear, linear))]
    config = peft.LoraConfig(r=2, target_modules=targets, modules_to_save=sorted(head) or None, lora_dropout=0.0)
    return peft.get_peft_model(model, config).get_base_model().train()


@each_case
def test_full_training_in_a_lean_model(case: Case) -> None:
    row, model = quote(case, "full+lean"), case.model()
    tithe.lean(model)
    agree(row, step(case, model), within=0.05)
    assert row.kept < quote(case, "full").kept


@each_case
def test_full_training_with_checkpoints(case: Case) -> None:
    row = quote(case, "full+ckpt")
    agree(row, step(case, checkpointed(case.model())))
    assert row.kept < quote(case, "full").kept


@each_case
@pytest.mark.parametrize(("method", "change"), [("lora+lean", tithe.lean), ("lora+ckpt", checkpointed)])
def test_adapters(case: Case, method: str, change: Callable[[nn.Module], object]) -> None:
    row, model = quote(case, method), adapted(case, case.model())
    change(model)
    agree(row, step(case, model), within=0.05 if method == "lora+lean" else 0.0)
    assert row.kept < quote(case, "lora").kept


@each_case
def test_a_base_of_four_bits(case: Case) -> None:
    """As bitsandbytes runs it, which copies the output of a layer before an adapter adds to it."""
    bnb = pytest.importorskip("bitsandbytes")
    model = case.model()
    last = [name for name, module in model.named_modules() if isinstance(module, nn.Linear)][-1]
    for path, module in list(model.named_modules()):
        if isinstance(module, nn.Linear) and path not in {*heads(case, model), last}:
            packed = bnb.nn.Linear4bit(
                module.in_features,
                module.out_features,
                bias=module.bias is not None,
                compute_dtype=torch.float32,
                compress_statistics=False,
                quant_type="nf4",
            )
            packed.load_state_dict(module.state_dict())
            model.set_submodule(path, packed.to("cpu"))
    codes = [m for m in model.modules() if isinstance(m, bnb.nn.Linear4bit)]
    scales = sum(m.weight.quant_state.absmax.nbytes for m in codes)
    weights = scales + sum(t.nbytes for t in [*model.parameters(), *model.buffers()])
    row, ledger = quote(case, "qlora"), step(case, adapted(case, model, bnb.nn.Linear4bit))
    assert row.weights == weights < quote(case, "lora").weights
    assert row.kept == ledger.kept
    assert abs(sum(row.at_peak.values()) - ledger.peak) <= 0.05 * row.peak


def test_rows_leave_the_model_as_it_was() -> None:
    methods = ["head", "fish", "full+ckpt", "full+lean", "head", "fish"]
    rows = price(subject(CASES["bert"]), methods=methods, terms=TERMS).rows
    assert rows[:2] == rows[-2:]


def test_a_model_without_a_switch_has_no_row_with_checkpoints() -> None:
    found = price(subject(CASES["depthwise"]), methods=["full", "full+ckpt"], terms=TERMS)
    assert [row.method for row in found.rows] == ["full"]
    assert "found a model without a switch for it" in found.left_out["full + ckpt"]


def test_three_methods_are_priced_only_by_name() -> None:
    assert not {"vrpge", "taylor", "twa"} & set(USUAL)
    assert {"full", "full+lean", "full+ckpt", "lora", "lora+lean", "lora+ckpt", "qlora"} < set(USUAL)


def test_what_only_four_bits_fit_into() -> None:
    case = CASES["llama"]
    whole, packed = quote(case, "full"), quote(case, "qlora")
    memory = (packed.weights + whole.weights) // 2
    rows = price(subject(case), methods=["full", "qlora"], terms=TERMS, memory=memory).rows
    assert rows[0].fit is not None
    assert rows[0].fit.micro_batch == 0


@pytest.mark.parametrize("method", ["full", "fish+lean", "trady", "lora", "twa"])
def test_operators_that_are_looked_up_change_no_figure(method: str, monkeypatch: pytest.MonkeyPatch) -> None:
    case = CASES["bert"]
    terms = Terms(rank=2, budget=tithe.Budget(fraction=0.2), checkpoints=5)
    looked_up = price(subject(case), batch=4, methods=[method], terms=terms)
    monkeypatch.setattr(Remembered, "__getitem__", lambda memory, key: None)
    run = price(subject(case), batch=4, methods=[method], terms=terms)
    assert looked_up == run
