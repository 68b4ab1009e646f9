"""Pick indices by score, exactly, with ties by index."""

from __future__ import annotations

import itertools
import math
from collections.abc import Iterable, Mapping

import torch
from torch import Tensor

from tithe.errors import TitheError


def largest(scores: Tensor, k: int) -> Tensor:
    """Return the positions of the k largest of 1-D `scores`, ascending; the lower position wins a tie.

    Returns:
        int64, (min(k, n),).

    Example:
        >>> largest(torch.tensor([1.0, 3.0, 3.0, 3.0]), 2)
        tensor([1, 2])
    """
    if k >= scores.numel():
        return torch.arange(scores.numel(), device=scores.device)
    if k <= 0:
        return torch.empty(0, dtype=torch.int64, device=scores.device)
    cut = torch.topk(scores, k, sorted=False).values.min()
    taken = scores > cut
    ties = (scores == cut).nonzero().flatten()
    taken[ties[: k - int(taken.sum())]] = True
    return taken.nonzero().flatten()


def top_k(scores: Iterable[tuple[str, Tensor]], k: int, sizes: Mapping[str, int]) -> dict[str, Tensor]:
    """Make one exact global cut: the k largest scores of all tensors; ties by order in `sizes`, then by index.

    Tensors are consumed one at a time, in any order, and little more than k candidates are held.

    Args:
        scores: names and scores of any shape.
        k: how many to take in all.
        sizes: name → number of entries, in the model's order.

    Returns:
        Name → sorted flat int64 indices, for every name in `sizes`, possibly empty.

    Raises:
        TitheError: when a score is not finite.

    Example:
        >>> top_k([("a", torch.tensor([1.0, 5.0])), ("b", torch.tensor([5.0]))], 2, {"a": 2, "b": 1})
        {'a': tensor([1]), 'b': tensor([0])}
    """
    starts = dict(zip(sizes, itertools.accumulate(sizes.values(), initial=0), strict=False))
    values, places = torch.empty(0), torch.empty(0, dtype=torch.int64)
    least = -math.inf
    for name, score in scores:
        flat = check_finite(name, score).reshape(-1)
        local = (flat >= least).nonzero().flatten() if least > -math.inf else largest(flat, k)
        values = torch.cat([values.to(flat), flat[local]])
        places = torch.cat([places.to(local), local + starts[name]])
        if values.numel() > 2 * k:
            values, places = _cut(values, places, k)
            least = float(values.min())
    _, places = _cut(values, places, k)
    bounds = torch.searchsorted(places, torch.tensor([*starts.values(), sum(sizes.values())], device=places.device))
    ends = bounds.tolist()
    return {name: places[ends[i] : ends[i + 1]] - starts[name] for i, name in enumerate(sizes)}


def _cut(values: Tensor, places: Tensor, k: int) -> tuple[Tensor, Tensor]:
    """The k largest candidates in the order of their places."""
    places, order = places.sort()
    kept = largest(values[order], k)
    return values[order][kept], places[kept]


def top_in_each(scores: Iterable[tuple[str, Tensor]], counts: Mapping[str, int]) -> dict[str, Tensor]:
    """Return the `counts[name]` largest scores of each tensor; ties by index."""
    return {name: largest(check_finite(name, score).reshape(-1), counts[name]) for name, score in scores}


def top_columns(
    scores: Mapping[str, Tensor], weights: Mapping[str, int], k: int, parts: Mapping[str, int] | None = None
) -> dict[str, Tensor]:
    """Pick whole columns of at most k weights in all: the best of each matrix, then the best of the rest that fits.

    Without `parts` the columns of all matrices are ranked by score per weight. With them matrices are filled evenly:
    the j-th best column of a matrix, from 0, is ranked by j · weights / part. Ties go by order in `scores`, then by
    column. Nothing that is left out would fit beside what is picked.

    Args:
        scores: name → score of each column, (I,).
        weights: name → weights of a column.
        k: the most that may be picked, in weights.
        parts: name → a number in proportion to which matrices share k.

    Returns:
        Name → sorted columns, int64.

    Example:
        >>> scores = {"a": torch.tensor([1.0, 9.0, 6.0]), "b": torch.tensor([3.0, 2.0])}
        >>> top_columns(scores, {"a": 2, "b": 1}, 5)
        {'a': tensor([1, 2]), 'b': tensor([0])}
    """
    counts = [score.numel() for score in scores.values()]
    orders = {name: torch.sort(score.double().cpu(), descending=True, stable=True) for name, score in scores.items()}
    places = torch.cat([order.indices.argsort() for order in orders.values()])
    sizes = torch.tensor([weights[name] for name in scores]).repeat_interleave(torch.tensor(counts))
    if parts is None:
        worth = torch.cat([score.double().cpu() for score in scores.values()]) / sizes
    else:
        shares = torch.tensor([parts[name] for name in scores]).repeat_interleave(torch.tensor(counts))
        worth = -(places * sizes).double() / shares
    order = torch.sort(worth, descending=True, stable=True).indices
    best = places[order] == 0
    first = _that_fit(order[best], sizes, k)
    rest = _that_fit(order[~best], sizes, k - int(sizes[first].sum()))
    picked = torch.zeros(len(sizes), dtype=torch.bool)
    picked[torch.cat([first, rest])] = True
    return {name: part.nonzero().flatten() for name, part in zip(scores, picked.split(counts), strict=True)}


