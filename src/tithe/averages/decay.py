"""Weights of a run's checkpoints under which their average stands for a decay of the learning rate.

Tian et al. *WSM: Decay-Free Learning Rate Schedule via Checkpoint Merging for LLM Pre-training.* ICLR 2026,
arXiv 2507.17634, section 3.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from numbers import Integral
from typing import Final

from tithe.errors import TitheError

DECAYS: Final[Mapping[str, Callable[[float], float]]] = {
    "linear": lambda part: 1 - part,
    "cosine": lambda part: 0.5 * (1 + math.cos(math.pi * part)),
    "sqrt": lambda part: 1 - math.sqrt(part),
}
"""What is left of the learning rate after a part of the decay: from 1 at 0 down to 0 at 1."""

EMA: Final = "ema:"
_WIDTH: Final = "'ema:' and a relative width, such as 'ema:0.08'"


def decay_weights(decay: str, count: int, *, last: int | None = None) -> list[float]:
    """Return the weights of checkpoints whose average is the end of a decayed run.

    Let a run at a constant rate have checkpoints θ_0 … θ_k, and Δ_i = θ_{i−1} − θ_i be what its updates took off
    between two of them. Weights c_j that sum to one give

        Σ_j c_j θ_j = θ_0 − Σ_i w_i Δ_i,    w_i = Σ_{j ≥ i} c_j,

    so the average is where the same updates lead when those before θ_i are scaled by w_i. Any decay w is reached by

        c_j = w_j − w_{j+1},    w_j = f(j / (k + 1)),    j = 0 … k,

    with f from 1 down to 0, hence c_0 = 1 − w_1 and c_k = w_k. The decay begins at θ_0, and would be at zero one
    checkpoint after θ_k. "linear", f(x) = 1 − x, is the uniform mean of the k + 1; "cosine" is
    f(x) = ½ (1 + cos πx); "sqrt" is f(x) = 1 − √x. All c_j are positive.

    The identity is about updates that were made: a decayed run would have made others, at other weights. Checkpoints
    count as evenly spaced, whatever their steps are.

    Args:
        decay: "linear", "cosine" or "sqrt".
        count: of checkpoints, oldest first.
        last: how many of them the decay covers, from the end; those before weigh nothing. None for all.

    Returns:
        One weight a checkpoint, in sum 1.

    Raises:
        TitheError: when there is no such decay, `last` is no whole number, or there are fewer checkpoints than it.

    Example:
        >>> [round(weight, 3) for weight in decay_weights("cosine", 5, last=4)]
        [0.0, 0.146, 0.354, 0.354, 0.146]
    """
    if decay not in DECAYS:
        raise _unknown(decay)
    if last is not None and not isinstance(last, Integral):
        raise TitheError(
            "average",
            found=f"last={last!r}",
            expected="a whole number of checkpoints, or None",
            remedy="write last=round(…) where it is a share of them",
        )
    n = count if last is None else last
    if not 1 <= n <= count:
        raise TitheError(
            "average",
            found=f"{count} checkpoints",
            expected=f"{n} or more, since the last {n} count" if n > 0 else "a number of checkpoints from 1 on",
            remedy="lower last, or record more checkpoints",
        )
    left = [DECAYS[decay](j / n) for j in range(n + 1)]
    return [0.0] * (count - n) + [left[j] - left[j + 1] for j in range(n)]


def ema_width(like: str) -> float | None:
    """Return the relative width that "ema:0.08" names; None of a decay.

    Raises:
        TitheError: when it is neither.

    Example:
        >>> ema_width("ema:0.08"), ema_width("cosine")
        (0.08, None)
    """
    if like in DECAYS:
        return None
    if not isinstance(like, str) or not like.startswith(EMA):  # pyright: ignore
        raise _unknown(like, _WIDTH)
    try:
        return float(like.removeprefix(EMA))
    except ValueError:
        raise _unknown(like, _WIDTH) from None


def _unknown(like: str, *others: str) -> TitheError:
    known = ", ".join([*map(repr, DECAYS), *others])
    return TitheError("average", found=f"like={like!r}", expected=known, remedy="choose one of them")
