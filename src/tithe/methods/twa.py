"""TWA: train the weights of an average of checkpoints.

Li, Huang, Tao, Wu, Huang. *Trainable Weight Averaging: Efficient Training by Optimizing Historical Solutions.*
ICLR 2023, openreview.net/forum?id=8wbnpOJY-f; extended to layers, held-out data and few bits, arXiv 2205.13104.

Deviations from the papers: the checkpoints are centred, and made orthonormal through the n × n matrix of their products
in float64, where the authors orthogonalise vectors of the network's length in float32, which a duplicate breaks; weight
decay is projected with the gradient; codes are packed, with a scale for each 256 weights.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import get_args

from tithe.averages import DECAYS, EMA, History
from tithe.errors import TitheError
from tithe.method import Granularity, SubspaceMethod


@dataclass(frozen=True)
class TWA(SubspaceMethod):
    """Train in the span of checkpoints, from their mean.

        w = w̄ + Σ_i β_i (w_i − w̄)

    With granularity "model" (ICLR 2023) θ is n coordinates in an orthonormal basis P of the span: SGD on them is SGD
    on all weights with the gradient P Pᵀ g. With "tensor" (the extension) each weight tensor has n coefficients of its
    own, on differences of unit length, for AdamW. Trained on the training data it is TWA-t, on data held out TWA-v.

    Args:
        history: a `History`, or the path or paths of one.
        bits: None as the history is stored; 8, 4 or 1 for a coded basis.
        granularity: "model" or "tensor".
        start: "mean", "last", or "best" by the scores told to `history.record`; or an average of `History.weights`:
            "linear", "cosine" and "sqrt", where such a decay of the learning rate would have led, "ema:0.08"; or the
            weight of each checkpoint, n numbers that sum to one within 0.001, of either sign.

    Raises:
        TitheError: when a setting is none of these.

    Example:
        >>> TWA("checkpoints", bits=8).granularity
        'model'
    """

    history: History | str | Path | Sequence[str | Path]
    bits: int | None = None
    granularity: Granularity = "model"
    start: str | Sequence[float] = "mean"

    def __post_init__(self) -> None:
        for name, value, choices in (
            ("bits", self.bits, (None, 8, 4, 1)),
            ("granularity", self.granularity, get_args(Granularity)),
        ):
            if value not in choices:
                raise TitheError(
                    "TWA",
                    found=f"{name}={value!r}",
                    expected="one of " + ", ".join(map(repr, choices)),
                    remedy=f"change {name}",
                )
        if not isinstance(self.start, str):
            weights = self.start if isinstance(self.start, Sequence) else [None]  # pyright: ignore[reportUnnecessaryIsInstance]
            if not all(isinstance(weight, (int, float)) for weight in weights):
                raise TitheError(
                    "TWA",
                    found=f"start={self.start!r}",
                    expected="a name, or a number for each checkpoint",
                    remedy='write start="mean", or a list of numbers that sum to one',
                )
            return
        if self.start not in ("mean", "last", "best", *DECAYS) and not self.start.startswith(EMA):
            raise TitheError(
                "TWA",
                found=f"start={self.start!r}",
                expected="one of 'mean', 'last', 'best', "
                + ", ".join(map(repr, DECAYS))
                + ", such as 'ema:0.08', or a weight for each checkpoint",
                remedy="change start",
            )
