"""The way in: a model and a method become a plan.

Budget ──┐                                   ┌──> θ (nn.Parameter on its layer) ──> any torch.optim
         v                                   │                                        │ step
data ─> score ─> pick ─> Selection ─> Rule bound to the layer                         v
         ^        (pure, seeded)     forward keeps only what it must          commit: w <- S θ
         │                           backward: θ.grad = Sᵀ∇w                          │
         └── Schedule says "again": carry optimizer state, swap indices in place <────┘
Ledger watches: predicted == measured (live storages).   delta writes θ, indices, step, seed.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import Any, TypedDict, Unpack, overload

from torch import nn

from tithe.averages import Spanning
from tithe.errors import TitheError
from tithe.method import Method
from tithe.narrow import InferenceNetwork, Structure
from tithe.plan.narrow import NarrowPlan
from tithe.plan.sparse import SparsePlan
from tithe.plan.subspace import SubspacePlan
from tithe.rules import Carrier
from tithe.scoring import Loss


class Settings(TypedDict, total=False):
    """What `attach` takes besides, whatever the method."""

    loss: Loss | None
    data: Iterable[Any] | None
    where: str | Sequence[str]
    head: str | Sequence[str]
    seed: int
    state: Mapping[str, Any] | None


@overload
def attach(model: nn.Module, method: Method, **settings: Unpack[Settings]) -> SparsePlan: ...


@overload
def attach(model: nn.Module, method: Structure, **settings: Unpack[Settings]) -> NarrowPlan: ...


@overload
def attach(model: nn.Module, method: Spanning, **settings: Unpack[Settings]) -> SubspacePlan: ...


def attach(
    model: nn.Module,
    method: Method | Structure | Spanning,
    *,
    loss: Loss | None = None,
    data: Iterable[Any] | None = None,
    where: str | Sequence[str] = "*",
    head: str | Sequence[str] = (),
    seed: int = 0,
    state: Mapping[str, Any] | None = None,
) -> SparsePlan | NarrowPlan | SubspacePlan:
    """Choose what to train in `model`, and train nothing else from now on.

    The model is not wrapped, its class and its `state_dict` keys stay as they are, and `plan.release()` gives it back.

    Args:
        model: any module with floating-point parameters that require gradients.
        method: what to choose, for example `tithe.FISH(density=0.005)`.
        loss: `loss(model, batch)` → scalar, the mean over the samples of the batch; needed by scores of gradients.
        data: batches, trees of tensors whose first axis counts samples; needed by scores of gradients.
        where: globs over parameter names to choose from; one that begins with "!" leaves out. Where the rest is
            absent, what is left out is whole, and trained.
        head: globs over parameter names that are trained whole.
        seed: of every random draw.
        state: `plan.state_dict()` of an earlier run: its choice is taken over, nothing is scored.

    Returns:
        The plan.

    Raises:
        TitheError: when a glob matches nothing, nothing is left to choose, data or loss is missing, the loss is no
            scalar with a gradient, a scored weight gets no gradient, or the model has a plan already.

    Example:
        >>> import tithe
        >>> model = nn.Linear(4, 2)
        >>> plan = tithe.attach(model, tithe.FISH(k=3, score="magnitude"), where="weight")
        >>> [name for name, _ in plan.named_parameters()], plan.selected("weight").numel()
        (['weight'], 3)
        >>> plan.release()
    """
    _check_free(model)
    if isinstance(method, Spanning):
        plan = SubspacePlan(model, method, loss=loss, data=data, where=where, head=head, seed=seed)
    elif isinstance(method, Structure):
        plan = NarrowPlan(model, method, loss=loss, data=data, where=where, head=head, seed=seed)
    else:
        plan = SparsePlan(model, method, loss=loss, data=data, where=where, head=head, seed=seed)
    try:
        if state is not None:
            plan.load_state_dict(state)
        elif isinstance(plan, SparsePlan):
            plan.start()
    except BaseException:
        plan.release()
        raise
    return plan


def _check_free(model: nn.Module) -> None:
    """Check that no plan is attached.

    Raises:
        TitheError: naming the module that belongs to one.
    """
    for path, module in model.named_modules():
        hooks = [getattr(hook, "__self__", None) for hook in module._forward_pre_hooks.values()]
        carried = any(isinstance(value, Carrier) for value in vars(module).values())
        if carried or any(isinstance(owner, InferenceNetwork) for owner in hooks):
            raise TitheError(
                path or "model",
                found="a plan already attached",
                expected="a model without one",
                remedy="call release() on the first plan",
            )
