"""Puts carriers on a model's modules and takes them off again: the hooks, the flags, and how to undo each."""

from __future__ import annotations

import weakref
from collections.abc import Generator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any, cast

import torch
from torch import nn
from torch.nn.modules.batchnorm import _NormBase  # pyright: ignore[reportPrivateUsage]
from torch.utils.hooks import RemovableHandle

from tithe.errors import TitheError
from tithe.rules import Binding, Carrier, FlatTheta, theta_key

_COUNT = "num_parameters"


def _hide(module: nn.Module, state: dict[str, Any], prefix: str, metadata: Any) -> None:
    """After `state_dict()`: θ is no key of the model's."""
    for key, value in module.__dict__.items():
        if isinstance(value, Carrier):
            state.pop(prefix + theta_key(key), None)


def _hide_flat(module: nn.Module, state: dict[str, Any], prefix: str, metadata: Any) -> None:
    """The same for the flat parameter under all θ."""
    state.pop(prefix + theta_key(""), None)


def _provide(module: nn.Module, state: dict[str, Any], prefix: str, *rest: Any) -> None:
    """Before loading: strict loading finds every θ that is registered here, with the values that it has."""
    for key, parameter in module._parameters.items():
        if key.endswith(theta_key("")) and parameter is not None:
            state[prefix + key] = parameter.detach()


def _reload(module: nn.Module, keys: Any) -> None:
    """After loading: θ takes its values from the weight that was loaded."""
    for value in module.__dict__.values():
        if isinstance(value, Carrier):
            value.binding.refresh()


def _evaluate(module: nn.Module, args: Any) -> None:
    """Before the forward of a frozen norm: `model.train()` does not reach its running statistics."""
    if module.training and not any(p is not None and p.requires_grad for p in module._parameters.values()):
        module.training = False


class _Settle:
    """Before the root's forward: what an optimizer moved is committed, and a model moved elsewhere is followed.

    An object rather than a closure, so that a deep copy of the model settles its own weights.
    """

    def __init__(self, places: list[tuple[nn.Module, str]]) -> None:
        self.places = places

    def __call__(self, module: nn.Module, args: Any) -> None:
        if torch.compiler.is_compiling():
            return
        for owner, key in self.places:
            carrier = owner.__dict__.get(key)
            if isinstance(carrier, Carrier):
                binding = carrier.binding
                binding.commit()
                if carrier.memory != binding.weight.untyped_storage()._cdata:
                    binding.follow()
                    owner.__dict__[key] = Carrier(binding, owner, key)


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

    Raises:
        TitheError: when another plan is attached to the model.
    """

    def __init__(self, model: nn.Module, weights: Mapping[str, nn.Parameter]) -> None:
        self.model = model
        self.bindings = {name: Binding(name, weight) for name, weight in weights.items()}
        self._owner: dict[str, tuple[nn.Module, str]] = {}
        self._handles: list[RemovableHandle] = []
        self._lists: dict[nn.Module, dict[str, Any]] = {}
        self._still: dict[nn.Module, tuple[RemovableHandle, bool]] = {}
        self._required = {name: weight.requires_grad for name, weight in weights.items()}
        for path, module in model.named_modules():
            if any(isinstance(value, Carrier) for value in module.__dict__.values()):
                raise TitheError(
                    path or "model",
                    found="a plan already attached",
                    expected="a model without one",
                    remedy="call release() on the first plan",
                )
        by_id = {id(weight): self.bindings[name] for name, weight in weights.items()}
        self._counting = [module for module in model.modules() if callable(getattr(type(module), _COUNT, None))]
        for module in model.modules():
            self._place(module, by_id)
        for module in self._counting:
            module.__dict__[_COUNT] = _CountWithoutTheta(module)
        places = [(m, key) for m in model.modules() for key, v in m.__dict__.items() if isinstance(v, Carrier)]
        self._handles.append(model.register_forward_pre_hook(_Settle(places)))
        for binding in self.bindings.values():
            binding.weight.requires_grad_(False)
            binding.weight.grad = None

    def _place(self, module: nn.Module, by_id: Mapping[int, Binding]) -> None:
        placed = False
        for key, parameter in module._parameters.items():
            binding = by_id.get(id(parameter))
            if parameter is None or binding is None:
                continue
            module.__dict__[key] = Carrier(binding, module, key)
            self._owner.setdefault(binding.name, (module, key))
            placed = True
        if placed:
            self._handles.append(module.register_state_dict_post_hook(_hide))
            self._handles.append(module.register_load_state_dict_pre_hook(_provide))
            self._handles.append(module.register_load_state_dict_post_hook(_reload))
            if isinstance(module, nn.RNNBase):  # it reads its weights from a list instead of its attributes
                self._lists[module] = {key: module.__dict__[key] for key in ("_flat_weights", "_flat_weight_refs")}
                carriers = [getattr(module, key) for key in cast(list[str], module._flat_weights_names)]
                module.__dict__.update(_flat_weights=carriers, _flat_weight_refs=[weakref.ref(c) for c in carriers])

    def join(self, bindings: Sequence[Binding], size: int) -> FlatTheta:
        """Put all θ into one flat parameter, registered on the model itself."""
        flat = FlatTheta(bindings, size)
        self.show_root(flat.parameter)
        return flat

    def show_root(self, parameter: nn.Parameter) -> None:
        """Register a θ that weights have in common on the model itself."""
        self.model.register_parameter(theta_key(""), parameter)
        for binding in self.bindings.values():
            binding.home = self.model, theta_key("")
        self._handles.append(self.model.register_state_dict_post_hook(_hide_flat))
        self._handles.append(self.model.register_load_state_dict_pre_hook(_provide))

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
            trained = everything or whole_head or any(carrier.binding.theta.numel() for carrier in carriers)
            if trained and module in self._still:
                self._wake(module)
            elif not trained and module not in self._still:
                self._still[module] = (module.register_forward_pre_hook(_evaluate), module.training)

    def _wake(self, module: nn.Module) -> None:
        handle, was_training = self._still.pop(module)
        handle.remove()
        module.training = self.model.training if was_training else False

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
            yield
        finally:
            for (module, key), weight in zip(places, bound, strict=True):
                module._parameters[key] = weight

    def release(self) -> None:
        """Take everything off: no attribute, no hook and no flag is left."""
        for module in list(self._still):
            self._wake(module)
        for handle in self._handles:
            handle.remove()
        self.model._parameters.pop(theta_key(""), None)
        for module in self.model.modules():
            for key in [key for key, value in module.__dict__.items() if isinstance(value, Carrier)]:
                del module.__dict__[key]
                module._parameters.pop(theta_key(key), None)
        for module in self._counting:
            module.__dict__.pop(_COUNT, None)
        for module, lists in self._lists.items():
            module.__dict__.update(lists)
        for name, binding in self.bindings.items():
            binding.weight.requires_grad_(self._required[name])
