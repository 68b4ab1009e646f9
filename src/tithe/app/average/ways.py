"""The ways to average checkpoints, and what is known of each when it has been tried."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any, Final, Literal

from torch import Tensor

from tithe.app.train.terms import merit
from tithe.errors import TitheError

Granularity = Literal["model", "tensor"]

METHODS: Final[Mapping[str, str]] = {
    "best": "best single",
    "mean": "uniform mean",
    "ema": "EMA",
    "greedy": "greedy soup",
    "twa-t": "TWA-t",
    "twa-v": "TWA-v",
}
"""What `--method` may name, and what the table calls it."""

WITHOUT_DATA: Final = ("mean", "ema")


@dataclass(frozen=True, kw_only=True)
class Settings:
    """How ways are tried.

    Args:
        method: the way that is written: a key of `METHODS`, or "auto" for the best on the selection rows.
        decay: of EMA.
        like: the way that is written, where it is one that `History.weights` knows; it is tried besides the others.
        last: how many checkpoints the decay that it names covers.
        bits: of TWA's basis; None as the checkpoints are stored.
        granularity: of TWA's coefficients.
        epochs: TWA trains for.
        lr: of TWA's optimizer; None tries two.

    Raises:
        TitheError: when a setting is out of range.
    """

    method: str = "auto"
    decay: float = 0.9
    like: str | None = None
    last: int | None = None
    bits: int | None = None
    granularity: Granularity = "tensor"
    epochs: int = 5
    lr: float | None = None

    def __post_init__(self) -> None:
        for name, fine, expected in (
            ("method", self.method in ("auto", *METHODS), "auto, " + ", ".join(METHODS)),
            ("decay", 0 < self.decay < 1, "a number between 0 and 1"),
            ("bits", self.bits in (None, 8, 4, 1), "8, 4 or 1"),
            ("granularity", self.granularity in ("model", "tensor"), "model or tensor"),
            ("epochs", self.epochs >= 1, "at least 1"),
            ("lr", self.lr is None or self.lr > 0, "a positive number"),
        ):
            if not fine:
                raise TitheError(f"--{name}", found=str(getattr(self, name)), expected=expected, remedy="change it")
        if self.like is not None and self.method != "auto":
            raise TitheError(
                "--like", found=f"--method {self.method} beside it", expected="one of the two", remedy="leave out one"
            )
        if self.like is None and self.last is not None:
            raise TitheError(
                "--last",
                found="no --like",
                expected="one, for the average that is meant",
                remedy="add --like linear for the mean of the last ones, or cosine, sqrt, ema:0.08",
            )

    @property
    def written(self) -> str:
        """The way that is written: what `like` names or `method`, which may be "auto"."""
        return self.like or self.method


@dataclass(frozen=True, kw_only=True)
class Row:
    """What one way gave.

    Args:
        method: a key of `METHODS`, or a name that `History.weights` knows.
        selection: metric → value on the rows that everything is chosen by.
        test: the same on rows that nothing is chosen by; empty where there are none.
        detail: what was chosen, in a few words.
        seconds: taken.
        coefficients: how much of each checkpoint it is made of, (n,) float64: under "all", or by tensor.
    """

    method: str
    selection: Mapping[str, float]
    test: Mapping[str, float]
    detail: str
    seconds: float
    coefficients: Mapping[str, Tensor]

    @property
    def merit(self) -> float:
        """The first metric on the selection rows, as a number of which more is better."""
        return merit(*next(iter(self.selection.items())))

    @property
    def score(self) -> float:
        """What it is chosen by: the first metric."""
        return next(iter(self.selection.values()))


@dataclass(frozen=True, kw_only=True)
class Fixed:
    """An average by weights that look at no data.

    Args:
        checkpoints: that were averaged.
        method: "mean", "ema", "weights", or the name that `--like` gave.
        weights: one a checkpoint.
        output: the new file or folder.
        models: averaged besides the first model of the checkpoints.
        kept: what is the last checkpoint's.
        copied: files of the first one's folder.
        skipped: what does not count, or is not in the output → why.
    """

    checkpoints: tuple[str, ...]
    method: str
    weights: tuple[float, ...]
    output: str
    models: tuple[str, ...]
    kept: tuple[str, ...]
    copied: tuple[str, ...]
    skipped: Mapping[str, str]

    def as_dict(self) -> dict[str, Any]:
        """Plain data, ready for JSON."""
        return asdict(self)


@dataclass(frozen=True, kw_only=True)
class Comparison:
    """All ways, and the one that was written.

    Args:
        checkpoints: that were averaged.
        skipped: what does not count → why.
        rows: a row a way.
        written: the way whose result is at `output`.
        output: the new file or folder.
        splits: how many examples each part of the data has.
    """

    checkpoints: tuple[str, ...]
    skipped: Mapping[str, str]
    rows: tuple[Row, ...]
    written: str
    output: str
    splits: Mapping[str, int]

    @property
    def winner(self) -> Row:
        """The row of the way that was written."""
        return next(row for row in self.rows if row.method == self.written)

    def as_dict(self) -> dict[str, Any]:
        """Plain data, ready for JSON."""
        rows = [
            {**vars(row), "coefficients": {name: values.tolist() for name, values in row.coefficients.items()}}
            for row in self.rows
        ]
        return {**vars(self), "rows": rows}


def ema_weights(count: int, decay: float) -> list[float]:
    """The weights of an exponential moving average over checkpoints, begun at the first; they sum to one.

    Args:
        count: of checkpoints.
        decay: what is kept of the average at each further one.

    Example:
        >>> ema_weights(3, 0.5)
        [0.25, 0.25, 0.5]
    """
    weights = [(1 - decay) * decay ** (count - 1 - index) for index in range(count)]
    return [decay ** (count - 1), *weights[1:]]


def fixed_weights(method: str, count: int, *, decay: float) -> list[float]:
    """The weights of a way that looks at no data.

    Raises:
        TitheError: when the way needs data.
    """
    if method not in WITHOUT_DATA:
        raise TitheError(
            f"--method {method}",
            found="no recipe",
            expected="one, for the model and the data that this way looks at",
            remedy="add --recipe RECIPE.toml, or use --method mean, --method ema or --weights",
        )
    return ema_weights(count, decay) if method == "ema" else [1 / count] * count


def one_hot(index: int, count: int) -> Sequence[float]:
    """All of one checkpoint."""
    return [float(place == index) for place in range(count)]
