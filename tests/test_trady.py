"""TraDy: the two limits, a budget that is never exceeded, and the draw."""

from __future__ import annotations

import copy
from collections import Counter

import pytest
import torch
from torch import Tensor, nn

import tithe
from models import CASES, LARGE, Batch, Case
from oracles import Optimizer, adamw, bits, equal_bits, sgd
from prices import Price, norms, prices, rgn
from tithe import Budget, Channels, TraDy

pytestmark = pytest.mark.filterwarnings("ignore:.*no rule for input channels:tithe.TitheWarning")
NO_CHANNELS = ("recurrent", "functional")
EVERY = [
    pytest.param(case, id=name, marks=[pytest.mark.slow] if case in LARGE else [])
    for name, case in CASES.items()
    if name not in NO_CHANNELS
]
HUGE = 10**9
ROUNDED = ("depthwise", "resnet_basic", "resnet_bottleneck", "convnext", "mobilenet_v2")
"""Their frozen norms are affine maps, which rounds in another order than the stock ones."""
UNPREDICTED = ("experts", "swin", "regression")
"""Why is said in test_memory.py."""
MLP, DEPTHWISE, BERT = CASES["mlp"], CASES["depthwise"], CASES["bert"]


def plain(parameters: object) -> torch.optim.Optimizer:
    """The paper's: no momentum, no decay."""
    return torch.optim.SGD(parameters, lr=0.05)


OPTIMIZERS = {plain: 0, sgd: 1, adamw: 2}  # tensors of θ's size that each keeps
each_optimizer = pytest.mark.parametrize("optimizer", [plain, pytest.param(sgd, marks=pytest.mark.slow), adamw])


def _attach(case: Case, model: nn.Module, method: TraDy, num_samples: int = 4, **settings: object) -> tithe.Plan:
    given = {"loss": case.loss, "data": case.batches(2, num_samples), "head": case.head} | settings
    return tithe.attach(model, method, **given)


def _epoch(
    plan: tithe.Plan, opt: torch.optim.Optimizer, case: Case, batches: list[Batch], *, end: bool = True
) -> list[float]:
    losses: list[float] = []
    for batch in batches:
        opt.zero_grad()
        losses.append(plan.backward(lambda batch=batch: case.loss(plan.model, batch)).item())
        opt.step()
        plan.step()
    if end:
        plan.end_epoch()
    return losses


def _drawn(plan: tithe.Plan) -> dict[str, list[int]]:
    return {name: selection.items.tolist() for name, selection in plan.selections.items()}


# --- the two limits


@pytest.mark.parametrize("optimizer", [plain, adamw])
@pytest.mark.parametrize("case", EVERY)
def test_everything_affordable_is_ordinary_training_bit_for_bit(case: Case, optimizer: Optimizer) -> None:
    """All matrices with channels and the head train; biases, norms and tables are frozen on both sides."""
    dtype = torch.float64 if case.name in ROUNDED else torch.float32
    model = case.model(dtype=dtype)
    ordinary = copy.deepcopy(model)
    method = TraDy(Budget(elements=HUGE), layers="all", lean=False)
    plan = _attach(case, model, method, data=case.batches(2, dtype=dtype))
    trained = {*plan.selections, *plan.head}
    assert all(selection.full for selection in plan.selections.values())
    for name, parameter in ordinary.named_parameters():
        parameter.requires_grad_(name in trained)
    for module in ordinary.modules():
        if isinstance(module, nn.modules.batchnorm._BatchNorm):
            module.eval()
    opts = [optimizer(plan.parameters()), optimizer([p for p in ordinary.parameters() if p.requires_grad])]
    plan.bind(opts[0])
    for epoch in range(2):
        for batch in case.batches(2, dtype=dtype):
            torch.manual_seed(epoch)
            loss = plan.backward(lambda batch=batch: case.loss(model, batch))
            torch.manual_seed(epoch)
            expected = case.loss(ordinary, batch)
            expected.backward()
            assert loss.item() == (pytest.approx(expected.item()) if case.name in ROUNDED else expected.item())
            for opt in opts:
                opt.step()
                opt.zero_grad()
            plan.step()
        plan.end_epoch()
    if case.name in ROUNDED:
        torch.testing.assert_close(bits(model), bits(ordinary), rtol=1e-9, atol=1e-11)
        return
    assert equal_bits(bits(model), bits(ordinary)) == []
    plan.release()
    assert equal_bits(bits(model), bits(ordinary)) == []


