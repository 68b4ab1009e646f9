"""A peer finds the same channels coupled: Torch-Pruning's dependency graph, for the networks that it can follow."""

from __future__ import annotations

import pytest
import torch
import torch_pruning
from torch import nn

from models import CASES
from narrow_networks import NETWORKS
from tithe.coupling import Coupling, couple


def _ours(coupling: Coupling, name: str, channel: int) -> set[tuple[str, int, int]]:
    """Every (tensor, axis, position) that is absent together with this output channel of a layer."""
    unit = int(coupling.axes[coupling.places[f"{name}.weight"][0]][channel])
    return {
        (tensor, axis, position)
        for tensor, axes in coupling.places.items()
        for axis, index in axes.items()
        for position in (coupling.axes[index] == unit).nonzero().flatten().tolist()
    }


def _theirs(graph: torch_pruning.DependencyGraph, layer: nn.Module, channel: int) -> set[tuple[str, int, int]]:
    """The same, as the peer's group says it: in units of layers, with a side for what comes in and what goes out."""
    names = {module: name for name, module in graph.model.named_modules()}
    found: set[tuple[str, int, int]] = set()
    prune = graph.get_pruner_of_module(layer).prune_out_channels
    for dependency, positions in graph.get_pruning_group(layer, prune, [channel]):
        module = dependency.layer
        if module not in names:  # an operation without weights
            continue
        tensors = ("weight", "bias", "running_mean", "running_var")
        every = {key for key in tensors if getattr(module, key, None) is not None}
        depthwise = isinstance(module, nn.Conv2d) and module.groups > 1
        goes_out = graph.is_out_channel_pruning_fn(dependency.pruning_fn) or depthwise or module.weight.dim() == 1
        keys, axis = (every, 0) if goes_out else ({"weight"}, 1)
        found |= {(f"{names[module]}.{key}", axis, position) for key in keys for position in positions}
    return found


@pytest.mark.parametrize("name", ["vgg", "residual", "dense", "resnet_bottleneck", "mobilenet_v2"])
def test_the_same_channels_are_coupled(name: str) -> None:
    torch.manual_seed(0)
    if name in NETWORKS:
        model, inputs = NETWORKS[name](), {"input" if name == "vgg" else "x": torch.randn(2, 3, 8, 8)}
    else:
        model, inputs = CASES[name].model(), {"pixel_values": CASES[name].batch(2)["x"]}
    coupling = couple(model, lambda: model(**inputs), dict(model.named_parameters()), samples=2)
    graph = torch_pruning.DependencyGraph().build_dependency(model.eval(), inputs)
    layers = dict(model.named_modules())
    for group in coupling.groups:
        tensor, axis = group.members[0]
        owner = tensor.rpartition(".")[0]
        assert axis == 0
        units = coupling.axes[coupling.places[tensor][0]].tolist()
        for unit in (group.start, group.stop - 1):
            channel = units.index(unit)
            assert _theirs(graph, layers[owner], channel) == _ours(coupling, owner, channel)
    assert coupling.num_units
