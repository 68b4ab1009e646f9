"""FISH: the scores are those of a loop over single samples, and the choice is the exact top k with ties by index."""

from __future__ import annotations

from dataclasses import dataclass, field

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor, nn

import tithe
from models import CASES, LARGE, Batch, Case
from oracles import bits, empirical_fisher, equal_bits, largest, mean_gradient, true_fisher
from tithe import FISH, TitheError
from tithe.method import SelectionContext, SparseMethod
from tithe.select.topk import share, top_in_each, top_k
from tithe.selection import Coordinates
from tithe.testing import ContractError, check_method

EVERY = [pytest.param(case, id=name, marks=[pytest.mark.slow] if case in LARGE else []) for name, case in CASES.items()]
CLASSIFIERS = [pytest.param(case, id=name) for name, case in CASES.items() if case.logits and case not in LARGE]


@dataclass(frozen=True)
class Listen(SparseMethod):
    """A stranger's method: it looks at the scores and chooses one weight of each tensor."""

    kind: str = "fisher"
    fisher: str = "empirical"
    samples: int = 10**6
    warmup: int = 0
    reselect: tithe.Schedule | None = None
    heard: dict[str, Tensor] = field(default_factory=dict)

    @property
    def needs_data(self) -> bool:
        return True

    def num_selected(self, context: SelectionContext) -> int:
        return len(context.shapes)

    def choose(self, context: SelectionContext) -> dict[str, Coordinates]:
        for name, values in context.scores(self.kind, samples=self.samples, fisher=self.fisher):
            self.heard[name] = values.clone()
        return {name: Coordinates(shape, torch.tensor([0])) for name, shape in context.shapes.items()}


def _scores(
    model: nn.Module, case: Case, batches: list[Batch], kind: str, fisher: str = "empirical"
) -> dict[str, Tensor]:
    method = Listen(kind, fisher)
    tithe.attach(model, method, loss=case.loss, data=batches).release()
    return method.heard


def _assert_close(found: dict[str, Tensor], expected: dict[str, Tensor], tolerance: float = 1e-5) -> None:
    assert list(found) == list(expected)
    noise = 1e-16 * max(
        float(want.max()) for want in expected.values()
    )  # key biases under a softmax have no gradient but rounding
    for name, want in expected.items():
        error = (found[name].to(want.dtype) - want).abs()
        worst = float((error / (want + noise)).max())
        assert worst <= tolerance, f"{name}: off by {worst:.2e}"


@pytest.mark.parametrize("num_samples", [5, 1, 8])
@pytest.mark.parametrize("case", EVERY)
def test_batched_squares_equal_the_batch_1_loop(case: Case, num_samples: int) -> None:
    model, batches = case.model(dtype=torch.float64), case.batches(3, num_samples, dtype=torch.float64)
    before = bits(model)
    tolerance = 1e-3 if "single" in case.tags else 1e-5
    _assert_close(_scores(model, case, batches, "fisher"), empirical_fisher(model, case, batches), tolerance)
    assert equal_bits(before, bits(model)) == []
    assert model.training


@pytest.mark.parametrize("seen", [0, 1])
def test_an_expert_that_the_first_samples_do_not_reach_is_scored_exactly(seen: int) -> None:
    """How samples mix in a weight cannot be told from samples that do not touch it."""
    case = CASES["experts"]
    model, batches = case.model(dtype=torch.float64), case.batches(3, 6, dtype=torch.float64)
    first = batches[0]["x"]
    first[:2, seen:, 0] = -first[:2, seen:, 0].abs()
    first[:2, :seen, 0] = first[:2, :seen, 0].abs()
    _assert_close(_scores(model, case, batches, "fisher"), empirical_fisher(model, case, batches))


