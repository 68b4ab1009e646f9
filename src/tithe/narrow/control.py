"""Foretell the difference of two losses from what earlier steps told of each unit: less of it is noise then.

    L_0 − L_1 ≈ cᵀ (m_0 − m_1),   c = β u

    u   what each unit is worth: a moving average of its gate gradients over the weight steps in which it was drawn; or,
        where weights have no gradient, the metric that probabilities started from, or else a running fit of the
        differences themselves
    β   one number: the regression of the differences on uᵀ (m_0 − m_1), each foretold before it was seen, and shrunk
        to 0 as far as chance alone explains it

Gate gradients know which units matter beside which, and are too small: removing a unit costs more than its slope tells.
β makes up for that, and switches off a forecast that is none.
"""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor

_DECAY = 0.98
"""What a step leaves of the averages before it: of 0.8 to 0.98 that which took most variance in `benchmarks.estimator`,
and off the differences of a network of 320 channels."""
_RATE = 0.3
"""Of a forecast's error, the part that the running fit takes over."""


class ControlVariate:
    """The vector c of the estimator, made of earlier steps alone: it is complete before the draws that it is used on.

    Args:
        num_units: n.
    """

    def __init__(self, num_units: int) -> None:
        self._sums = torch.zeros(num_units, dtype=torch.float64)
        self._counts = torch.zeros(num_units, dtype=torch.float64)
        self._moments = torch.zeros(4, dtype=torch.float64)  # Σ xy, Σ x², Σ y², Σ 1: x foretold, y seen

    @property
    def units(self) -> Tensor:
        """Return u, float64 (n,): 0 for a unit that was never drawn."""
        return torch.where(self._counts > 0, self._sums / self._counts.clamp(min=1e-12), 0)

    @property
    def scale(self) -> float:
        """Return β ≥ 0: Σ xy / Σ x², times max(0, 1 − (1 − r²) / ((N − 1) r²)), r the correlation over N steps."""
        xy, xx, yy, count = self._moments.tolist()
        if count <= 1 or not yy > 0 or not xy > 0:  # a forecast of the wrong sign is chance
            return 0.0
        explained = min(xy * xy / (xx * yy), 1.0)
        return xy / xx * max(0.0, 1 - (1 - explained) / ((count - 1) * explained))

    @property
    def vector(self) -> Tensor:
        """Return c = β u, float64 (n,)."""
        return self.scale * self.units

    def start(self, units: Tensor) -> None:
        """Let u be this, (n,), in whatever scale: β finds it."""
        self._sums, self._counts = units.double().clone(), torch.ones_like(self._counts)

    def see(self, mask_0: Tensor, mask_1: Tensor, difference: float) -> None:
        """Take a difference of losses into β; the draws of one and the same network tell nothing."""
        foretold = float(self.units @ (mask_0.double() - mask_1.double()))
        if not torch.equal(mask_0, mask_1):
            seen = [foretold * difference, foretold**2, difference**2, 1.0]
            self._moments.mul_(_DECAY).add_(torch.tensor(seen, dtype=torch.float64))

    def take(self, gates: Tensor, mask: Tensor) -> None:
        """Take a weight step's gate gradients into u.

        Args:
            gates: (n,), of the loss that the differences are of.
            mask: the drawn network that they are of, bool (n,).
        """
        sums = _DECAY * self._sums + (1 - _DECAY) * gates.double()
        self._sums = torch.where(mask, sums, self._sums)
        self._counts = torch.where(mask, _DECAY * self._counts + (1 - _DECAY), self._counts)

    def fit(self, mask_0: Tensor, mask_1: Tensor, difference: float) -> None:
        """Take a difference of losses into u, where there are no gate gradients: normalised least mean squares.

        u ← u + 0.3 (ΔL − uᵀ Δm) Δm / |Δm|²
        """
        apart = mask_0.double() - mask_1.double()
        if bool(apart.any()):
            u = self.units
            self._sums = u + _RATE * (difference - float(u @ apart)) * apart / float(apart @ apart)
            self._counts = torch.ones_like(self._counts)

    def shrink(self, alive: Tensor) -> None:
        """Follow units that have left for good; bool (n,) says which are alive."""
        self._sums, self._counts = self._sums[alive], self._counts[alive]

    def state(self) -> dict[str, Tensor]:
        """Return copies of what it is made of."""
        return {"sums": self._sums.clone(), "counts": self._counts.clone(), "moments": self._moments.clone()}

    def load(self, state: Mapping[str, Tensor]) -> None:
        """Take over the result of `state`, for as many units."""
        self._sums, self._counts = state["sums"].clone(), state["counts"].clone()
        self._moments = state["moments"].clone()
