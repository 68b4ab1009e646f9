"""Test the contracts: run these checks on a selection, a rule or a method of your own.

    check_selection(MySelection(...))
    check_rule(MyLayer(), x)
    check_method(MyMethod(...), make_model, loss, batches)

Each raises `ContractError` with what was found and what was expected, and needs no test runner.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator, Sequence
from typing import Any, cast

import torch
from torch import Tensor, nn

from tithe import plan as plans
from tithe.errors import TitheError
from tithe.rules import Binding, Carrier, graft
from tithe.selection import Coordinates, Selection

__all__ = ["ContractError", "check_method", "check_rule", "check_selection", "patterns"]


class ContractError(TitheError, AssertionError):
    """A law of the library that a selection, a rule or a method breaks."""


def _require(holds: bool, place: str, found: str, expected: str, remedy: str) -> None:
    if not holds:
        raise ContractError(place, found=found, expected=expected, remedy=remedy)


# --- selections


def check_selection(selection: Selection, *, dtype: torch.dtype = torch.float64, seed: int = 0) -> None:
    """Check that S is linear and injective, that `gather` is its transpose, and that nothing outside of S is touched.

        Sᵀ S v = v        ⟨S v, w⟩ = ⟨v, Sᵀ w⟩        (1 − S Sᵀ) w keeps its bits under `scatter_`

    Args:
        selection: what is checked; its `shape` says which weights it maps into.
        dtype: of the weights and values used.
        seed: of the weights and values used.

    Raises:
        ContractError: when any of it fails.

    Example:
        >>> check_selection(Coordinates((2, 3), torch.tensor([0, 4])))
    """
    place = type(selection).__name__
    generator = torch.Generator().manual_seed(seed)

    def random(*shape: int) -> Tensor:
        return torch.randn(shape, generator=generator, dtype=torch.float64).to(dtype)

    shape = selection.theta_shape
    weight, values, other = random(*selection.shape), random(*shape), random(*shape)
    before = weight.clone()
    gathered = selection.gather(weight)
    _require(
        gathered.shape == shape and gathered.dtype == dtype,
        place,
        f"gather gives {tuple(gathered.shape)} of {gathered.dtype}",
        f"{shape} of {dtype}",
        "return one value for each entry of θ, in the weight's dtype",
    )
    gathered.zero_()
    _require(torch.equal(weight, before), place, "gather shares memory with the weight", "a copy", "clone the values")

    spread = torch.zeros_like(weight)
    selection.scatter_(spread, values)
    _require(
        torch.equal(selection.gather(spread), values),
        place,
        "gather after scatter_ gives other values",
        "the values that were scattered",
        "make S injective: every value of θ its own place",
    )
    inner, outer = (spread * weight).sum(), (values * selection.gather(weight)).sum()
    _require(
        torch.allclose(
            inner, outer, rtol=1e-2 if dtype.itemsize < 4 else 1e-5, atol=1e-2 if dtype.itemsize < 4 else 1e-5
        ),
        place,
        f"⟨S v, w⟩ = {float(inner):g} but ⟨v, Sᵀ w⟩ = {float(outer):g}",
        "the same",
        "make gather the transpose of scatter_",
    )
    both = torch.zeros_like(weight)
    selection.scatter_(both, 2 * values + other)
    apart = torch.zeros_like(weight)
    selection.scatter_(apart, other)
    _require(
        torch.allclose(both, 2 * spread + apart, rtol=1e-2, atol=1e-2),
        place,
        "S(2v + u) differs from 2Sv + Su",
        "a linear map",
        "write the values as they are",
    )
    ones = torch.zeros_like(weight)
    selection.scatter_(ones, torch.ones_like(values))
    selection.scatter_(weight, values)
    _require(
        torch.equal(weight[ones == 0], before[ones == 0]),
        place,
        "scatter_ changed an entry outside of the selection",
        "the bits of every other entry untouched",
        "write only at the selected entries",
    )
    state = selection.state()
    _require(
        all(type(key) is str and type(value) is Tensor for key, value in cast("dict[Any, Any]", state).items()),
        place,
        "state() with something else than tensors under names",
        "dict[str, Tensor]",
        "save data, never structure",
    )
    _require(
        torch.equal(selection.of_items(selection.by_item(values)), values),
        place,
        "of_items(by_item(values)) gives other values",
        "the same values",
        "make them inverse to each other",
    )
    picked = (ones != 0).reshape(-1).nonzero().reshape(-1)
    _require(
        torch.equal(selection.indices, picked),
        place,
        "indices that are not where scatter_ writes",
        "the sorted flat indices of the selected entries",
        "compute them from the same ids",
    )


# --- rules


def patterns(shape: Sequence[int], *, seed: int = 0) -> Iterator[tuple[str, Coordinates]]:
    """Return selections in a weight of `shape` that together make each way of computing the cheapest once.

    Args:
        shape: the weight's shape, without an axis of length 0.
        seed: of the scattered ones.

    Yields:
        A name, and the selection.

    Example:
        >>> [name for name, _ in patterns((4, 6))]
        ['one', 'a column', 'a row', 'a few columns', 'scattered', 'most', 'everything']
    """
    shape = tuple(shape)
    count = torch.Size(shape).numel()
    generator = torch.Generator().manual_seed(seed)
    order, flat = torch.randperm(count, generator=generator), torch.arange(count)
    yield "one", Coordinates(shape, order[:1])
    if len(shape) > 1:
        at = flat.view(shape)
        column, row = int(order[0]) % shape[1], int(order[0]) % shape[0]
        yield "a column", Coordinates(shape, at[:, column].flatten())
        yield "a row", Coordinates(shape, at[row].flatten())
        few = at[:, :: max(shape[1] // 2, 1)].flatten()
        yield (
            "a few columns",
            Coordinates(shape, few[torch.randperm(len(few), generator=generator)[: len(few) // 2 + 1]].unique()),
        )
    yield "scattered", Coordinates(shape, order[: max(count // 10, 1)].unique())
    yield "most", Coordinates(shape, order[: max(count - 1, 1)].unique())
    yield "everything", Coordinates.everything(shape)


Outputs = tuple[list[Tensor], dict[str, Tensor], list[Tensor | None]]


def check_rule(
    layer: nn.Module,
    *inputs: Any,
    parameters: Sequence[str] | None = None,
    rtol: float = 1e-9,
    atol: float = 1e-11,
    seed: int = 0,
) -> None:
    """Check that a layer's rules give exactly the results of graft and autograd, for every pattern of selection.

        θ.grad = Sᵀ ∇w        the output and the input's gradient unchanged        no gradient on the weight itself

    Args:
        layer: any module; it is copied, never changed. Use float64 for the tolerances given here.
        inputs: what its forward takes; floating tensors among them are differentiated.
        parameters: names of the parameters to select in; all of them when None.
        rtol: relative tolerance of gradients.
        atol: absolute tolerance of gradients.
        seed: of the selections and of the output gradient.

    Raises:
        ContractError: when any of it fails.

    Example:
        >>> check_rule(nn.Linear(3, 4).double(), torch.randn(5, 3, dtype=torch.float64))
    """
    names = [name for name, _ in layer.named_parameters()] if parameters is None else list(parameters)
    outputs, dense, input_grads = _differentiate(copy.deepcopy(layer), inputs, {}, seed)
    choices = {name: dict(patterns(layer.get_parameter(name).shape, seed=seed)) for name in names}
    for pattern in dict.fromkeys(pattern for named in choices.values() for pattern in named):
        chosen = {name: named[pattern] for name, named in choices.items() if pattern in named}
        subsets = [chosen] if len(chosen) == 1 else [chosen, *({name: one} for name, one in chosen.items())]
        for subset in subsets:
            for through in ("rule", "graft"):
                place = f"{type(layer).__name__}, {pattern} of {', '.join(subset)}, by {through}"
                bound, bindings = _bind(copy.deepcopy(layer), subset, by_graft=through == "graft")
                found = _differentiate(bound, inputs, bindings, seed)
                expected = {name: selection.gather(dense[name]) for name, selection in subset.items()}
                _compare(place, found, (outputs, expected, input_grads), rtol, atol)
                _require(
                    all(binding.weight.grad is None for binding in bindings.values()),
                    place,
                    "a dense gradient on the weight",
                    "none",
                    "hand the gradient to θ alone",
                )


def _bind(layer: nn.Module, chosen: dict[str, Coordinates], *, by_graft: bool) -> tuple[nn.Module, dict[str, Binding]]:
    """Shadow each parameter by its carrier, as a plan does; parameters that are not chosen are frozen."""
    bindings: dict[str, Binding] = {}
    for name, weight in list(layer.named_parameters()):
        weight.requires_grad_(False)
        binding = Binding(name, weight, weight.dtype)
        path, _, key = name.rpartition(".")
        owner = layer.get_submodule(path)
        if name in chosen:
            binding.select(chosen[name])
            bindings[name] = binding
        carrier: Tensor = Carrier(binding, owner, key)
        owner.__dict__[key] = graft(carrier) if by_graft else carrier
    return layer, bindings


def _differentiate(layer: nn.Module, inputs: Sequence[Any], bindings: dict[str, Binding], seed: int) -> Outputs:
    """Outputs, gradients of θ (of the weights where nothing is bound) and of the inputs."""
    leaves = [x.detach().clone().requires_grad_() if _floats(x) else x for x in inputs]
    found = layer(*leaves)
    outputs = [y for y in (cast("Sequence[Any]", found) if isinstance(found, (tuple, list)) else [found]) if _floats(y)]
    generator = torch.Generator().manual_seed(seed)
    loss = sum(
        ((y * torch.randn(y.shape, generator=generator, dtype=torch.float64).to(y)).sum() for y in outputs),
        start=torch.zeros((), dtype=outputs[0].dtype),
    )
    loss.backward()
    asked = {name: b.theta for name, b in bindings.items()} if bindings else dict(layer.named_parameters())
    grads = {name: torch.zeros_like(p) if p.grad is None else p.grad for name, p in asked.items()}
    return [y.detach() for y in outputs], grads, [x.grad for x in leaves if _floats(x)]


def _floats(x: Any) -> bool:
    return isinstance(x, Tensor) and x.is_floating_point()


def _compare(place: str, found: Outputs, expected: Outputs, rtol: float, atol: float) -> None:
    """Outputs and gradients, to the tolerance: stock PyTorch itself sums in another order when a weight is frozen."""
    for y, want in zip(found[0], expected[0], strict=True):
        same = y.shape == want.shape and y.dtype == want.dtype and torch.allclose(y, want, rtol=rtol, atol=atol)
        _require(same, place, f"an output off by {_distance(y, want):g}", "the stock output", "run the stock operation")
    for name, want in expected[1].items():
        got = found[1][name]
        _require(
            got.shape == want.shape and got.dtype == want.dtype and torch.allclose(got, want, rtol=rtol, atol=atol),
            place,
            f"θ.grad of {name} {tuple(got.shape)} off by {_distance(got, want):g}",
            f"Sᵀ∇w, {tuple(want.shape)}",
            "compare the rule's backward with gather(autograd's gradient)",
        )
    for got, want in zip(found[2], expected[2], strict=True):
        same = got is None if want is None else got is not None and torch.allclose(got, want, rtol=rtol, atol=atol)
        _require(same, place, "another gradient of the input", "autograd's", "check the rule's input gradient")


def _distance(a: Tensor, b: Tensor) -> float:
    return float((a.double() - b.double()).abs().max()) if a.shape == b.shape and a.numel() else 0.0


# --- methods


def check_method(
    method: plans.Method[plans.Plan],
    make_model: Callable[[], nn.Module],
    loss: Callable[[Any, Any], Tensor],
    batches: Sequence[Any],
    *,
    head: str | Sequence[str] = (),
    num_steps: int = 3,
) -> None:
    """Check the contract of a method by training with AdamW, weight decay included.

    The choice is the same for the same seed · keys stay as they are · only selected weights, the head and buffers
    move · stopping and resuming on a fresh base equals never stopping · `release` leaves nothing behind.

    Args:
        method: what is checked.
        make_model: returns the same freshly built model at each call; its training must draw no random numbers.
        loss: `loss(model, batch)`, the mean over the samples of the batch.
        batches: at least one batch; they are cycled through.
        head: globs of parameters trained whole.
        num_steps: steps to train before and after the stop.

    Raises:
        ContractError: when any of it fails.

    Example:
        >>> import tithe
        >>> def loss(model, batch):
        ...     return model(batch).square().mean()
        >>> def make_model():
        ...     torch.manual_seed(0)
        ...     return nn.Linear(4, 2)
        >>> check_method(tithe.FISH(k=3), make_model, loss, [torch.ones(5, 4)])
    """
    place = type(method).__name__
    model, twin, third = make_model(), make_model(), make_model()
    base = {key: value.clone() for key, value in model.state_dict().items()}
    attributes = [sorted(vars(module)) for module in model.modules()]
    flags = [(name, p.requires_grad) for name, p in model.named_parameters()]

    def attach(to: nn.Module, state: Any = None) -> tuple[plans.Plan, torch.optim.Optimizer]:
        plan = plans.attach(to, method, loss=loss, data=batches, head=head, seed=1, state=state)
        optimizer = torch.optim.AdamW(plan.parameters(), lr=1e-2, weight_decay=0.1)
        plan.bind(optimizer)
        return plan, optimizer

    def train(plan: plans.Plan, optimizer: torch.optim.Optimizer, first: int) -> None:
        for number in range(first, first + num_steps):
            batch = batches[number % len(batches)]
            optimizer.zero_grad()
            plan.backward(lambda batch=batch: loss(plan.model, batch))
            ever.update({name: ever.get(name, set()) | set(plan.selected(name).tolist()) for name in plan.selections})
            optimizer.step()
            plan.step()
        if plan.narrowing() is None:  # what does not exist any more is dropped at the end of an epoch
            plan.end_epoch()

    ever: dict[str, set[int]] = {}
    plan, optimizer = attach(model)
    other, other_optimizer = attach(twin)
    for name in {*plan.selections, *other.selections}:
        _require(
            torch.equal(plan.selected(name), other.selected(name)),
            place,
            f"two choices in {name} for one seed",
            "the same choice",
            "draw every random number from context.seed and context.step",
        )
        check_selection(plan.selections[name])
    _require(
        list(model.state_dict()) == list(base), place, "other keys", "the model's own", "register nothing on modules"
    )
    train(plan, optimizer, 0)
    train(plan, optimizer, num_steps)
    first: dict[int, str] = {}
    for name, parameter in model.named_parameters(remove_duplicate=False):
        origin = first.setdefault(id(parameter), name)
        if name not in base or origin in plan.head or parameter.shape != base[name].shape:  # it was cut
            continue
        moved = (parameter.detach() != base[name]).flatten().nonzero().flatten().tolist()
        _require(
            set(moved) <= ever.get(origin, set()),
            place,
            f"{name}: a weight moved that was never selected",
            "its bits untouched",
            "select every weight that is to move",
        )
    train(other, other_optimizer, 0)
    saved, optimizer_state = copy.deepcopy((other.state_dict(), other_optimizer.state_dict()))
    resumed, optimizer = attach(third, saved)
    optimizer.load_state_dict(optimizer_state)
    train(resumed, optimizer, num_steps)
    expected = model.state_dict()
    _require(
        all(torch.equal(value, expected[key]) for key, value in third.state_dict().items()),
        place,
        "other weights after stopping and resuming",
        "those of never stopping, bit for bit",
        "choose from scores, budget, seed and step alone",
    )
    for attached in (plan, other, resumed):
        attached.release()
    _require(
        [sorted(vars(module)) for module in model.modules()] == attributes
        and [(name, p.requires_grad) for name, p in model.named_parameters()] == flags,
        place,
        "something left on the model by release()",
        "the model as it was",
        "hold state in the method's own objects",
    )