def test_samples_of_different_lengths_are_scored_exactly() -> None:
    """A mean over the positions of a batch is no mean over its samples once lengths differ."""
    case = CASES["gpt2_classifier"]

    def loss(model: nn.Module, batch: Batch) -> Tensor:
        labels = torch.where(batch["mask"] > 0, batch["x"] % 3, -100)
        hidden = model.transformer(input_ids=batch["x"], attention_mask=batch["mask"])[0]
        return F.cross_entropy(model.score(hidden).flatten(0, 1), labels.flatten())

    model, batches = case.model(dtype=torch.float64), case.batches(3, 6, dtype=torch.float64)
    for batch in batches:
        batch["mask"][2:4, 2:] = 0
    alike = Case("lengths", case.make, case.draw, loss)
    _assert_close(_scores(model, alike, batches, "fisher"), empirical_fisher(model, alike, batches))


@pytest.mark.parametrize("case", CLASSIFIERS)
def test_true_fisher_is_the_exact_expectation_over_the_classes(case: Case) -> None:
    if "penalty" in case.tags:
        pytest.skip("a penalty is no part of p(y | x)")
    model, batches = case.model(dtype=torch.float64), case.batches(2, 3, dtype=torch.float64)
    _assert_close(_scores(model, case, batches, "fisher", "true"), true_fisher(model, case, batches))


@pytest.mark.parametrize("case", EVERY)
def test_the_gradient_score_is_the_mean_gradient(case: Case) -> None:
    model, batches = case.model(dtype=torch.float64), case.batches(2, 3, dtype=torch.float64)
    found, expected = _scores(model, case, batches, "gradient"), mean_gradient(model, case, batches)
    for name, want in expected.items():
        torch.testing.assert_close(
            found[name],
            want,
            rtol=1e-4 if "single" in case.tags else 1e-8,
            atol=1e-7 if "single" in case.tags else 1e-10,
        )


@pytest.mark.parametrize("name", ["mlp", "bert", "depthwise", "gpt2"])
def test_float32_scores_are_within_1e_5_of_the_exact_ones(name: str) -> None:
    case = CASES[name]
    exact = empirical_fisher(case.model(dtype=torch.float64), case, case.batches(2, dtype=torch.float64))
    found = _scores(case.model(), case, case.batches(2), "fisher")
    scale = max(float(want.max()) for want in exact.values())
    for key, want in exact.items():
        assert (found[key].double() - want).abs().max() <= 1e-5 * want.max() + 1e-9 * scale, key


def test_squares_are_of_single_samples_and_not_of_a_batch_mean() -> None:
    case = CASES["mlp"]
    found = _scores(case.model(dtype=torch.float64), case, case.batches(1, 8, dtype=torch.float64), "fisher")
    mean = mean_gradient(case.model(dtype=torch.float64), case, case.batches(1, 8, dtype=torch.float64))
    assert all((found[name] > mean[name].square()).any() for name in found)


def test_at_most_the_asked_number_of_samples_is_used() -> None:
    case = CASES["mlp"]
    data = case.batches(4, 3, dtype=torch.float64)
    method = Listen(samples=7)
    tithe.attach(case.model(dtype=torch.float64), method, loss=case.loss, data=data)
    first = [*data[:2], {key: value[:1] for key, value in data[2].items()}]
    _assert_close(method.heard, empirical_fisher(case.model(dtype=torch.float64), case, first))


def test_data_may_be_an_iterator_that_is_used_once() -> None:
    case = CASES["mlp"]
    plan = tithe.attach(case.model(), FISH(k=30), loss=case.loss, data=iter(case.batches(3)))
    again = tithe.attach(case.model(), FISH(k=30), loss=case.loss, data=case.batches(3))
    assert all(torch.equal(plan.selected(name), again.selected(name)) for name in plan.selections)


