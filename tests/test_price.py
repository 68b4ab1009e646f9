"""Prices on shapes alone are what a real model takes: peak, parts, operations, file; and what fits is what fits."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from torch import nn
from torch.utils.flop_counter import FlopCounterMode

import tithe
from models import CASES, LARGE, Case
from tithe.app.price import OFFERS, Quote, Subject, Terms, parse_budget, price
from tithe.app.price.draw import Drawn
from tithe.app.price.engine import largest
from tithe.errors import TitheError
from tithe.ledger import Blank, measure, predict
from tithe.ledger.flops import FlopCounter

pytest.importorskip("transformers")

UNPREDICTED = {"experts", "recurrent", "swin", "regression"}  # tests/test_memory.py has the reasons
EVERY = [
    pytest.param(case, id=name, marks=[pytest.mark.slow] if case in LARGE else [])
    for name, case in CASES.items()
    if name not in UNPREDICTED
]
REAL = [CASES[name] for name in ("bert", "vit", "gpt2", "llama", "resnet_bottleneck", "depthwise")]
each_case = pytest.mark.parametrize("case", EVERY)
real_case = pytest.mark.parametrize("case", REAL, ids=lambda case: case.name)
K, FLOAT = 60, 4


def subject(case: Case) -> Subject:
    return Subject(name=case.name, build=case.make, batch=case.batch, loss=case.loss, head=case.head)


def quote(case: Case, method: str, batch: int = 4, terms: Terms | None = None) -> Quote:
    (row,) = price(
        subject(case), batch=batch, methods=[method], terms=terms or Terms(budget=tithe.Budget(elements=K))
    ).rows
    return row


def step(case: Case, model: nn.Module, batch: int = 4) -> tithe.Ledger:
    data = case.batch(batch)
    return measure(lambda: case.loss(model, data).backward(), model=model)


def agree(row: Quote, ledger: tithe.Ledger) -> None:
    assert row.kept == ledger.kept
    assert row.layers == ledger.kept_by_module
    if row.moment == "optimizer step":
        assert ledger.peak <= sum(row.at_peak.values())
        return
    assert sum(row.at_peak.values()) == ledger.peak
    names = {"kept": "kept", "gradients": "gradients", "transient": "other"}
    assert row.at_peak == {name: ledger.by_kind[kind] for name, kind in names.items()}


@each_case
def test_full_fine_tuning_takes_what_was_said(case: Case) -> None:
    row, model = quote(case, "full"), case.model()
    agree(row, step(case, model))
    state = [*model.parameters(), *model.buffers()]
    assert row.weights == sum({t.data_ptr(): t.untyped_storage().nbytes() for t in state}.values())
    assert (
        row.gradients == sum(p.grad.nbytes for p in model.parameters() if p.grad is not None)
        or case.name == "time_major"
    )
    assert row.trained == sum(p.numel() for p in model.parameters())
    assert row.theta == row.index == 0
    assert row.optimizer == 2 * row.trained * FLOAT


@each_case
def test_a_mask_takes_what_was_said(case: Case) -> None:
    row, model = quote(case, "fish"), case.model()
    plan = tithe.attach(model, Drawn(k=K), loss=case.loss, head=case.head)
    agree(row, step(case, model))
    trained = list(plan.parameters())
    assert row.trained == sum(p.numel() for p in trained) == K + sum(model.get_parameter(n).numel() for n in plan.head)
    assert row.theta == K * FLOAT
    assert row.index == plan.index_bytes
    assert row.gradients == row.trained * FLOAT


@each_case
def test_a_mask_in_a_lean_model_takes_what_was_said(case: Case) -> None:
    row, model = quote(case, "fish+lean"), case.model()
    tithe.lean(model)
    tithe.attach(model, Drawn(k=K), loss=case.loss, head=case.head)
    ledger = step(case, model)
    assert row.kept == ledger.kept
    assert row.layers == ledger.kept_by_module
    beyond = sum(row.at_peak.values()) - ledger.peak
    assert abs(beyond) <= 0.05 * row.peak


@real_case
def test_channels_under_a_budget_take_what_was_said(case: Case) -> None:
    terms = Terms(budget=tithe.Budget(fraction=0.2), optimizer="sgd")
    row, model = quote(case, "trady", terms=terms), case.model()
    method = tithe.TraDy(terms.budget, layers="all", optimizer_states=terms.states)
    plan = tithe.attach(model, method, loss=case.loss, data=[case.batch(4)], head=case.head)
    plan.bind(torch.optim.SGD(plan.parameters(), 0.1))
    ledger = step(case, model)
    assert row.kept == ledger.kept
    assert abs(sum(row.at_peak.values()) - ledger.peak) <= 0.05 * row.peak
    assert row.optimizer == 0


@pytest.mark.parametrize("name", ["depthwise", "gpt2"])
def test_whole_columns_take_what_was_said(name: str) -> None:
    case, budget = CASES[name], tithe.Budget(fraction=0.45)
    row, model = quote(case, "fish-columns", terms=Terms(budget=budget)), case.model()
    tithe.lean(model)
    method = Drawn(density=0.45, unit="column")
    plan = tithe.attach(model, method, loss=case.loss, data=[case.batch(4)], head=case.head)
    ledger = step(case, model)
    assert row.kept == ledger.kept
    assert row.layers == ledger.kept_by_module
    assert row.index == plan.index_bytes
    assert row.trained == sum(p.numel() for p in plan.parameters())


@pytest.mark.filterwarnings("ignore::FutureWarning")  # peft asks transformers by an older name
def test_lora_is_priced_as_it_runs() -> None:
    peft = pytest.importorskip("peft")
    case = CASES["bert"]
    row, model = quote(case, "lora", terms=Terms(rank=2)), case.model()
    linear = [n for n, m in model.named_modules() if isinstance(m, nn.Linear) and n != "classifier"]
    adapted = peft.get_peft_model(
        model, peft.LoraConfig(r=2, target_modules=linear, modules_to_save=["classifier"], lora_dropout=0.0)
    )
    agree(row, step(case, adapted.get_base_model().train()))
    assert row.trained == sum(p.numel() for p in adapted.parameters() if p.requires_grad)


@pytest.mark.parametrize("optimizer", ["adamw", "adam", "sgd", "momentum"])
def test_an_optimizer_step_takes_what_was_said(optimizer: str) -> None:
    """A second step, when the state is there: all gradients, and two tensors of the largest parameter's size."""
    from tithe.app.price.terms import OPTIMIZERS

    case = CASES["bert"]
    model = case.model()
    opt = OPTIMIZERS[optimizer].make(list(model.parameters()))
    for _ in range(2):
        case.loss(model, case.batch(4)).backward()
        ledger = measure(opt.step)
    most = max(p.nbytes for p in model.parameters())
    slack = 64 * len(list(model.parameters()))  # counters and scalars
    assert abs(ledger.peak - OPTIMIZERS[optimizer].temporaries * most) <= slack
    kept = sum(
        v.nbytes for state in opt.state.values() for v in state.values() if isinstance(v, torch.Tensor) and v.dim()
    )
    assert kept == OPTIMIZERS[optimizer].states * sum(p.nbytes for p in model.parameters())


