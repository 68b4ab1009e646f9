"""Follows a model that is changed under its plan: what can be followed is, the rest is refused before the next step.

another Parameter of the same shape (`assign=True`, a fresh `nn.Parameter`)     becomes the weight; what differs moved
values written into a weight or into θ (`copy_`, `.data`, an average's swap)     the other one takes them over
a model converted to half precision (`model.bfloat16()`)                         θ is its master; a head is refused
`requires_grad_` on a frozen weight                                              set back, with one warning
a module replaced, a weight resized, parametrised, tied or untied                refused
"""

from __future__ import annotations

import sys
import warnings
import weakref
from collections.abc import Iterator, Mapping, MutableMapping, Sequence
from typing import Any, NamedTuple, NoReturn

import torch
from torch import nn
from torch.nn.utils.stateless import _functional_call  # pyright: ignore[reportPrivateUsage]
from torch.utils._python_dispatch import _get_current_dispatch_mode  # pyright: ignore[reportPrivateUsage]

from tithe import distributed
from tithe.errors import TitheError, TitheWarning
from tithe.rules import Binding, Carrier, SharedTheta


class Place(NamedTuple):
    """Where a module holds a weight.

    Args:
        owner: the module.
        key: of the parameter on it.
        name: the parameter's name in the model, spelled by way of this module.
        binding: of the weight, or None for one that is trained whole.
    """

    owner: nn.Module
    key: str
    name: str
    binding: Binding | None


class Followed:
    """The places of a model's weights, and the modules on the way to them.

    An object that a deep copy of the model copies too: the copy follows its own weights.

    Args:
        model: the model.
        places: where its weights are.
        head: name → parameter trained whole; a replaced one is written here.
    """

    def __init__(self, model: nn.Module, places: Sequence[Place], head: MutableMapping[str, nn.Parameter]) -> None:
        self.model, self.places, self.head = model, list(places), head
        self.bindings = list({id(p.binding): p.binding for p in places if p.binding is not None}.values())
        self._dtypes = {name: parameter.dtype for name, parameter in head.items()}
        self.replaced = False
        """Whether a head parameter became another one, which an optimizer made before does not hold."""
        self.paused = False
        """Whether forward passes go by unseen, while the weights stand for others."""
        self._warned = False
        owners = {place.owner for place in places}
        self._links = _links(model, owners)

    def __call__(self, module: nn.Module, args: Any) -> None:
        """Before the root's forward."""
        if not (self.paused or torch.compiler.is_compiling()):
            self.follow()

    def follow(self) -> None:
        """Compare the model with what it was.

        Raises:
            TitheError: naming the module or weight that was changed in a way that cannot be followed.
        """
        if not self.check():
            return
        if _get_current_dispatch_mode() is not None:  # on shapes alone, or while bytes are counted
            return
        for binding in self.bindings:
            binding.settle()

    def check(self) -> bool:
        """Compare modules, parameters and flags, but no values; returns whether they are the model's own.

        They are not inside `torch.func.functional_call`, which puts other values in their place for one call.

        Raises:
            TitheError: as `follow`.
        """
        if self._called_with_others():
            return False
        for parent, name, child, path in self._links:
            if parent._modules.get(name) is not child:
                found = parent._modules.get(name)
                _refuse(path, f"another module, a {type(found).__name__}", "the one that was there when attaching")
        first: dict[int, nn.Parameter] = {}
        for place in self.places:
            parameter = self._parameter(place)
            if place.binding is not None and first.setdefault(id(place.binding), parameter) is not parameter:
                _refuse(place.name, "a Parameter of its own", f"that of {place.binding.name}, to which it was tied")
        for place in self.places:
            self._take_over(place)
        for binding in self.bindings:
            self._check_flag(binding)
            self._check_sizes(binding)
        self._check_thetas()
        return True

    def _called_with_others(self) -> bool:
        places = [(p.owner, p.key, self.head[p.name] if p.binding is None else p.binding.weight) for p in self.places]
        if all(owner._parameters.get(key) is parameter for owner, key, parameter in [*places, *self._thetas()]):
            return False
        frame = sys._getframe()
        while frame is not None and frame.f_code is not _functional_call.__code__:
            frame = frame.f_back
        return frame is not None

    def _thetas(self) -> Iterator[tuple[nn.Module, str, nn.Parameter]]:
        """Where each θ is registered."""
        for binding in self.bindings:
            if binding.selection.size and binding.home is not None:
                yield *binding.home, binding.parameter

    def _parameter(self, place: Place) -> nn.Parameter:
        """The parameter that is there now; one that was assigned from the shadowing attribute is what it stood for."""
        parameter = place.owner._parameters.get(place.key)
        if isinstance(parameter, Carrier):
            parameter = place.owner._parameters[place.key] = parameter.binding.weight
        if parameter is None:
            _refuse(place.name, "no parameter of that name", "the one that was there when attaching")
        return parameter

    def _take_over(self, place: Place) -> None:
        parameter = place.owner._parameters[place.key]
        assert parameter is not None
        before = self.head[place.name] if place.binding is None else place.binding.weight
        if parameter is not before:
            for other in self.places:
                if other.binding not in (None, place.binding) and other.binding.weight is parameter:
                    _refuse(place.name, f"the Parameter of {other.name}", "its own, as when attaching")
            distributed.check_whole(self.model, wrapped=True)
            same = (tuple(parameter.shape), parameter.dtype, parameter.device)
            expected = (tuple(before.shape), before.dtype, before.device)
            if same != expected:
                _refuse(place.name, " ".join(map(str, same)), " ".join(map(str, expected)))
            if place.binding is None:
                parameter.requires_grad_(True)
                self.head[place.name] = parameter
                self.replaced = True
            else:
                parameter.requires_grad_(False)
                place.binding.replace(parameter)
        if place.binding is None:
            if parameter.dtype != self._dtypes[place.name] and parameter.dtype in (torch.float16, torch.bfloat16):
                _refuse(place.name, f"{parameter.dtype}, without a master copy", str(self._dtypes[place.name]))
            return
        carrier = place.owner.__dict__.get(place.key)
        moved = isinstance(carrier, Carrier) and carrier.memory != place.binding.weight.untyped_storage()._cdata
        if moved:
            place.binding.follow()
        if moved or not isinstance(carrier, Carrier) or parameter is not before:
            place.owner.__dict__[place.key] = Carrier(place.binding, place.owner, place.key)
            if isinstance(place.owner, nn.RNNBase):
                list_carriers(place.owner)

    def _check_sizes(self, binding: Binding) -> None:
        """A wrapper that shards may leave nothing of a weight or of θ behind."""
        shape, size = tuple(binding.weight.shape), binding.selection.size
        short = not isinstance(binding.common, SharedTheta) and binding.parameter.numel() < size
        if short or shape != binding.selection.shape:
            distributed.check_whole(self.model, wrapped=True)
            theta = f" and a θ of {binding.parameter.numel()} values" if short else ""
            _refuse(binding.name, f"shape {list(shape)}{theta}", f"{list(binding.selection.shape)} and {size} values")

    def _check_flag(self, binding: Binding) -> None:
        weight = binding.weight
        if not weight.requires_grad or binding.probe is not None:  # scores may ask for gradients of the weight itself
            return
        weight.requires_grad_(False)
        weight.grad = None
        if not self._warned:
            self._warned = True
            warnings.warn(
                f"{binding.name} and perhaps other weights were set to require a gradient while a plan is attached;"
                " they stay frozen but for what is selected. To train weights whole, name them in head= of attach",
                TitheWarning,
                stacklevel=4,
            )

    def _check_thetas(self) -> None:
        """θ is the parameter that an optimizer holds: no other one may take its place."""
        for owner, key, theta in self._thetas():
            if owner._parameters.get(key, theta) is not theta:
                name = next((b.name for b in self.bindings if b.parameter is theta), "theta")
                _refuse(name, "another Parameter in the place of θ", "the one that plan.parameters() gives")


