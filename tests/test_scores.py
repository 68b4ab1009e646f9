"""The scores beside the paper's: each equals its formula written as a loop over single samples."""

from __future__ import annotations

import copy
import math
from collections.abc import Iterable
from pathlib import Path

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor, nn

import tithe
from models import CASES, LARGE, Batch, Case, samples
from oracles import largest
from ranks import play
from test_fish import Listen
from tithe import FISH, TitheError
from tithe.select import importance
from tithe.select.topk import share
from tithe.testing import check_method

EVERY = [pytest.param(case, id=name, marks=[pytest.mark.slow] if case in LARGE else []) for name, case in CASES.items()]
NEW = ("snr", "saliency", "principal")


def _moments(model: nn.Module, case: Case, batches: Iterable[Batch]) -> dict[str, tuple[Tensor, Tensor]]:
    """Name → mean over the samples of the gradient, and of its square; one backward a sample."""
    model = copy.deepcopy(model).eval()
    sums = {name: (torch.zeros_like(p), torch.zeros_like(p)) for name, p in model.named_parameters()}
    count = 0
    for batch in batches:
        for sample in samples(batch):
            model.zero_grad()
            case.loss(model, sample).backward()
            count += 1
            for name, p in model.named_parameters():
                if p.grad is not None:
                    sums[name][0].add_(p.grad)
                    sums[name][1].addcmul_(p.grad, p.grad)
    return {name: (first / count, second / count) for name, (first, second) in sums.items()}


def _heard(model: nn.Module, case: Case, batches: list[Batch], kind: str) -> dict[str, Tensor]:
    method = Listen(kind)
    tithe.attach(model, method, loss=case.loss, data=batches).release()
    return method.heard


@pytest.mark.parametrize("num_samples", [3, 8])
@pytest.mark.parametrize("case", EVERY)
def test_scores_of_gradients_equal_a_loop_over_samples(case: Case, num_samples: int) -> None:
    """Few samples are scored one by one, 24 together where the weights tell them apart."""
    model, batches = case.model(dtype=torch.float64), case.batches(3, num_samples, dtype=torch.float64)
    expected, loose = _moments(model, case, batches), "single" in case.tags
    biggest = max(float(square.max()) for _, square in expected.values())
    found = _heard(model, case, batches, "snr")
    assert list(found) == list(expected)
    for name, (mean, square) in expected.items():
        ratio = torch.where(square > 0, mean.abs() / square.sqrt(), 0.0)
        counts = square > (1e-7 if loose else 1e-20) * biggest  # smaller ones may be rounding
        torch.testing.assert_close(found[name][counts], ratio[counts], rtol=0, atol=1e-2 if loose else 1e-5)
        assert float(found[name].max()) <= 1
    found = _heard(model, case, batches, "saliency")
    for name, (mean, _) in expected.items():
        want = (model.get_parameter(name) * mean).abs().detach()
        torch.testing.assert_close(found[name], want, rtol=1e-4 if loose else 1e-8, atol=1e-7 if loose else 1e-10)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_a_gradient_of_rounding_alone_has_no_signal(dtype: torch.dtype) -> None:
    """A key's bias does not change a softmax: what arises there is rounding, whose ratio would be as high as any."""
    case = CASES["bert"]
    found = _heard(case.model(dtype=dtype), case, case.batches(2, 3, dtype=dtype), "snr")
    keys = [name for name in found if name.endswith("key.bias")]
    assert keys
    assert not any(bool(found[name].any()) for name in keys)
    assert all(bool(score.any()) for name, score in found.items() if name not in keys)


def test_both_sums_are_taken_in_one_pass_over_the_data() -> None:
    case, calls = CASES["mlp"], {"fisher": 0, "snr": 0}
    for kind in calls:

        def loss(model: nn.Module, batch: Batch, kind: str = kind) -> Tensor:
            calls[kind] += 1
            return case.loss(model, batch)

        tithe.attach(case.model(), Listen(kind), loss=loss, data=case.batches(8, 16)).release()
    assert calls["snr"] <= calls["fisher"] + 4  # a glance at a few samples, and no second pass


def test_how_weights_are_grouped_changes_no_score(monkeypatch: pytest.MonkeyPatch) -> None:
    """Groups follow the memory that is free; a choice may not."""
    case = CASES["bert"]
    batches = case.batches(4, 8, dtype=torch.float64)
    one = _heard(case.model(dtype=torch.float64), case, batches, "snr")
    monkeypatch.setattr("tithe.scoring.passes._free_bytes", lambda device: 0.0)
    many = _heard(case.model(dtype=torch.float64), case, batches, "snr")
    for name, score in one.items():
        torch.testing.assert_close(many[name], score, rtol=1e-9, atol=1e-12)


