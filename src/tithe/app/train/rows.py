"""What a run is made of: the rows of a split, and the batches that are made of them."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any, Protocol, TypedDict

from torch import Tensor

Targets = Sequence[Any] | Tensor
"""What each row is to give, as the task made it."""


class Batch(TypedDict):
    """`inputs`: the tokenizer's tensors by name, or images (N, C, H, W); `labels`: (N, …), as the task makes them."""

    inputs: dict[str, Tensor] | Tensor
    labels: Tensor


class Tokenizer(Protocol):
    """The part of a Hugging Face tokenizer that every task uses."""

    def __call__(self, *texts: Any, **settings: Any) -> Any:
        """Encode texts."""
        ...

    def pad(self, encoded: Any, **settings: Any) -> Any:
        """Pad encoded texts to one length."""
        ...


@dataclass(frozen=True)
class Table:
    """The columns of one split that a recipe asks for.

    Args:
        source: the file (or data set and split) to name in messages.
        text: what each row is about: a text, a tuple of words, or the messages of a chat, as the task reads them.
        text_pair: the second text of each row, or None.
        label: what each row is to give: a class, a number as a string, a tuple of classes, or a text; empty strings
            where the split has none.
        lines: the line each row starts on, from 1, or None where the format has no lines.
        labelled: whether the rows have labels.
        names: of all classes, in the data set's own order; empty where it has none.
        skipped: the rows that were left out, each with the reason.
        running: whether the rows are whole texts, of which a part can be held out by cutting them.
        places: where each row stands, where that is no line of one file.
    """

    source: str
    text: tuple[Any, ...]
    text_pair: tuple[str, ...] | None
    label: tuple[Any, ...]
    lines: tuple[int, ...] | None
    labelled: bool = True
    names: tuple[str, ...] = ()
    skipped: tuple[str, ...] = ()
    running: bool = False
    places: tuple[str, ...] = ()

    def place(self, row: int) -> str:
        """Say where a row stands, for a message."""
        return self.places[row] if self.places else place_of(self.source, self.lines, row)

    def take(self, rows: Sequence[int]) -> Table:
        """The same table with these rows only, in this order."""
        pair = self.text_pair
        return replace(
            self,
            text=tuple(self.text[row] for row in rows),
            text_pair=None if pair is None else tuple(pair[row] for row in rows),
            label=tuple(self.label[row] for row in rows),
            lines=None if self.lines is None else tuple(self.lines[row] for row in rows),
            places=tuple(self.places[row] for row in rows) if self.places else (),
        )


def place_of(source: str, lines: Sequence[int] | None, row: int) -> str:
    """Say where a row of a table stands, for a message."""
    return f"{source} line {lines[row]}" if lines is not None else f"{source} row {row + 1}"
