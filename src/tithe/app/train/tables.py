"""Rows of text and a label, from TSV, CSV, JSONL, parquet or a Hugging Face dataset.

Parquet files and data sets by name are read by `datasets`. Lines of text are read here: its readers fill a short row up
and forget on which line a row stood, which every message about a row names.
"""

from __future__ import annotations

import csv
import difflib
import json
import tempfile
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, cast

from tithe.app.train.recipe import Recipe
from tithe.errors import TitheError

_SUFFIXES = (".tsv", ".csv", ".jsonl", ".json", ".parquet")


@dataclass(frozen=True)
class Table:
    """The columns of one split that a recipe asks for.

    Args:
        source: the file (or data set and split) to name in messages.
        text: one text a row.
        text_pair: the second text of each row, or None.
        label: the label of each row as a string, or None where the split has no label column.
        lines: the line each row starts on, from 1, or None where the format has no lines.
    """

    source: str
    text: tuple[str, ...]
    text_pair: tuple[str, ...] | None
    label: tuple[str, ...]
    lines: tuple[int, ...] | None

    def place(self, row: int) -> str:
        """Say where a row stands, for a message."""
        return f"{self.source} line {self.lines[row]}" if self.lines is not None else f"{self.source} row {row + 1}"

    def take(self, rows: Sequence[int]) -> Table:
        """The same table with these rows only, in this order."""
        pair = self.text_pair
        return Table(
            self.source,
            tuple(self.text[row] for row in rows),
            None if pair is None else tuple(pair[row] for row in rows),
            tuple(self.label[row] for row in rows),
            None if self.lines is None else tuple(self.lines[row] for row in rows),
        )


def read_table(recipe: Recipe, split: str, path: Path) -> Table:
    """Read the columns that `[data]` names from one file.

    Raises:
        TitheError: the format is unknown, the file is malformed or empty, or a column is not there.
    """
    suffix = path.suffix.lower()
    if path.is_dir() or suffix not in _SUFFIXES:
        raise TitheError(
            recipe.place("data", split),
            found=f"{'folder' if path.is_dir() else 'file'} {path.name}",
            expected=f"a file ending in {', '.join(_SUFFIXES)}",
            remedy="convert it, or correct the path",
        )
    try:
        if suffix in {".tsv", ".csv"}:
            columns, lines = _read_delimited(recipe, path, "\t" if suffix == ".tsv" else ",")
        elif suffix == ".parquet":
            return _from_rows(recipe, split, path.name, _read_parquet(recipe, path))
        else:
            columns, lines = _read_jsonl(recipe, path)
    except UnicodeDecodeError as error:
        raise TitheError(
            str(path), found=f"bytes that are not UTF-8 ({error.reason})", expected="UTF-8", remedy="convert the file"
        ) from error
    return _table(recipe, split, path.name, columns, lines)


def read_hub_table(recipe: Recipe, split: str, name: str) -> Table:
    """Read one split of the Hugging Face data set that `[data] dataset` names (an id or a local folder).

    Raises:
        TitheError: the data set or its split cannot be loaded, or a column is not there.
    """
    return _from_rows(recipe, split, f"{recipe.data.dataset} ({name})", load_hub_split(recipe, split, name))


def load_hub_split(recipe: Recipe, split: str, name: str) -> Any:
    """One split of a Hugging Face data set, as `datasets.Dataset`."""
    import datasets

    try:
        return cast(Any, datasets).load_dataset(recipe.data.dataset, recipe.data.config, split=name)
    except (OSError, ValueError) as error:
        raise TitheError(
            recipe.place("data", "dataset") if split == "train" else recipe.place("data", split),
            found=str(error).splitlines()[0],
            expected="a data set of the hub, or a local folder, with this split",
            remedy="check the name, the config and the split",
        ) from error


def _from_rows(recipe: Recipe, split: str, source: str, rows: Any) -> Table:
    """Take the columns that `[data]` names from a `datasets.Dataset`, its classes by name."""
    _check_columns(recipe, source, rows.column_names)
    columns: dict[str, list[Any]] = {column: list(rows[column]) for column in set(_columns(recipe).values())}
    names = cast("Sequence[str] | None", getattr(rows.features[recipe.data.label], "names", None))
    if names is not None:
        columns[recipe.data.label] = [names[value] for value in columns[recipe.data.label]]
    return _table(recipe, split, source, columns, None)


def _columns(recipe: Recipe) -> dict[str, str]:
    data = recipe.data
    wanted = {"text": data.text, "label": data.label}
    return wanted if data.text_pair is None else {**wanted, "text_pair": data.text_pair}