@pytest.mark.parametrize("kind", ["regression", "binary"])
def test_true_fisher_of_other_likelihoods(kind: str) -> None:
    """Squared error: a normal density of variance ½. Binary cross-entropy: one Bernoulli label an output."""
    case = CASES["regression"]
    model, batch = case.model(dtype=torch.float64), case.batch(3, dtype=torch.float64)

    def loss(model: nn.Module, batch: Batch) -> Tensor:
        if kind == "regression":
            return F.mse_loss(model(batch["x"]), batch["t"])
        return F.binary_cross_entropy_with_logits(model(batch["x"]), batch["t"].sigmoid())

    expected = {name: torch.zeros_like(p) for name, p in model.named_parameters()}
    for x in batch["x"]:
        for output in model(x[None])[0]:
            weight = 2.0 if kind == "regression" else output.sigmoid() * (1 - output.sigmoid())
            for (name, _), grad in zip(
                model.named_parameters(),
                torch.autograd.grad(output, list(model.parameters()), retain_graph=True),
                strict=True,
            ):
                expected[name] += (weight * grad.square()).detach() / 3
    method = Listen(fisher="true")
    tithe.attach(model, method, loss=loss, data=[batch])
    _assert_close(method.heard, expected)


def test_true_fisher_of_a_loss_without_a_known_likelihood_is_refused() -> None:
    case = CASES["mlp"]

    def loss(model: nn.Module, batch: Batch) -> Tensor:
        return model(batch["x"]).square().mean()

    with pytest.raises(TitheError, match="empirical"):
        tithe.attach(case.model(), FISH(k=5, fisher="true"), loss=loss, data=case.batches(1))


def test_scoring_leaves_gradients_flags_and_random_numbers_as_they_were() -> None:
    case = CASES["bert_dropout"]
    model = case.model()
    head = model.get_parameter("classifier.weight")
    head.grad = torch.ones_like(head)
    torch.manual_seed(3)
    expected = torch.rand(1)
    torch.manual_seed(3)
    plan = tithe.attach(model, FISH(density=0.3), loss=case.loss, data=case.batches(2), head=case.head)
    assert torch.equal(torch.rand(1), expected)
    assert all(module.training for module in model.modules())
    assert all(p.requires_grad for p in plan.parameters())
    assert all(p.grad is None for name, p in plan.named_parameters() if name not in plan.head)


@pytest.mark.parametrize(
    "method",
    [
        FISH(k=40),
        FISH(k=40, score="random", reselect=tithe.every(2)),
        FISH(k=40, score="gradient", scope="tensor", reselect=tithe.every(1)),
        FISH(k=40, score="magnitude", warmup=2, reselect=tithe.every(3)),
        Listen("fisher"),
    ],
    ids=repr,
)
@pytest.mark.parametrize("name", ["mlp", "tied_mlp", "depthwise", "recurrent", "bert", "gpt2"])
def test_the_contract_holds(name: str, method: FISH) -> None:
    case = CASES[name]
    if not case.head and method.warmup:
        pytest.skip("a warm-up trains a head")
    check_method(method, case.model, case.loss, case.batches(2), head=case.head)


class _Fickle(Listen):
    def choose(self, context: SelectionContext) -> dict[str, Coordinates]:
        return {name: Coordinates(shape, torch.randperm(shape[0])[:1]) for name, shape in context.shapes.items()}


class _Moving(Listen):
    def choose(self, context: SelectionContext) -> dict[str, Coordinates]:
        with torch.no_grad():
            context._bindings[0].weight.add_(1)
        return super().choose(context)


@pytest.mark.parametrize("method", [_Fickle(), _Moving()], ids=lambda m: type(m).__name__)
def test_the_contract_refuses_a_broken_method(method: Listen) -> None:
    case = CASES["mlp"]
    with pytest.raises(ContractError, match=type(method).__name__):
        check_method(method, case.model, case.loss, case.batches(2))


# --- picks


SCORES = st.dictionaries(
    st.sampled_from("abcd"), st.lists(st.sampled_from([0.0, 0.5, 1.0, 2.0, 3.5]), min_size=1, max_size=8), min_size=1
)


