"""Plans: what may be attached, what is refused, what a step does."""

from __future__ import annotations

import warnings
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import tithe
from models import CASES, Batch, Case
from oracles import adamw, bits, equal_bits, sgd
from tithe import FISH, TitheError
from tithe.ledger import human

MLP = CASES["mlp"]


def _attach(case: Case, model: nn.Module, method: FISH, **settings: object) -> tithe.Plan:
    return tithe.attach(model, method, loss=case.loss, data=case.batches(2), **settings)


def _step(plan: tithe.Plan, opt: torch.optim.Optimizer, case: Case, batch: Batch) -> bool:
    opt.zero_grad()
    plan.backward(lambda: case.loss(plan.model, batch))
    opt.step()
    return plan.step()


# --- what may be attached


@pytest.mark.parametrize(
    ("where", "expected"),
    [
        ("*", {"0.weight", "0.bias", "2.weight", "2.bias", "4.weight", "4.bias"}),
        ("*.weight", {"0.weight", "2.weight", "4.weight"}),
        (["0.*", "4.bias"], {"0.weight", "0.bias", "4.bias"}),
        (["*", "!*.bias"], {"0.weight", "2.weight", "4.weight"}),
        ("2.weight", {"2.weight"}),
    ],
)
def test_where_is_globs_over_parameter_names(where: str | list[str], expected: set[str]) -> None:
    model = MLP.model()
    size = sum(p.numel() for name, p in model.named_parameters() if name in expected)
    plan = _attach(MLP, model, FISH(k=size, score="magnitude"), where=where)
    assert {name for name, selection in plan.selections.items() if selection.size} == expected
    assert {name for name, theta in plan.named_parameters() if theta.numel()} == expected


def test_the_head_is_trained_whole_and_charged_to_the_budget() -> None:
    model = MLP.model()
    total = sum(p.numel() for p in model.parameters())
    plan = _attach(MLP, model, FISH(density=0.3), head="4.*")
    assert set(plan.head) == {"4.weight", "4.bias"}
    head = sum(p.numel() for name, p in plan.named_parameters() if name in plan.head)
    assert head == 16 * 3 + 3
    assert sum(selection.size for selection in plan.selections.values()) == int(0.3 * total) - head
    assert sum(p.numel() for p in plan.parameters()) == int(0.3 * total)
    assert not set(plan.head) & set(plan.selections)
    assert all(p is model.get_parameter(name) for name, p in plan.named_parameters() if name in plan.head)


def test_selected_is_sorted_flat_int64_and_matches_the_selection() -> None:
    plan = _attach(MLP, MLP.model(), FISH(k=37))
    chosen = [plan.selected(name) for name in plan.selections]
    assert sum(len(indices) for indices in chosen) == 37
    for indices in chosen:
        assert indices.dtype == torch.int64
        assert torch.equal(indices, indices.unique())
    for name, theta in plan.named_parameters():
        assert theta.dim() == 1
        assert torch.equal(
            theta.detach(), dict(plan.model.named_parameters())[name].detach().flatten()[plan.selected(name)]
        )
    assert [id(p) for p in plan.parameters()] == [id(p) for _, p in plan.named_parameters()]


