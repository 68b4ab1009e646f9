"""What cannot be followed is refused, with the module's path and a way out; the way out works."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from fnmatch import fnmatchcase

import pytest
import torch
from torch import Tensor, nn

from narrow_networks import Decides
from tithe import TitheError
from tithe.coupling import Coupling, couple


@pytest.fixture(scope="module", autouse=True)
def operators() -> Iterator[None]:
    """An operation that no table knows."""
    library = torch.library.Library("strange", "DEF")
    library.define("mix(Tensor x) -> Tensor")
    library.impl("mix", lambda x: x.flip(1) + x, "CPU")
    yield
    library._destroy()


class Strange(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return torch.ops.strange.mix(x)


def trace(model: nn.Module, *without: str, run: Callable[[], object] | None = None) -> Coupling:
    names = [name for name, _ in model.named_parameters() if not any(fnmatchcase(name, glob) for glob in without)]
    x = torch.randn(2, 6)
    return couple(model, run or (lambda: model(x).sum()), names, samples=2)


def test_an_unknown_operation_is_named_with_its_module() -> None:
    model = nn.Sequential(nn.Linear(6, 8), nn.ReLU(), Strange(), nn.Linear(8, 5), nn.ReLU(), nn.Linear(5, 3))
    with pytest.raises(TitheError) as error:
        trace(model)
    assert error.value.place == "2"
    assert "strange::mix" in error.value.found
    assert error.value.remedy == 'keep what it works on whole with where="!0.*"'
    coupling = trace(model, "0.*")
    assert [group.name for group in coupling.groups] == ["3"]
    assert coupling.whole == {"5": "an output of Sequential"}


def test_an_unknown_operation_on_what_is_whole_anyway_is_no_matter() -> None:
    model = nn.Sequential(Strange(), nn.Linear(6, 8), nn.LayerNorm(8), Strange(), nn.Linear(8, 5), nn.Linear(5, 3))
    assert [group.name for group in trace(model).groups] == ["4"]


class Branches(nn.Module):
    """Decides by the sum of what its second layer makes, with the channels of the first at hand."""

    def __init__(self, *, returns_it: bool = False) -> None:
        super().__init__()
        self.one, self.two, self.returns_it = nn.Linear(6, 8), nn.Linear(8, 6), returns_it

    def forward(self, x: Tensor) -> Tensor | tuple[Tensor, bool]:
        h = torch.relu(self.one(x))
        y = self.two(h)
        positive = bool(y.sum() > 0)
        if self.returns_it:
            return y, positive
        return self.two(h.flip(1)) if positive else y


@pytest.mark.parametrize("model", [Decides(), Branches()], ids=lambda model: type(model).__name__)
def test_decisions_on_computed_values_are_refused(model: nn.Module) -> None:
    with pytest.raises(TitheError) as error:
        trace(nn.Sequential(model, nn.ReLU()))
    assert error.value.place == "0"
    assert "decide what runs" in error.value.found
    assert error.value.remedy


def test_a_module_that_is_whole_may_decide_among_its_own_tensors() -> None:
    inside = nn.Sequential(nn.Linear(6, 9), nn.ReLU(), nn.Linear(9, 6), Branches())
    assert [group.name for group in trace(inside, "3.*").groups] == ["0"]
    with pytest.raises(TitheError, match="3: found values computed from the weights that decide what runs"):
        trace(inside)


def test_a_decision_that_a_module_tells_others_is_refused() -> None:
    class Outer(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.one, self.two, self.inner = nn.Linear(6, 9), nn.Linear(9, 6), Branches(returns_it=True)

        def forward(self, x: Tensor) -> Tensor:
            y, positive = self.inner(x)
            return self.two(self.one(y).flip(1) if positive else self.one(y))

    with pytest.raises(TitheError, match="inner: found values computed from the weights that decide what runs"):
        trace(Outer(), "inner.*")


@pytest.mark.parametrize(
    "choose",
    [
        lambda h: h[h[:, 0] > 0],
        lambda h: h[h[:, 0].nonzero().flatten()],
        lambda h: torch.masked_select(h, h > 0),
        lambda h: h * float(h.max()),
    ],
    ids=["mask", "nonzero", "masked_select", "float"],
)
def test_shapes_and_numbers_from_computed_values_are_refused(choose: Callable[[Tensor], Tensor]) -> None:
    class Chooses(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.one = nn.Linear(6, 8)

        def forward(self, x: Tensor) -> Tensor:
            return choose(self.one(x))

    with pytest.raises(TitheError, match="Chooses: found values computed from the weights"):
        trace(Chooses())


def test_decisions_on_inputs_are_fine_and_so_is_reading_the_loss() -> None:
    class Looks(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.one, self.two = nn.Linear(6, 8), nn.Linear(8, 3)

        def forward(self, x: Tensor) -> Tensor:
            if bool((x != x).any()):
                raise ValueError("not a number")
            return self.two(torch.tanh(self.one(x[x[:, 0] < 99])))

    model, x = Looks(), torch.randn(2, 6)
    assert [group.name for group in trace(model, run=lambda: float(model(x).sum())).groups] == ["one"]


def test_a_loss_that_does_not_run_the_model_is_refused() -> None:
    with pytest.raises(TitheError, match="Sequential: found no forward pass of it"):
        trace(nn.Sequential(nn.Linear(6, 3)), run=lambda: torch.zeros(()))


def test_a_failing_forward_leaves_no_hook() -> None:
    model = nn.Sequential(nn.Linear(5, 3))
    with pytest.raises(RuntimeError):
        trace(model)
    assert not any(module._forward_hooks or module._forward_pre_hooks for module in model.modules())
