"""Find the numbers by which a module states its own width, for its forward pass or its readers.

A tensor that gets narrower is not enough where a module counts channels, groups or heads itself. Each such number is
proportional to the length of one axis of one tensor, so that it is right at every width:

    number = number at full width · live positions / positions
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass

from torch import nn
from torch.nn.modules.batchnorm import _NormBase  # pyright: ignore[reportPrivateUsage]
from torch.nn.modules.conv import _ConvNd, _ConvTransposeNd  # pyright: ignore[reportPrivateUsage]

from tithe.coupling import Coupling

# Attribute → (tensor of the module, axis). The groups of a convolution live and die as wholes: all but one divide it.
_CONVOLUTION = {"out_channels": ("weight", 0), "in_channels": ("weight", 1)}
_GROUPED = {"out_channels": ("weight", 0), "in_channels": ("weight", 0), "groups": ("weight", 0)}
_TRANSPOSED = {"out_channels": ("weight", 1), "in_channels": ("weight", 0)}
_STORED_IN_OUT = {"nf": ("weight", 1), "nx": ("weight", 0)}  # transformers' Conv1D, a linear layer the other way round

OUTSIDE = (
    *("num_heads", "num_attention_heads", "n_head", "n_heads", "num_key_value_heads", "num_kv_heads", "n_kv_heads"),
    *("all_head_size", "split_size", "inner_dim", "embed_dim", "hidden_dim", "heads", "dim", "intermediate_size"),
)
"""Names under which modules keep widths of their submodules."""

_WORDS = (
    *(
        "head",
        "emb",
        "hidden",
        "dim",
        "width",
        "channel",
        "size",
        "feature",
        "plane",
        "inner",
        "inter",
        "unit",
        "model",
    ),
    *("ff", "group", "out"),
)
"""Words in the names of numbers that may be widths."""

_HEAD_SIZE = ("head_dim", "attention_head_size", "dim_head", "key_value_proj_dim", "d_head", "attention_head_dim")


@dataclass(frozen=True)
class Count:
    """A number of a module that follows the width of an axis.

    Args:
        path: of the module whose attribute it is.
        attribute: its name.
        full: its value at the coupling's widths.
        axis: index into `Coupling.axes`.
        length: positions of that axis.
    """

    path: str
    attribute: str
    full: int
    axis: int
    length: int

    def at(self, live: int) -> int:
        """Return the number when `live` positions of the axis exist."""
        return self.full * live // self.length


def find_counts(model: nn.Module, coupling: Coupling) -> list[Count]:
    """Return every number of a module of `model` that has to follow a width of the coupling.

    Args:
        model: at the widths that it was built with: what a number speaks of can no longer be told where a single group
            or head is left.
        coupling: of it.
    """
    found: list[Count] = []
    names = {id(tensor): name for name, tensor in [*model.named_parameters(), *model.named_buffers()]}
    for path, module in model.named_modules():
        for attribute, (key, axis) in _own(module).items():
            tensor = getattr(module, key, None)
            at = None if tensor is None else coupling.places.get(names.get(id(tensor), ""), {}).get(axis)
            if at is not None:
                found.append(Count(path, attribute, getattr(module, attribute), at, len(coupling.axes[at])))
        found += _of_submodules(path, module, OUTSIDE, coupling, names)
    return found


def other_counts(model: nn.Module, coupling: Coupling, known: Iterable[Count]) -> list[Count]:
    """Return numbers of further names that may speak of a width, by their value: of modules that are not torch's own.

    Args:
        model: as `find_counts`.
        coupling: of it.
        known: what is found by name.
    """
    found: list[Count] = []
    taken = {(count.path, count.attribute) for count in known}
    names = {id(tensor): name for name, tensor in [*model.named_parameters(), *model.named_buffers()]}
    for path, module in model.named_modules():
        if not type(module).__module__.startswith("torch.nn."):
            others = [name for name in vars(module) if (path, name) not in taken and _may_be_a_width(name)]
            found += _of_submodules(path, module, others, coupling, names, units=True)
    return found


def _may_be_a_width(name: str) -> bool:
    return name not in _HEAD_SIZE and any(word in name.lower() for word in _WORDS)


def _own(module: nn.Module) -> Mapping[str, tuple[str, int]]:
    """The counts of a layer's own tensors."""
    match module:
        case _ConvTransposeNd():
            return _TRANSPOSED if module.groups == 1 else _GROUPED
        case _ConvNd():
            return _CONVOLUTION if module.groups == 1 else _GROUPED
        case nn.Linear():
            return {"out_features": ("weight", 0), "in_features": ("weight", 1)}
        case _NormBase():
            return {"num_features": ("weight" if module.affine else "running_mean", 0)}
        case nn.GroupNorm():
            return {"num_channels": ("weight", 0), "num_groups": ("weight", 0)}
        case nn.Embedding():
            return {"embedding_dim": ("weight", 1)}
        case _ if type(module).__name__ == "Conv1D":  # told by name: it needs no import of transformers
            return {key: at for key, at in _STORED_IN_OUT.items() if key in vars(module)}
        case _:
            return {}


def _of_submodules(
    path: str,
    module: nn.Module,
    attributes: Iterable[str],
    coupling: Coupling,
    names: Mapping[int, str],
    *,
    units: bool = False,
) -> Iterator[Count]:
    """Counts of heads and hidden units, kept by the module around the layers that make them.

    Which axis such a number speaks of follows from its value: it is the axis's length or its number of heads, or those
    of one of its three equal parts (query, key and value from one product); with `units`, how many units it has, too.
    """
    own = {name: vars(module)[name] for name in attributes if type(vars(module).get(name)) is int}
    own = {name: value for name, value in own.items() if value > 1}
    if not own:
        return
    sizes = [vars(module)[name] for name in _HEAD_SIZE if type(vars(module).get(name)) is int]
    for attribute, value in own.items():
        for at in _made_inside(module, coupling, names):
            length = len(coupling.axes[at])
            fits = length in {value * part * size for part in (1, 3) for size in (1, *sizes)}
            if fits or (units and value == len(coupling.axes[at].unique())):
                yield Count(path, attribute, value, at, length)
                break


def _made_inside(module: nn.Module, coupling: Coupling, names: Mapping[int, str]) -> Iterator[int]:
    """The axes of the outputs of a module's direct submodules."""
    for child in module.children():
        weight = child._parameters.get("weight")
        if weight is not None and weight.dim() > 1:
            axis = 1 if type(child).__name__ == "Conv1D" else 0
            at = coupling.places.get(names.get(id(weight), ""), {}).get(axis)
            if at is not None:
                yield at
