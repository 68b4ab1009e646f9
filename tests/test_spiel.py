"""SpIEL: what moved least goes, what has the largest gradient comes, and the contract holds."""

from __future__ import annotations

import pytest
import torch

import tithe
from models import CASES
from tithe import SpIEL, TitheError
from tithe.app.section import AttachedSection
from tithe.app.train import parse_recipe
from tithe.testing import check_method


@pytest.mark.parametrize("name", ["mlp", "tied_mlp", "depthwise", "bert"])
def test_the_contract_holds(name: str) -> None:
    case = CASES[name]
    density = (sum(p.numel() for p in _head(name)) + 40) / sum(p.numel() for p in case.model().parameters())
    method = SpIEL(density=density, replaced=0.5, reselect=tithe.every(2, "steps"))
    check_method(method, case.model, case.loss, case.batches(2), head=case.head)


def _head(name: str) -> list[torch.nn.Parameter]:
    model = CASES[name].model()
    plan = tithe.attach(model, tithe.FISH(k=1, score="magnitude"), head=CASES[name].head)
    named = dict(model.named_parameters())
    return [named[path] for path in plan.head]


def test_what_moved_least_is_dropped_and_what_has_the_largest_gradient_is_grown() -> None:
    model = torch.nn.Linear(8, 4, bias=False)
    with torch.no_grad():
        model.weight.zero_()
    target = torch.arange(32.0).reshape(4, 8).flip(0)

    def loss(model: torch.nn.Module, batch: torch.Tensor) -> torch.Tensor:
        return ((model(batch) - batch @ target.T) ** 2).sum(1).mean() / 2  # over the identity

    batches = [torch.eye(8)]
    plan = tithe.attach(model, SpIEL(density=8 / 32, replaced=0.25), loss=loss, data=batches)
    first = target.flatten().topk(8).indices.sort().values
    assert torch.equal(plan.selected("weight"), first)
    with torch.no_grad():
        (theta,) = plan.parameters()
        theta.copy_(3 * torch.arange(8.0) + 3)  # how far each has moved: the first two least
    plan.step()
    assert plan.end_epoch()
    left = target.flatten().clone()
    left[first] = 0
    left[first[:2]] = target.flatten()[first[:2]] - torch.tensor([3.0, 6.0])  # what was dropped might come again
    grown = left.topk(2).indices
    assert set(plan.selected("weight").tolist()) == {*first[2:].tolist(), *grown.tolist()}
    assert model.weight.detach().flatten()[first].tolist() == [3.0 * i + 3 for i in range(8)]


def test_nothing_is_replaced_where_nothing_is_to_be() -> None:
    case = CASES["mlp"]
    model = case.model()
    plan = tithe.attach(model, SpIEL(density=0.5, replaced=0.0), loss=case.loss, data=case.batches(2), head=case.head)
    before = {name: plan.selected(name) for name in plan.selections}
    assert not plan.end_epoch()
    assert all(torch.equal(plan.selected(name), places) for name, places in before.items())


def test_a_recipe_says_its_schedule_as_a_table_also_by_default() -> None:
    recipe = parse_recipe(
        {
            "model": {"pretrained": "tiny"},
            "data": {"task": "text-classification", "train": "train.tsv"},
            "method": {"name": "spiel", "density": 0.1},
            "optimizer": {"lr": 0.1},
            "run": {"epochs": 1, "output": "out"},
        }
    )
    assert recipe.settings()["method"]["reselect"] == {"every": 1, "unit": "epochs"}
    assert isinstance(recipe.method, AttachedSection)
    assert recipe.method.make(recipe.folder) == SpIEL(density=0.1)


@pytest.mark.parametrize("settings", [(0.0,), (0.1, 1.5), (0.1, 0.2, 0)])
def test_what_is_out_of_range_is_refused(settings: tuple[float, ...]) -> None:
    with pytest.raises(TitheError):
        SpIEL(*settings)  # pyright: ignore[reportArgumentType]