class _NoFloat(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("table", torch.arange(4))


class _Unused(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.used, self.spare = nn.Linear(10, 3), nn.Linear(10, 3)

    def forward(self, x: Tensor) -> Tensor:
        return self.used(x)


def _detached(model: nn.Module, batch: Batch) -> Tensor:
    return MLP.loss(model, batch).detach()


def _per_sample(model: nn.Module, batch: Batch) -> Tensor:
    return F.cross_entropy(model(batch["x"]), batch["y"], reduction="none")


def _infinite(model: nn.Module, batch: Batch) -> Tensor:
    return MLP.loss(model, batch) / 0


BAD: dict[str, tuple[Callable[[], object], str]] = {
    "neither density nor k": (lambda: FISH(), "density"),
    "both density and k": (lambda: FISH(density=0.1, k=3), "density"),
    "density zero": (lambda: FISH(density=0.0), "density"),
    "density above one": (lambda: FISH(density=1.5), "density"),
    "k zero": (lambda: FISH(k=0), "k"),
    "unknown score": (lambda: FISH(density=0.1, score="best"), "score"),
    "unknown fisher": (lambda: FISH(density=0.1, fisher="half"), "fisher"),
    "unknown scope": (lambda: FISH(density=0.1, scope="layer"), "scope"),
    "no samples": (lambda: FISH(density=0.1, samples=0), "samples"),
    "negative warm-up": (lambda: FISH(density=0.1, warmup=-1), "warmup"),
    "nothing left after the head": (lambda: _attach(MLP, MLP.model(), FISH(density=0.05), head="4.*"), "head"),
    "where matches nothing": (lambda: _attach(MLP, MLP.model(), FISH(density=0.5), where="encoder.*"), "encoder.*"),
    "head matches nothing": (lambda: _attach(MLP, MLP.model(), FISH(density=0.5), head="classifier.*"), "classifier.*"),
    "no data for a score that needs it": (lambda: tithe.attach(MLP.model(), FISH(density=0.5), loss=MLP.loss), "data"),
    "no loss for a score that needs it": (
        lambda: tithe.attach(MLP.model(), FISH(density=0.5), data=MLP.batches(1)),
        "loss",
    ),
    "empty data": (lambda: tithe.attach(MLP.model(), FISH(density=0.5), loss=MLP.loss, data=[]), "data"),
    "no trainable float tensor": (lambda: tithe.attach(_NoFloat(), FISH(density=0.5, score="random")), ""),
    "no parameter at all": (lambda: tithe.attach(nn.ReLU(), FISH(density=0.5, score="random")), ""),
    "a loss that is not a scalar": (
        lambda: tithe.attach(MLP.model(), FISH(density=0.5), loss=_per_sample, data=MLP.batches(1)),
        "loss",
    ),
    "a detached loss": (
        lambda: tithe.attach(MLP.model(), FISH(density=0.5), loss=_detached, data=MLP.batches(1)),
        "loss",
    ),
    "an infinite loss": (lambda: tithe.attach(MLP.model(), FISH(density=0.5), loss=_infinite, data=MLP.batches(1)), ""),
    "a parameter that gets no gradient": (
        lambda: tithe.attach(_Unused(), FISH(density=0.5), loss=MLP.loss, data=MLP.batches(1)),
        "spare",
    ),
    "a head that gets no gradient": (
        lambda: tithe.attach(_Unused(), FISH(k=5), loss=MLP.loss, data=MLP.batches(1), where="!spare*", head="spare*"),
        "spare",
    ),
    "density that rounds to nothing": (lambda: _attach(MLP, MLP.model(), FISH(density=0.001)), ""),
}


@pytest.mark.parametrize("name", BAD)
def test_bad_input_is_refused_with_place_found_expected_and_remedy(name: str) -> None:
    wrong, place = BAD[name]
    with pytest.raises(TitheError) as error:
        wrong()
    assert place in str(error.value)
    assert error.value.place
    assert error.value.found
    assert error.value.expected
    assert error.value.remedy


def test_a_model_is_untouched_after_attaching_failed() -> None:
    model = MLP.model()
    before, keys = bits(model), [sorted(vars(module)) for module in model.modules()]
    with pytest.raises(TitheError):
        tithe.attach(model, FISH(density=0.5), loss=_detached, data=MLP.batches(1))
    assert equal_bits(before, bits(model)) == []
    assert [sorted(vars(module)) for module in model.modules()] == keys
    assert all(p.requires_grad and p.grad is None for p in model.parameters())
    assert model.training
    _attach(MLP, model, FISH(density=0.5)).release()


def test_attaching_twice_is_refused() -> None:
    model = MLP.model()
    plan = _attach(MLP, model, FISH(density=0.5))
    with pytest.raises(TitheError, match="release"):
        _attach(MLP, model, FISH(density=0.5))
    plan.release()


def test_a_released_plan_refuses_to_go_on() -> None:
    plan = _attach(MLP, MLP.model(), FISH(density=0.5))
    plan.release()
    for use in (plan.step, plan.reselect, lambda: plan.bind(adamw(MLP.model().parameters()))):
        with pytest.raises(TitheError, match="release"):
            use()


def test_selected_of_an_unknown_name_says_so() -> None:
    plan = _attach(MLP, MLP.model(), FISH(density=0.5))
    with pytest.raises(TitheError, match="spam"):
        plan.selected("spam")


@pytest.mark.parametrize("loss", [_detached, _per_sample])
def test_backward_refuses_what_is_not_a_scalar_with_a_graph(loss: Callable[[nn.Module, Batch], Tensor]) -> None:
    plan = _attach(MLP, MLP.model(), FISH(density=0.5))
    with pytest.raises(TitheError) as error:
        plan.backward(lambda: loss(plan.model, MLP.batch()))
    assert error.value.remedy


@pytest.mark.parametrize("case", [CASES[name] for name in ("mlp", "depthwise", "bert")], ids=lambda c: c.name)
def test_batches_of_one_sample_and_of_none_in_a_batch_of_data(case: Case) -> None:
    """One sample at a time is the same choice as a batch at a time."""
    one = tithe.attach(case.model(), FISH(k=40), loss=case.loss, data=[case.batch(1, seed=s) for s in range(3)])
    assert sum(len(one.selected(name)) for name in one.selections) == 40
    plan = one
    plan.backward(lambda: case.loss(plan.model, case.batch(1)))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_low_precision_models_are_scored_and_trained(dtype: torch.dtype) -> None:
    model = MLP.model(dtype=dtype)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", tithe.TitheWarning)
        plan = tithe.attach(model, FISH(density=0.1), loss=MLP.loss, data=MLP.batches(2, dtype=dtype))
    opt = sgd(plan.parameters())
    plan.bind(opt)
    _step(plan, opt, MLP, MLP.batch(dtype=dtype))
    assert all(theta.dtype == torch.float32 for theta in plan.parameters())


# --- graphs across a step, backward


def test_a_graph_kept_across_a_commit_gets_a_clear_error() -> None:
    plan = _attach(MLP, MLP.model(), FISH(density=0.5))
    opt = sgd(plan.parameters())
    plan.bind(opt)
    stale = MLP.loss(plan.model, MLP.batch())
    _step(plan, opt, MLP, MLP.batch(seed=1))
    with pytest.raises((TitheError, RuntimeError), match=r"loss|in-?place"):
        stale.backward()


def test_saving_and_applying_gives_the_trained_model(tmp_path: object) -> None:
    base, model = MLP.model(), MLP.model()
    plan = _attach(MLP, model, FISH(density=0.3), head="4.*")
    opt = adamw(plan.parameters())
    plan.bind(opt)
    for batch in MLP.batches(3):
        _step(plan, opt, MLP, batch)
    path = f"{tmp_path}/delta.safetensors"
    plan.save(path)
    plan.release()
    tithe.apply(base, path)
    assert equal_bits(bits(base), bits(model)) == []


# --- what stays small


@pytest.mark.parametrize("reselect", [None, tithe.every(2)], ids=["once", "again"])
def test_theta_is_written_into_the_weights_once_a_step(reselect: tithe.Schedule | None) -> None:
    model = MLP.model()
    plan = _attach(MLP, model, FISH(k=30, score="random", reselect=reselect), head="4.*")
    opt = sgd(plan.parameters())
    plan.bind(opt)
    weight = model[0]._parameters["weight"]
    assert plan.selected("0.weight").numel()
    assert weight is not None
    for batch in MLP.batches(5):
        before = weight._version
        changed = _step(plan, opt, MLP, batch)
        assert weight._version - before == 1 or changed  # a new choice commits what leaves


@pytest.mark.parametrize("kind", ["narrow", "subspace"])
def test_the_other_plans_write_a_weight_once_a_step_too(kind: str, tmp_path: Path) -> None:
    history = tithe.History(tmp_path)
    for step in range(3):
        torch.manual_seed(step)
        history.record(MLP.model(), step)
    methods = {"narrow": tithe.VRPGE(keep=0.7), "subspace": tithe.TWA(history)}
    model = MLP.model()
    plan = tithe.attach(model, methods[kind], loss=MLP.loss, data=MLP.batches(2))
    opt = sgd(plan.parameters())
    plan.bind(opt)
    weight = model[0]._parameters["weight"]
    assert weight is not None
    for batch in MLP.batches(3):
        before = weight._version
        _step(plan, opt, MLP, batch)
        MLP.loss(model, batch)
        assert weight._version - before == 1


@pytest.mark.parametrize("method", [FISH(density=0.6), FISH(density=0.6, reselect=tithe.every(2))], ids=["own", "flat"])
def test_a_hugging_face_model_counts_itself(method: FISH) -> None:
    case = CASES["bert"]
    model = case.model()
    names = list(vars(model))
    counts = [model.num_parameters(), model.num_parameters(exclude_embeddings=True), model.bert.num_parameters()]
    plan = _attach(case, model, method, head=case.head)
    found = [model.num_parameters(), model.num_parameters(exclude_embeddings=True), model.bert.num_parameters()]
    assert found == counts
    assert model.num_parameters(only_trainable=True) == sum(p.numel() for p in plan.parameters())
    plan.release()
    assert list(vars(model)) == names


@pytest.mark.parametrize("method", ["fish", tithe.FISH, None], ids=["a name", "a class", "nothing"])
def test_what_is_no_method_is_refused(method: object) -> None:
    with pytest.raises(TitheError, match="expected a SparseMethod, a NarrowMethod, a CutMethod or a SubspaceMethod"):
        tithe.attach(MLP.model(), method)


# --- what it says of itself


@pytest.mark.parametrize("lean", [False, True], ids=["", "lean"])
@pytest.mark.parametrize("name", ["mlp", "bert", "depthwise", "llama"])
def test_a_plan_prints_what_it_trains_and_keeps_against_stock(name: str, lean: bool) -> None:
    case = CASES[name]
    batches = case.batches(2)
    twin = case.model()
    twin.train()
    stock = tithe.measure(lambda: case.loss(twin, batches[0]).backward()).kept
    model = case.model()
    model.train()
    plan = tithe.attach(model, FISH(density=0.7, score="random"), loss=case.loss, data=batches, head=case.head)
    handle = tithe.lean(model) if lean else None
    before, state = bits(model), torch.get_rng_state()
    text = str(plan)
    assert torch.equal(torch.get_rng_state(), state)
    assert equal_bits(before, bits(model)) == []
    trained, total = (sum(p.numel() for p in each) for each in (plan.parameters(), twin.parameters()))
    assert f"trains {trained:,} of {total:,} parameters" in text
    kept = tithe.measure(lambda: plan.backward(lambda: case.loss(model, batches[0]))).kept
    assert f"keeps {human(kept)} for backward" in text
    assert f"full training keeps {human(stock)}" in text
    assert handle is None or name == "mlp" or kept < stock  # each ReLU of the mlp shares what the next layer keeps
    plan.release()
    assert str(plan).endswith("released")


@pytest.mark.parametrize("accumulated", [1, 2])
@pytest.mark.parametrize("reselect", [None, tithe.every(2)], ids=["once", "again"])
def test_printing_between_and_within_steps_changes_no_training(
    reselect: tithe.Schedule | None, accumulated: int
) -> None:
    ends: list[dict[str, Tensor]] = []
    for shown in (False, True):
        model = MLP.model()
        plan = _attach(MLP, model, FISH(k=60, score="random", reselect=reselect), head="4.*")
        opt = adamw(plan.parameters())
        plan.bind(opt)
        for _ in range(4):
            for batch in MLP.batches(accumulated):
                assert not shown or "keeps" in str(plan)
                plan.backward(lambda batch=batch, model=model: MLP.loss(model, batch))
            opt.step()
            opt.zero_grad()
            assert not shown or list(plan.parameters())
            plan.step()
        ends.append(bits(model))
    assert equal_bits(*ends) == []


def test_a_plan_without_data_prints_what_it_trains() -> None:
    plan = tithe.attach(MLP.model(), FISH(k=3, score="random"))
    assert repr(plan) == "SparsePlan of Sequential by FISH: trains 3 of 499 parameters (0.60%)"
    assert str(plan) == f'{plan!r}\n  no head: nothing is trained whole; if 4 is a new layer, pass head="4.*"'


def test_inside_of_inference_mode_nothing_is_trained_but_inside_of_no_grad_all_works() -> None:
    model, batch = MLP.model(), MLP.batch()
    with torch.no_grad():
        plan = _attach(MLP, model, FISH(k=60))
        assert plan.suggest_lr(batch) == plan.suggest_lr(batch)
    with torch.inference_mode(), pytest.raises(TitheError, match=r"suggest_lr: found torch\.inference_mode"):
        plan.suggest_lr(batch)
    plan.release()
    with torch.inference_mode(), pytest.raises(TitheError, match=r"attach: found torch\.inference_mode"):
        _attach(MLP, model, FISH(k=60))


def test_what_full_training_keeps_is_told_of_stock_layers_also_where_parts_are_lean_apart() -> None:
    case = CASES["bert"]
    told: list[str] = []
    for lean in (False, True):
        model = case.model()
        for layer in [m for m in model.modules() if lean and type(m).__name__ == "BertLayer"]:
            tithe.lean(layer)
        told.append(str(_attach(case, model, FISH(k=60, score="random"))).rsplit("full training keeps", 1)[1])
    assert told[0] == told[1]
