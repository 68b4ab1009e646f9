"""Puts carriers on a model's modules and takes them off again: the hooks, the flags, and how to undo each."""

from __future__ import annotations

import weakref
from collections.abc import Generator, Iterator, Mapping, MutableMapping, Sequence
from contextlib import contextmanager
from typing import Any, cast

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _NormBase  # pyright: ignore[reportPrivateUsage]
from torch.utils.hooks import RemovableHandle

from tithe.errors import TitheError
from tithe.plan.follow import Followed, Place, list_carriers
from tithe.plan.watch import clear
from tithe.rules import Binding, Carrier, FlatTheta, theta_key

_COUNT = "num_parameters"


_live: weakref.WeakSet[Binding] = weakref.WeakSet()
"""The bindings of all plans: a carrier of another binding belongs to a copy of an attached model."""


def _hide(module: nn.Module, state: dict[str, Any], prefix: str, metadata: Any) -> None:
    """After `state_dict()`: θ is no key of the model's."""
    for key, value in module.__dict__.items():
        if isinstance(value, Carrier):
            state.pop(prefix + theta_key(key), None)


def _hide_flat(module: nn.Module, state: dict[str, Any], prefix: str, metadata: Any) -> None:
    """The same for the flat parameter under all θ."""
    state.pop(prefix + theta_key(""), None)


class _Loading:
    """Around `load_state_dict`: θ is no key that could be missing, and what was loaded has moved.

    One object for a module, so that a deep copy of the module has its own.
    """

    def __init__(self) -> None:
        self.before: dict[str, tuple[Tensor, nn.Parameter | None]] = {}

    def provide(self, module: nn.Module, state: dict[str, Any], prefix: str, *rest: Any) -> None:
        """Before: strict loading finds every θ that is registered here, with the values that it has."""
        for key, parameter in module._parameters.items():
            if parameter is None:
                continue
            if key.endswith(theta_key("")):
                state[prefix + key] = parameter.detach()
                self.before[key] = parameter.detach(), parameter
            elif prefix + key in state and isinstance(module.__dict__.get(key), Carrier):
                self.before[key] = parameter.detach().clone(), parameter

    def reload(self, module: nn.Module, keys: Any) -> None:
        """After: θ takes its values from the weight, and stays the parameter that it was (`assign=True`)."""
        before, self.before = self.before, {}
        for key, (_, parameter) in before.items():
            if key.endswith(theta_key("")):
                module._parameters[key] = parameter
        for key, carrier in module.__dict__.items():
            if isinstance(carrier, Carrier) and module._parameters.get(key) is carrier.binding.weight:
                carrier.binding.note_changes(before[key][0] if key in before else None)


def _evaluate(module: nn.Module, args: Any) -> None:
    """Before the forward of a frozen norm: `model.train()` does not reach its running statistics."""
    if module.training and not any(p is not None and p.requires_grad for p in module._parameters.values()):
        module.training = False


class _CountWithoutTheta:
    """Stands for `num_parameters()` of a Hugging Face model, which sums over `named_parameters()`.

    θ holds values that the weights hold as well, so that the model's own count would have them twice.
    """

    def __init__(self, module: Any) -> None:
        self.module = module

    def __call__(self, only_trainable: bool = False, exclude_embeddings: bool = False) -> int:
        count: int = type(self.module).num_parameters(self.module, only_trainable, exclude_embeddings)
        if only_trainable:  # the weights behind θ are frozen: θ alone is counted
            return count
        named = cast(nn.Module, self.module).named_parameters()
        return count - sum(theta.numel() for name, theta in named if name.endswith(theta_key("")))


