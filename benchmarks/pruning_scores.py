"""What a unit of a trained network is worth, by four published formulas, over the units that Tithe finds.

A unit is a channel, an attention head or a hidden unit of an FFN. Its *filters* are the rows of the weights that make
it, its *columns* those that read it; a head has 32 of each in every matrix.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from tithe.coupling import Coupling

Loss = Callable[[nn.Module, Any], Tensor]
Score = Callable[[nn.Module, Coupling, Loss, Sequence[Any]], Tensor]  # → (n,), the larger the better


def l1(model: nn.Module, coupling: Coupling, loss: Loss, batches: Sequence[Any]) -> Tensor:
    """Σ |w| over the filters.

    Li, Kadav, Durdanovic, Samet, Graf, *Pruning Filters for Efficient ConvNets*, ICLR 2017, section 3.1.
    """
    weights = dict(model.named_parameters())
    return _sums(coupling, {place: _per(weights[place[0]].abs(), place[1]) for place in _places(coupling, weights, 0)})


def magnitude(model: nn.Module, coupling: Coupling, loss: Loss, batches: Sequence[Any]) -> Tensor:
    """√Σ w² over all that goes with the unit: filters and columns.

    The group norm of Fang, Ma, Song, Mi, Wang, *DepGraph*, CVPR 2023, section 3.3.
    """
    weights = dict(model.named_parameters())
    places = [*_places(coupling, weights, 0), *_places(coupling, weights, 1)]
    return _sums(coupling, {place: _per(weights[place[0]].square(), place[1]) for place in places}).sqrt()


def taylor(model: nn.Module, coupling: Coupling, loss: Loss, batches: Sequence[Any]) -> Tensor:
    """Σ over batches of (∂L/∂m)², where a gate m multiplies the unit: ∂L/∂m = Σ w ∂L/∂w over its columns.

    Molchanov, Mallya, Tyree, Frosio, Kautz, *Importance Estimation for Neural Network Pruning*, CVPR 2019, equation 8.
    """
    weights = dict(model.named_parameters())
    places = list(_places(coupling, weights, 1))
    total = torch.zeros(coupling.num_units)
    model.eval()
    for batch in batches:
        loss(model, batch).backward()
        with torch.no_grad():
            gates = {place: _per(w * w.grad, place[1]) for place in places if (w := weights[place[0]]).grad is not None}
        total += _sums(coupling, gates).square()
        model.zero_grad()
    model.train()
    return total


@torch.no_grad()
def wanda(model: nn.Module, coupling: Coupling, loss: Loss, batches: Sequence[Any]) -> Tensor:
    """Mean over outputs of |W_oi| · ‖x_i‖₂, over the columns: Wanda for whole structures, "Wanda-sp".

    An, Zhao, Yu, Tang, Wang, *Fluctuation-based Adaptive Structured Pruning*, AAAI 2024, after Sun, Liu, Bair, Kolter,
    *A Simple and Effective Pruning Approach for Large Language Models*, ICLR 2024.
    """
    weights = dict(model.named_parameters())
    places = list(_places(coupling, weights, 1))
    squares: dict[str, Tensor] = {}

    def watch(name: str) -> Callable[[nn.Module, tuple[Tensor, ...]], None]:
        def before(module: nn.Module, inputs: tuple[Tensor, ...]) -> None:
            channels_last = inputs[0] if isinstance(module, nn.Linear) else inputs[0].movedim(1, -1)
            squares[name] = squares.get(name, 0) + channels_last.flatten(0, -2).square().sum(0)

        return before

    hooks = [model.get_submodule(n.rpartition(".")[0]).register_forward_pre_hook(watch(n)) for n, _ in places]
    model.eval()
    for batch in batches:
        loss(model, batch)
    model.train()
    for hook in hooks:
        hook.remove()
    products = {(n, axis): _per(weights[n].abs(), axis) / len(weights[n]) * squares[n].sqrt() for n, axis in places}
    return _sums(coupling, products)


def taylor_by_wanda(model: nn.Module, coupling: Coupling, loss: Loss, batches: Sequence[Any]) -> Tensor:
    """Taylor's scores of each group, handed to its units in the order of Wanda-sp.

    Taylor scores say well how wide groups should be beside each other. Within a group of a network that fits its data
    they are mostly noise, and the size of what a unit sends on tells more.
    """
    between, within = taylor(model, coupling, loss, batches), wanda(model, coupling, loss, batches)
    worth = torch.empty_like(between)
    for group in coupling.groups:
        at = slice(group.start, group.stop)
        worth[at] = between[at].sort().values[within[at].argsort().argsort()]
    return worth


def _places(coupling: Coupling, weights: Mapping[str, Tensor], axis: int) -> Iterator[tuple[str, int]]:
    """The matrices and kernels that have units along the axis: 0 makes them, 1 reads them."""
    found = {place for group in coupling.groups for place in group.members}
    return (
        place for place in sorted(found) if place[1] == axis and place[0] in weights and weights[place[0]].dim() > 1
    )


def _per(values: Tensor, axis: int) -> Tensor:
    """Sums over all but one axis."""
    return values.detach().movedim(axis, 0).flatten(1).sum(1)


def _sums(coupling: Coupling, values: Mapping[tuple[str, int], Tensor]) -> Tensor:
    """Of every unit the sum of the values at its positions, (n,)."""
    total = torch.zeros(coupling.num_units)
    for (name, axis), each in values.items():
        units = coupling.axes[coupling.places[name][axis]]
        total.index_add_(0, units[units >= 0], each[units >= 0])
    return total