def _that_fit(order: Tensor, sizes: Tensor, limit: int) -> Tensor:
    """The items of `order` that are taken one by one, where what does not fit any more is passed over."""
    taken = [order[:0]]
    while order.numel():
        order = order[sizes[order] <= limit]
        count = int((sizes[order].cumsum(0) <= limit).sum())
        taken.append(order[:count])
        limit -= int(sizes[order[:count]].sum())
        order = order[count:]
    return torch.cat(taken)


def share(k: int, sizes: Mapping[str, int], most: Mapping[str, int] | None = None) -> dict[str, int]:
    """Split k in proportion to `sizes` by largest remainder, ties by order.

    Args:
        k: to split.
        sizes: name → weight of its part.
        most: name → the most that it can take, by default its size; what one cannot take goes to the others.

    Returns:
        Name → part; they add up to min(k, Σ most).

    Example:
        >>> share(3, {"a": 10, "b": 10})
        {'a': 2, 'b': 1}
        >>> share(9, {"a": 10, "b": 10}, {"a": 2, "b": 20})
        {'a': 2, 'b': 7}
    """
    most = sizes if most is None else most
    shares: dict[str, int] = {}
    left, k = dict(sizes), min(k, sum(most.values()))
    while left:
        part = _in_proportion(k, left)
        over = [name for name in left if part[name] > most[name]]
        for name in over or left.copy():
            shares[name] = min(part[name], most[name])
            k -= shares[name]
            del left[name]
    return {name: shares[name] for name in sizes}


def _in_proportion(k: int, sizes: Mapping[str, int]) -> dict[str, int]:
    total = sum(sizes.values())
    exact = {name: k * size for name, size in sizes.items()}
    shares = {name: value // max(total, 1) for name, value in exact.items()}
    by_remainder = sorted(sizes, key=lambda name: -(exact[name] % max(total, 1)))
    for name in by_remainder[: k - sum(shares.values())]:
        shares[name] += 1
    return shares


def check_finite(name: str, score: Tensor) -> Tensor:
    """Return scores as they are where all of them are finite.

    Raises:
        TitheError: naming the tensor of which some are not.
    """
    if not math.isfinite(float(score.sum(dtype=torch.float64))):  # needs nothing of the scores' size, isfinite does
        raise TitheError(
            name,
            found=f"{score.numel() - int(torch.isfinite(score).sum())} scores that are not finite",
            expected="finite scores",
            remedy="check the loss for NaN or overflow; score a float16 model in float32 or bfloat16",
        )
    return score


def under_budget(
    order: Tensor, weights: Tensor, kept: Tensor, unit: float, limit: float, capacity: int | None
) -> Tensor:
    """The items at the head of `order` that fit: they are taken one by one until the next would pass the limit.

        unit · Σ weights + Σ kept ≤ limit                        (capacity None)
        Σ weights ≤ capacity, unit · capacity + Σ kept ≤ limit       (a buffer is paid for as a whole)

    When not even the first fits, the first that does is taken alone.

    Args:
        order: items, int64 (n,).
        weights: of each item, int64 (n,).
        kept: other cost of each item, float64 (n,).
        unit: cost of one weight.
        limit: of the sum.
        capacity: weights that the buffer holds, or None for a buffer that is made to measure.

    Returns:
        The items taken, int64, in their order; empty when none fits.

    Example:
        >>> order, weights = torch.tensor([2, 0, 1]), torch.tensor([3, 4, 1])
        >>> under_budget(order, weights, torch.zeros(3).double(), 1.0, 5.0, None)
        tensor([2, 0])
    """
    count = length = 0
    # Few of very many fit, as a rule: the head of the order is looked at, and twice as much where all of it fits.
    while count == length < order.numel():
        length = min(max(2 * length, _HEAD), order.numel())
        taken, other = weights[order[:length]].cumsum(0), kept[order[:length]].cumsum(0)
        if capacity is None:
            fits = unit * taken + other <= limit
        else:
            fits = (taken <= capacity) & (unit * capacity + other <= limit)
        count = int(fits.sum())
    if count:
        return order[:count]
    taken, other = weights[order], kept[order]
    if capacity is None:
        alone = unit * taken + other <= limit
    else:
        alone = (taken <= capacity) & (unit * capacity + other <= limit)
    return order[alone.nonzero().flatten()[:1]]


_HEAD = 1 << 14
"""Items of an order that are looked at first."""
