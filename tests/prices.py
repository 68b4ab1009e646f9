"""What input channels cost and how large their gradients are, read off a stock model the slow and obvious way."""

from __future__ import annotations

import copy
from collections.abc import Iterable
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from models import Batch, Case
from oracles import gradients
from tithe import Channels

STRAIGHT = (nn.Conv1d, nn.Conv2d, nn.Conv3d)
TRANSPOSED = (nn.ConvTranspose1d, nn.ConvTranspose2d, nn.ConvTranspose3d)


@dataclass
class Price:
    """One layer: its channels, C'·D² weights each, and the values of one channel's input.

    Args:
        channels: all of them.
        module: the path of the layer.
        positions: values of one channel's input in the batch.
        num_samples: of the batch.
    """

    channels: Channels
    module: str
    positions: int
    num_samples: int

    @property
    def weights(self) -> int:
        return self.channels.num_weights // self.channels.num_channels

    @property
    def elements(self) -> float:
        return self.weights + self.positions / self.num_samples


def prices(model: nn.Module, case: Case, batch: Batch) -> dict[str, Price]:
    """By name of the weight; from what the layers' own forward passes see."""
    model = copy.deepcopy(model).eval()
    names = {id(p): name for name, p in model.named_parameters()}
    found: dict[str, Price] = {}
    size = len(next(iter(batch.values())))

    def see(path: str, module: nn.Module, x: Tensor) -> None:
        transposed = type(module).__name__ == "Conv1D" or isinstance(module, TRANSPOSED)
        groups = getattr(module, "groups", 1)
        shape = tuple(module.weight.shape)
        count = shape[0] if transposed else shape[1] * groups
        every = Channels(shape, torch.arange(count), groups=groups, transposed=transposed)
        axis = 1 if isinstance(module, (*STRAIGHT, *TRANSPOSED)) else -1
        name = names[id(module.weight)]
        before = found[name].positions if name in found else 0
        padding = getattr(module, "_reversed_padding_repeated_twice", None)
        if padding is not None and module.padding_mode != "zeros":
            x = nn.functional.pad(x, padding, mode=module.padding_mode)
        found[name] = Price(every, path, before + x.numel() // x.shape[axis], size)

    for path, module in model.named_modules():
        if isinstance(module, (nn.Linear, *STRAIGHT, *TRANSPOSED)) or type(module).__name__ == "Conv1D":
            module.register_forward_pre_hook(lambda m, args, path=path: see(path, m, args[0]))
    with torch.no_grad():
        case.loss(model, batch)
    return found


def norms(model: nn.Module, case: Case, batches: Iterable[Batch], priced: dict[str, Price]) -> dict[str, Tensor]:
    """Σ over batches of ‖∂L/∂W_c‖₂ by dense autograd in evaluation mode."""
    model = copy.deepcopy(model).eval()
    total = {name: torch.zeros(price.channels.num_channels, dtype=torch.float64) for name, price in priced.items()}
    for batch in batches:
        for name, grad in gradients(model, case.loss, batch).items():
            if name in priced:
                every = priced[name].channels
                total[name] += every.by_item(every.gather(grad)).double().norm(dim=1)
    return total


def rgn(model: nn.Module, case: Case, batches: list[Batch], priced: dict[str, Price]) -> dict[str, float]:
    """Σ_c ‖∂L/∂W_c‖₂ / (C'·D² + H·W)."""
    found = norms(model, case, batches, priced)
    return {name: float(value.sum()) / priced[name].elements for name, value in found.items()}
