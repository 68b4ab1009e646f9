"""Watches the optimizers that train a plan's parameters, whoever made them: attaching is enough.

any optimizer's step ──> does it hold parameters of a plan? ──> it is bound: checked once, followed from then on
            bound    ──> before its step: the model is compared with what it was
                     ──> after it: θ goes into the weights; when all bound optimizers had their step, it is counted

torch calls process-wide hooks around the step of every optimizer, whatever kernel it uses, and not at all where a step
is skipped.
"""

from __future__ import annotations

import weakref
from collections.abc import Callable, Iterable, Mapping
from typing import Any, Protocol

import torch
from torch import nn
from torch._compile import _disable_dynamo  # pyright: ignore[reportPrivateUsage]
from torch.optim import Optimizer
from torch.optim.optimizer import register_optimizer_step_pre_hook

from tithe.errors import TitheError
from tithe.living import living
from tithe.plan.optimizers import is_trial

STATE_KEY = "tithe"
"""Where the plan's state is in an optimizer's: `optimizer.state_dict()["state"]["tithe"]`."""


class Watched(Protocol):
    """What a plan does about its optimizers; each is called with one that holds a parameter of the plan."""

    def named_parameters(self) -> Iterable[tuple[str, nn.Parameter]]:
        """Iterate over what optimizers train."""
        ...

    def known(self) -> set[int]:
        """Return the ids of the model's parameters and of what optimizers train, without a check of the model."""
        ...

    def state_dict(self) -> dict[str, Any]:
        """Return the plan's state."""
        ...

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Go on from a state."""
        ...

    def check_optimizer(self, optimizer: Optimizer, elementwise: bool | None) -> None:
        """Refuse an optimizer that the plan cannot be trained with."""
        ...

    def before_update(self, optimizer: Optimizer) -> None:
        """Get ready for an optimizer's step, or refuse it."""
        ...

    def after_update(self, optimizer: Optimizer) -> None:
        """Take over what an optimizer's step changed."""
        ...

    def finish_step(self) -> None:
        """Count a step in which every optimizer had its turn."""
        ...


