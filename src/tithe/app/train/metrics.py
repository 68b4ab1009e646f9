"""How good answers are: the formulas behind the metrics of tasks."""

from __future__ import annotations

from collections.abc import Callable, Mapping

import torch
from torch import Tensor


def accuracy(answers: Tensor, targets: Tensor) -> float:
    """Share of equal entries of two (N,) tensors of classes.

    Example:
        >>> accuracy(torch.tensor([0, 1]), torch.tensor([0, 0]))
        0.5
    """
    return float((answers == targets).double().mean())


def f1(answers: Tensor, targets: Tensor) -> float:
    """F1 of class 1 where there are two classes, else the mean of F1 over the classes that occur.

    Example:
        >>> f1(torch.tensor([1, 1, 0]), torch.tensor([1, 0, 0])) == 2 / 3
        True
    """
    classes = torch.unique(torch.cat([answers, targets])).tolist()
    if max(classes, default=0) <= 1:
        classes = [1]
    scores: list[float] = []
    for label in classes:
        hits = int(((answers == label) & (targets == label)).sum())
        total = int((answers == label).sum()) + int((targets == label).sum())
        scores.append(2 * hits / total if total else 0.0)
    return sum(scores) / len(scores)


def matthews(answers: Tensor, targets: Tensor) -> float:
    """Matthews correlation of two (N,) tensors of classes; 0 where either is constant.

    Example:
        >>> matthews(torch.tensor([1, 0, 2]), torch.tensor([1, 0, 2]))
        1.0
    """
    num = int(torch.cat([answers, targets]).max()) + 1
    answers_NC = torch.nn.functional.one_hot(answers, num).double()
    targets_NC = torch.nn.functional.one_hot(targets, num).double()
    answers_NC, targets_NC = answers_NC - answers_NC.mean(0), targets_NC - targets_NC.mean(0)
    scale = (answers_NC.square().sum() * targets_NC.square().sum()).sqrt()
    return float((answers_NC * targets_NC).sum() / scale) if scale > 0 else 0.0


def pearson(answers: Tensor, targets: Tensor) -> float:
    """Linear correlation of two (N,) tensors of values; 0 where either is constant.

    Example:
        >>> round(pearson(torch.tensor([1.0, 2.0, 3.0]), torch.tensor([2.0, 4.0, 6.0])), 6)
        1.0
    """
    x, y = answers.double() - answers.double().mean(), targets.double() - targets.double().mean()
    scale = (x.square().sum() * y.square().sum()).sqrt()
    return float((x * y).sum() / scale) if scale > 0 else 0.0


def spearman(answers: Tensor, targets: Tensor) -> float:
    """Linear correlation of the ranks, equal values sharing their mean rank.

    Example:
        >>> round(spearman(torch.tensor([1.0, 2.0, 9.0]), torch.tensor([0.1, 0.2, 0.3])), 6)
        1.0
    """
    return pearson(_ranks(answers), _ranks(targets))


def _ranks(values: Tensor) -> Tensor:
    _, group, counts = torch.unique(values, return_inverse=True, return_counts=True)
    last = counts.cumsum(0).double()
    return (last - (counts.double() - 1) / 2)[group]


CLASSES: Mapping[str, Callable[[Tensor, Tensor], float]] = {"accuracy": accuracy, "f1": f1, "matthews": matthews}
"""Of (N,) tensors of classes: the answers, and what is right."""

VALUES: Mapping[str, Callable[[Tensor, Tensor], float]] = {"pearson": pearson, "spearman": spearman}
"""Of (N,) tensors of values."""


def micro_f1(hits: float, answered: float, right: float) -> float:
    """F1 of counts: those answered that are right, all that are answered, and all that are right.

    Example:
        >>> micro_f1(1, 2, 2)
        0.5
    """
    return 2 * hits / (answered + right) if answered + right else 0.0
