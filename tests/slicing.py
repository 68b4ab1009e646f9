"""What a narrow network must equal, written the slow way: a dense network of zeros, and a copy with smaller tensors."""

from __future__ import annotations

import copy

import torch
from torch import Tensor, nn

from tithe.coupling import Coupling


def draw(coupling: Coupling, seed: int) -> Tensor:
    """A mask in which each unit is there with probability one half, and one of each group at least."""
    generator = torch.Generator().manual_seed(seed)
    mask = torch.rand(coupling.num_units, generator=generator) < 0.5
    for group in coupling.groups:
        mask[group.start + seed % group.num_units] = True
    return mask


def zeroed(model: nn.Module, coupling: Coupling, mask: Tensor) -> nn.Module:
    """A copy in which every absent position of every tensor is 0 (of a running variance 1)."""
    model = copy.deepcopy(model)
    kept = coupling.kept(mask)
    tensors = {**dict(model.named_parameters()), **dict(model.named_buffers())}
    with torch.no_grad():
        for name, axes in coupling.places.items():
            for axis, index in axes.items():
                gone = torch.ones(tensors[name].shape[axis], dtype=torch.bool)
                gone[kept[index]] = False
                tensors[name].index_fill_(axis, gone.nonzero().flatten(), float(name.endswith("running_var")))
    return model


def sliced(model: nn.Module, coupling: Coupling, mask: Tensor) -> nn.Module:
    """A copy with the absent positions cut out, and the numbers that modules keep of their widths put right."""
    model = copy.deepcopy(model)
    kept = coupling.kept(mask)
    names = {id(tensor): name for name, tensor in [*model.named_parameters(), *model.named_buffers()]}
    narrow: dict[int, Tensor] = {}
    for module in model.modules():
        for tensors in (module._parameters, module._buffers):
            for key, tensor in tensors.items():
                if tensor is None or not (axes := coupling.places.get(names[id(tensor)])):
                    continue
                value = tensor.detach()
                for axis, index in axes.items():
                    value = value.index_select(axis, kept[index])
                made = nn.Parameter(value) if isinstance(tensor, nn.Parameter) else value
                tensors[key] = narrow.setdefault(id(tensor), made)
                if key == "weight":
                    _count(module, tensor, made)
    return model


def _count(module: nn.Module, before: Tensor, after: Tensor) -> None:
    if isinstance(module, nn.modules.conv._ConvNd) and module.groups > 1:
        module.groups = module.groups * after.shape[0] // before.shape[0]
    elif isinstance(module, nn.GroupNorm):
        module.num_groups = module.num_groups * after.shape[0] // before.shape[0]
        module.num_channels = after.shape[0]
    elif isinstance(module, nn.modules.batchnorm._NormBase):
        module.num_features = after.shape[0]
    elif type(module).__name__ == "Conv1D":
        module.nf = after.shape[1]


def settle_counts(model: nn.Module) -> nn.Module:
    """Numbers that an attention keeps of the widths of its layers."""
    for module in model.modules():
        match type(module).__name__:
            case "GPT2Attention":
                module.split_size = module.c_attn.nf // 3
            case _:
                pass
    return model
