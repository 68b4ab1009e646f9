"""Tell from a weight step's own gradients what each unit is worth: the derivative in a gate on its output.

    L(m): what units write is read as m_i x_i        c_i = ∂L/∂m_i = Σ_readers Σ_o W_oi ∂L/∂W_oi       at m_i = 1

A gate m_i multiplies the unit's activations wherever a weight sums over them, which is the same as multiplying the
weight's columns of that unit. So the gradient of the columns has it, and nothing else need be kept or computed. At
m_i = 0 the network is the one without the unit, whatever norms, shortcuts, depthwise convolutions and gated products
lie between where a unit is made and where it is read. The channels of a residual stream are read by every block, an
attention head by the output projection, a hidden unit by the layer behind it.

References:
    P. Molchanov, A. Mallya, S. Tyree, I. Frosio, J. Kautz. Importance Estimation for Neural Network Pruning. CVPR 2019,
    arXiv 1906.10771, section 3.2: the first-order estimate of what a unit's removal changes, there at a gate behind the
    batch norm or over a filter's own weights; here at the readers, which is exact for whatever lies before them.
"""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor, nn

from tithe.coupling import Coupling, Group
from tithe.errors import TitheError
from tithe.selection import Grid


@torch.no_grad()
def gate_gradients(
    coupling: Coupling, grids: Mapping[str, Grid], weights: Mapping[str, Tensor], gradients: Mapping[str, Tensor]
) -> Tensor:
    """Return c_i = Σ over the readers of unit i of Σ_o W_oi ∂L/∂W_oi, for a gate on the unit's output.

    Exact where every reader is a weight of `coupling.reads` that is read nowhere else in another way (a table tied to
    the output layer adds its own term). A group that no weight reads (two factors of one product, a sum of entries)
    takes Σ W ∂L/∂W over all its positions, divided by the number of its matrices: exact where nothing but sums, ReLU
    and products lies between.

    Args:
        coupling: which positions are of which unit.
        grids: what exists of each tensor, by name.
        weights: what exists of each weight, of the shape that the grid says; others than the coupling's are left out.
        gradients: of the same shapes; a weight that has none is taken to have zero.

    Returns:
        (n,), on the CPU, in float32, or float64 if a gradient is; 0 for units that do not exist.
    """
    units: list[Tensor] = []
    shares: list[Tensor] = []
    values: list[Tensor] = []
    for (name, axis), groups in _readers(coupling, weights).items():
        weight, grad = weights.get(name), gradients.get(name)
        if weight is None or grad is None:
            continue
        of = coupling.axes[coupling.places[name][axis]][grids[name].axes[axis].cpu()]
        share = torch.zeros(len(of))
        for group, times in groups:
            share[(of >= group.start) & (of < group.stop)] = 1 / times
        units.append(of.clamp(min=0))  # a position that always exists has no share
        shares.append(share)
        values.append(_along(weight, grad, axis))
    if not values:
        return torch.zeros(coupling.num_units)
    each = torch.cat(values).cpu()  # all at once: a device is waited for once
    return each.new_zeros(coupling.num_units).index_add_(0, torch.cat(units), each * torch.cat(shares).to(each))


def gates_of_step(
    optimizer: torch.optim.Optimizer,
    named: Mapping[str, nn.Parameter],
    coupling: Coupling,
    grids: Mapping[str, Grid],
) -> Tensor:
    """Return `gate_gradients` of the weights that an optimizer is about to move, (n,).

    Args:
        optimizer: before its step.
        named: the model's parameters that are trained, by name; those that the optimizer does not hold are left out.
        coupling: which positions are of which unit.
        grids: what exists of each tensor.

    Raises:
        TitheError: when a weight that reads units was frozen: units that it alone reads would all be worth nothing.
    """
    silent = min((name for name, _ in coupling.reads if name not in named), default=None)
    if silent is not None:
        raise TitheError(
            silent,
            found="a weight that was frozen after attaching, whose gradient tells what its inputs are worth",
            expected="every weight that reads what may be cut trained, until the last cut",
            remedy="freeze it before tithe.attach, which then leaves its inputs whole, or after plan.settled; attach"
            " after steps that train the head alone",
        )
    held = {id(p) for group in optimizer.param_groups for p in group["params"]}
    gradients = {name: p.grad for name, p in named.items() if id(p) in held and p.grad is not None}
    gates = gate_gradients(coupling, grids, {name: named[name] for name in gradients}, gradients)
    scale = getattr(optimizer, "grad_scale", None)  # a fused kernel takes a gradient scaler's factor out by itself
    return gates if scale is None else gates / float(scale)


def _readers(coupling: Coupling, weights: Mapping[str, Tensor]) -> dict[tuple[str, int], list[tuple[Group, int]]]:
    """For each place that gates units: the groups that it gates, and how often the same gate is in the group."""
    found: dict[tuple[str, int], list[tuple[Group, int]]] = {}
    for group in coupling.groups:
        places, times = [place for place in group.members if place in coupling.reads], 1
        if not places:
            places = list({name: (name, axis) for name, axis in reversed(group.members)}.values())  # a square has two
            times = max(1, sum(weights[name].dim() > 1 for name, _ in places if name in weights))
        for place in places:
            found.setdefault(place, []).append((group, times))
    return found


def _along(weight: Tensor, grad: Tensor, axis: int) -> Tensor:
    """Σ w · g over every other axis, one weight's product at a time."""
    dtype = torch.float64 if weight.dtype == torch.float64 else torch.float32
    grad = grad.to_dense() if grad.is_sparse else grad
    product = weight.to(dtype) * grad.to(dtype)
    others = [dim for dim in range(product.dim()) if dim != axis]
    return product.sum(others) if others else product
