"""The greedy soup: checkpoints from the best on, each kept where the mean does not get worse.

Wortsman et al. *Model soups: averaging weights of multiple fine-tuned models improves accuracy without increasing
inference time.* ICML 2022, recipe 1.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from tithe.app.average.bench import Bench


def greedy_soup(bench: Bench, scores: Sequence[float]) -> list[int]:
    """The checkpoints that are kept; the model has their mean and its statistics when this returns.

    Args:
        bench: the model, its data and the checkpoints.
        scores: of each checkpoint alone, on the selection rows.

    Returns:
        Their places, in the order in which they were taken.
    """
    order = sorted(range(len(scores)), key=lambda index: (-scores[index], index))
    rows = bench.rows.rows
    kept = [order[0]]
    mean = {name: _wide(rows.tensor(order[0], name)) for name in rows.forms}
    best = scores[order[0]]
    for index in order[1:]:
        size = len(kept) + 1
        trial = {name: _joined(value, rows.tensor(index, name), size) for name, value in mean.items()}
        bench.put(trial.__getitem__)
        bench.estimate()
        score = bench.merit()
        if score >= best:
            best, mean = score, trial
            kept.append(index)
    bench.put(mean.__getitem__)
    if len(kept) > 1:
        bench.estimate()
    return kept


def _wide(tensor: Tensor) -> Tensor:
    """A tensor in which a mean can run."""
    return tensor.to(torch.promote_types(tensor.dtype, torch.float32)) if _averaged(tensor) else tensor


def _joined(mean: Tensor, tensor: Tensor, size: int) -> Tensor:
    """The mean with one more, which makes it one of `size`."""
    return mean + (_wide(tensor) - mean) / size if _averaged(mean) else tensor


def _averaged(tensor: Tensor) -> bool:
    return tensor.is_floating_point() or tensor.is_complex()
