"""What may move: injective linear maps from a small vector θ into a weight tensor.

    w = b + S θ            ∇θ = Sᵀ ∇w

A selection knows shapes and indices. It never sees a module, an optimizer or a rank.
"""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from dataclasses import dataclass

import torch
from torch import Tensor

from tithe.errors import TitheError


class Selection(ABC):
    """An injective linear map S from θ into a weight of a fixed shape; `gather` is Sᵀ and `scatter_` is S."""

    shape: tuple[int, ...]

    @property
    @abstractmethod
    def size(self) -> int:
        """Number of values in θ."""

    @abstractmethod
    def gather(self, weight: Tensor) -> Tensor:
        """Sᵀ w: the selected values of `weight`, a new 1-D tensor of `size` values in the weight's dtype."""

    @abstractmethod
    def scatter_(self, weight: Tensor, values: Tensor) -> None:
        """Write `values` into `weight` in place; every other entry keeps its bits."""

    @abstractmethod
    def state(self) -> dict[str, Tensor]:
        """The tensors that rebuild this selection for its shape, ready for a file."""

    @property
    def num_weights(self) -> int:
        """Number of entries of the weight that the selection maps into."""
        return math.prod(self.shape)


@dataclass(frozen=True, eq=False)
class Coordinates(Selection):
    """Single entries of a weight, named by flat row-major index.

    Args:
        shape: the weight's shape.
        indices: int64, 1-D, strictly increasing, each in [0, prod(shape)).

    Raises:
        TitheError: when the indices are not int64, not 1-D, out of range, unsorted or repeated.

    Example:
        >>> picked = Coordinates((2, 3), torch.tensor([0, 4]))
        >>> picked.gather(torch.arange(6.0).reshape(2, 3))
        tensor([0., 4.])
    """

    shape: tuple[int, ...]
    indices: Tensor

    def __post_init__(self) -> None:
        object.__setattr__(self, "shape", tuple(int(n) for n in self.shape))
        idx = self.indices
        if idx.dtype != torch.int64 or idx.dim() != 1:
            raise TitheError(
                "Coordinates",
                found=f"indices of dtype {idx.dtype} and {idx.dim()} dimensions",
                expected="a 1-D int64 tensor",
                remedy="pass flat row-major indices, indices.flatten().long()",
            )
        if idx.numel() == 0:
            return
        low, high = int(idx[0]), int(idx[-1])
        if low < 0 or high >= self.num_weights:
            raise TitheError(
                "Coordinates",
                found=f"indices from {low} to {high}",
                expected=f"indices in [0, {self.num_weights}) for shape {self.shape}",
                remedy="use flat row-major indices into this weight",
            )
        if idx.numel() > 1 and not bool((idx[1:] > idx[:-1]).all()):
            raise TitheError(
                "Coordinates",
                found="unsorted or repeated indices",
                expected="strictly increasing indices",
                remedy="pass indices.unique()",
            )

    @classmethod
    def nothing(cls, shape: tuple[int, ...]) -> Coordinates:
        """The empty selection: the weight is frozen."""
        return cls(shape, torch.empty(0, dtype=torch.int64))

    @classmethod
    def everything(cls, shape: tuple[int, ...]) -> Coordinates:
        """Every entry: ordinary training."""
        return cls(shape, torch.arange(math.prod(shape)))

    @property
    def size(self) -> int:
        """Number of selected entries."""
        return self.indices.numel()

    @property
    def full(self) -> bool:
        """Whether every entry is selected."""
        return self.size == self.num_weights

    def gather(self, weight: Tensor) -> Tensor:
        """Sᵀ w: `weight.flatten()[indices]`, a copy."""
        flat = weight.reshape(-1)
        return flat.clone() if self.full else flat.index_select(0, self.indices.to(weight.device))

    def scatter_(self, weight: Tensor, values: Tensor) -> None:
        """Write `values` (1-D, `size`) at the selected entries of `weight`, in place."""
        with torch.no_grad():
            if self.full:
                weight.copy_(values.view(self.shape))
            elif weight.is_contiguous():
                weight.view(-1).index_copy_(0, self.indices.to(weight.device), values.to(weight.dtype))
            else:
                at = torch.unravel_index(self.indices.to(weight.device), self.shape)
                weight.index_put_(at, values.to(weight.dtype))

    def state(self) -> dict[str, Tensor]:
        """`{"indices": int64}`."""
        return {"indices": self.indices}

    def to(self, device: torch.device) -> Coordinates:
        """The same selection with its indices on `device`."""
        return self if self.indices.device == device else Coordinates(self.shape, self.indices.to(device))