@pytest.mark.parametrize("optimizer", [pytest.param(sgd, marks=pytest.mark.slow), adamw])
@pytest.mark.parametrize("case", EVERY)
def test_what_was_never_drawn_keeps_its_bits_under_decay_and_momentum(case: Case, optimizer: Optimizer) -> None:
    model = case.model()
    before = bits(model)
    plan = _attach(case, model, TraDy(Budget(fraction=0.6)))
    opt = optimizer(plan.parameters())
    plan.bind(opt)
    ever: dict[str, set[int]] = {}
    for _ in range(3):
        for name in plan.selections:
            ever[name] = ever.get(name, set()) | set(plan.selected(name).tolist())
        _epoch(plan, opt, case, case.batches(2))
    plan.release()
    for name, parameter in model.named_parameters():
        if name not in plan.head:
            moved = (parameter.detach() != before[name]).flatten().nonzero().flatten().tolist()
            assert set(moved) <= ever.get(name, set()), name
    assert [n for n, b in model.named_buffers() if n in before and not torch.equal(b, before[n])] == []


# --- the budget is never exceeded


def _counted(plan: tithe.Plan, priced: dict[str, Price], states: int) -> float:
    """The paper's count, the buffer included: values of θ (and as many for each state) and kept inputs at batch 1."""
    buffer = plan.model.get_parameter("@theta").numel()
    kept = sum(s.items.numel() * priced[n].positions / priced[n].num_samples for n, s in plan.selections.items())
    assert buffer >= sum(selection.size for selection in plan.selections.values())
    return buffer * (1 + states) + kept


@each_optimizer
@pytest.mark.parametrize("case", EVERY)
def test_elements_are_never_exceeded(case: Case, optimizer: Optimizer) -> None:
    model = case.model()
    priced = prices(model, case, case.batches(1)[0])
    dearest = max(price.elements for price in priced.values())
    limit = int(4 * dearest)
    plan = _attach(case, model, TraDy(Budget(elements=limit), layers="all"))
    opt = optimizer(plan.parameters())
    assert _counted(plan, priced, 0) <= limit
    plan.bind(opt)
    for _ in range(5):
        assert plan.selections
        assert _counted(plan, priced, OPTIMIZERS[optimizer]) <= limit
        _epoch(plan, opt, case, case.batches(1))


def _bytes(tensors: object) -> int:
    return sum(t.numel() * t.element_size() for t in tensors)


@each_optimizer
@pytest.mark.parametrize("case", EVERY)
def test_bytes_are_never_exceeded_as_measured_and_as_predicted(case: Case, optimizer: Optimizer) -> None:
    """θ, its gradient and state, indices, kept inputs of the selected layers, the head's gradient and state: all of it
    measured, each epoch; and the whole step's bytes are the predicted ones."""
    model, batch = case.model(), case.batch()
    priced, states = prices(model, case, batch), OPTIMIZERS[optimizer]
    head = _bytes(p for name, p in model.named_parameters() if any(name.startswith(h[:-1]) for h in case.head))
    dearest = max(price.weights * (2 + states) * 4 + price.positions * 4 + 8 for price in priced.values())
    limit = head * (1 + states) + 4 * dearest
    plan = _attach(case, model, TraDy(Budget(limit), layers="all", optimizer_states=states), data=[batch])
    assert _bytes(model.get_parameter(name) for name in plan.head) == head
    opt = optimizer(plan.parameters())
    plan.bind(opt)
    for _ in range(3):
        opt.zero_grad()
        predicted = None if case.name in UNPREDICTED else plan.predict(batch)
        measured = tithe.measure(lambda: plan.backward(lambda: case.loss(model, batch)), model=model)
        if predicted is not None:
            assert predicted.kept == measured.kept
            assert predicted.kept_by_module == measured.kept_by_module
            assert predicted.peak == measured.peak
            assert predicted.by_kind == measured.by_kind
        opt.step()
        plan.step()
        flat = model.get_parameter("@theta")
        dense = [model.get_parameter(name) for name in plan.head]
        spent = {
            "theta": _bytes([flat]),
            "gradients": _bytes([flat.grad]) + _bytes(p.grad for p in dense),
            "optimizer": _bytes(v for state in opt.state.values() for v in state.values() if v.dim()),
            "index": _bytes(selection.items for selection in plan.selections.values()),
            "kept": sum(measured.kept_by_module.get(priced[name].module, 0) for name in plan.selections),
        }
        assert sum(spent.values()) <= limit, spent
        if predicted is not None:
            assert predicted.theta == spent["theta"] + head
            assert predicted.gradients == spent["gradients"]
            assert predicted.optimizer >= spent["optimizer"]
            assert predicted.index == spent["index"]
        plan.end_epoch()


