"""Suggest a learning rate: how far the loss falls along the signs of its gradient, by two gradients of each batch.

    g = mean of the batches' g_b = ∇L_b(θ)    s_b = sign g_b    c_b = s_bᵀ H_b s_b ≈ (∇L_b(θ + ε s_b) − g_b) · s_b / ε
    η = Σ|g| / mean c_b

An optimizer that divides each gradient by its usual size moves every value by about its learning rate: the first step
of Adam is −η s. Of one batch L(θ − ηs) ≈ L(θ) − η Σ|g| + ½ η² c is least at this η. Of several, a step follows the
signs of one of them, its noise included, and meets the curvature along these; what all agree on is the slope of the
mean gradient.

A loss that is not negative bounds η: its parabola has a minimum above zero, not further away than 2 L / Σ|g|. Where c
says otherwise, or is not positive, it tells of the loss near θ alone; it is then taken over that whole distance, −s,
which remains the bound, unless the loss is below zero there.

Gradients that lie close together are subtracted, so whatever is computed or kept in few digits counts: ε follows the
coarsest dtype of the graph, and lean layers keep nothing in codes meanwhile.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Generator, Iterable, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from tithe import distributed
from tithe.errors import TitheError
from tithe.forward import graph_dtypes, graph_leaves, training, untouched
from tithe.narrow import Stage
from tithe.plan.shared_theta import ThetaSharing
from tithe.rules import Carrier
from tithe.rules.lean.model import Lean
from tithe.scoring import check_loss
from tithe.selection import Grid

Loss = Callable[[], Tensor]

_FINEST = 1e-10
"""No rounding is taken to be finer: models in float64 may compute a norm or their loss in float32."""


@dataclass(frozen=True)
class Movable:
    """What an optimizer moves, made ready for a trial of other values.

    Args:
        leaves: where its gradients arrive.
        scale: √(|w|² / number of values), with the length of what they are written into.
        dtypes: that the weights are computed in.
        move: (ε, directions) → the network has `values + ε directions` from now on.
    """

    leaves: Sequence[Tensor]
    scale: float
    dtypes: Iterable[torch.dtype]
    move: Callable[[float, Sequence[Tensor]], None]


class _Look(NamedTuple):
    """Means over batches, at θ and a step further along the signs of each one's gradient.

    Args:
        step: how much further.
        value: the loss at θ.
        further: the loss there.
        curved: how much the slope along the signs changes in between, per unit.
        total: Σ|g| of the mean gradient at θ.
    """

    step: float
    value: float
    further: float
    curved: float
    total: float


class Whole:
    """Parameters that an optimizer moves as they are, with their values.

    Args:
        parameters: which.
    """

    def __init__(self, parameters: Iterable[Tensor]) -> None:
        self.parameters = list(parameters)
        self._values = [parameter.detach().clone() for parameter in self.parameters]

    def move(self, step: float, directions: Sequence[Tensor]) -> None:
        """Let each be its value + step · direction."""
        for parameter, value, direction in zip(self.parameters, self._values, directions, strict=True):
            parameter.data.copy_(value + step * direction)

    def restore(self) -> None:
        """Put the values back."""
        for parameter, value in zip(self.parameters, self._values, strict=True):
            parameter.data.copy_(value)

    @contextmanager
    def movable(self) -> Generator[Movable]:
        """Let a trial move them, and nothing else, inside."""
        count = sum(parameter.numel() for parameter in self.parameters)
        dtypes = {parameter.dtype for parameter in self.parameters}
        try:
            yield Movable(self.parameters, scale_of(self.parameters, count), dtypes, self.move)
        finally:
            self.restore()


@contextmanager
def movable_network(
    stage: Stage, grids: Mapping[str, Grid], parts: Iterable[str], whole: Iterable[Tensor]
) -> Generator[Movable]:
    """Let a trial move a drawn network's own copies of weights, and parameters that are whole, inside.

    Args:
        stage: of the network.
        grids: what exists of each tensor.
        parts: names of the weights of which a part exists and is trained.
        whole: further parameters that are trained.
    """
    live = stage.live(grids)  # copies, which nobody else has
    copies = {name: nn.Parameter(live[name]) for name in parts}
    with (
        stage.untouched(),
        stage.run(grids, {**live, **copies}),
        Whole([*copies.values(), *whole]).movable() as movable,
    ):
        yield movable


def in_steps(losses: Sequence[Loss], accumulate: int) -> list[Sequence[Loss]]:
    """Return the losses of micro-batches by the steps that they are of.

    Raises:
        TitheError: when they make no whole number of steps.
    """
    if not isinstance(accumulate, int) or accumulate < 1 or len(losses) % accumulate:  # pyright: ignore
        raise _refused(
            f"{len(losses)} batches, accumulate={accumulate!r}",
            "a whole number of steps of that many batches",
            "give as many batches as accumulate for each step; four steps are good",
        )
    return [losses[start : start + accumulate] for start in range(0, len(losses), accumulate)]


def suggest_rate(model: nn.Module, movable: Movable, losses: Sequence[Sequence[Loss]]) -> float:
    """Return the rate at which a step along the signs of the gradient lowers the loss most; ranks return the same.

    Args:
        model: in whichever mode; its forward passes here run in training mode and leave no trace.
        movable: of this model; afterwards it stands elsewhere than at θ, and whoever made it puts it back.
        losses: of the micro-batches of some steps; all steps count alike, and within a step all micro-batches.

    Raises:
        TitheError: no gradient, or one that is not finite; or nothing that would bound the step.
    """
    if not movable.leaves:
        raise _refused("a plan that trains nothing now", "values that an optimizer moves", "call it once there are any")
    device = movable.leaves[0].device
    met = set(movable.dtypes) | _autocast(movable)

    def looked(step: float = 0.0) -> _Look:
        """Compare θ with what lies `step` further along the signs, by default as near as rounding allows."""
        value, further, curved, mean = 0.0, 0.0, 0.0, [torch.zeros_like(leaf) for leaf in movable.leaves]
        for number, loss in enumerate(losses, 1):
            here, directions = _gradients(model, movable.leaves, loss, met, finite=True)
            step = step or math.sqrt(_rounding(met)) * (movable.scale or 1.0)
            distributed.meet(f"suggest_lr: the gradient of batch {number}")
            distributed.mean_all_(directions)
            for total, gradient in zip(mean, directions, strict=True):
                total.add_(gradient, alpha=1 / len(losses))
            slope = _sum(gradient.abs() for gradient in directions)
            for gradient in directions:
                gradient.sign_()
            movable.move(step, directions)
            there, gradients = _gradients(model, movable.leaves, loss, met, finite=False)
            moved = _sum(g * s for g, s in zip(gradients, directions, strict=True))
            movable.move(0.0, directions)
            distributed.meet(f"suggest_lr: the gradient {step:.1g} further, of batch {number}")
            value += distributed.mean_number(here, device) / len(losses)
            further += distributed.mean_number(there, device) / len(losses)
            curved += (distributed.mean_number(moved, device) - slope) / step / len(losses)
        return _Look(step, value, further, curved, _sum(gradient.abs() for gradient in mean))

    step, value, _, curved, total = looked()
    if not 0 < total < math.inf:
        raise _refused(
            f"a gradient whose entries have the sum {total:g}",
            "a gradient that is finite and not zero",
            "look at the loss of this batch; a network that was just drawn needs values other than zero",
        )
    least = _rounding(met) * total / step
    # A parabola that stays above zero has its minimum no further away than this.
    far = 2 * value / total if value > 0 else math.inf
    if curved > least and total / curved <= far:
        return total / curved
    if far == math.inf and abs(curved) > least:
        far = total / abs(curved)
    if not far < math.inf:
        raise _refused(
            f"a slope of {total:g} that changes by {curved * step:.1g} in a step of {step:.1g}, of a loss of {value:g}",
            "a loss that is finite and curved along the signs of its gradient, or nothing bounds a step",
            "name a rate, or look at the loss",
        )
    _, _, further, curved, _ = looked(-far)
    if not least < curved < math.inf:
        return far
    return total / curved if further < 0 else min(far, total / curved)  # a loss below zero bounds nothing


def scale_of(weights: Iterable[Tensor], count: int) -> float:
    """Return √(|w|² / count)."""
    return math.sqrt(_sum(weight.detach().square() for weight in weights) / max(count, 1))


def _gradients(
    model: nn.Module, leaves: Sequence[Tensor], losses: Sequence[Loss], met: set[torch.dtype], *, finite: bool
) -> tuple[float, list[Tensor]]:
    """The mean loss of a step, and the gradients that its passes bring to leaves; nothing else gets or keeps one.

    Dtypes that it is computed in are added to `met`.
    """
    mean, gradients = 0.0, [torch.zeros_like(leaf) for leaf in leaves]
    for loss in losses:
        with training(model), untouched(model), torch.enable_grad(), ExitStack() as inside:
            for lean in Lean.all_of(model):
                inside.enter_context(lean.exactly())
            torch.clear_autocast_cache()  # it holds weights as they were before they were moved
            value = check_loss(loss(), finite=finite)
            met |= graph_dtypes(value)
            with _put_aside([*leaves, *graph_leaves(value)]):
                value.backward()
                for gradient, leaf in zip(gradients, leaves, strict=True):
                    if leaf.grad is not None:
                        gradient.add_(leaf.grad, alpha=1 / len(losses))  # a sparse one, too
            torch.clear_autocast_cache()
        mean += float(value.detach()) / len(losses)
    return mean, gradients


@contextmanager
def _put_aside(leaves: Sequence[Tensor]) -> Generator[None]:
    """Let leaves have no gradient for now, and no hook by which a loop changes it, or trains as soon as there is one.

    A carrier hands on what arrives at it, and θ of a span collects it, by such hooks of their own.
    """
    plain: dict[int, Any] = {id(leaf): leaf for leaf in leaves if not isinstance(leaf, Carrier)}
    kinds = [(leaf._post_accumulate_grad_hooks, leaf._backward_hooks) for leaf in plain.values()]
    hooks = [each for kind in kinds for each in kind if each]
    before = [(leaf, leaf.grad) for leaf in plain.values()], [(each, dict(each)) for each in hooks]
    try:
        for leaf in plain.values():
            leaf.grad = None
        for each in hooks:
            own = {key: hook for key, hook in each.items() if isinstance(getattr(hook, "__self__", None), ThetaSharing)}
            each.clear()
            each.update(own)
        yield
    finally:
        for leaf, grad in before[0]:
            leaf.grad = grad
        for each, content in before[1]:
            each.clear()  # in their order
            each.update(content)


def _autocast(movable: Movable) -> set[torch.dtype]:
    """The dtype that the passes are cast to from outside, if they are."""
    kinds = {leaf.device.type for leaf in movable.leaves}
    return {torch.get_autocast_dtype(kind) for kind in kinds if torch.is_autocast_enabled(kind)}


def _rounding(dtypes: Iterable[torch.dtype]) -> float:
    """The relative rounding of the coarsest numbers that passes compute with."""
    return max(_FINEST, *(torch.finfo(dtype).eps for dtype in dtypes))


def _sum(tensors: Iterable[Tensor]) -> float:
    return math.fsum(float(tensor.detach().sum(dtype=torch.float64)) for tensor in tensors)


def _refused(found: str, expected: str, remedy: str) -> TitheError:
    return TitheError("suggest_lr", found=found, expected=expected, remedy=remedy)
