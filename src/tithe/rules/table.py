"""The table of rules: which operations a rule serves, what it keeps for backward, and what stock keeps.

sparse wing    a weight of which a part is selected: a row for each family of operations × kind of selection
lean wing      what an operation without a selected weight keeps while a model is lean: a row for each family

`register` and `catch`, the two decorators, write the rows; the tables of the docs are written from them.
"""

from __future__ import annotations

import re
import textwrap
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from torch.overrides import resolve_name

from tithe.errors import TitheError

Handler = Callable[..., Any]

SPARSE, LEAN = "sparse", "lean"
WINGS: dict[str, dict[Handler, Handler]] = {SPARSE: {}, LEAN: {}}
"""Wing → operation → what it goes to. An operation that is taken out here leaves the table."""

ENTRIES, CHANNELS = "entries", "channels"


@dataclass(frozen=True)
class Row:
    """What one family of operations keeps for backward.

    Args:
        wing: "sparse", or "lean".
        family: what the operations have in common.
        selected: "entries" or "channels", what is selected of the weight; "" in the lean wing.
        operations: full names.
        handler: full name of the function that the first of them goes to.
        keeps: what the rule keeps, besides the weight.
        stock: what PyTorch keeps without the rule.
        note: what the page says besides; in the lean wing how the gradient compares with stock's.
    """

    wing: str
    family: str
    selected: str
    operations: tuple[str, ...]
    handler: str
    keeps: str
    stock: str
    note: str

    @property
    def short(self) -> list[str]:
        """The operations' last names, each once; one name for those in place, and one for those of 1 to 3 axes."""
        last = [name.rpartition(".")[2] for name in self.operations]
        names = list(dict.fromkeys(name.rstrip("_") for name in last if not name.startswith("__")))
        for name in [name for name in names if name.endswith("1d")]:
            stem = name.removesuffix("1d")
            if {f"{stem}2d", f"{stem}3d"} <= set(names):
                names[names.index(name)] = f"{stem}1d–3d"
                names = [other for other in names if other not in (f"{stem}2d", f"{stem}3d")]
        return names


@dataclass(frozen=True)
class Table:
    """The rows, which print as a table.

    Example:
        >>> found = table()
        >>> [row.keeps for row in found if row.family == "dropout"]
        ['n / 8']
        >>> max(map(len, str(found).splitlines())) <= 80
        True
    """

    rows: tuple[Row, ...]

    def __iter__(self) -> Iterator[Row]:
        return iter(self.rows)

    def __len__(self) -> int:
        return len(self.rows)

    def wing(self, name: str) -> tuple[Row, ...]:
        """The rows of one wing, "sparse" or "lean"."""
        return tuple(row for row in self.rows if row.wing == name)

    def __str__(self) -> str:
        sparse = [("operation", SPARSE, "a rule keeps", "stock keeps")]
        before = ""
        for row in self.wing(SPARSE):
            sparse.append(("" if row.family == before else _title(row), row.selected, row.keeps, row.stock))
            before = row.family
        lean = [("operation", "lean keeps", "stock keeps")]
        lean += [(_title(row), row.keeps, row.stock) for row in self.wing(LEAN)]
        return _text(sparse, (25, 8, 24, 17)) + "\n\n" + _text(lean, (29, 24, 23))

    __repr__ = __str__

    def markdown(self, wing: str) -> str:
        """One wing as a table of Markdown."""
        if wing == SPARSE:
            lines = [("operation", "selected", "kept for backward besides the weight", "stock keeps")]
            lines += [(_title(row, "`"), row.selected, row.keeps, row.stock) for row in self.wing(SPARSE)]
        else:
            lines = [("layer", "stock keeps", "lean keeps", "gradient")]
            lines += [(_title(row, "`"), row.stock, row.keeps, row.note) for row in self.wing(LEAN)]
        lines.insert(1, ("---", "---", "---", "---"))
        return "\n".join(f"| {' | '.join(line)} |" for line in lines)

    def write(self, *pages: str | Path) -> None:
        """Write the tables between the marks of these pages, `<!-- table: sparse -->` and `<!-- end of table -->`.

        Raises:
            TitheError: a page has no such marks.
        """
        for page in map(Path, pages):
            text = page.read_text("utf-8")
            written = self.rewrite(text)
            if not _BLOCK.search(text):
                raise TitheError(
                    str(page),
                    found="no mark of a table",
                    expected="<!-- table: sparse --> … <!-- end of table -->, or lean",
                    remedy="put the two lines where the table belongs",
                )
            page.write_text(written, "utf-8")

    def rewrite(self, text: str) -> str:
        """A page's text with the tables between its marks as they are now, of this package's rules alone."""

        def block(found: re.Match[str]) -> str:
            own = Table(tuple(row for row in self.rows if row.handler.startswith("tithe.")))
            return f"<!-- table: {found[1]} -->\n\n{own.markdown(found[1])}\n\n<!-- end of table -->"

        return _BLOCK.sub(block, text)


