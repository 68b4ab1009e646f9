"""Rows of texts and labels, from TSV, CSV, JSONL, parquet, plain text or a Hugging Face dataset.

Lines of text are read here, not by `datasets`: its readers fill a short row up and forget on which line a row stood,
which every message about a row names. Whatever the format, a cell is taken by the rules of `cells`.
"""

from __future__ import annotations

import difflib
import json
import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, cast

from tithe.app.train.cells import ABSENT, Fault, canonical, read_label
from tithe.app.train.decoding import decode, kind_of, read_bytes
from tithe.app.train.delimited import read_delimited
from tithe.app.train.documents import read_documents
from tithe.app.train.hub import class_names, load_split
from tithe.app.train.recipe import Recipe
from tithe.app.train.rows import Table, place_of
from tithe.app.train.skipping import Unusable
from tithe.app.train.tasks import task_of
from tithe.errors import TitheError

_SUFFIXES = (".tsv", ".csv", ".jsonl", ".ndjson", ".json", ".parquet")
_JSON: dict[type[Any], str] = {int: "number", float: "number", str: "text", bool: "truth value", type(None): "null"}
_LINES = "(pandas: df.to_json(path, orient='records', lines=True))"


def read_table(recipe: Recipe, split: str, path: Path) -> Table:
    """Read the columns that `[data]` names from one file.

    Raises:
        TitheError: the format is unknown, the file is malformed or empty, a column is not there, or a cell holds no
                text or label; it names the line.
    """
    suffix = path.suffix.lower()
    plain = "documents" in recipe.data.terms.keys and recipe.data.messages is None
    if plain and suffix not in _SUFFIXES:  # notes, programs, a file without an ending: whatever is text
        return read_documents(recipe, split, path)
    if path.is_dir() or suffix not in _SUFFIXES:
        raise TitheError(
            recipe.place("data", split),
            found=f"{'folder' if path.is_dir() else 'file'} {path.name}",
            expected=f"a file ending in {', '.join(_SUFFIXES)}",
            remedy="convert it, or correct the path",
        )
    if suffix == ".parquet":
        return _read_parquet(recipe, split, path)
    content, unusable = read_bytes(path), Unusable(recipe)
    if not content.strip():
        raise TitheError(
            recipe.place("data", split),
            found=f"no rows in {path.name}: the file is empty",
            expected="a header and at least one row" if suffix in {".tsv", ".csv"} else "at least one row",
            remedy="write the file again, or correct the path",
        )
    if (kind := kind_of(content)) is not None:
        raise TitheError(str(path), found=f"{kind[0]}, not text", expected=f"text, as {suffix} says", remedy=kind[1])
    key = None if recipe.data.encoding is None else recipe.place("data", "encoding")
    text = decode(content, path.name, encoding=recipe.data.encoding, key=key or "[data] encoding")
    if suffix in {".tsv", ".csv"}:
        columns, lines = _delimited(recipe, split, path.name, text, "\t" if suffix == ".tsv" else ",", unusable)
    else:
        columns, lines = _read_json(recipe, split, path.name, text, unusable)
    return _table(recipe, split, path.name, columns, lines, unusable)


def read_hub_table(recipe: Recipe, split: str, name: str) -> Table:
    """Read one split of the Hugging Face data set that `[data] dataset` names (an id or a local folder).

    Raises:
        TitheError: the data set or its split cannot be loaded, or a column is not there.
    """
    rows, source = load_split(recipe, split, name), f"{recipe.data.dataset} ({name})"
    check_columns(recipe, split, source, rows.column_names)
    columns: dict[str, Sequence[object]] = {
        column: list(rows[column]) for column in set(_columns(recipe).values()) if column in rows.column_names
    }
    names = class_names(rows.features.get(_columns(recipe).get("label", "")))
    return _table(recipe, split, source, columns, None, Unusable(recipe), names)


def table_of(
    recipe: Recipe, split: str, source: str, columns: Mapping[str, Sequence[object]], names: tuple[str, ...]
) -> Table:
    """Take the cells of some rows of a data set.

    Raises:
        TitheError: a cell holds no text or label; it names the row.
    """
    return _table(recipe, split, source, columns, None, Unusable(recipe), names)


def _columns(recipe: Recipe) -> dict[str, str]:
    return task_of(recipe).columns(recipe.data)


def _required(recipe: Recipe, split: str) -> dict[str, str]:
    """The columns that a split has to have: a test split may come without labels."""
    return {key: column for key, column in _columns(recipe).items() if key != "label" or split != "test"}


