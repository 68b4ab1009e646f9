"""The layout of a narrow network: what is cut out of whole tensors, padded and written back, in few calls."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode

from narrow_plans import FAMILIES, attach, bound, step
from oracles import sgd
from tithe.coupling import couple
from tithe.narrow import Stage
from tithe.narrow.fit import Fit, batches


def _stage(order: torch.memory_format = torch.contiguous_format) -> Stage:
    """Convolutions of so many channels that their widths are rounded up, and norms with statistics."""
    torch.manual_seed(0)
    model = nn.Sequential(
        nn.Conv2d(3, 20, 3), nn.BatchNorm2d(20), nn.Conv2d(20, 16, 1), nn.ReLU(), nn.Flatten(), nn.Linear(16 * 4, 5)
    ).to(memory_format=order)  # pyright: ignore[reportCallIssue]
    x = torch.randn(2, 3, 4, 4)
    return Stage(model, couple(model, lambda: model(x).sum(), [n for n, _ in model.named_parameters()], 2))


def _fit(stage: Stage, seed: int, share: float) -> tuple[Tensor, Fit]:
    generator = torch.Generator().manual_seed(seed)
    mask = torch.rand(stage.coupling.num_units, generator=generator) < share
    for group in stage.coupling.groups:
        mask[group.start + seed % group.num_units] = True
    return mask, stage.fit(mask)


ORDERS = st.sampled_from([torch.contiguous_format, torch.channels_last])


@settings(max_examples=25, deadline=None)
@given(seed=st.integers(0, 10_000), share=st.floats(0.05, 1.0), order=ORDERS)
def test_what_is_taken_is_the_existing_part_and_zeros(seed: int, share: float, order: torch.memory_format) -> None:
    stage = _stage(order)
    _, fit = _fit(stage, seed, share)
    taken = fit.take(stage.tensors)
    assert set(taken) == set(stage.tensors)
    for name, tensor in stage.tensors.items():
        part = fit.grids[name].gather(tensor)
        padded = torch.zeros(fit.read[name].theta_shape)
        fit.inner[name].scatter_(padded, part) if name in fit.inner else padded.copy_(part)
        assert torch.equal(taken[name], padded), name
        assert torch.equal(fit.strip(taken)[name], part), name
        assert torch.equal(fit.pad(fit.gather(stage.tensors))[name], padded), name
        assert taken[name].data_ptr() != tensor.data_ptr()


@settings(max_examples=25, deadline=None)
@given(seed=st.integers(0, 10_000), share=st.floats(0.05, 1.0), order=ORDERS)
def test_what_is_written_back_changes_nothing_else(seed: int, share: float, order: torch.memory_format) -> None:
    stage = _stage(order)
    _, fit = _fit(stage, seed, share)
    found = {name: tensor.detach().clone() for name, tensor in stage.tensors.items()}
    values = {name: torch.randn(grid.theta_shape) for name, grid in fit.grids.items()}
    fit.scatter_(found, values)
    for name, tensor in stage.tensors.items():
        alone = tensor.detach().clone()
        fit.grids[name].scatter_(alone, values[name])
        assert torch.equal(found[name], alone), name


@settings(max_examples=25, deadline=None)
@given(seed=st.integers(0, 10_000), share=st.floats(0.05, 1.0))
def test_positions_compared_are_those_of_either_network(seed: int, share: float) -> None:
    coupling = _stage().coupling
    mask, _ = _fit(_stage(), seed, share)
    wider = mask | (torch.rand(len(mask), generator=torch.Generator().manual_seed(seed + 1)) < 0.3)
    for axis, (narrow, wide, within, added) in enumerate(zip(*coupling.nested(mask, wider), strict=True)):
        assert torch.equal(narrow, coupling.kept(mask)[axis])
        assert torch.equal(wide, coupling.kept(wider)[axis])
        assert torch.equal(wide[within], narrow)
        assert torch.equal(torch.cat([within, added]).sort().values, torch.arange(len(wide)))


def test_vectors_cut_together_are_tensors_of_their_own() -> None:
    """A norm writes its statistics while autograd keeps its weight: neither may count as a change of the other."""
    stage = _stage()
    _, fit = _fit(stage, 0, 0.5)
    taken = fit.take({name: tensor.detach() for name, tensor in stage.tensors.items()})
    before = taken["1.weight"]._version
    taken["1.running_mean"].add_(1.0)
    assert taken["1.weight"]._version == before
    assert not torch.equal(taken["1.running_mean"], fit.take(stage.tensors)["1.running_mean"])


def test_a_batch_is_of_one_dtype() -> None:
    mixed = {"a": torch.zeros(3), "b": torch.zeros(3, dtype=torch.float64), "c": torch.zeros(2), "d": torch.zeros(2, 2)}
    assert batches(mixed) == [["d"], ["a", "c"], ["b"]]
    stage = _stage()
    _, fit = _fit(stage, 3, 0.5)
    tensors = {n: t.double() if "running" in n else t for n, t in stage.tensors.items()}
    taken = fit.take(tensors)
    assert {name: t.dtype for name, t in taken.items()} == {name: t.dtype for name, t in tensors.items()}


class _Calls(TorchDispatchMode):
    """Counts the operators that copy positions."""

    def __init__(self) -> None:
        super().__init__()
        self.count = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):  # pyright: ignore
        self.count += func.overloadpacket.__name__ in ("index_select", "index_copy_", "index_fill_")
        return func(*args, **(kwargs or {}))


@pytest.mark.parametrize("name", ["vgg", "residual", "bert"])
def test_vectors_add_a_fixed_number_of_calls(name: str) -> None:
    """A step copies positions of each matrix a few times, and of all vectors together as often as of one."""
    case = FAMILIES[name]
    plan = attach(case)
    opt = bound(plan, sgd)
    for batch in case.batches(2):
        step(plan, opt, case, batch)
    vectors = sum(tensor.dim() == 1 for tensor in plan.stage.tensors.values())
    matrices = len(plan.stage.tensors) - vectors
    with _Calls() as calls:
        step(plan, opt, case, case.batch())
    assert vectors >= 9
    assert calls.count <= 12 * matrices + 30