@pytest.mark.parametrize("measure", ["fraction", "flops"])
def test_a_fraction_and_flops_are_never_exceeded(measure: str) -> None:
    model, batch = DEPTHWISE.model(), DEPTHWISE.batch()
    priced = prices(model, DEPTHWISE, batch)
    priced.pop("classifier.weight")
    outputs: dict[str, int] = {}
    for price in priced.values():
        model.get_submodule(price.module).register_forward_hook(
            lambda m, x, y, path=price.module: outputs.__setitem__(path, y.numel() // y.shape[1])
        )
    DEPTHWISE.loss(model, batch)
    cost = {n: p.elements if measure == "fraction" else 2 * p.weights * outputs[p.module] for n, p in priced.items()}
    total = sum(cost[name] * price.channels.num_channels for name, price in priced.items())
    budget = Budget(fraction=0.25) if measure == "fraction" else Budget(flops=int(0.25 * total))
    plan = _attach(DEPTHWISE, model, TraDy(budget, layers="all"))
    for _ in range(8):
        spent = sum(cost[name] * selection.items.numel() for name, selection in plan.selections.items())
        assert 0 < spent <= 0.25 * total
        plan.end_epoch()


@pytest.mark.parametrize("dynamic", [True, False])
@pytest.mark.parametrize("budget", [Budget(elements=900), Budget("12kB")])
def test_a_stateful_optimizer_is_charged_for_from_the_start(budget: Budget, dynamic: bool) -> None:
    sizes: list[int] = []
    for optimizer, states in OPTIMIZERS.items():
        method = TraDy(budget, layers="all", dynamic=dynamic, optimizer_states=states)
        plan = _attach(BERT, BERT.model(), method)
        parameters = [id(p) for p in plan.parameters()]
        opt = optimizer(plan.parameters())
        plan.bind(opt)
        sizes.append(sum(selection.size for selection in plan.selections.values()))
        assert [id(p) for p in plan.parameters()] == parameters
        _epoch(plan, opt, BERT, BERT.batches(2))
    assert sizes[0] > sizes[1] > sizes[2] > 0


# --- the draw


def test_a_draw_is_a_pure_function_of_seed_and_epoch() -> None:
    method = TraDy(Budget(fraction=0.3), layers="all")
    one, two, other = (_attach(BERT, BERT.model(seed=s), method, seed=seed) for s, seed in ((0, 1), (5, 1), (0, 2)))
    opt = plain(two.parameters())
    two.bind(opt)
    draws: list[dict[str, list[int]]] = []
    for _ in range(4):
        assert _drawn(one) == _drawn(two)
        assert _drawn(one) != _drawn(other)
        draws.append(_drawn(one))
        assert one.reselect() is False
        _epoch(two, opt, BERT, BERT.batches(1))
        one.end_epoch()
        other.end_epoch()
    assert all(a != b for i, a in enumerate(draws) for b in draws[:i])


def test_every_channel_of_one_price_is_drawn_alike_often() -> None:
    """Chi-square of 400 epochs over the 64 channels of one layer: far below the 1e-6 quantile of 63 degrees."""
    model = nn.Sequential(nn.Linear(64, 8), nn.ReLU(), nn.Linear(8, 2))

    def loss(model: nn.Module, x: Tensor) -> Tensor:
        return model(x).square().mean()

    plan = tithe.attach(
        model,
        TraDy(Budget(elements=9 * 8), layers="all", optimizer_states=0),
        loss=loss,
        data=[torch.randn(4, 64)],
        where="0.weight",
    )
    counts, epochs, pairs = torch.zeros(64), 400, Counter[tuple[int, int]]()
    for _ in range(epochs):
        drawn = _drawn(plan)["0.weight"]
        assert len(drawn) == 8
        counts[drawn] += 1
        pairs.update((a, b) for a in drawn for b in drawn if a < b)
        plan.end_epoch()
    expected = epochs * 8 / 64
    assert float(((counts - expected) ** 2 / expected).sum()) < 130
    assert len(pairs) > 0.95 * 64 * 63 / 2


def test_layers_of_unlike_prices_are_all_reached() -> None:
    plan = _attach(DEPTHWISE, DEPTHWISE.model(), TraDy(Budget(fraction=0.3), layers="all"))
    reached: dict[str, set[int]] = {}
    for _ in range(60):
        for name, ids in _drawn(plan).items():
            reached.setdefault(name, set()).update(ids)
        plan.end_epoch()
    weights = {n: s.num_channels for n, s in reached_channels(plan).items()}
    assert {name: len(ids) for name, ids in reached.items()} == weights


def reached_channels(plan: tithe.Plan) -> dict[str, Channels]:
    priced = prices(DEPTHWISE.model(), DEPTHWISE, DEPTHWISE.batch())
    return {name: price.channels for name, price in priced.items() if name not in plan.head}


def test_the_static_variant_never_changes() -> None:
    model = DEPTHWISE.model()
    plan = _attach(DEPTHWISE, model, TraDy(Budget(fraction=0.5), dynamic=False))
    opt = sgd(plan.parameters())
    plan.bind(opt)
    first = _drawn(plan)
    for _ in range(3):
        _epoch(plan, opt, DEPTHWISE, DEPTHWISE.batches(1))
        assert _drawn(plan) == first
    assert plan.reselect() is False
    dynamic = _attach(DEPTHWISE, DEPTHWISE.model(), TraDy(Budget(fraction=0.5)))
    assert set(dynamic.selections) <= set(reached_channels(dynamic))


@pytest.mark.parametrize("coverage", [0.3, 0.7, 0.97])
def test_channels_come_from_the_layers_that_hold_the_coverage(coverage: float) -> None:
    model, batches = DEPTHWISE.model(dtype=torch.float64), DEPTHWISE.batches(2, dtype=torch.float64)
    priced = prices(model, DEPTHWISE, batches[0])
    priced.pop("classifier.weight")
    ranked = rgn(model, DEPTHWISE, batches, priced)
    allowed = tithe.select.channel_costs.cover(ranked, coverage)
    method = TraDy(Budget(elements=HUGE), coverage=coverage)
    plan = _attach(DEPTHWISE, model, method, data=batches)
    assert set(plan.selections) == set(allowed)
    assert len(allowed) < len(priced) or coverage > 0.9


@pytest.mark.parametrize("name", ["depthwise", "resnet_basic", "bert", "llama"])
def test_the_oracle_takes_the_largest_norms_for_their_cost(name: str) -> None:
    case = CASES[name]
    model, batches = case.model(dtype=torch.float64), case.batches(3, dtype=torch.float64)
    priced = prices(model, case, batches[0])
    method = TraDy(Budget(fraction=0.4), layers="all", score="rgn", lean=False)
    plan = _attach(case, model, method, data=batches)
    opt = plain(plan.parameters())
    plan.bind(opt)
    for _ in range(2):
        scores = norms(_stock(plan, case), case, batches, priced)
        ranked = [
            (float(value) / priced[n].elements, n, channel)
            for n, values in scores.items()
            if n not in plan.head
            for channel, value in enumerate(values)
        ]
        chosen = {(n, channel) for n, ids in _drawn(plan).items() for channel in ids}
        least = min(value for value, n, channel in ranked if (n, channel) in chosen)
        most = max(value for value, n, channel in ranked if (n, channel) not in chosen)
        assert least >= most * (1 - 1e-6)
        _epoch(plan, opt, case, batches)


def _stock(plan: tithe.Plan, case: Case) -> nn.Module:
    model = case.model(dtype=torch.float64)
    model.load_state_dict(plan.model.state_dict())
    return model


@pytest.mark.parametrize("name", ["mlp", "depthwise", "gpt2_classifier"])
def test_fisher_information_of_a_channel_is_the_sum_over_its_weights(name: str) -> None:
    from oracles import empirical_fisher

    case = CASES[name]
    model, batches = case.model(dtype=torch.float64), case.batches(3, dtype=torch.float64)
    priced = prices(model, case, batches[0])
    information = empirical_fisher(model, case, batches)
    plan = _attach(case, model, TraDy(Budget(fraction=0.4), layers="all", score="fisher", lean=False), data=batches)
    ranked: list[tuple[float, bool]] = []
    for key, price in priced.items():
        if key not in plan.head:
            values = price.channels.by_item(price.channels.gather(information[key])).sum(1) / price.elements
            drawn = set(_drawn(plan).get(key, []))
            ranked += [(float(value), channel in drawn) for channel, value in enumerate(values)]
    least, most = min(v for v, chosen in ranked if chosen), max(v for v, chosen in ranked if not chosen)
    assert least >= most * (1 - 1e-6)