@given(SCORES, st.integers(1, 20))
def test_top_k_is_exact_with_ties_by_tensor_and_index(drawn: dict[str, list[float]], k: int) -> None:
    scores = {name: torch.tensor(values) for name, values in drawn.items()}
    found = top_k(scores.items(), k, {name: len(values) for name, values in drawn.items()})
    assert {name: indices.tolist() for name, indices in found.items()} == largest(scores, k)
    assert all(indices.dtype == torch.int64 for indices in found.values())


@given(SCORES, st.integers(1, 20))
def test_a_share_in_each_tensor_adds_up(drawn: dict[str, list[float]], k: int) -> None:
    sizes = {name: len(values) for name, values in drawn.items()}
    counts = share(k, sizes)
    total = sum(sizes.values())
    assert sum(counts.values()) == min(k, total)
    assert all(abs(counts[name] - min(k, total) * size / total) < 1 for name, size in sizes.items())
    picked = top_in_each(((name, torch.tensor(values)) for name, values in drawn.items()), counts)
    for name, values in drawn.items():
        assert picked[name].tolist() == largest({name: torch.tensor(values)}, counts[name])[name]


def test_scores_that_are_not_finite_are_refused_by_name() -> None:
    with pytest.raises(TitheError, match="layer"):
        top_k([("layer.weight", torch.tensor([1.0, float("nan")]))], 1, {"layer.weight": 2})


@pytest.mark.parametrize("name", ["mlp", "tied_mlp", "bert", "depthwise"])
def test_the_choice_is_the_global_top_k_of_the_fisher_information(name: str) -> None:
    case = CASES[name]
    model, batches = case.model(dtype=torch.float64), case.batches(3, dtype=torch.float64)
    expected = largest(empirical_fisher(model, case, batches), 100)
    plan = tithe.attach(model, FISH(k=100), loss=case.loss, data=batches)
    assert {key: plan.selected(key).tolist() for key in expected} == expected


def test_the_head_takes_no_part_in_the_cut() -> None:
    case = CASES["bert"]
    model, batches = case.model(dtype=torch.float64), case.batches(2, dtype=torch.float64)
    scores = {
        key: value for key, value in empirical_fisher(model, case, batches).items() if not key.startswith("classifier")
    }
    plan = tithe.attach(model, FISH(k=100), loss=case.loss, data=batches, head=case.head)
    assert {key: plan.selected(key).tolist() for key in scores} == largest(scores, 100)


def test_magnitude_and_the_scope_of_one_tensor() -> None:
    case = CASES["mlp"]
    model = case.model()
    magnitudes = {name: p.detach().abs() for name, p in model.named_parameters()}
    plan = tithe.attach(model, FISH(k=50, score="magnitude"))
    assert {name: plan.selected(name).tolist() for name in magnitudes} == largest(magnitudes, 50)
    plan.release()
    plan = tithe.attach(model, FISH(density=0.25, score="magnitude", scope="tensor"))
    for name, values in magnitudes.items():
        assert abs(len(plan.selected(name)) - 0.25 * values.numel()) <= 1
        assert plan.selected(name).tolist() == largest({name: values}, len(plan.selected(name)))[name]


def test_a_random_choice_is_uniform_over_all_weights() -> None:
    case = CASES["mlp"]
    counts = torch.zeros(sum(p.numel() for p in case.model().parameters()))
    for seed in range(200):
        model = case.model()
        starts = dict(
            zip(
                dict(model.named_parameters()),
                torch.tensor([0, *[p.numel() for p in model.parameters()]]).cumsum(0).tolist(),
                strict=False,
            )
        )
        plan = tithe.attach(model, FISH(density=0.5, score="random"), seed=seed)
        for name, start in starts.items():
            counts[start + plan.selected(name)] += 1
    assert counts.min() >= 60
    assert counts.max() <= 140