def _links(model: nn.Module, owners: set[nn.Module]) -> list[tuple[nn.Module, str, nn.Module, str]]:
    """Parent, name, child and path of every module that leads to an owner or is one."""
    leads: dict[nn.Module, bool] = {}

    def to_owner(module: nn.Module) -> bool:
        if module not in leads:
            leads[module] = module in owners  # a module inside itself leads nowhere else
            below = [to_owner(child) for child in module._modules.values() if child is not None]
            leads[module] = leads[module] or any(below)
        return leads[module]

    return [
        (parent, name, child, f"{path}.{name}".lstrip("."))
        for path, parent in model.named_modules()
        for name, child in parent._modules.items()
        if child is not None and to_owner(child)
    ]


def list_carriers(module: nn.RNNBase) -> None:
    """Put what the module's attributes show into the list that a recurrent module reads its weights from."""
    shown = [getattr(module, key) for key in module._flat_weights_names]  # pyright: ignore
    module.__dict__.update(_flat_weights=shown, _flat_weight_refs=[weakref.ref(weight) for weight in shown])


def _refuse(name: str, found: str, expected: str) -> NoReturn:
    raise TitheError(
        name,
        found=f"{found}, since the plan was attached",
        expected=expected,
        remedy="call plan.release(), change the model, and attach again",
    )


Held = Mapping[str, tuple[nn.Module, str, nn.Parameter]]


def held_parameters(model: nn.Module) -> Held:
    """Return where each parameter of a model is: name → module, key, parameter."""
    return {
        f"{path}.{key}".lstrip("."): (module, key, parameter)
        for path, module in model.named_modules()
        for key, parameter in module._parameters.items()
        if parameter is not None
    }


def check_same(held: Held) -> None:
    """Check that modules hold the parameters that they held.

    Raises:
        TitheError: naming the first that does not.
    """
    for name, (owner, key, parameter) in held.items():
        if owner._parameters.get(key) is not parameter:
            _refuse(name, "another Parameter", "the one that was there when attaching")