def test_a_ratio_of_one_sample_is_refused() -> None:
    case = CASES["mlp"]
    with pytest.raises(TitheError, match="two means"):
        tithe.attach(case.model(), FISH(k=5, score="snr"), loss=case.loss, data=case.batches(1, 1))


def test_signed_scores_are_refused_over_the_models_own_distribution() -> None:
    for score in ("gradient", "snr", "saliency"):
        with pytest.raises(TitheError, match="mean gradient is zero"):
            FISH(k=5, score=score, fisher="true")
    case = CASES["mlp"]
    with pytest.raises(TitheError, match="mean gradient is zero"):
        tithe.attach(case.model(), Listen("snr", "true"), loss=case.loss, data=case.batches(1))


def test_a_score_that_does_not_exist_is_refused() -> None:
    case = CASES["mlp"]
    with pytest.raises(TitheError, match="'principal'"):
        tithe.attach(case.model(), Listen("curvature"), loss=case.loss, data=case.batches(1))


@given(st.integers(2, 12), st.integers(2, 12), st.integers(1, 14), st.integers(0, 99))
def test_the_low_rank_part_is_that_of_an_exact_decomposition(rows: int, columns: int, rank: int, seed: int) -> None:
    """Of a spectrum that falls by half from value to value the randomised one finds the first r."""
    generator = torch.Generator().manual_seed(seed)
    few = min(rows, columns)
    left = torch.linalg.qr(torch.randn(rows, few, generator=generator, dtype=torch.float64)).Q
    right = torch.linalg.qr(torch.randn(columns, few, generator=generator, dtype=torch.float64)).Q
    sizes = 0.5 ** torch.arange(few, dtype=torch.float64)
    matrix = left * sizes @ right.T
    want = (left[:, :rank] * sizes[:rank] @ right[:, :rank].T).abs()
    found = importance.principal(matrix, rank, generator)
    torch.testing.assert_close(found, want, rtol=0, atol=0.02)


@pytest.mark.parametrize("block", [1 << 22, 50])
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16, torch.float16])
def test_a_matrix_of_low_rank_is_its_own_low_rank_part(
    dtype: torch.dtype, block: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(importance, "_BLOCK", block)
    torch.manual_seed(0)
    matrix = (torch.randn(40, 5, dtype=torch.float64) @ torch.randn(5, 30, dtype=torch.float64)).to(dtype)
    found = importance.principal(matrix, 5, torch.Generator().manual_seed(1))
    assert found.dtype == (torch.float64 if dtype == torch.float64 else torch.float32)
    close = {torch.float64: 1e-9, torch.float32: 1e-4, torch.bfloat16: 0.1, torch.float16: 0.02}[dtype]
    torch.testing.assert_close(found.double(), matrix.double().abs(), rtol=0, atol=close)
    again = importance.principal(matrix, 5, torch.Generator().manual_seed(1))
    assert torch.equal(found, again)


@pytest.mark.parametrize(
    ("shape", "convolution", "expected"),
    [
        ((8, 4, 3, 3), True, (8, 36)),
        ((8, 4, 3), True, (8, 12)),
        ((8, 4, 3), False, (32, 3)),
        ((1, 6, 5), False, (6, 5)),
        ((1, 1, 5), False, None),
        ((1, 5), False, None),
        ((5, 1), False, None),
        ((5,), False, None),
        ((), False, None),
        ((0, 4), False, None),
    ],
)
def test_which_weights_are_matrices(
    shape: tuple[int, ...], convolution: bool, expected: tuple[int, int] | None
) -> None:
    matrix = importance.as_matrix(torch.zeros(shape), convolution=convolution)
    assert (None if matrix is None else tuple(matrix.shape)) == expected


@pytest.mark.parametrize("name", ["mlp", "depthwise", "bert", "gpt2", "tied_mlp"])
def test_each_matrix_gets_its_part_of_the_principal_weights(name: str) -> None:
    case = CASES[name]
    model = case.model(dtype=torch.float64)
    k = 120
    plan = tithe.attach(model, FISH(k=k, score="principal", scope="tensor"), seed=3)
    weights = {key: plan.selections[key] for key in plan.selections}
    matrices = {key: (s.shape[0], math.prod(s.shape[1:])) for key, s in weights.items()}
    total = sum(m + n for m, n in matrices.values())
    assert sum(s.size for s in weights.values()) == k
    for key, (m, n) in matrices.items():
        assert abs(weights[key].size - k * (m + n) / total) < 1
    plan.release()
    again = tithe.attach(model, FISH(k=k, score="principal", scope="tensor"), seed=3)
    assert all(torch.equal(again.selected(key), s.indices) for key, s in weights.items())


@pytest.mark.parametrize("scope", ["global", "tensor"])
def test_the_principal_weights_of_low_rank_matrices_are_the_largest(scope: str) -> None:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(12, 16), nn.Conv1d(4, 9, 3)).double()
    weights = {f"{at}.weight": model[at].weight for at in (0, 1)}
    with torch.no_grad():
        for weight in weights.values():
            m, n = weight.shape[0], weight[0].numel()
            weight.copy_((torch.randn(m, 2).double() @ torch.randn(2, n).double()).view_as(weight))
    k = 2 * (12 + 16) + 2 * (9 + 12)
    plan = tithe.attach(model, FISH(k=k, score="principal", scope=scope))
    sizes = {name: weight.detach().abs() for name, weight in weights.items()}
    if scope == "global":
        expected = largest(sizes, k)
    else:
        counts = {"0.weight": 2 * (12 + 16), "1.weight": 2 * (9 + 12)}
        expected = {name: largest({name: sizes[name]}, count)[name] for name, count in counts.items()}
    assert {name: plan.selected(name).tolist() for name in weights} == expected
    assert set(plan.selections) == set(weights)


