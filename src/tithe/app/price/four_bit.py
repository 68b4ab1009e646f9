"""Linear layers whose weights are stored in four bits, on shapes alone: what QLoRA's base takes.

A weight is half a byte an entry, and one float32 scale for each block of 64 (4.5 bits together), as bitsandbytes stores
NF4 without double quantisation. It is made whole in the dtype of the input for each product, forward and backward.

References:
    Dettmers, Pagnoni, Holtzman, Zettlemoyer: QLoRA: Efficient Finetuning of Quantized LLMs, 2023, section 3.
"""

from __future__ import annotations

from collections.abc import Collection
from typing import Any, final

import torch
from torch import Tensor, nn

from tithe.ledger import Blank

BLOCK = 64


class _Product(torch.autograd.Function):
    """`x Wᵀ` with a frozen W that is made from its codes when it is needed."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, codes: Tensor, scales: Tensor, shape: tuple[int, int]) -> Tensor:
        ctx.save_for_backward(codes, scales)
        ctx.shape = shape
        return nn.functional.linear(x, x.new_empty(shape))

    @staticmethod
    def backward(ctx: Any, *grads: Any) -> tuple[Tensor | None, ...]:
        (gy,) = grads
        return gy @ gy.new_empty(ctx.shape), None, None, None


@final
class FourBit(nn.Linear):
    """A linear layer with a weight of codes.

    Args:
        layer: without data; its bias stays.
    """

    def __init__(self, layer: nn.Linear) -> None:
        nn.Module.__init__(self)
        self.in_features, self.out_features = layer.in_features, layer.out_features
        weight = layer.weight.detach()
        codes = weight.new_empty((weight.numel() + 1) // 2, 1, dtype=torch.uint8)
        self.weight = nn.Parameter(codes, requires_grad=False)
        self.register_parameter("bias", layer._parameters["bias"])
        self.register_buffer("scales", weight.new_empty(-(-weight.numel() // BLOCK), dtype=torch.float32))

    def forward(self, input: Tensor) -> Tensor:
        """As a linear layer of the whole weight."""
        y: Tensor = _Product.apply(input, self.weight, self.scales, (self.out_features, self.in_features))
        return y if self._parameters["bias"] is None else y + self.bias


def store_in_four_bits(model: nn.Module, blank: Blank, *, but: Collection[str]) -> int:
    """Put `FourBit` in the place of the linear layers, some apart; returns how many.

    Args:
        model: made under `blank`, changed in place.
        blank: the shapes-only place of the model.
        but: paths of layers that stay.
    """
    found = [(path, layer) for path, layer in model.named_modules() if type(layer) is nn.Linear and path not in but]
    with blank:
        for path, layer in found:
            model.set_submodule(path, FourBit(layer))
    return len(found)