@real_case
def test_operations_are_those_of_torch(case: Case) -> None:
    """Where torch counts right: its formula for a grouped convolution's weight multiplies out all pairs of channels."""
    model, blank = case.model(), Blank()
    for module in model.modules():
        if hasattr(module, "config"):
            module.config._attn_implementation = "eager"  # torch does not count fused attention on a CPU
    with blank:
        empty = case.make()
    for module in empty.modules():
        if hasattr(module, "config"):
            module.config._attn_implementation = "eager"
    counter, batch = FlopCounter(empty.parameters()), case.batch(4)
    predict(empty.train(), lambda shapes: case.loss(empty, shapes), batch, inside=counter)
    with FlopCounterMode(display=False) as forward:
        loss = case.loss(model, batch)
    with FlopCounterMode(display=False) as backward:
        loss.backward()
    counted = counter.counted
    assert counted.forward == forward.get_total_flops()
    if case.name == "depthwise":
        assert counted.weight_gradient == counted.forward
    else:
        assert counted.input_gradient + counted.weight_gradient == backward.get_total_flops()
    row = quote(case, "head") if case.head else None
    if row is not None and row.flops is not None:
        assert row.flops.weight_gradient < counted.weight_gradient / 2


@pytest.mark.parametrize("name", ["bert", "gpt2", "depthwise"])
def test_the_file_is_as_large_as_was_said(name: str, tmp_path: Path) -> None:
    case = CASES[name]
    row, model = quote(case, "fish"), case.model()
    plan = tithe.attach(model, Drawn(k=K), loss=case.loss, head=case.head)
    opt = torch.optim.AdamW(plan.parameters(), lr=1e-2)
    plan.bind(opt)
    plan.backward(lambda: case.loss(model, case.batch(4)))
    opt.step()
    plan.step()
    plan.save(tmp_path / "delta.safetensors")
    written = (tmp_path / "delta.safetensors").stat().st_size
    assert abs(row.file - written) <= max(256, 0.01 * written)  # the free metadata is not known beforehand


