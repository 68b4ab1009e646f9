"""Pruning by first-order Taylor scores while the network trains, in a few cuts; also from fresh weights.

P. Molchanov, A. Mallya, S. Tyree, I. Frosio, J. Kautz. *Importance Estimation for Neural Network Pruning.* CVPR 2019,
arXiv 1906.10771: the score, (Σ w ∂L/∂w)² of a gate on a unit's output, averaged over batches with momentum.

M. Zhu, S. Gupta. *To Prune, or Not to Prune.* 2017, arXiv 1710.01878, section 3: the cubic schedule.

Deviations from the papers: the gate lies where the unit is read, behind norm, activation and residual sum, and joins
all channels that exist together; the share is one of operations or parameters, and a unit is worth its score over the
root of its price; no layer gets much narrower than the others (`floor`); a unit goes from the weights, the gradients
and the optimizer's state, and not by a mask; training starts from fresh weights as well as from trained ones.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import get_args

from torch import Tensor

from tithe.budget import written_as_percent
from tithe.errors import TitheError
from tithe.method import Cost, CutMethod
from tithe.select import bernoulli_masks

_MOMENTUM = 0.95
"""Of the scores: they are those of the last few dozen steps, since early gradients tell little about late ones."""


@dataclass(frozen=True)
class TaylorPruning(CutMethod):
    """Train the whole network for a few steps, then cut it down in a few more, and train on what is left.

        a_i ← 0.95 a_i + 0.05 c_i²,   c_i = Σ_o W_oi ∂L/∂W_oi        over the weights that read unit i
        at a cut: the units of least a_i / √cost_i go, until Σ cost ≤ share · total

    No random draw and no second forward pass: a step is an ordinary one, of a network that gets smaller. The share
    falls by a cube, share(step) = keep + (1 − keep) (1 − (step − start) / (stop − start))³, at `cuts` equidistant steps
    after `start`, the last of which is `stop`; then the structure is fixed.

    Args:
        keep: the share of the cost that is kept in the end, in (0, 1].
        stop: step after which the last cut is made: a tenth of the run, and of fresh weights at least a hundred steps
            (`docs/taylor-pruning.md`).
        start: step from which on cuts are counted; the first comes (stop − start) / cuts steps later.
        cuts: how many there are.
        cost: what is counted. "flops", "params": the forward pass's operations, or the parameters, fixed parts
            included; "channels": each unit once.
        floor: no group of units gets below this part of the width that it would have if all were equally narrow, in
            [0, 1]; 1 leaves only the choice of units within each group.
        fresh: whether training starts from fresh weights. Then scores say how many units of each group go, and their
            gate gradients in the last 32 steps which: those that do what others do. Weights that lose inputs keep the
            norm with which they read. Of a network that is trained already both do harm.

    Raises:
        TitheError: when a value is out of range.

    Example:
        >>> method = TaylorPruning(keep=0.2, stop=50)
        >>> [round(method.share(step), 3) for step in (0, 9, 10, 20, 49, 50)]
        [1.0, 1.0, 0.61, 0.373, 0.206, 0.2]
    """

    keep: float
    stop: int
    start: int = 0
    cuts: int = 5
    cost: Cost = "flops"
    floor: float = 0.8
    fresh: bool = False

    def __post_init__(self) -> None:
        for name, value, low in (("keep", self.keep, 0.0), ("floor", self.floor, -1e-9)):
            if not (isinstance(value, (int, float)) and low < value <= 1):  # pyright: ignore[reportUnnecessaryIsInstance]
                raise TitheError(
                    "TaylorPruning",
                    found=f"{name}={value!r}",
                    expected="a number in " + ("(0, 1]" if name == "keep" else "[0, 1]"),
                    remedy=written_as_percent(name, value, f"change {name}"),
                )
        for name, value in (("start", self.start), ("stop", self.stop), ("cuts", self.cuts)):
            if type(value) is not int:
                raise TitheError(
                    "TaylorPruning",
                    found=f"{name}={value!r}",
                    expected="a whole number",
                    remedy="count steps: num_steps // 10" if name == "stop" else f"give {name} as a whole number",
                )
        if not 0 <= self.start < self.stop:
            raise TitheError(
                "TaylorPruning",
                found=f"start={self.start}, stop={self.stop}",
                expected="two counts of steps, the first smaller",
                remedy="stop after a tenth of all steps: stop = num_steps // 10",
            )
        if not 1 <= self.cuts <= self.stop - self.start:
            raise TitheError(
                "TaylorPruning",
                found=f"cuts={self.cuts} in {self.stop - self.start} steps",
                expected="at least one, and at most one a step",
                remedy="change cuts, start or stop",
            )
        if type(self.fresh) is not bool:
            raise TitheError(
                "TaylorPruning",
                found=f"fresh={self.fresh!r}",
                expected="True or False",
                remedy="fresh=True for weights that were just drawn, False for a network that is trained already",
            )
        if self.cost not in get_args(Cost):
            raise TitheError(
                "TaylorPruning",
                found=f"cost={self.cost!r}",
                expected="one of " + ", ".join(map(repr, get_args(Cost))),
                remedy="change cost",
            )

    def share(self, step: int) -> float:
        """Return the share that is kept after `step` finished steps: that of the last cut until then."""
        done = max(0, step - self.start) * self.cuts // (self.stop - self.start)
        return bernoulli_masks.ratio(min(done, self.cuts), self.keep, (0, self.cuts))

    def accumulate(self, scores: Tensor, gates: Tensor) -> Tensor:
        """Return the moving average of squared gate gradients."""
        return _MOMENTUM * scores + (1 - _MOMENTUM) * gates.square()

    def worth(self, scores: Tensor, prices: Tensor) -> Tensor:
        """Return scores over the root of prices: over the price itself, the widest layers become bottlenecks."""
        return scores / prices.sqrt()
