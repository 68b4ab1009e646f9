"""Exponential moving averages whose memory grows with the run, and any width of them from two that were recorded.

Karras, Aittala, Lehtinen, Hellsten, Aila, Laine. *Analyzing and Improving the Training Dynamics of Diffusion Models.*
CVPR 2024, arXiv 2312.02696, section 3 and appendix C.

An average that follows the weights at steps u_1 < u_2 < … has after step u_m = t

    θ̂_t = Σ_i p_t(u_i) θ(u_i),    p_t(u_i) = (u_i^{γ+1} − u_{i−1}^{γ+1}) / t^{γ+1},    u_0 = 0:

the power function u^γ, integrated between updates. So one update multiplies by β = (u_{i−1} / u_i)^{γ+1}, which is the
paper's (1 − 1/t)^{γ+1} where all steps are followed. Here steps may be left out, and profiles stay exact.

Deviations from the paper: profiles are the sums over updates that were made, not integrals over time; their weights
are held to the sum of one; directions that are only rounding are left out.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Final

import numpy as np
import torch
from torch import Tensor

from tithe.errors import TitheError

WIDEST: Final = 0.28
"""The mean of a whole run, γ = 0, has 0.289."""

_BLOCK: Final = 1 << 14
"""Steps of all profiles that are in memory at a time."""

_TOLERANCE: Final = 1e-12
"""Of squared lengths of profiles of length one: what is shorter is rounding."""

_FARTHEST: Final = 0.1
"""Of its own length, how far a profile may be from the one that was asked for."""

Runs = tuple[tuple[int, int, int], ...]
"""Steps as ranges: first, last, stride."""


def exponent(width: float) -> float:
    """Return γ of a relative width, which is the profile's standard deviation as a share of the run.

        σ_rel = √(γ + 1) / ((γ + 2) √(γ + 3))

    Args:
        width: σ_rel, between 0 and 0.28.

    Raises:
        TitheError: when it is out of range.

    Example:
        >>> round(exponent(0.05), 2), round(exponent(0.10), 2)
        (16.97, 6.94)
    """
    if not 0 < width <= WIDEST:
        raise TitheError(
            "ema",
            found=f"a relative width of {width:g}",
            expected=f"above 0, at most {WIDEST}",
            remedy="use 0.05 to 0.10 for most runs",
        )
    inverse = width**-2
    return float(np.roots([1, 7, 16 - inverse, 12 - inverse]).real.max())


def followed(runs: Runs, step: int) -> Runs:
    """Return the steps with one more at the end.

    Example:
        >>> followed(followed(followed((), 10), 20), 30)
        ((10, 30, 10),)
    """
    if not runs:
        return ((step, step, 1),)
    first, last, stride = runs[-1]
    if first == last:
        return (*runs[:-1], (first, step, step - first))
    return (*runs[:-1], (first, step, stride)) if step - last == stride else (*runs, (step, step, 1))


def steps_between(runs: Runs, start: int, stop: int) -> tuple[int, np.ndarray]:
    """Return the last step before `start`, 0 where there is none, and those from `start` up to before `stop`, int64.

    Example:
        >>> steps_between(((10, 50, 10),), 20, 50)
        (10, array([20, 30, 40]))
    """
    before, found = 0, [np.arange(0)]
    for first, last, stride in runs:
        if first < start:
            before = min(last, first + (start - 1 - first) // stride * stride)
        begin = first + max(-(-(start - first) // stride), 0) * stride
        found.append(np.arange(begin, min(last + 1, stop), stride))
    return before, np.concatenate(found)


@dataclass(frozen=True)
class Profile:
    """How much of each step's weights an average holds.

    Args:
        width: relative.
        runs: the steps that were followed; the last is when the average was taken.
    """

    width: float
    runs: Runs

    @property
    def step(self) -> int:
        """Return the step after which the average was taken."""
        return self.runs[-1][1]

    def between(self, start: int, stop: int) -> tuple[np.ndarray, np.ndarray]:
        """Return the steps that were followed from `start` up to before `stop`, and p at each, float64."""
        before, steps = steps_between(self.runs, start, stop)
        power = exponent(self.width) + 1
        return steps, np.diff((steps / self.step) ** power, prepend=(before / self.step) ** power)


def products(profiles: Sequence[Profile]) -> Tensor:
    """Return the products of profiles with each other, Σ_u p_i(u) p_j(u): (n, n) float64."""
    total = torch.zeros(len(profiles), len(profiles), dtype=torch.float64)
    length = _BLOCK * min(stride for one in profiles for *_, stride in one.runs)
    for start in range(1, max(one.step for one in profiles) + 1, length):
        parts = [one.between(start, start + length) for one in profiles]
        grid = np.unique(np.concatenate([steps for steps, _ in parts]))
        block = np.zeros((len(profiles), len(grid)))
        for row, (steps, values) in zip(block, parts, strict=True):
            row[np.searchsorted(grid, steps)] = values
        total += torch.from_numpy(block @ block.T)
    return total


def reconstruct(profiles: Sequence[Profile], wanted: Profile) -> tuple[list[float], float]:
    """Return the weights under which some averages add up to another, and how far their profile is from its own.

        x = argmin |Σ_i x_i p_i − p|²  where Σ_i x_i = 1;    the distance is |Σ_i x_i p_i − p| / |p|

    Args:
        profiles: of the averages that there are.
        wanted: of the one that is asked for.

    Raises:
        TitheError: when the distance is above a tenth: the averages are too few, or too unlike it.

    Example:
        >>> own = [Profile(0.05, ((1, 50, 1),)), Profile(0.05, ((1, 100, 1),)), Profile(0.1, ((1, 100, 1),))]
        >>> weights, distance = reconstruct(own, own[1])
        >>> [abs(round(weight, 6)) for weight in weights], distance < 1e-6
        ([0.0, 1.0, 0.0], True)
    """
    gram = products([*profiles, wanted])
    lengths = gram.diagonal().sqrt()
    scaled = gram / lengths / lengths[:, None]
    inverse, sums = torch.linalg.pinv(scaled[:-1, :-1], rtol=_TOLERANCE, hermitian=True), 1 / lengths[:-1]
    free, along = inverse @ scaled[:-1, -1], inverse @ sums
    weights = free + along * (1 / lengths[-1] - sums @ free) / (sums @ along)
    both = torch.cat([weights, weights.new_tensor([-1.0])])
    distance = math.sqrt(max(float(both @ scaled @ both), 0.0))
    if distance > _FARTHEST:
        raise TitheError(
            f"ema:{wanted.width:g}",
            found=f"{len(profiles)} averages, whose best sum has a profile {distance:.0%} from it",
            expected=f"one within {_FARTHEST:.0%}",
            remedy="ask for a width nearer to those that were recorded, or record more often",
        )
    return (weights * lengths[-1] / lengths[:-1]).tolist(), distance
