"""Picks: from scores to indices, exactly, with ties by index."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping

import torch
from torch import Tensor

from tithe.errors import TitheError


def largest(scores: Tensor, k: int) -> Tensor:
    """Positions of the k largest of 1-D `scores`, ascending; of equal scores the lower position wins.

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
    above = (scores > cut).nonzero().flatten()
    ties = (scores == cut).nonzero().flatten()[: k - above.numel()]
    return torch.cat([above, ties]).sort().values


def top_k(scores: Iterable[tuple[str, Tensor]], k: int) -> dict[str, Tensor]:
    """One exact global cut: the k largest scores of all tensors together; ties by order of tensor, then by index.

    Tensors are consumed one at a time and never hold more than k candidates, so scores may be streamed.

    Args:
        scores: names and scores of any shape, in the model's order.
        k: how many to take in all.

    Returns:
        Name → sorted flat int64 indices, for every name, possibly empty.

    Raises:
        TitheError: when a score is not finite.

    Example:
        >>> top_k([("a", torch.tensor([1.0, 5.0])), ("b", torch.tensor([5.0]))], 2)
        {'a': tensor([1]), 'b': tensor([0])}
    """
    names: list[str] = []
    starts = [0]
    values, places = torch.empty(0), torch.empty(0, dtype=torch.int64)
    for name, score in scores:
        flat = _finite(name, score)
        local = largest(flat, k)
        values = torch.cat([values.to(flat), flat[local]])
        places = torch.cat([places.to(local), local + starts[-1]])
        kept = largest(values, k)
        values, places = values[kept], places[kept]
        names.append(name)
        starts.append(starts[-1] + flat.numel())
    bounds = torch.searchsorted(places, torch.tensor(starts, device=places.device)).tolist()
    return {name: places[bounds[i] : bounds[i + 1]] - starts[i] for i, name in enumerate(names)}


def top_in_each(scores: Iterable[tuple[str, Tensor]], counts: Mapping[str, int]) -> dict[str, Tensor]:
    """The `counts[name]` largest scores of each tensor; ties by index."""
    return {name: largest(_finite(name, score), counts[name]) for name, score in scores}


def share(k: int, sizes: Mapping[str, int]) -> dict[str, int]:
    """Split k in proportion to `sizes` by largest remainder, ties by order; the shares add up to min(k, Σ sizes).

    Example:
        >>> share(3, {"a": 10, "b": 10})
        {'a': 2, 'b': 1}
    """
    total = sum(sizes.values())
    k = min(k, total)
    exact = {name: k * size for name, size in sizes.items()}
    shares = {name: value // total for name, value in exact.items()}
    by_remainder = sorted(sizes, key=lambda name: -(exact[name] % total))
    for name in by_remainder[: k - sum(shares.values())]:
        shares[name] += 1
    return shares


def _finite(name: str, score: Tensor) -> Tensor:
    flat = score.reshape(-1)
    if not bool(torch.isfinite(flat).all()):
        bad = math.prod(flat.shape) - int(torch.isfinite(flat).sum())
        raise TitheError(
            name,
            found=f"{bad} scores that are not finite",
            expected="finite scores",
            remedy="check the loss for NaN or overflow; score a float16 model in float32 or bfloat16",
        )
    return flat
