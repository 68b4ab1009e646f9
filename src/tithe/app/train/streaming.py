"""Data sets that are read while training goes on: nothing but the rows of a few steps is ever in memory."""

from __future__ import annotations

import hashlib
import itertools
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any, final

from tithe.app.train.hub import class_names, load_split, streaming
from tithe.app.train.recipe import Recipe
from tithe.app.train.rows import Batch, Table
from tithe.app.train.tables import check_columns, table_of
from tithe.app.train.tasks import task_of
from tithe.app.train.tasks.base import Encoder
from tithe.errors import TitheError

_BUFFER = 1000
"""Rows that are shuffled together, where the recipe does not say."""

_AT_ONCE = 256
"""Rows that are encoded, and packed, together."""


@dataclass(frozen=True)
class Stream:
    """The training split of a data set, of which rows are read when they are needed.

    Args:
        recipe: names it.
        data: the `datasets.IterableDataset`.
        names: of the classes, where the data set has them.
    """

    recipe: Recipe
    data: Any
    names: tuple[str, ...]

    @property
    def label(self) -> tuple[Any, ...]:
        """Nothing is known of labels before they are read."""
        return ()

    @property
    def _buffer(self) -> int:
        told = self.recipe.data.shuffle_buffer
        return _BUFFER if told is None else told

    def fingerprint(self) -> str:
        """A digest of what is read, as far as it can be known without reading it."""
        data = self.recipe.data
        told = f"{data.dataset}\0{data.config}\0{data.train}\0{self._buffer}\0{sorted(self.data.column_names)}"
        return hashlib.sha256(told.encode()).hexdigest()

    def tables(self) -> Iterator[Table]:
        """The rows, shuffled within a buffer, pass after pass without an end.

        Raises:
            TitheError: a row cannot be used; it names the row of the shuffled stream.
        """
        recipe = self.recipe
        columns = [name for name in task_of(recipe).columns(recipe.data).values() if name in self.data.column_names]
        rows = self.data.select_columns(columns)
        if self._buffer:
            rows = rows.shuffle(seed=recipe.run.seed, buffer_size=self._buffer)
        for turn in itertools.count():
            rows.set_epoch(turn)
            read, batches = 0, iter(rows.iter(batch_size=_AT_ONCE))
            while True:
                source = (
                    f"{recipe.data.dataset} ({recipe.data.train or 'train'}), pass {turn + 1}, from row {read + 1}:"
                )
                with streaming(recipe, source.removesuffix(":")):
                    batch = next(batches, None)
                if batch is None:
                    break
                read += len(next(iter(batch.values())))
                yield table_of(recipe, "train", source, batch, self.names)
            if read == 0:
                raise TitheError(
                    recipe.place("data", "dataset"), found="no rows", expected="at least one", remedy="check the name"
                )


def open_stream(recipe: Recipe) -> Stream:
    """Open the training split of a recipe's data set, and read its first rows.

    Raises:
        TitheError: there is none, a column is not there, or the classes are not known before the rows are read.
    """
    name = recipe.data.train or "train"
    data = load_split(recipe, "train", name, streaming=True)
    if data.column_names is None:
        with streaming(recipe, "its first row"):
            first = next(iter(data), None)
        data = data if first is None else data.select_columns(list(first))
    check_columns(recipe, "train", f"{recipe.data.dataset} ({name})", list(data.column_names or ()))
    label = task_of(recipe).columns(recipe.data).get("label", "")
    names = class_names((data.features or {}).get(label))
    stream = Stream(recipe, data, names)
    if "labels" in recipe.data.terms.keys and not (names or recipe.data.labels):
        raise TitheError(
            recipe.place("data", "streaming"),
            found="a stream whose data set does not name its classes",
            expected="all classes before the first row is read",
            remedy='list them: labels = ["…", "…"] in [data]',
        )
    next(stream.tables())
    return stream


@final
class StreamedSamples:
    """The training rows of a stream, encoded when they are needed.

    Args:
        stream: the rows.
        classes: in the order of the model's outputs.
        encoder: how rows become items, and items batches.
        num: how many items the run sees.
        step_size: items of one step, of all processes.

    Raises:
        TitheError: the first rows cannot be encoded.
    """

    def __init__(self, stream: Stream, classes: tuple[str, ...], encoder: Encoder, *, num: int, step_size: int) -> None:
        self._stream, self._classes, self._encoder = stream, classes, encoder
        self._num, self._kept = num, 2 * step_size
        self._first, notes = next(self._chunks())
        self._window = _Window(self._items(), self._kept)
        told = [f"of the first {len(self._first)}, {note}" for note in notes]
        self.notes = ("rows are read while training goes on, and were not all opened before", *told)

    def __len__(self) -> int:
        return self._num

    def __getitem__(self, row: int) -> Any:
        return self._window.take([row])[0]

    @property
    def largest(self) -> int:
        """The largest of the first items; later ones may be larger."""
        return self._encoder.largest(self._first)

    def weight(self, rows: Sequence[int]) -> int:
        """Count what the mean loss of a batch with these rows is a mean of."""
        items = self._window.take(rows)
        weights = self._encoder.weights(items)
        return len(items) if weights is None else sum(weights)

    def batches(self, rows: Iterable[Sequence[int]], workers: int = 0) -> Iterator[Batch]:
        """Iterate over the batches with these rows, which ascend, from the start of the stream."""
        window = _Window(self._items(), self._kept)
        return (self._encoder.join(window.take(part)) for part in rows)

    def steps(
        self, parts: Iterable[list[tuple[Sequence[int], float]]], workers: int
    ) -> Iterator[list[tuple[Batch, float]]]:
        """The micro-batches of each step; their weights were found by reading the same rows."""
        for part in parts:
            yield [(self._encoder.join(self._window.take(rows)), weight) for rows, weight in part]

    def _chunks(self) -> Iterator[tuple[Sequence[Any], Sequence[str]]]:
        recipe = self._stream.recipe
        task = task_of(recipe)
        for table in self._stream.tables():
            items, notes = self._encoder.encode(table, task.targets(recipe, table, self._classes))
            yield [items[row] for row in range(len(items))], notes

    def _items(self) -> Iterator[Any]:
        return (item for items, _ in self._chunks() for item in items)


class _Window:
    """Items by number; the last ones read are kept.

    Args:
        items: without an end.
        keep: how many.
    """

    def __init__(self, items: Iterator[Any], keep: int) -> None:
        self._items, self._keep, self._read = items, keep, 0
        self._kept: dict[int, Any] = {}

    def take(self, rows: Sequence[int]) -> list[Any]:
        """The items with these numbers, none of which may lie far before one that was asked for."""
        high = max(rows)
        while self._read <= high:
            item = next(self._items)
            if self._read > high - self._keep:
                self._kept[self._read] = item
            self._kept.pop(self._read - self._keep, None)
            self._read += 1
        return [self._kept[row] for row in rows]
