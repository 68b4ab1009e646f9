"""What a recipe may say of each task: the keys that it reads, its usual columns, its metrics."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field

_TABLE = frozenset({"text", "encoding", "max_length", "streaming"})
_CLASSES = frozenset({"label", "labels"})
_IMAGE = frozenset({"npz", "image_size", "channels", "mean", "std"})


@dataclass(frozen=True, kw_only=True)
class Terms:
    """What a recipe may say of one task.

    Args:
        keys: of `[data]`, those that this task reads and not every other does.
        metrics: that it can be scored by.
        usual: the metrics where a recipe names none; the first chooses the best checkpoint.
        columns: the usual names of columns, key of `[data]` → name.
        num_labels: whether the recipe may say how many outputs the model has.
        at_once: rows of a batch in evaluation, where the recipe does not say; 0 is as many as in training.
    """

    keys: frozenset[str]
    metrics: tuple[str, ...]
    usual: tuple[str, ...]
    columns: Mapping[str, str] = field(default_factory=dict[str, str])
    num_labels: bool = True
    at_once: int = 64


TERMS: Mapping[str, Terms] = {
    "text-classification": Terms(
        keys=_TABLE | _CLASSES | {"text_pair"},
        metrics=("accuracy", "f1", "matthews"),
        usual=("accuracy",),
        columns={"text": "text", "label": "label"},
    ),
    "text-regression": Terms(
        keys=_TABLE | {"label", "text_pair"},
        metrics=("pearson", "spearman"),
        usual=("pearson", "spearman"),
        columns={"text": "text", "label": "label"},
    ),
    "image-classification": Terms(
        keys=_IMAGE | _CLASSES,
        metrics=("accuracy", "f1", "matthews"),
        usual=("accuracy",),
        columns={"label": "label"},
    ),
    "causal-lm": Terms(
        keys=_TABLE | {"messages", "documents", "packing"},
        metrics=("perplexity", "loss"),
        usual=("perplexity", "loss"),
        columns={"text": "text"},
        num_labels=False,
        at_once=0,
    ),
    "token-classification": Terms(
        keys=_TABLE | _CLASSES,
        metrics=("f1", "accuracy"),
        usual=("f1", "accuracy"),
        columns={"text": "tokens", "label": "tags"},
    ),
    "multi-label": Terms(
        keys=_TABLE | _CLASSES | {"text_pair", "separator"},
        metrics=("f1", "exact_match"),
        usual=("f1", "exact_match"),
        columns={"text": "text", "label": "labels"},
    ),
    "seq2seq": Terms(
        keys=_TABLE | {"label", "max_target_length"},
        metrics=("loss", "exact_match"),
        usual=("loss", "exact_match"),
        columns={"text": "source", "label": "target"},
        num_labels=False,
        at_once=0,
    ),
}

KEYS = frozenset().union(*(terms.keys for terms in TERMS.values()))
"""The keys of `[data]` that not every task reads."""

METRICS = tuple(dict.fromkeys(metric for terms in TERMS.values() for metric in terms.metrics))

FALLING = frozenset({"perplexity", "loss"})
"""The metrics of which less is better."""


def merit(metric: str, value: float) -> float:
    """Turn the value of a metric into a number of which more is better.

    Example:
        >>> merit("accuracy", 0.5), merit("perplexity", 8.0)
        (0.5, -8.0)
    """
    return -value if metric in FALLING else value