def test_more_than_all_weights_of_matrices_are_refused() -> None:
    model = CASES["mlp"].model()
    size = sum(p.numel() for p in model.parameters() if p.dim() == 2)
    tithe.attach(model, FISH(k=size, score="principal")).release()
    with pytest.raises(TitheError, match="weights of matrices"):
        tithe.attach(model, FISH(k=size + 1, score="principal"))


@given(
    st.dictionaries(st.sampled_from("abcd"), st.tuples(st.integers(1, 9), st.integers(0, 9)), min_size=1),
    st.integers(0, 30),
)
def test_a_share_leaves_what_one_cannot_take_to_the_others(drawn: dict[str, tuple[int, int]], k: int) -> None:
    sizes = {name: size for name, (size, _) in drawn.items()}
    most = {name: least for name, (_, least) in drawn.items()}
    counts = share(k, sizes, most)
    assert list(counts) == list(sizes)
    assert sum(counts.values()) == min(k, sum(most.values()))
    assert all(0 <= counts[name] <= most[name] for name in sizes)
    free = {name for name in sizes if counts[name] < most[name]}
    for name in free:  # those that are not full have their parts in proportion
        assert all(
            abs(counts[name] / sizes[name] - counts[o] / sizes[o]) <= 1 / sizes[name] + 1 / sizes[o] for o in free
        )


@pytest.mark.parametrize("score", NEW)
@pytest.mark.parametrize("name", ["mlp", "tied_mlp", "depthwise", "bert"])
def test_the_contract_holds_for_each_score(name: str, score: str) -> None:
    case = CASES[name]
    method = FISH(k=40, score=score, scope="tensor", reselect=tithe.every(2))
    check_method(method, case.model, case.loss, case.batches(2), head=case.head)


def _choice(rank: int | None, score: str) -> dict[str, list[int]]:
    """What is chosen from half of each batch, or from all of it."""
    case, part = CASES["bert"], slice(None) if rank is None else slice(3 * rank, 3 * rank + 3)
    batches = [{key: t[part] for key, t in batch.items()} for batch in case.batches(2, 6, dtype=torch.float64)]
    method = FISH(k=60, score=score)
    plan = tithe.attach(case.model(dtype=torch.float64), method, loss=case.loss, data=batches, seed=1)
    return {name: selection.indices.tolist() for name, selection in plan.selections.items()}


def snr(rank: int) -> dict[str, list[int]]:
    return _choice(rank, "snr")


def saliency(rank: int) -> dict[str, list[int]]:
    return _choice(rank, "saliency")


def principal(rank: int) -> dict[str, list[int]]:
    return _choice(rank, "principal")


def test_two_ranks_choose_as_one_does_with_the_samples_of_both(tmp_path: Path) -> None:
    for score, found in play(tmp_path, snr, saliency, principal).items():
        assert found == (_choice(None, score),) * 2