def _check_columns(recipe: Recipe, source: str, names: Sequence[str]) -> None:
    for key, column in _columns(recipe).items():
        if column not in names:
            close = difflib.get_close_matches(column, names, n=1)
            raise TitheError(
                recipe.place("data", key),
                found=f"no column {column!r} in {source}",
                expected=f"one of its columns: {', '.join(names)}",
                remedy=f"did you mean {close[0]}?" if close else f'set {key} = "..." in [data]',
            )


def _table(
    recipe: Recipe, split: str, source: str, columns: Mapping[str, Sequence[Any]], lines: Sequence[int] | None
) -> Table:
    _check_columns(recipe, source, list(columns))
    data = recipe.data
    text, label = columns[data.text], columns[data.label]
    if not text:
        raise TitheError(
            recipe.place("data", split), found=f"no rows in {source}", expected="at least one", remedy="check the file"
        )
    pair = None if data.text_pair is None else tuple(str(value) for value in columns[data.text_pair])
    texts, labels = tuple(str(value) for value in text), tuple(_label(value) for value in label)
    return Table(source, texts, pair, labels, None if lines is None else tuple(lines))


def _label(value: object) -> str:
    # JSON and parquet tell 1 from "1" and True; a recipe's labels are written as texts.
    if isinstance(value, float) and value.is_integer():
        return str(int(value))
    return str(value).strip()


def _read_delimited(recipe: Recipe, path: Path, delimiter: str) -> tuple[dict[str, list[str]], list[int]]:
    # GLUE's TSV files hold unbalanced quotes: a tab ends a field and nothing else does.
    quoting = csv.QUOTE_NONE if delimiter == "\t" else csv.QUOTE_MINIMAL
    with path.open(encoding="utf-8-sig", newline="") as file:
        reader = csv.reader(file, delimiter=delimiter, quoting=quoting, strict=True)
        try:
            header = next(reader, [])
            _check_columns(recipe, path.name, header)
            columns: dict[str, list[str]] = {name: [] for name in header}
            lines: list[int] = []
            start = reader.line_num + 1
            for row in reader:
                if row:
                    _check_width(path, start, row, header)
                    for name, value in zip(header, row, strict=True):
                        columns[name].append(value)
                    lines.append(start)
                start = reader.line_num + 1
        except csv.Error as error:
            raise TitheError(
                f"{path.name} line {reader.line_num}",
                found=str(error),
                expected=f"fields parted by {'tabs' if delimiter == chr(9) else 'commas'}",
                remedy="correct the line",
            ) from error
    return columns, lines


def _check_width(path: Path, line: int, row: Sequence[str], header: Sequence[str]) -> None:
    if len(row) != len(header):
        raise TitheError(
            f"{path.name} line {line}",
            found=f"{len(row)} fields",
            expected=f"{len(header)}: {', '.join(header)}",
            remedy="correct the line",
        )


def _read_jsonl(recipe: Recipe, path: Path) -> tuple[dict[str, list[Any]], list[int]]:
    columns: dict[str, list[Any]] = {}
    lines: list[int] = []
    with path.open(encoding="utf-8-sig") as file:
        for number, line in enumerate(file, start=1):
            if not line.strip():
                continue
            try:
                row: object = json.loads(line)
            except json.JSONDecodeError as error:
                row = error.msg
            if not isinstance(row, dict):
                found = row if isinstance(row, str) else type(row).__name__
                raise TitheError(
                    f"{path.name} line {number}",
                    found=found,
                    expected="one JSON object a line",
                    remedy="correct the line",
                )
            values = cast(dict[str, Any], row)
            if not columns:
                _check_columns(recipe, path.name, list(values))
                columns = {name: [] for name in values}
            for name in _columns(recipe).values():
                if name not in values:
                    raise TitheError(
                        f"{path.name} line {number}", found=f"no {name!r}", expected="it in every row", remedy="add it"
                    )
                columns[name].append(values[name])
            lines.append(number)
    return columns or {name: [] for name in _columns(recipe).values()}, lines


def _read_parquet(recipe: Recipe, path: Path) -> Any:
    """Read a parquet file as `datasets.Dataset`, in memory; nothing is left in a cache."""
    import datasets
    from datasets.exceptions import DatasetGenerationError

    shown = datasets.is_progress_bar_enabled()
    datasets.disable_progress_bars()
    try:
        with tempfile.TemporaryDirectory(prefix="tithe-parquet-") as cache:
            return cast(Any, datasets.Dataset).from_parquet(str(path), cache_dir=cache, keep_in_memory=True)
    except (OSError, ValueError, DatasetGenerationError) as error:
        raise TitheError(
            path.name, found=str(error), expected="a parquet file", remedy="write the file again"
        ) from error
    finally:
        if shown:
            datasets.enable_progress_bars()