def check_columns(recipe: Recipe, split: str, source: str, names: Sequence[str], hint: str = "") -> None:
    """Look for the columns that the task reads.

    Raises:
        TitheError: one is missing, or there twice.
    """
    for key, column in _columns(recipe).items():
        if names.count(column) > 1:
            numbers = [str(number) for number, name in enumerate(names, start=1) if name == column]
            raise TitheError(
                recipe.place("data", key),
                found=f"{len(numbers)} columns {column!r} in {source}: its columns {' and '.join(numbers)}",
                expected="one column of that name",
                remedy="rename one of them in the file",
            )
    for key, column in _required(recipe, split).items():
        if column not in names:
            close = [name for name in names if name.casefold() == column.casefold()]
            close = close or difflib.get_close_matches(column, names, n=1)
            raise TitheError(
                recipe.place("data", key),
                found=f"no column {column!r} in {source}",
                expected=f"one of its columns: {', '.join(name or '(no name)' for name in names)}",
                remedy=f'did you mean {close[0]}? Set {key} = "{close[0]}" in [data]'
                if close
                else hint or f'set {key} = "..." in [data]',
            )


def _table(
    recipe: Recipe,
    split: str,
    source: str,
    columns: Mapping[str, Sequence[object]],
    lines: Sequence[int] | None,
    unusable: Unusable,
    names: tuple[str, ...] = (),
) -> Table:
    """Take every cell as text or label, and refuse or leave out the rows where one is neither."""
    task, data, wanted = task_of(recipe), recipe.data, _columns(recipe)
    num = max(map(len, columns.values()), default=0)
    if num == 0:
        unusable.settle()
        raise TitheError(
            recipe.place("data", split), found=f"no rows in {source}", expected="at least one", remedy="check the file"
        )
    cells = {
        key: [task.cell(data, key, value, names) for value in columns.get(column, [ABSENT] * num)]
        for key, column in sorted(wanted.items())  # of several faults in a row, the label's is told
    }
    labels = cells.get("label", [""] * num)
    labelled = not all(isinstance(label, Fault) and label.missing for label in labels)
    kept: list[int] = []
    for row in range(num):
        own = {key: values[row] for key, values in cells.items()}
        faults = [
            (key, fault) for key, fault in own.items() if isinstance(fault, Fault) and (labelled or key != "label")
        ]
        if not faults and labelled and (fault := task.row_fault(own)) is not None:
            faults = [fault]
        if faults:
            unusable.add(_faulty(recipe, place_of(source, lines, row), *faults[0]))
        else:
            kept.append(row)
    skipped = unusable.settle()
    if not kept:
        raise TitheError(
            recipe.place("data", split),
            found=f"no row in {source} that can be used: {skipped[0]}",
            expected="at least one",
            remedy="check the file",
        )
    texts = cells["messages" if "messages" in cells else "text"]
    return Table(
        source,
        tuple(texts[row] for row in kept),
        tuple(cells["text_pair"][row] for row in kept) if "text_pair" in cells else None,
        tuple(labels[row] if labelled else "" for row in kept),
        None if lines is None else tuple(lines[row] for row in kept),
        labelled=labelled,
        names=names,
        skipped=skipped,
    )


def _faulty(recipe: Recipe, place: str, key: str, fault: Fault) -> TitheError:
    column = _columns(recipe)[key]
    if fault.expected is not None:
        return TitheError(
            place,
            found=fault.found,
            expected=f"{fault.expected} in column {column!r}",
            remedy=fault.remedy or "correct the line",
        )
    found = f"no {column!r}" if fault.found == "nothing" else fault.found
    remedy = "correct the line" if key != "label" or not fault.missing else "write the label"
    if key == "label" and " stands for a missing value" in fault.found:
        remedy += ", or list it in [data] labels if it is a class"
    return TitheError(
        f"{place} column {column!r}",
        found=found,
        expected="a label" if key == "label" else "a text",
        remedy=fault.remedy or remedy,
    )


# ---------------------------------------------------------------------------------------------------------- formats


def _delimited(
    recipe: Recipe, split: str, source: str, text: str, usual: str, unusable: Unusable
) -> tuple[dict[str, list[str]], list[int]]:
    wanted = list(_required(recipe, split).values())
    header, rows, lines = read_delimited(text, source, usual, wanted, unusable)
    hint = ""
    if any(re.fullmatch(r"[-+\d.,]+", name) or name.count(" ") > 2 for name in header):
        spare = [f"column{number}" for number in range(1, len(header) + 1 - len(wanted))]
        hint = (
            f"the first line looks like a row: write a line with the columns' names above it, such as "
            f"{(chr(9) if usual == chr(9) else ',').join([*wanted, *spare])!r}"
        )
    check_columns(recipe, split, source, header, hint)
    columns = {name: [row[index] for row in rows] for index, name in enumerate(header) if header.count(name) == 1}
    return columns, lines


