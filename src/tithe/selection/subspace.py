"""Select the span of some vectors around a start: θ holds one coefficient per vector, the same in every entry."""

from __future__ import annotations

from abc import ABC, abstractmethod
from dataclasses import dataclass

import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensor

from tithe.selection.base import Selection, beside


class Columns(ABC):
    """The entries of n vectors d_i that belong to one weight, and those of the start w̄; c entries each.

    They may be coded, on disk, or on other ranks: whoever asks gets products alone.
    """

    num_vectors: int

    @abstractmethod
    def project(self, gradient: Tensor) -> Tensor:
        """Return d_i · g for every i: (n,) float64, from (c,)."""

    @abstractmethod
    def compose(self, weights: Tensor) -> Tensor:
        """Return w̄ + Σ weights_i d_i: (c,), from (n,) float64."""


@dataclass(frozen=True, eq=False)
class Span(Selection):
    """A weight that moves in the span of n vectors; θ is the same n coefficients for every weight that shares them.

        w = w̄ + Dᵀ M (θ − θ̄)            ∇θ = Mᵀ D ∇w            D: (n, c), the vectors d_i as rows

    Where M makes the vectors orthonormal over all weights together, and θ̄ is where w̄ lies among them, θ is Pᵀ w with
    P = Dᵀ M, and a gradient step on θ is the step of w along P Pᵀ ∇w, weight decay included.

    Args:
        shape: the weight's shape.
        columns: the vectors.
        mix: M, (n, m) float64.
        origin: θ̄, (m,) float64.
        places: flat int64 indices of the c entries that move; None for all of them.
    """

    shape: tuple[int, ...]
    columns: Columns
    mix: Tensor
    origin: Tensor
    places: Tensor | None = None

    @property
    def items(self) -> Tensor:
        """Return the numbers of the coefficients."""
        return torch.arange(self.mix.shape[1])

    @property
    def theta_shape(self) -> tuple[int, ...]:
        """Return a shape with one value for each coefficient."""
        return (self.mix.shape[1],)

    @property
    def indices(self) -> Tensor:  # pyright: ignore[reportIncompatibleVariableOverride]
        """Return the sorted flat int64 indices of the entries that move."""
        return torch.arange(self.num_weights) if self.places is None else self.places

    @property
    def whole(self) -> bool:
        """Return True: every entry's gradient counts, so a rule cannot skip any."""
        return True

    def gather(self, weight: Tensor) -> Tensor:
        """Return Sᵀ w, (m,), in the dtype of the weight but at least float32; zeros for a tensor without data."""
        dtype = torch.promote_types(weight.dtype, torch.float32)
        if without_values(weight):
            return weight.new_zeros(self.theta_shape, dtype=dtype)
        flat = weight.detach().reshape(-1)
        flat = flat if self.places is None else flat.index_select(0, beside(self.places, weight))
        products = self.columns.project(flat)
        return (self.mix.to(products.device).T @ products).to(weight.device, dtype)

    def weights(self, values: Tensor) -> Tensor:
        """Return M (θ − θ̄), (n,) float64: the coefficient of each vector."""
        return self.mix @ (values.detach().to(self.mix) - self.origin)

    def scatter_(self, weight: Tensor, values: Tensor) -> None:
        """Write w̄ + Dᵀ M (θ − θ̄) into `weight`, computed from the start: rounding errors do not accumulate."""
        self.write_(weight, self.columns.compose(self.weights(values)))

    def write_(self, weight: Tensor, entries: Tensor) -> None:
        """Write the entries that move, (c,), into `weight`."""
        with torch.no_grad():
            if self.places is None:
                weight.copy_(entries.view(self.shape))
            else:
                at = torch.unravel_index(beside(self.places, weight), self.shape)
                weight.index_put_(at, entries.to(weight.device, weight.dtype))

    def by_item(self, values: Tensor) -> Tensor:
        """Return the coefficients as a column."""
        return values.view(-1, 1)

    def of_items(self, rows: Tensor) -> Tensor:
        """Return the column as a list of coefficients."""
        return rows.view(-1)

    def state(self) -> dict[str, Tensor]:
        """Return `{"mix": M, "origin": θ̄}`; the history stores the vectors."""
        return {"mix": self.mix, "origin": self.origin}

    def to(self, device: torch.device) -> Span:
        """Return the span itself: its few numbers stay on the CPU, and products go to where the weight is."""
        return self

    def take(self, items: Tensor) -> Span:
        """Return the span of some of the coefficients."""
        return Span(self.shape, self.columns, self.mix[:, items], self.origin[items], self.places)


def without_values(tensor: Tensor) -> bool:
    """Return whether a tensor has only a shape and no data."""
    return tensor.is_meta or isinstance(tensor, FakeTensor)
