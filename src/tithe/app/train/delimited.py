"""Tables of delimited text, by the rules of the csv module, with what spreadsheets and benchmarks do besides."""

from __future__ import annotations

import contextlib
import csv
import io
import re
import sys
from collections.abc import Generator, Iterator, Sequence
from typing import Any, cast

from tithe.app.train.skipping import Unusable
from tithe.errors import TitheError

DELIMITERS = {",": "comma", "\t": "tab", ";": "semicolon", "|": "bar"}

_SEPARATOR_LINE = re.compile(r'"?sep=(.)"?\r?\n')


def read_delimited(
    text: str, source: str, usual: str, wanted: Sequence[str], unusable: Unusable
) -> tuple[list[str], list[list[str]], list[int]]:
    """Read the header and the rows of a table.

    The delimiter is the `usual` one, or another under which the header has the `wanted` columns.

    Returns:
        The header without blanks and quotes around its names, the rows, and the line that each begins on.

    Raises:
        TitheError: a row has other fields than the header, or a quoted field does not end.
    """
    first_line, text = 1, text.removesuffix("\x1a")  # the mark that DOS put at the end of a file
    if match := _SEPARATOR_LINE.match(text):  # a hint to spreadsheets that they write themselves
        usual, text, first_line = match[1], text[match.end() :], 2
    delimiter, header = _header(text, usual, wanted)
    raw = delimiter == "\t" and '"' in text and not _is_quoted(text)
    spaced = delimiter != "\t" and any(name.startswith(" ") for name in header[1:])
    rows: list[list[str]] = []
    lines: list[int] = []
    reader = csv.reader(
        io.StringIO(text, newline=""),
        delimiter=delimiter,
        quoting=csv.QUOTE_NONE if raw else csv.QUOTE_MINIMAL,
        skipinitialspace=spaced,
        strict=True,
    )
    with _long_fields():
        for line, row in _numbered(reader, source, delimiter, first_line):
            if delimiter == "|" and not rows and all(set(field.strip()) <= {"-", ":"} for field in row):
                continue  # the rule below the header of a table in Markdown
            extra = row[len(header) :]
            if len(row) >= len(header) and not any(field.strip() for field in extra):
                rows.append(row[: len(header)])
                lines.append(line)
            else:
                unusable.add(_wrong_width(source, line, row, header, delimiter))
    return [clean(name) for name in header], rows, lines


def clean(name: str) -> str:
    """A column's name without blanks, a byte order mark and quotes around it."""
    return name.strip().strip("\ufeff").strip().strip('"').strip()


def _header(text: str, usual: str, wanted: Sequence[str]) -> tuple[str, list[str]]:
    """The delimiter, and the fields of the first row that is not blank."""
    found: dict[str, list[str]] = {}
    start = text.lstrip("\ufeff \r\n")
    for delimiter in (usual, *(other for other in DELIMITERS if other != usual)):
        with _long_fields():
            try:
                fields = next(csv.reader(io.StringIO(start, newline=""), delimiter=delimiter), [])
            except csv.Error:
                fields = []
        if set(wanted) <= {clean(field) for field in fields}:
            return delimiter, fields
        found[delimiter] = fields
    best = max(found, key=lambda delimiter: (len(found[delimiter]), delimiter == usual))
    delimiter = usual if len(found[usual]) > 1 else best
    return delimiter, found[delimiter]


def _numbered(reader: Any, source: str, delimiter: str, first: int) -> Iterator[tuple[int, list[str]]]:
    """The rows after the header, each with the line that it begins on; blank ones are passed over."""
    line, is_header = first, True
    while True:
        try:
            row = cast("list[str] | None", next(reader, None))
        except csv.Error as error:
            raise _malformed(source, line, str(error), delimiter) from error
        if row is None:
            return
        if any(field.strip() for field in row):
            if not is_header:
                yield line, row
            is_header = False
        line = first + reader.line_num


@contextlib.contextmanager
def _long_fields() -> Generator[None]:
    """Let a field be of any length: the limit of the csv module is one of the process."""
    before = csv.field_size_limit(sys.maxsize)
    try:
        yield
    finally:
        csv.field_size_limit(before)


def _malformed(source: str, line: int, said: str, delimiter: str) -> TitheError:
    if "unexpected end" in said:
        found, remedy = "a quote that opens here and never closes (unexpected end)", "close it"
    else:
        found, remedy = said, f"put a field that holds a quote or a {DELIMITERS.get(delimiter, delimiter)} in quotes"
    return TitheError(
        f"{source} line {line}",
        found=found,
        expected='fields in "…", with quotes inside doubled ("")',
        remedy=f"{remedy}, and double the quotes inside",
    )


def _wrong_width(source: str, line: int, row: Sequence[str], header: Sequence[str], delimiter: str) -> TitheError:
    name = DELIMITERS.get(delimiter, repr(delimiter))
    return TitheError(
        f"{source} line {line}",
        found=f"{len(row)} fields"
        + (f" (column {len(header) + 1} begins {row[len(header)][:20]!r})" if len(row) > len(header) else ""),
        expected=f"{len(header)}: {', '.join(map(clean, header))}",
        remedy=f"put a field that holds a {name} in quotes" if len(row) > len(header) else "add what is missing",
    )


# A field in quotes, or one without any; then what ends it.
_FIELD = re.compile(r'(?:"(?P<quoted>[^"]*(?:""[^"]*)*)"|(?P<bare>[^"\t\r\n]*))(?P<end>\t|\r\n|\n|\r|\Z)')


def _is_quoted(text: str) -> bool:
    """Whether a table of tabs was written with the csv rules of quotes, as spreadsheets do.

    GLUE's files were not: a quote is a character of the text like any other there. Under the csv rules no field holds a
    quote without being in quotes; and some are there for a reason, or the header or a whole column is.
    """
    position, row, column = 0, 0, 0
    needed, widths, quoted, filled = False, set[int](), dict[int, int](), dict[int, int]()
    while position < len(text):
        match = _FIELD.match(text, position)
        if match is None:
            return False
        inner = match["quoted"]
        if inner is not None:
            needed = needed or row == 0 or any(char in inner for char in '\t\r\n,;"') or inner != inner.strip()
            quoted[column] = quoted.get(column, 0) + (row > 0)
        filled[column] = filled.get(column, 0) + bool(row > 0 and (inner or match["bare"]))
        position = match.end()
        if match["end"] == "\t":
            column += 1
            continue
        if column or inner or match["bare"]:  # not a blank line
            widths.add(column + 1)
            row += 1
        column = 0
    if len(widths) > 1:
        return False
    return needed or any(count == filled[column] > 1 for column, count in quoted.items())
