"""FISH Mask: train the k weights with the most Fisher information.

Sung, Nair, Raffel. *Training Neural Networks with Fixed Sparse Masks.* NeurIPS 2021, arXiv 2111.09839.

Other scores than the paper's: "snr" and "saliency", known from pruning (`tithe.select.importance`), and "principal", of
Liu et al., *LIFT the Veil for the Truth*, ICML 2025, arXiv 2506.00772.

Deviations from the authors' code: scores are per-sample squares of whole batches instead of batches of one, taken in
evaluation mode; weights outside the mask are not touched by weight decay or momentum; nothing dense is kept.
"""

from __future__ import annotations

import math
import warnings
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from typing import Literal, get_args

from torch import Tensor

from tithe.budget import Budget, written_as_percent
from tithe.errors import TitheError, TitheWarning
from tithe.method import DATA_FREE, SelectionContext, SparseMethod
from tithe.schedule import Schedule
from tithe.select.topk import share, top_columns, top_in_each, top_k
from tithe.selection import Coordinates, Selection

Score = Literal["fisher", "gradient", "snr", "saliency", "magnitude", "random", "principal"]
Fisher = Literal["empirical", "true"]
Scope = Literal["global", "tensor"]
Unit = Literal["entry", "column"]


@dataclass(frozen=True)
class FISH(SparseMethod):
    """Train the k single weights with the largest score; the head is always trained and charged to the density.

        F_j = 1/N Σ_i (∂ log p(y_i | x_i) / ∂w_j)²        k = density · (all parameters) − (head parameters)
        principal: |W_r|, the part of a weight, taken as a matrix, of rank r = ⌈k / Σ (m + n)⌉

    Args:
        density: fraction of all parameters that is trained, head included, in (0, 1]. All are those of float16,
            bfloat16, float32 and float64, frozen ones too; codes of quantised weights and complex numbers do not count.
        k: number of weights trained besides the head. Exactly one of `density` and `k` is given.
        samples: N, how many samples the scores are taken over, all ranks together.
        fisher: "empirical" takes the given labels y_i; "true" the exact expectation over the model's own p(y | x_i).
            Under it the mean gradient is zero: it is for the score "fisher" alone.
        score: "fisher", of the gradients g also "gradient" (|mean g|), "snr" (|mean g| / √(mean g²)) and "saliency"
            (|w · mean g|); without data "magnitude" (|w|), "random" (uniform) and "principal" (|W_r|).
        scope: "global" is the paper's one cut over all tensors; "tensor" gives each tensor the same density, and under
            "principal" each matrix (m, n) its part of k in proportion to m + n.
        unit: "entry" chooses single weights; "column" whole input channels of linear layers and convolutions, by the
            sum of the score over their weights, at most k weights in all: the best column of each matrix, then by score
            per weight what fits. A layer keeps the chosen channels of its input alone for backward.
        warmup: steps that train the head alone before the choice is made.
        reselect: a Schedule for context again, or None for once.

    Raises:
        TitheError: when not exactly one of density and k is given, or a value is out of range.

    Example:
        >>> FISH(density=0.005).score
        'fisher'
    """

    density: float | None = None
    k: int | None = None
    samples: int = 1024
    fisher: Fisher = "empirical"
    score: Score = "fisher"
    scope: Scope = "global"
    warmup: int = 0
    reselect: Schedule | None = None
    unit: Unit = "entry"

    def __post_init__(self) -> None:
        if (self.density is None) == (self.k is None):
            raise TitheError(
                "FISH",
                found=f"density={self.density} and k={self.k}",
                expected="exactly one of them",
                remedy="write FISH(density=0.005) or FISH(k=10_000)",
            )
        if self.density is not None and not (isinstance(self.density, (int, float)) and 0 < self.density <= 1):  # pyright: ignore[reportUnnecessaryIsInstance]
            raise TitheError(
                "FISH",
                found=f"density={self.density!r}",
                expected="a fraction in (0, 1]",
                remedy=written_as_percent("density", self.density, "try density=0.005"),
            )
        for name, least in (("k", 1), ("samples", 1), ("warmup", 0)):
            value = getattr(self, name)
            if value is not None and (not isinstance(value, int) or value < least):
                raise TitheError(
                    "FISH",
                    found=f"{name}={value!r}",
                    expected=f"a whole number ≥ {least}",
                    remedy=f"write density={value!r} for a part of all parameters"
                    if name == "k" and isinstance(value, float) and 0 < value < 1
                    else f"write {name}={int(value)}"
                    if isinstance(value, float) and value.is_integer() and value >= least
                    else f"give {name} as a whole number",
                )
        for name, options in (("fisher", Fisher), ("score", Score), ("scope", Scope), ("unit", Unit)):
            if getattr(self, name) not in get_args(options):
                raise TitheError(
                    "FISH",
                    found=f"{name}={getattr(self, name)!r}",
                    expected="one of " + ", ".join(map(repr, get_args(options))),
                    remedy=f"change {name}",
                )
        if self.fisher == "true" and self.score not in ("fisher", *DATA_FREE):
            raise TitheError(
                "FISH",
                found=f'fisher="true" with score={self.score!r}',
                expected='fisher="empirical": over the model\'s own distribution the mean gradient is zero',
                remedy='leave fisher= out, or write score="fisher"',
            )
        if not isinstance(self.reselect, (Schedule, type(None))):  # pyright: ignore[reportUnnecessaryIsInstance]
            raise TitheError(
                "FISH",
                found=f"reselect={self.reselect!r}",
                expected="a Schedule or None",
                remedy='write reselect=tithe.every(1, "epochs")',
            )

    @property
    def needs_data(self) -> bool:
        """Return whether data are read: for the score, or for the layout of columns, which a batch tells."""
        return self._scores_data or self.unit == "column"

    @property
    def _scores_data(self) -> bool:
        return self.score not in DATA_FREE

    def num_selected(self, context: SelectionContext) -> int:
        """Return k for this model: density · (all parameters) − (head parameters).

        Raises:
            TitheError: when nothing is left after the head, more is asked for than there is, or not every matrix can
                have one column.
        """
        sizes, _ = self._sizes(context)
        available = sum(sizes.values())
        if self.k is not None:
            k = self.k
        else:
            k = Budget(fraction=self.density).of(context.num_parameters) - context.num_head
        if k <= 0:
            least = math.ceil((context.num_head + 1) / context.num_parameters * 1e6) / 1e6
            raise TitheError(
                "head",
                found=f"{context.num_head} head parameters against a budget of {k + context.num_head}",
                expected="a budget that leaves at least one weight besides the head",
                remedy=f"use density {least:g} or more, a smaller head, or k=",
            )
        if k > available:
            of = " in columns" if self.unit == "column" else " of matrices" if self.score == "principal" else ""
            raise TitheError(
                "where",
                found=f"{available} weights{of} to choose from",
                expected=f"at least k = {k}",
                remedy="use a lower density, or let where= match more parameters",
            )
        floor = 0 if self.unit == "entry" else sum(context.layers()[name].weights for name in sizes)
        if floor > k:
            least = math.ceil((context.num_head + floor) / context.num_parameters * 1e6) / 1e6
            raise TitheError(
                "FISH",
                found=f"k = {k} for {len(sizes)} matrices, of which one column each has {floor} weights together",
                expected="a budget for at least one column of each matrix",
                remedy=f"use density {least:g} or more, k={floor}, or name fewer matrices in where=",
            )
        return k

    def choose(self, context: SelectionContext) -> dict[str, Selection]:
        """Choose one selection for each tensor that has a score, empty ones included."""
        k = self.num_selected(context)
        first = ", or train the head first with warmup=" if context.num_head and not self.warmup else ""
        instead = f'{first}, or choose by score="magnitude"'
        sizes, parts = self._sizes(context)
        rank = max(1, -(-k // sum(parts.values())))
        samples, fisher = self.samples, self.fisher
        if self.unit == "column":
            sums = context.channel_scores(self.score, samples=samples, fisher=fisher, rank=rank, or_else=instead)
            return self._columns(context, sums, k, parts)
        scores = context.scores(self.score, samples=samples, fisher=fisher, rank=rank, or_else=instead)
        scored = list[int]()
        counted = _counting(scores, scored)
        picked = top_k(counted, k, sizes) if self.scope == "global" else top_in_each(counted, share(k, parts, sizes))
        if self._scores_data and sum(scored) < k < sum(sizes.values()):
            _warn_of_place(f"of {k} weights, {k - sum(scored)}", f"only {sum(scored)} have a score above zero")
        return {name: Coordinates(context.shapes[name], indices.cpu()) for name, indices in picked.items()}

    def _columns(
        self, context: SelectionContext, scores: Mapping[str, Tensor], k: int, parts: Mapping[str, int]
    ) -> dict[str, Selection]:
        layers = context.layers()
        scored = {name: scores[name] for name in parts}
        weights = {name: layers[name].weights for name in parts}
        picked = top_columns(scored, weights, k, parts if self.scope == "tensor" else None)
        idle = sum(int((scored[name].cpu()[columns] == 0).sum()) for name, columns in picked.items())
        count = sum(columns.numel() for columns in picked.values())
        if self._scores_data and idle and count < sum(score.numel() for score in scored.values()):
            _warn_of_place(f"of {count} columns, {idle}", "their score is zero")
        return {name: layers[name].select(columns) for name, columns in picked.items()}

    def _sizes(self, context: SelectionContext) -> tuple[dict[str, int], dict[str, int]]:
        """Entries of each tensor to choose from, and the numbers in proportion to which they share k."""
        names = context.layers() if self.unit == "column" else context.sizes
        sizes = {name: context.sizes[name] for name in names}
        if self.score != "principal":
            return sizes, sizes
        sides = {name: m + n for name, (m, n) in context.matrices.items() if name in sizes}
        return {name: sizes[name] for name in sides}, sides


def _warn_of_place(found: str, why: str) -> None:
    warnings.warn(
        f"FISH: {found} are chosen by their place alone: {why}. Use a lower density, or more samples.",
        TitheWarning,
        stacklevel=4,
    )


def _counting(scores: Iterable[tuple[str, Tensor]], found: list[int]) -> Iterator[tuple[str, Tensor]]:
    """The same scores; `found` gets the number of each tensor's that are not zero."""
    for name, score in scores:
        found.append(int(score.count_nonzero()))
        yield name, score
