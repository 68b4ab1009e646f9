"""Texts as tensors: encoded once, padded to the longest of each batch."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, cast, final

import torch
from torch import Tensor

from tithe.app.train.recipe import Recipe
from tithe.app.train.rows import Batch, Table, Targets, Tokenizer
from tithe.app.train.tasks.base import Encoder, Rows, Task

IGNORED = -100
"""The label of a token that is not predicted; torch and transformers leave such out of a mean."""


class TextTask(Task):
    """A task whose inputs are texts."""

    def encoder(self, recipe: Recipe, tokenizer: Any, length: int) -> Encoder:
        """How rows become batches.

        Args:
            recipe: the run.
            tokenizer: a Hugging Face tokenizer with a token that pads.
            length: tokens of an input, at most.

        Raises:
            TitheError: the tokenizer lacks what the task needs.
        """
        return TextEncoder(tokenizer, length)


@final
@dataclass(frozen=True)
class TextEncoder(Encoder):
    """Makes batches of texts with a target for each.

    Args:
        tokenizer: a Hugging Face tokenizer.
        max_length: tokens that a text (or pair) is cut to.
    """

    tokenizer: Tokenizer
    max_length: int

    def encode(self, rows: Rows, targets: Targets) -> tuple[Sequence[Any], tuple[str, ...]]:
        """One mapping of token lists for each row, with its target."""
        assert isinstance(rows, Table)
        texts = [list(rows.text)] if rows.text_pair is None else [list(rows.text), list(rows.text_pair)]
        encoded = cast(Mapping[str, list[Any]], self.tokenizer(*texts, truncation=True, max_length=self.max_length))
        inputs = [dict(zip(encoded, row, strict=True)) for row in zip(*encoded.values(), strict=True)]
        full = [row for row, item in enumerate(inputs) if len(item["input_ids"]) >= self.max_length]
        return list(zip(inputs, targets, strict=True)), cut_note(self.tokenizer, texts, full, self.max_length)

    def join(self, items: Sequence[Any]) -> Batch:
        """Pad encoded rows to tensors (N, longest)."""
        inputs = dict(cast(Mapping[str, Tensor], self.tokenizer.pad([item for item, _ in items], return_tensors="pt")))
        return {"inputs": inputs, "labels": torch.stack([target for _, target in items])}

    def largest(self, items: Sequence[Any]) -> int:
        """Find the one of the most tokens."""
        return max(range(len(items)), key=lambda item: len(items[item][0]["input_ids"]))


def cut_note(tokenizer: Any, texts: Sequence[Sequence[Any]], full: Sequence[int], length: int) -> tuple[str, ...]:
    """Say how many of some texts are longer than they may be.

    Args:
        tokenizer: that encodes them.
        texts: the texts, and their pairs where they have any.
        full: the rows that may be longer, as they fill the length.
        length: in tokens.
    """
    if not full:
        return ()
    whole = tokenizer(*([column[row] for row in full] for column in texts), verbose=False)["input_ids"]
    longer = sum(len(tokens) > length for tokens in whole)
    total = len(texts[0])
    return (f"{longer} of {total} texts are longer than {length} tokens ([data] max_length): cut",) if longer else ()


def padded(rows: Sequence[Sequence[int]], value: int) -> Tensor:
    """Stack lists of numbers to an int64 tensor (N, longest), filled up on the right.

    Example:
        >>> padded([[1, 2], [3]], 0).tolist()
        [[1, 2], [3, 0]]
    """
    longest = max(map(len, rows))
    return torch.tensor([[*row, *[value] * (longest - len(row))] for row in rows], dtype=torch.int64)


def masks(rows: Sequence[Sequence[int]]) -> Tensor:
    """An attention mask (N, longest): one for each token, zero for padding."""
    return padded([[1] * len(row) for row in rows], 0)
