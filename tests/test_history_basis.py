"""The basis of a history: steps along a tree of checkpoints, which are coded once and no more."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor, nn

from histories import checkpoints, recorded, walk
from tithe import History
from tithe.averages import Basis, strips
from tithe.averages.basis import centred_paths, edges
from tithe.averages.quantize import CARRIED

N = 12


def _run(count: int = N) -> list[nn.Module]:
    torch.manual_seed(0)
    return walk(nn.Linear(128, 96, bias=False), count)


def _basis(history: History, bits: int | None, start: int | None = None) -> Basis:
    n = len(history)
    weights = [1 / n] * n if start is None else [float(i == start) for i in range(n)]
    return Basis(history, strips(history, ["weight"]), bits=bits, start=weights)


def _differences(basis: Basis) -> Tensor:
    """d_i, (n, D) float64, as they are composed."""
    stop = basis.columns[-1].stop
    start = basis.compose(0, stop, torch.zeros(basis.num_vectors, dtype=torch.float64))
    return torch.stack(
        [(basis.compose(0, stop, row) - start).double().view(-1) for row in torch.eye(basis.num_vectors).double()]
    )


def _points(models: list[nn.Module]) -> Tensor:
    rows = torch.stack([dict(model.named_parameters())["weight"].detach().double().view(-1) for model in models])
    return rows - rows.mean(0)


@given(st.integers(1, 9), st.integers(0, 8), st.booleans())
def test_steps_along_a_tree_make_every_difference(n: int, root: int, chained: bool) -> None:
    root %= n
    tree = edges(n, root, chained=chained)
    assert sorted([root, *(child for _, child in tree)]) == list(range(n))
    known = {root}
    for parent, child in tree:
        assert parent in known
        assert parent in (root, child - 1, child + 1)
        known.add(child)
    points = torch.randn(n, 5, dtype=torch.float64)
    steps = torch.stack([points[child] - points[parent] for parent, child in tree]) if tree else torch.zeros(0, 5)
    assert torch.allclose(centred_paths(n, tree) @ steps.double(), points - points.mean(0))


@pytest.mark.parametrize("start", [None, 0, 5, N - 1])
@pytest.mark.parametrize("bits", [8, 4, 1])
def test_recorded_codes_are_not_rounded_again(bits: int, start: int | None, tmp_path: Path) -> None:
    history = recorded(tmp_path / "run", _run(), bits)
    rows = history.columns("weight", 0, 128 * 96).double()
    error = (_differences(_basis(history, bits, start)) - (rows - rows.mean(0))).norm()
    once = (_differences(_basis(recorded(tmp_path / "whole", _run()), bits, start)) - _points(_run())).norm()
    # Signs and their scale come back as they are. Scales of 8 and 4 bits may be rounded up once more.
    assert error <= {8: 1.0, 4: 0.5, 1: 1e-5}[bits] * once


@pytest.mark.parametrize("bits", [8, 4, 1])
def test_rounding_does_not_add_up(bits: int, tmp_path: Path) -> None:
    models = _run(60)
    points = _points(models)
    basis = _basis(recorded(tmp_path / "run", models), bits, 0)
    errors = (_differences(basis) - points).norm(dim=1)
    step = (points[1:] - points[:-1]).norm(dim=1).mean()
    assert errors[30:].mean() <= 1.5 * errors[:30].mean()
    assert errors.max() <= {8: 0.01, 4: 0.2, 1: 1.6}[bits] * step


def test_what_is_independent_is_coded_from_the_start(tmp_path: Path) -> None:
    """Fine-tunings of one base have no neighbours: each is a step from the start, and none takes up another's error."""
    models = checkpoints(nn.Linear(128, 96, bias=False), 6)
    points = _points(models)
    basis = _basis(recorded(tmp_path / "run", models), 1, 5)
    wrong = _differences(basis) - points
    wrong -= wrong[5].clone()  # the start is exact; the mean that all are seen from is not
    lengths = (points - points[5]).square().sum(1)
    assert wrong[5].norm() == 0
    assert (wrong[:5].square().sum(1) <= 0.4 * lengths[:5]).all()  # 1 − 2/π of random numbers


def test_averages_of_neighbours_are_nearer_with_carried_errors(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    models = _run(30)
    history, points = recorded(tmp_path / "run", models), _points(models)

    def missed() -> float:
        wrong = _differences(_basis(history, 1, 0)) - points
        return float(wrong.unfold(0, 5, 5).mean(-1).norm())

    carried = missed()
    monkeypatch.setitem(CARRIED, 1, 0.0)
    assert carried <= 0.9 * missed()