class Optimizers:
    """The optimizers of one plan.

    Args:
        plan: what they train.
    """

    def __init__(self, plan: Watched) -> None:
        self._plan = weakref.ref(plan)
        self.bound: list[Optimizer] = []
        self.seen = False
        """Whether a step of any of them came by: torch runs no hooks where a step is compiled."""
        self._stepped: set[int] = set()
        self._handles: dict[int, list[Any]] = {}

    def start(self) -> None:
        """Meet every optimizer of the process before its next step."""
        _watching.add(self)
        if not _hook:
            _hook.append(register_optimizer_step_pre_hook(_meet_all))

    @property
    def pending(self) -> bool:
        """Return whether some optimizers had their step and others not yet."""
        return bool(self._stepped)

    def finish(self) -> None:
        """Count the step that is going on, whichever optimizers took part in it."""
        plan = self._plan()
        if self._stepped and plan is not None:
            self._stepped.clear()
            plan.finish_step()

    def bind(self, optimizer: Any, *, elementwise: bool | None = None) -> None:
        """Check an optimizer, follow it from now on, and go on from a plan's state that it has loaded.

        Raises:
            TitheError: as `Plan.bind`.
        """
        plan = self._plan()
        optimizer = inner_optimizer(optimizer)
        if plan is None or any(optimizer is known for known in self.bound):
            return
        state = optimizer.state.pop(STATE_KEY, None)  # pyright: ignore
        if state is not None:
            _check_kind(optimizer)
            plan.load_state_dict(state)  # θ of another size is made first
            _check_sizes(optimizer, plan)
        others = self.check_holds([optimizer, *self.bound])
        plan.check_optimizer(optimizer, elementwise)
        new = _held([optimizer])
        for old in [known for known in self.bound if _held([known]) <= new]:  # made anew, as for another phase
            self._leave(old)
        self.bound.append(optimizer)
        post = optimizer.register_step_post_hook(self._after)
        optimizer._optimizer_step_post_hooks.move_to_end(post.id, last=False)  # a hook of the loop's sees the weights
        self._handles[id(optimizer)] = [
            post,
            optimizer.register_step_pre_hook(self._before),
            optimizer.register_state_dict_post_hook(self._add_state),
            optimizer.register_load_state_dict_post_hook(self._take_state),
        ]

        for other in others:
            self.bind(other, elementwise=elementwise)

    def meet(self, optimizer: Optimizer) -> None:
        """Bind an optimizer that is about to step, where it holds a parameter that the plan trains or froze.

        Raises:
            TitheError: as `bind`.
        """
        plan = self._plan()
        if plan is None or any(optimizer is known for known in self.bound):
            return
        ours = plan.known()
        if any(id(p) in ours for group in optimizer.param_groups for p in group["params"]):
            self.bind(optimizer)

    def search(self, *, loaded: bool = False) -> None:
        """Bind the optimizers of this process that hold what the plan trains, where none is bound yet.

        Args:
            loaded: only those that have loaded a plan's state, which brings the choice to take the gradient for.
        """
        plan = self._plan()
        if plan is None or self.bound:
            return
        ours = {id(parameter) for _, parameter in plan.named_parameters()}
        for optimizer in _find(ours):
            if not loaded or STATE_KEY in optimizer.state:  # pyright: ignore
                self.bind(optimizer)

    def check_holds(self, optimizers: list[Optimizer] | None = None) -> list[Optimizer]:
        """Check that every parameter of the plan is in an optimizer.

        Args:
            optimizers: these; by default those that are bound.

        Returns:
            Other optimizers of the process, which hold what these lack.

        Raises:
            TitheError: naming the first parameter that is missing.
        """
        plan = self._plan()
        assert plan is not None
        optimizers = self.bound if optimizers is None else optimizers
        named = [(name, p) for name, p in plan.named_parameters() if p.numel()]
        held = _held(optimizers)
        missing = [(name, p) for name, p in named if id(p) not in held]
        others: list[Optimizer] = []
        if missing:
            others = _find({id(p) for _, p in missing})
            held = _held(others)
            missing = [(name, p) for name, p in missing if id(p) not in held]
        if missing:
            raise TitheError(
                missing[0][0],
                found=f"an optimizer without {len(missing)} of the plan's parameters",
                expected="an optimizer over plan.parameters()",
                remedy="build it after attaching: torch.optim.AdamW(plan.parameters(), lr=…)",
            )
        return others

    def stop(self) -> None:
        """Leave the optimizers alone."""
        for optimizer in list(self.bound):
            self._leave(optimizer)
        _watching.discard(self)
        while _hook and not _watching:
            _hook.pop().remove()

    def _leave(self, optimizer: Optimizer) -> None:
        for handle in self._handles.pop(id(optimizer)):
            handle.remove()
        self.bound[:] = [known for known in self.bound if known is not optimizer]
        self._stepped.discard(id(optimizer))

    @_disable_dynamo
    def _before(self, optimizer: Optimizer, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        plan = self._plan()
        if plan is None:
            return None
        closure = kwargs.get("closure", args[1] if len(args) > 1 else None)
        if closure is None:
            plan.before_update(optimizer)
            return None

        def checked() -> Any:
            loss = closure()
            plan.before_update(optimizer)
            return loss

        if "closure" in kwargs:
            return args, {**kwargs, "closure": checked}
        return (optimizer, checked, *args[2:]), kwargs

    @_disable_dynamo
    def _after(self, optimizer: Optimizer, args: Any, kwargs: Any) -> None:
        plan = self._plan()
        if plan is None:
            return
        self.seen = True
        overflow = getattr(optimizer, "found_inf", None)  # a fused kernel skips its update by itself
        plan.after_update(optimizer)
        if isinstance(overflow, torch.Tensor) and bool(overflow):
            return
        if id(optimizer) in self._stepped:  # another does not step each time
            self.finish()
        self._stepped.add(id(optimizer))
        if len(self._stepped) == len(self.bound):
            self.finish()

    def _add_state(self, optimizer: Optimizer, state: dict[str, Any]) -> None:
        """In the state dict of the first optimizer: the plan's own."""
        plan = self._plan()
        if plan is not None and next(iter(self.bound), None) is optimizer:
            state["state"] = {**state["state"], STATE_KEY: plan.state_dict()}

    def _take_state(self, optimizer: Optimizer) -> None:
        plan = self._plan()
        state = optimizer.state.pop(STATE_KEY, None)  # pyright: ignore
        if plan is not None and state is not None:
            _check_kind(optimizer)
            plan.load_state_dict(state)
            _check_sizes(optimizer, plan)


def _check_kind(optimizer: Optimizer) -> None:
    """Check that the state that an optimizer has loaded is one of its kind: torch takes over any settings.

    Raises:
        TitheError: when it lacks settings of this one.
    """
    own = optimizer.defaults.keys() - {"differentiable"}  # which torch adds to the defaults of every one that loads
    lacking = sorted({key for group in optimizer.param_groups for key in own - group.keys()})
    if lacking:
        raise TitheError(
            type(optimizer).__name__,
            found=f"the state of another optimizer, without {', '.join(lacking)}",
            expected="the state of one of the same class",
            remedy="make the optimizer that the state was saved from (of a Trainer: the same optim=), or attach with"
            f' state=saved["state"]["{STATE_KEY}"] and let the new optimizer start afresh',
        )


def _check_sizes(optimizer: Optimizer, plan: Watched) -> None:
    """Check that what an optimizer has loaded for a parameter is of its size: torch goes by the parameters' order.

    Raises:
        TitheError: when it is of another, as where another choice than the saved one was made when attaching.
    """
    for name, parameter in plan.named_parameters():
        kept = [v for v in optimizer.state.get(parameter, {}).values() if isinstance(v, torch.Tensor) and v.dim()]
        if kept and all(value.shape != parameter.shape for value in kept):
            raise TitheError(
                name,
                found=f"an optimizer's state of shape {list(kept[0].shape)} for it",
                expected=f"one of shape {list(parameter.shape)}: an optimizer made for the choice that was saved",
                remedy="attach with the method, where= and data that the state was saved with, or with"
                f' state=saved["state"]["{STATE_KEY}"] before the optimizer is made',
            )


def inner_optimizer(optimizer: Any) -> Optimizer:
    """Return the torch optimizer inside a trainer's wrapper (accelerate keeps it as `.optimizer`).

    Raises:
        TitheError: when there is none.
    """
    inner = getattr(optimizer, "optimizer", optimizer)
    if not isinstance(inner, Optimizer):
        raise TitheError(
            "bind", found=f"a {type(inner).__name__}", expected="a torch.optim.Optimizer", remedy="pass the optimizer"
        )
    return inner


_scalers: weakref.WeakKeyDictionary[Optimizer, list[weakref.ref[torch.amp.GradScaler]]] = weakref.WeakKeyDictionary()


def loss_scale(optimizer: Optimizer) -> float:
    """Return what a `GradScaler` multiplied the loss by whose gradient this optimizer is about to step with; else 1."""
    if optimizer not in _scalers:
        found = living(torch.amp.GradScaler)
        _scalers[optimizer] = [weakref.ref(scaler) for scaler in found]
    for reference in _scalers[optimizer]:
        scaler = reference()
        if scaler is not None and scaler.is_enabled() and id(optimizer) in scaler._per_optimizer_states:
            return scaler.get_scale()
    return 1.0


def _held(optimizers: Iterable[Optimizer]) -> set[int]:
    return {id(p) for optimizer in optimizers for group in optimizer.param_groups for p in group["params"]}


def _find(parameters: set[int]) -> list[Optimizer]:
    """Every optimizer of the process that holds one of these."""
    return [each for each in living(Optimizer) if "param_groups" in vars(each) and parameters & _held([each])]


_watching: weakref.WeakSet[Optimizers] = weakref.WeakSet()
_hook: list[Any] = []


@_disable_dynamo
def _meet_all(optimizer: Optimizer, args: Any, kwargs: Any) -> None:
    for optimizers in () if is_trial() else list(_watching):
        optimizers.meet(optimizer)


_Forward = Callable[[], None]


class PlanHook:
    """A hook of a plan on its model, which a copy of the model is rid of."""


class BeforeForward(PlanHook):
    """Tells a plan that its model's forward begins; the model keeps the plan alive.

    In a copy of the model it does nothing, since the copy has no plan.

    Args:
        tell: what to call, or None.
    """

    def __init__(self, tell: _Forward | None) -> None:
        self._tell = tell

    def __call__(self, module: nn.Module, args: Any) -> None:
        """Before the model's forward."""
        if self._tell is not None and not torch.compiler.is_compiling():
            self._tell()

    def __deepcopy__(self, memo: Any) -> BeforeForward:
        return BeforeForward(None)

    def __reduce__(self) -> Any:
        return BeforeForward, (None,)


def clear(copy: nn.Module) -> None:
    """Take what tells a plan off a copy of its model."""
    for number in [number for number, hook in copy._forward_pre_hooks.items() if isinstance(hook, PlanHook)]:
        del copy._forward_pre_hooks[number]