class Mount:
    """The weights of a model outside the head, bound and frozen, with θ on their modules, until `release`.

    Args:
        model: the model; its class, its forward and its `state_dict` keys stay as they are.
        weights: name → parameter, one for each distinct weight outside the head.
        head: name → parameter trained whole; one that is replaced in the model is replaced here.
        outside: modules that hold one of the weights, and are not in the model.
        dtype: of θ; None is float32 for weights in half precision, and the weight's own otherwise.

    Raises:
        TitheError: when another plan is attached to the model.
    """

    def __init__(
        self,
        model: nn.Module,
        weights: Mapping[str, nn.Parameter],
        head: MutableMapping[str, nn.Parameter] | None = None,
        outside: Sequence[nn.Module] = (),
        dtype: torch.dtype | None = None,
    ) -> None:
        self.model = model
        check_free(model)
        self.bindings = {name: Binding(name, weight, dtype) for name, weight in weights.items()}
        self._owner: dict[str, tuple[nn.Module, str]] = {}
        self._handles: list[RemovableHandle] = []
        self._lists: dict[nn.Module, dict[str, Any]] = {}
        self._still: dict[nn.Module, tuple[RemovableHandle, bool]] = {}
        head = {} if head is None else head
        by_id: dict[int, Binding | str] = {id(weight): self.bindings[name] for name, weight in weights.items()}
        by_id.update({id(weight): name for name, weight in head.items()})
        self._counting = [module for module in model.modules() if callable(getattr(type(module), _COUNT, None))]
        places = [place for path, module in model.named_modules() for place in self._place(path, module, by_id)]
        # A use of a weight outside of the model counts too; the head's parameters are ordinary ones there.
        self._outside = outside
        places += [p for m in outside for p in self._place(type(m).__name__, m, by_id) if p.binding is not None]
        for module in self._counting:
            module.__dict__[_COUNT] = _CountWithoutTheta(module)
        self._followed = Followed(model, places, head)
        self._handles.append(model.register_forward_pre_hook(self._followed))
        for binding in self.bindings.values():
            binding.weight.requires_grad_(False)
            binding.weight.grad = None
            _live.add(binding)

    def _place(self, path: str, module: nn.Module, by_id: Mapping[int, Binding | str]) -> Iterator[Place]:
        placed = False
        for key, parameter in module._parameters.items():
            found = by_id.get(id(parameter))
            if found is None:
                continue
            if isinstance(found, str):
                yield Place(module, key, found, None)
                continue
            module.__dict__[key] = Carrier(found, module, key)
            self._owner.setdefault(found.name, (module, key))
            placed = True
            yield Place(module, key, f"{path}.{key}".lstrip("."), found)
        if placed:
            loading = _Loading()
            self._handles.append(module.register_state_dict_post_hook(_hide))
            self._handles.append(module.register_load_state_dict_pre_hook(loading.provide))
            self._handles.append(module.register_load_state_dict_post_hook(loading.reload))
            if isinstance(module, nn.RNNBase):  # it reads its weights from a list instead of its attributes
                self._lists[module] = {key: module.__dict__[key] for key in ("_flat_weights", "_flat_weight_refs")}
                list_carriers(module)

    @property
    def replaced(self) -> bool:
        """Return whether an optimizer may lack a parameter now, since the head has another one."""
        return self._followed.replaced

    def follow(self) -> None:
        """Follow what was changed in the model.

        Raises:
            TitheError: when it cannot be followed.
        """
        self._followed.follow()

    def take_weights(self) -> None:
        """Let every θ follow its weight where both were written."""
        for binding in self.bindings.values():
            binding.take_weight()

    def check(self) -> None:
        """Compare modules, parameters and flags with those when attaching, but no values.

        Raises:
            TitheError: when a change cannot be followed.
        """
        self._followed.check()

    def join(self, bindings: Sequence[Binding], size: int) -> FlatTheta:
        """Put all θ into one flat parameter, registered on the model itself."""
        flat = FlatTheta(bindings, size)
        self.show_root(flat.parameter)
        return flat

    def show_root(self, parameter: nn.Parameter) -> None:
        """Register a θ that weights have in common on the model itself."""
        self.model.register_parameter(theta_key(""), parameter)
        for binding in self.bindings.values():
            if binding.common is not None:
                binding.home = self.model, theta_key("")
        self._handles.append(self.model.register_state_dict_post_hook(_hide_flat))
        loading = _Loading()
        self._handles.append(self.model.register_load_state_dict_pre_hook(loading.provide))
        self._handles.append(self.model.register_load_state_dict_post_hook(loading.reload))

    def show(self, binding: Binding) -> None:
        """Register θ on its module while it holds values, so that `parameters()`, DDP and trainers find it."""
        module, key = self._owner[binding.name]
        module._parameters.pop(theta_key(key), None)
        if binding.theta.numel() and binding.common is None:
            module.register_parameter(theta_key(key), binding.theta)
            binding.home = module, theta_key(key)

    def still(self) -> None:
        """Keep every norm with running statistics and no selected value in evaluation mode."""
        everything = all(binding.selection.full for binding in self.bindings.values())
        for module in self.model.modules():
            if not isinstance(module, _NormBase) or not module.track_running_stats:
                continue
            carriers = [value for value in module.__dict__.values() if isinstance(value, Carrier)]
            whole_head = (
                bool(module._parameters)
                and not carriers
                and any(parameter is not None and parameter.requires_grad for parameter in module._parameters.values())
            )
            trained = everything or whole_head or any(carrier.binding.selection.size for carrier in carriers)
            if trained and module in self._still:
                self._wake(module)
            elif not trained and module not in self._still:
                self._still[module] = (module.register_forward_pre_hook(_evaluate), module.training)

    def _wake(self, module: nn.Module) -> None:
        handle, was_training = self._still.pop(module)
        handle.remove()
        module.training = self.model.training if was_training else False

    @contextmanager
    def unwatched(self) -> Generator[None]:
        """Let forward passes inside go by without comparing the model: choosing asks weights for gradients."""
        before, self._followed.paused = self._followed.paused, True
        try:
            yield
        finally:
            self._followed.paused = before

    @contextmanager
    def stock(self) -> Generator[None]:
        """Make every weight an ordinary trained parameter inside: torch's own operations run.

        A carrier whose module holds another parameter than the bound one stands for that parameter.
        """
        places = [(m, key) for m in self.model.modules() for key, v in m.__dict__.items() if isinstance(v, Carrier)]
        bound = [cast(nn.Parameter, module._parameters[key]) for module, key in places]
        plain = {id(weight): nn.Parameter(weight.detach()) for weight in bound}
        try:
            for (module, key), weight in zip(places, bound, strict=True):
                module._parameters[key] = plain[id(weight)]
            with self.unwatched():
                yield
        finally:
            for (module, key), weight in zip(places, bound, strict=True):
                module._parameters[key] = weight

    def release(self) -> None:
        """Take everything off: no attribute, no hook and no flag is left."""
        for binding in self.bindings.values():
            binding.settle()
        for module in list(self._still):
            self._wake(module)
        for handle in self._handles:
            handle.remove()
        for owner in [*(owner for owner, _ in self._owner.values()), *self._outside]:  # perhaps not in the model
            _uncover(owner)
        _uncover(self.model)
        for module in self._counting:
            module.__dict__.pop(_COUNT, None)
        for module, lists in self._lists.items():
            module.__dict__.update(lists)
        for binding in self.bindings.values():
            binding.weight.requires_grad_(binding.required)
            _live.discard(binding)


