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
from typing import Any, Protocol, TypeVar, final, runtime_checkable

import torch
from torch import nn

from tithe import distributed
from tithe.errors import TitheError
from tithe.method import CutMethod, NarrowMethod, SparseMethod, SubspaceMethod
from tithe.narrow import Cuts, InferenceNetwork, Probabilities
from tithe.plan.base import Plan, Settings
from tithe.plan.mount import check_free
from tithe.plan.narrow import NarrowPlan
from tithe.plan.parameters import TRAINABLE, check_recorded
from tithe.plan.ranks import Ranks
from tithe.plan.sparse import SparsePlan
from tithe.plan.subspace import SubspacePlan
from tithe.plan.ties import holders_outside
from tithe.scoring import Loss

PlanT = TypeVar("PlanT", bound=Plan, covariant=True)


@final
class Maker:
    """Makes the plan that a method asks for; see `tithe.method.PlanMaker`.

    Args:
        model: the model.
        settings: of `attach`.
    """

    def __init__(self, model: nn.Module, settings: Settings) -> None:
        self.model, self.settings = model, settings

    def sparse(self, method: SparseMethod) -> SparsePlan:
        """Make a plan under which what is not selected stays frozen at its value."""
        return SparsePlan(self.model, method, self.settings)

    def narrow(self, method: NarrowMethod) -> NarrowPlan:
        """Make a plan under which what is not drawn does not exist."""
        return NarrowPlan(
            self.model,
            method,
            self.settings,
            lambda coupling: Probabilities(coupling, method),
            frozen=method.weights == "frozen",
        )

    def cut(self, method: CutMethod) -> NarrowPlan:
        """Make a plan under which what is worth least goes for good, in a few steps."""
        return NarrowPlan(self.model, method, self.settings, lambda coupling: Cuts(coupling, method))

    def subspace(self, method: SubspaceMethod) -> SubspacePlan:
        """Make a plan under which all weights move together in a span."""
        return SubspacePlan(self.model, method, self.settings)


@runtime_checkable
class Method(Protocol[PlanT]):
    """Anything that makes its own plan, as the contracts of `tithe.method` do."""

    def make_plan(self, maker: Maker) -> PlanT:
        """Ask the maker for a plan of its kind."""
        ...


def attach(
    model: nn.Module,
    method: Method[PlanT],
    *,
    loss: Loss | None = None,
    data: Iterable[Any] | None = None,
    where: str | Sequence[str] = "*",
    head: str | Sequence[str] = (),
    seed: int = 0,
    state: Mapping[str, Any] | None = None,
    dtype: torch.dtype | None = None,
) -> PlanT:
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
        dtype: of θ. None is float32 for weights in half precision, whose master copy θ is, and the weight's own
            otherwise. A dtype that is given is that of all θ, and has to hold every weight's values.

    Returns:
        The plan.

    Raises:
        TitheError: when a glob matches nothing, nothing is left to choose, data or loss is missing, the loss is no
            scalar with a gradient, a scored weight gets no gradient, `dtype` cannot hold a weight, the model has a
            plan already, or something wraps or shards it. On several ranks all of them raise when one fails, when what
            they attach differs, or when one does not come within the timeout of the process group
            (`tithe.distributed.meeting`).

    Example:
        >>> import tithe
        >>> model = nn.Linear(4, 2)
        >>> plan = tithe.attach(model, tithe.FISH(k=3, score="magnitude"), where="weight")
        >>> [name for name, _ in plan.named_parameters()], plan.selected("weight").numel()
        (['weight'], 3)
        >>> plan.release()
    """
    settings, plan = Settings(loss, data, where, head, seed, holders_outside(model), dtype), None
    try:
        with distributed.together("attach"):
            _check_method(method)
            _check_dtype(dtype)
            check_recorded("attach")
            check_free(model)
            _check_whole(model)
            distributed.check_whole(model)
            ranks = Ranks(method, settings)
            ranks.compare(model, state)
            plan = method.make_plan(Maker(model, settings))
            plan.set_aside()
            if state is not None:
                plan.load_state_dict(state)
            else:
                plan.start()
            plan.ranks = ranks
            ranks.watch(
                model,
                plan.named_parameters(),
                averages_gradients=plan.averages_gradients,
                shares=plan.shares_work,
            )
            plan.watch()
    except BaseException:
        if plan is not None:
            plan.release()
        raise
    return plan


def _check_method(method: object) -> None:
    """Check that an object is a method.

    Raises:
        TitheError: when it is not, as a class is not.
    """
    if isinstance(method, type) or not isinstance(method, Method):
        raise TitheError(
            "method",
            found=repr(method),
            expected="a SparseMethod, a NarrowMethod, a CutMethod or a SubspaceMethod",
            remedy="write tithe.attach(model, tithe.FISH(density=0.005), ...), or derive your method from one of these",
        )


def _check_dtype(dtype: object) -> None:
    """Check that a dtype that is given for θ is one that an optimizer can train.

    Raises:
        TitheError: when it is not.
    """
    if dtype is not None and dtype not in TRAINABLE:
        raise TitheError(
            "dtype",
            found=repr(dtype),
            expected="None, torch.float32, torch.float64, or the half precision of the weights",
            remedy="leave dtype= out: θ is float32 for weights in half precision, and has the weight's dtype otherwise",
        )


def _check_whole(model: nn.Module) -> None:
    """Check that no plan is attached under which a part of the model does not exist.

    Raises:
        TitheError: naming the module that belongs to one.
    """
    for path, module in model.named_modules():
        hooks = [getattr(hook, "__self__", None) for hook in module._forward_pre_hooks.values()]
        if any(isinstance(owner, InferenceNetwork) for owner in hooks):
            raise TitheError(
                path or "model",
                found="a plan already attached",
                expected="a model without one",
                remedy="call release() on the first plan",
            )