def _read_json(
    recipe: Recipe, split: str, source: str, text: str, unusable: Unusable
) -> tuple[dict[str, list[object]], list[int] | None]:
    """Read one JSON object a line, or one list of objects."""
    wanted = list(_columns(recipe).values())
    items: list[tuple[str, object]]
    lines: list[int] | None = None
    if text.lstrip().startswith("[") and isinstance(found := _parse(text, wanted), list):
        items = [(f"{source} row {row}", item) for row, item in enumerate(cast("list[object]", found), start=1)]
    else:
        numbered = [(number, line) for number, line in enumerate(text.split("\n"), start=1) if line.strip()]
        items = [(f"{source} line {number}", _parse(line, wanted)) for number, line in numbered]
        lines = [number for number, _ in numbered]
    if items and isinstance(items[0][1], ValueError) and isinstance(_parse(text, wanted), dict):
        raise TitheError(
            f"{source} line 1",
            found="one JSON object over several lines",
            expected="one JSON object a line, or a list of them",
            remedy=f"write the rows as lines {_LINES}",
        )
    rows: list[dict[str, object]] = []
    kept: list[int] = []
    for row, (place, item) in enumerate(items):
        if isinstance(item, dict):
            rows.append(cast("dict[str, object]", item))
            kept.append(row)
        else:
            found = str(item) if isinstance(item, ValueError) else f"a {_JSON.get(type(item), 'list')}"
            column = re.search(r"column (\d+)", found)
            unusable.add(
                TitheError(
                    place + (f" column {column[1]}" if column else ""),
                    found=found.split(": line", 1)[0],
                    expected="one JSON object a line",
                    remedy=f"correct the line {_LINES}",
                )
            )
    if rows:
        names = list(dict.fromkeys(name for row in (rows[0], rows[-1]) for name in row))
        names += [name for name in wanted if name not in names and any(name in row for row in rows)]
        check_columns(recipe, split, source, names)
    columns = {name: [row.get(name, ABSENT) for row in rows] for name in wanted}
    return columns, None if lines is None else [lines[row] for row in kept]


def _parse(text: str, wanted: Sequence[str]) -> object:
    """The value of a JSON text, or the error that it has none."""

    def unique(pairs: list[tuple[str, object]]) -> dict[str, object]:
        made = dict(pairs)
        if len(made) < len(pairs) and (twice := [name for name in wanted if sum(key == name for key, _ in pairs) > 1]):
            raise ValueError(f"the key {twice[0]!r} twice")
        return made

    try:
        return json.loads(text, object_pairs_hook=unique)
    except ValueError as error:
        return error
    except RecursionError:
        return ValueError("values nested too deeply")


def _read_parquet(recipe: Recipe, split: str, path: Path) -> Table:
    import pyarrow
    from pyarrow import parquet

    reader: Any = parquet
    wanted = list(_columns(recipe).values())
    try:
        file = reader.ParquetFile(path)
        names = [str(name) for name in file.schema_arrow.names]
        check_columns(recipe, split, path.name, names)
        table: Any = file.read(columns=[name for name in wanted if name in names])
    except (OSError, ValueError, pyarrow.ArrowException) as error:
        raise TitheError(
            path.name,
            found=str(error).splitlines()[0],
            expected="a parquet file",
            remedy="write the file again" if path.stat().st_size else "the file is empty: write it again",
        ) from error
    label = _columns(recipe).get("label", "")
    columns: dict[str, Sequence[object]] = {name: table.column(name).to_pylist() for name in table.column_names}
    classes = _class_names(table, label) if label in columns else ()
    if label in columns and pyarrow.types.is_dictionary(table.column(label).type):  # values, not their numbers
        columns[label] = [value if value is None else str(value) for value in columns[label]]
    return _table(recipe, split, path.name, columns, None, Unusable(recipe), classes)


def _class_names(table: Any, label: str) -> tuple[str, ...]:
    """The names of the classes that a parquet file states: as `datasets` or as pandas' categories write them."""
    import pyarrow

    said = json.loads((table.schema.metadata or {}).get(b"huggingface", b"{}"))
    feature = said.get("info", {}).get("features", {}).get(label, {})
    if isinstance(feature, dict) and isinstance(inner := cast("dict[str, Any]", feature).get("feature"), dict):
        feature = cast("dict[str, Any]", inner)  # of a list
    if isinstance(feature, dict) and cast("dict[str, Any]", feature).get("names"):
        return tuple(canonical(str(name)) for name in cast("dict[str, Any]", feature)["names"])
    column: Any = table.column(label)
    if not pyarrow.types.is_dictionary(column.type) or column.num_chunks == 0:
        return ()
    read = [read_label(value) for value in column.unify_dictionaries().chunk(0).dictionary.to_pylist()]
    found = tuple(canonical(value) for value in read if isinstance(value, str))
    return found if len(found) == len(read) == len(set(found)) else ()