# --- what fits


@pytest.mark.parametrize("method", ["full", "fish", "trady"])
def test_the_largest_micro_batch_fits_and_one_more_does_not(method: str) -> None:
    case = CASES["bert"]
    terms = Terms(budget=tithe.Budget(fraction=0.3))
    one, all_of_it = (quote(case, method, batch, terms).peak for batch in (1, 8))
    memory = (one + all_of_it) // 2
    found = price(subject(case), batch=8, methods=[method], terms=terms, memory=memory)
    fit = found.rows[0].fit
    assert fit is not None
    assert 1 <= fit.micro_batch < 8
    assert fit.steps == -(-8 // fit.micro_batch)
    assert fit.peak <= memory
    more = price(subject(case), batch=8, methods=[method], terms=terms, memory=memory + memory // 8).rows[0].fit
    assert more is not None
    assert more.micro_batch >= fit.micro_batch
    if method == "full":
        measured = {n: accumulated(case, n) + found.rows[0].weights + found.rows[0].optimizer for n in range(1, 9)}
        fits = [n for n, peak in measured.items() if peak + batch_bytes(case, n) <= memory]
        assert fit.micro_batch == max(fits)
        assert fit.peak == measured[fit.micro_batch] + batch_bytes(case, fit.micro_batch)


def accumulated(case: Case, batch: int) -> int:
    """The peak beyond the start of a second micro-batch, the first one's gradients included."""
    model = case.model()
    case.loss(model, case.batch(batch)).backward()
    gradients = sum(p.grad.nbytes for p in model.parameters() if p.grad is not None)
    return gradients + step(case, model, batch).peak


def batch_bytes(case: Case, batch: int) -> int:
    return sum(tensor.nbytes for tensor in case.batch(batch).values())


def test_where_the_batch_fits_the_largest_selection_is_told() -> None:
    case = CASES["bert"]
    found = price(subject(case), batch=2, methods=["fish"], memory=10**9, terms=Terms(budget=tithe.Budget(elements=K)))
    fit = found.rows[0].fit
    assert fit is not None
    assert (fit.micro_batch, fit.steps, fit.fraction) == (2, 1, 0.5)
    little = price(
        subject(case),
        batch=2,
        methods=["fish"],
        memory=found.rows[0].peak + 2000,
        terms=Terms(budget=tithe.Budget(elements=K)),
    )
    assert little.rows[0].fit is not None
    assert (little.rows[0].fit.fraction or 0) < 0.5


def test_what_does_not_fit_with_one_sample_says_what_one_takes() -> None:
    case = CASES["bert"]
    weights = quote(case, "full").weights
    fit = price(subject(case), batch=4, methods=["full"], memory=weights + 1).rows[0].fit
    assert fit is not None
    assert (fit.micro_batch, fit.steps) == (0, 0)
    assert fit.peak > weights + 1


@pytest.mark.parametrize("cost", [lambda n: 100 + 7 * n, lambda n: 3 * n * n, lambda n: 50 * (n // 10) + n])
def test_the_search_finds_the_edge_with_few_looks(cost: Callable[[int], int]) -> None:
    for limit in (0, 5, 120, 1000, 54_321):
        looks: list[int] = []
        found = largest(lambda n, looks=looks: looks.append(n) or cost(n), limit, 5000)
        assert found == max((n for n in range(1, 5001) if cost(n) <= limit), default=0)
        assert len(looks) == len(set(looks)) <= 32
        assert found == 0 or found in looks


# --- without a model in memory


def test_a_model_of_any_size_is_priced_and_nothing_is_allocated() -> None:
    width = 2**18  # a layer of 256 GB

    def build() -> nn.Module:
        return nn.Sequential(nn.Linear(width, width), nn.ReLU(), nn.Linear(width, 4))

    huge = Subject(
        name="huge",
        build=build,
        batch=lambda n: torch.empty(n, width),
        loss=lambda model, x: model(x).square().mean(),
        head=("2.*",),
    )
    row = price(huge, batch=2, methods=["full"]).rows[0]
    assert row.weights > 4 * width**2
    assert row.peak > 4 * row.weights


def test_pricing_leaves_a_model_and_the_random_state_alone() -> None:
    before = torch.get_rng_state()
    case = CASES["bert"]
    one = price(
        subject(case),
        methods=["full", "head", "fish", "fish+lean", "full"],
        terms=Terms(budget=tithe.Budget(elements=K)),
    )
    assert one.rows[0] == one.rows[-1]
    assert torch.equal(before, torch.get_rng_state())


def test_a_constructor_that_reads_its_weights_is_named() -> None:
    class Reads(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.layer = nn.Linear(100, 100)
            self.scale = float(self.layer.weight.sum())

    reads = Subject(name="reads", build=Reads, batch=lambda n: torch.empty(n, 100), loss=lambda m, x: m.layer(x).sum())
    with pytest.raises(TitheError, match=r"constructor: found .*no data.*Remedy: build the network for real"):
        price(reads)


# --- refusals


@pytest.mark.parametrize(
    ("changed", "message"),
    [
        ({"batch": 0}, "batch: found 0; expected at least 1"),
        ({"methods": ["lori"]}, "method: found 'lori'; expected some of full, full.lean, full.ckpt, head"),
        ({"memory": 10}, "memory: found 10 bytes; expected more than the weights alone"),
        ({"terms": Terms(budget=tithe.Budget(elements=10**9))}, "where: found .* weights to choose from"),
        ({"terms": Terms(budget=tithe.Budget(1))}, "budget: found 1 bytes; expected more than the head's gradient"),
    ],
)
def test_refusals(changed: dict[str, object], message: str) -> None:
    with pytest.raises(TitheError, match=message):
        price(subject(CASES["bert"]), **{"methods": ["full", "fish"], **changed})  # pyright: ignore[reportArgumentType]


def test_a_method_that_is_not_to_be_had_is_left_out_and_said() -> None:
    found = price(subject(CASES["gpt2"]), methods=["full", "head"])
    assert [row.method for row in found.rows] == ["full"]
    assert "found none; expected a head" in found.left_out["head only"]


@pytest.mark.parametrize("text", ["", "2 XB", "200%", "-1", "0"])
def test_a_budget_that_is_none_is_refused(text: str) -> None:
    with pytest.raises(TitheError):
        parse_budget(text)


def test_every_offer_says_its_row() -> None:
    baselines = ["full", "full+lean", "full+ckpt", "head", "lora", "lora+lean", "lora+ckpt", "qlora"]
    names = ["fish", "fish+lean", "fish-columns", "trady", "vrpge", "taylor", "twa", "spiel"]
    assert list(OFFERS) == [*baselines, *names]