_BLOCK = re.compile(r"<!-- table: (sparse|lean) -->.*?<!-- end of table -->", re.DOTALL)


@dataclass
class _Family:
    """The operations of one family as they are registered, and the family's statements."""

    wing: str
    name: str
    handlers: list[Handler]
    operations: list[Handler]
    keeps: dict[str, str]
    stock: str
    note: str

    def rows(self) -> Iterator[Row]:
        handler = f"{self.handlers[0].__module__}.{self.handlers[0].__qualname__}"
        caught = [operation for operation in self.operations if operation in WINGS[self.wing]]
        names = tuple(_name(operation) for operation in caught)
        for selected, keeps in self.keeps.items() if caught else ():
            yield Row(self.wing, self.name, selected, names, handler, keeps, self.stock, self.note)


_FAMILIES: list[_Family] = []


def state(
    wing: str,
    operations: Sequence[Handler],
    handler: Handler,
    *,
    family: str,
    keeps: dict[str, str],
    stock: str,
    note: str,
    like: Handler | None,
) -> None:
    """Enter operations into a wing of the table: into a family of their own, or into that of the handler `like`.

    Args:
        wing: "sparse" or "lean".
        operations: what is caught; each leaves the family that it was in before.
        handler: what they go to.
        family: the new family's name; "" for the handler's.
        keeps: what is selected → what the rule keeps.
        stock: what stock keeps.
        note: what the page says besides.
        like: a handler whose family the operations join; then the statements are that family's.

    Raises:
        TitheError: `like` is no registered handler of this wing.
    """
    for other in _FAMILIES:
        if other.wing == wing:
            other.operations = [one for one in other.operations if not any(one is new for new in operations)]
    if like is None:
        name = family or handler.__name__.strip("_").replace("_", " ")
        _FAMILIES.append(_Family(wing, name, [handler], list(operations), keeps, stock, note))
        return
    joined = [one for one in _FAMILIES if one.wing == wing and any(known is like for known in one.handlers)]
    if not joined:
        raise TitheError(
            handler.__name__,
            found=f"like={like.__name__}, which is not registered",
            expected="a handler that was registered before in this wing",
            remedy="pass keeps= and stock= instead",
        )
    joined[0].handlers.append(handler)
    joined[0].operations += operations


def family(wing: str, operation: Handler) -> str:
    """The name of the row that an operation is in; its own name where it is in none."""
    found = [one.name for one in _FAMILIES if one.wing == wing and any(known is operation for known in one.operations)]
    return found[0] if found else _name(operation)


def table() -> Table:
    """Every rule that is registered now, strangers' included."""
    return Table(tuple(row for family in _FAMILIES for row in family.rows()))


def _name(operation: Handler) -> str:
    """Where an operation is found and what it is called; torch's list has one name of several for some."""
    place = (resolve_name(operation) or "").rpartition(".")[0]
    return f"{place}.{operation.__name__}".lstrip(".")


def _title(row: Row, quote: str = "") -> str:
    names = ", ".join(f"{quote}{name}{quote}" for name in row.short)
    return names if row.family == row.short[0].replace("_", " ") else f"{row.family}: {names}"


def _text(lines: Sequence[Sequence[str]], widths: Sequence[int]) -> str:
    """Cells side by side, wrapped to their column's width; the first line is the head."""
    out: list[str] = []
    for line in lines:
        cells = [textwrap.wrap(cell, width) or [""] for cell, width in zip(line, widths, strict=True)]
        for at in range(max(map(len, cells))):
            parts = [cell[at] if at < len(cell) else "" for cell in cells]
            out.append("  ".join(part.ljust(width) for part, width in zip(parts, widths, strict=True)).rstrip())
        if line is lines[0]:
            out.append("  ".join("-" * width for width in widths))
    return "\n".join(out)
