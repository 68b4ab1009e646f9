"""VR-PGE: completely sparse training, the structure learned without back-propagation.

Zhou, Zhang, Chen, Diao, Zhang. *Efficient Neural Network Training via Forward and Backward Propagation
Sparsification.* NeurIPS 2021, arXiv 2111.05685.

Deviations from the paper: a channel that is not drawn is not computed, so that it emits nothing, where the authors'
masked channel still emits its norm's shift; channels that residuals, groups, concatenations or heads join share one
probability; each group keeps a channel; one of the two losses is the weight step's own, so that one further forward
pass is paid; weights that do not take part in a step keep their bits, momentum and weight decay included.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import get_args

from torch import Tensor

from tithe.budget import written_as_percent
from tithe.errors import TitheError
from tithe.method import Cost, Init, NarrowMethod, Weights
from tithe.select import bernoulli_masks


@dataclass(frozen=True)
class VRPGE(NarrowMethod):
    """Train a network that is narrow in every step: which channels exist is drawn, and the odds are learned.

        min over w, s ∈ [0, 1]ⁿ of  E L(w, m),  m_i ~ Bernoulli(s_i)        subject to  Σ cost_i s_i ≤ keep · total
        w: one ordinary step of the drawn network        s: g = (L_0 − L_1)/2 · (z_0 − z_1),  z = (m − s)/(s(1−s))^(1−α)

    What earlier steps foretell of L_0 − L_1 is taken out of the difference and put back as its mean, which leaves the
    estimate unbiased and less noisy (`tithe.select.policy_gradient`).

    Args:
        keep: the share of the cost that is kept on average, in (0, 1].
        structure_lr: Adam's learning rate for s where the weights' is at its highest; it follows their schedule, as
            far as a scheduler of torch.optim or `initial_lr` in the optimizer's groups tells.
        alpha: exponent of the preconditioner, in [0, 1]; ½ is the paper's.
        gradual: None, or the steps (start, stop) between which the share falls from 1 to `keep`, by a cube.
        cost: what is counted. "channels": each unit once, as in the paper. "flops", "params": the forward pass's
            operations, or the parameters, of the network of expected widths, fixed parts included.
        weights: "trained", or "frozen": until `plan.settle` the structure alone is learned, from two forward passes
            without a gradient, and of parameters only those of `head=`.
        init: "uniform": one probability for all units. "taylor", "wanda", "taylor+wanda": from a metric of each unit,
            over `data=` (`tithe.narrow.metrics`), the odds s / (1 − s) in proportion to a power of it.
        hold: for how many steps a draw is kept; the second loss is evaluated in the first of them alone.
        control_variate: whether earlier steps' forecast is used; without it the estimate is the paper's.

    Raises:
        TitheError: when a value is out of range.

    Example:
        >>> VRPGE(keep=0.2).share(0), VRPGE(keep=0.2, gradual=(10, 20)).share(0)
        (0.2, 1.0)
    """

    keep: float
    structure_lr: float = 12e-3
    alpha: float = 0.5
    gradual: tuple[int, int] | None = None
    cost: Cost = "channels"
    weights: Weights = "trained"
    init: Init = "uniform"
    hold: int = 1
    control_variate: bool = True

    def __post_init__(self) -> None:
        for name, value, low, high in (("keep", self.keep, 0.0, 1.0), ("alpha", self.alpha, -1e-9, 1.0)):
            if not low < value <= high:
                bounds = "(0, 1]" if name == "keep" else "[0, 1]"
                raise TitheError(
                    "VRPGE",
                    found=f"{name}={value}",
                    expected=f"a number in {bounds}",
                    remedy=written_as_percent(name, value, f"change {name}"),
                )
        if not self.structure_lr >= 0:
            raise TitheError(
                "VRPGE", found=f"structure_lr={self.structure_lr}", expected="at least 0", remedy="try 12e-3"
            )
        if self.gradual is not None and not 0 <= self.gradual[0] < self.gradual[1]:
            raise TitheError(
                "VRPGE",
                found=f"gradual={self.gradual}",
                expected="two counts of steps, the first smaller",
                remedy="the paper's: (0.16 T, 0.6 T) for T steps in all",
            )
        for name, kind in (("cost", Cost), ("weights", Weights), ("init", Init)):
            if getattr(self, name) not in get_args(kind):
                raise TitheError(
                    "VRPGE",
                    found=f"{name}={getattr(self, name)!r}",
                    expected="one of " + ", ".join(map(repr, get_args(kind))),
                    remedy=f"change {name}",
                )
        if type(self.hold) is not int or self.hold < 1:
            raise TitheError(
                "VRPGE",
                found=f"hold={self.hold!r}",
                expected="a whole number of steps, at least 1",
                remedy="try hold=1",
            )
        if type(self.control_variate) is not bool:
            raise TitheError(
                "VRPGE",
                found=f"control_variate={self.control_variate!r}",
                expected="True or False",
                remedy="leave control_variate out",
            )
        if self.gradual is not None and self.init != "uniform":
            raise TitheError(
                "VRPGE",
                found=f"gradual={self.gradual} and init={self.init!r}",
                expected="one of them: a share of 1 starts with every probability at 1, whatever the metric",
                remedy='leave gradual out, or init="uniform"',
            )

    def share(self, step: int) -> float:
        """Return the share that is kept after `step` finished steps."""
        return bernoulli_masks.ratio(step, self.keep, self.gradual)

    def gradient(self, s: Tensor, mask_0: Tensor, mask_1: Tensor, difference: float) -> Tensor:
        """Return the variance-reduced estimate of `tithe.select.policy_gradient`."""
        return bernoulli_masks.policy_gradient(s, mask_0, mask_1, difference, 0.0, self.alpha)

    def controlled_gradient(
        self, s: Tensor, mask_0: Tensor, mask_1: Tensor, difference: float, control: Tensor
    ) -> Tensor:
        """Return the same estimate with a control variate."""
        return bernoulli_masks.policy_gradient(s, mask_0, mask_1, difference, 0.0, self.alpha, control=control)