def _uncover(model: nn.Module) -> None:
    """Take carriers and θ off the modules."""
    for module in model.modules():
        module._parameters.pop(theta_key(""), None)
        for key in [key for key, value in module.__dict__.items() if isinstance(value, Carrier)]:
            del module.__dict__[key]
            module._parameters.pop(theta_key(key), None)
        for key, parameter in module._parameters.items():
            if isinstance(parameter, Carrier):  # assigned from an attribute that showed one: the weights are tied
                module._parameters[key] = parameter.binding.weight


def check_free(model: nn.Module) -> None:
    """Check that no plan is attached to the model; a copy of an attached model becomes a plain one.

    Raises:
        TitheError: naming the module that belongs to a plan.
    """
    found: dict[int, Binding] = {}
    for path, module in model.named_modules():
        carriers = [value for value in module.__dict__.values() if isinstance(value, Carrier)]
        if any(carrier.binding in _live for carrier in carriers):
            raise TitheError(
                path or "model",
                found="a plan already attached",
                expected="a model without one",
                remedy="call release() on the first plan",
            )
        found.update({id(carrier.binding): carrier.binding for carrier in carriers})
    if found:
        _clear_copy(model, list(found.values()))


def _clear_copy(model: nn.Module, bindings: Sequence[Binding]) -> None:
    """Make a deep copy of an attached model, or of a part of one, plain: trained values stay."""
    for binding in bindings:
        binding.commit()
        binding.weight.requires_grad_(binding.required)
    _uncover(model)
    clear(model)
    for module in model.modules():
        for hooks in (
            module._forward_pre_hooks,
            module._state_dict_hooks,
            module._load_state_dict_pre_hooks,
            module._load_state_dict_post_hooks,
        ):
            for number in [number for number, hook in hooks.items() if _ours(hook)]:
                del hooks[number]
        module.__dict__.pop(_COUNT, None)
        if isinstance(module, nn.RNNBase):
            list_carriers(module)


def _ours(hook: Any) -> bool:
    hook = getattr(hook, "hook", hook)  # torch wraps hooks that are handed their module
    owner = getattr(hook, "__self__", hook)
    return isinstance(owner, (_Loading, Followed)) or hook in (_hide, _hide_flat, _evaluate)
