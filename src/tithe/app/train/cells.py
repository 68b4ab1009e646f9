"""One cell of a table: what may be a text and what a label, whichever format the table was written in."""

from __future__ import annotations

import json
import math
import re
import unicodedata
from collections.abc import Collection, Sequence
from dataclasses import dataclass
from decimal import Decimal
from typing import Any, cast

ABSENT = object()
"""The value of a key that a row does not have."""

# What pandas and spreadsheets write for a missing value. "none" and "NONE" are not among them: those may be classes.
_NOT_A_NUMBER = {"NaN", "nan", "-NaN", "-nan", "NaT", "1.#IND", "-1.#IND", "1.#QNAN", "-1.#QNAN"}
_NOTHING = {"NULL", "null", "None", "NA", "N/A", "n/a", "<NA>", "#NA", "#N/A", "#N/A N/A"}
_WHOLE = re.compile(r"[+-]?\d+\.0*")
_PRINTED = re.compile(r"\[\s*(?:[bu]?['\"]|array\(|None\b)|\[[-+\s\d.,]*\]$")
_LARGEST = 3.4028234663852886e38
_NUMBER = re.compile(r"[+-]?(\d+\.?\d*|\.\d+)([eE][+-]?\d+)?")
_KINDS: dict[type[Any], str] = {list: "a list", tuple: "a list", dict: "an object", bytes: "bytes", bytearray: "bytes"}


@dataclass(frozen=True)
class Fault:
    """Why a cell cannot be used.

    Args:
        found: what is there, in the words of a message.
        missing: whether that is nothing at all.
        expected: instead, where it is not simply a text or a label.
        remedy: where it is not simply to correct it.
    """

    found: str
    missing: bool = False
    expected: str | None = None
    remedy: str | None = None


def read_text(value: object) -> str | Fault:
    """Take a cell as a text.

    Example:
        >>> read_text("fine"), read_text(2.0), read_text(None)
        ('fine', '2', Fault(found='null', missing=True, expected=None, remedy=None))
    """
    value = _plain(value)
    if isinstance(value, Fault):
        return value
    return value if value.strip() else Fault("an empty text", missing=True)


def read_label(value: object, names: Sequence[str] = (), known: Collection[str] = ()) -> str | Fault:
    """Take a cell as a label: one number is one label, whether it is written 1, 1.0 or "1".

    Args:
        value: the cell.
        names: of the classes, where cells are their numbers; -1 then says that there is no label.
        known: labels that are classes although they look like a missing value.

    Example:
        >>> read_label("1.0"), read_label(1), read_label(1, names=["no", "yes"])
        ('1', '1', 'yes')
    """
    if names and isinstance(value, int) and not isinstance(value, bool):
        if value == -1:
            return Fault("-1, which stands for no label", missing=True)
        if not 0 <= value < len(names):
            return Fault(f"class {value} of {len(names)} ({', '.join(names[:12])})")
        return names[value]
    plain = _plain(value)
    if isinstance(plain, Fault):
        return plain
    label = plain.strip()
    if label in known:
        return label
    if not label:
        return Fault("an empty label", missing=True)
    if label in _NOT_A_NUMBER | _NOTHING:
        return Fault(f"{label!r}, which stands for a missing value", missing=True)
    return canonical(label)


def read_number(value: object) -> str | Fault:
    """Take a cell as the value of a regression, which float32 holds.

    Example:
        >>> read_number("2.5"), read_number("much").found
        ('2.5', "label 'much'")
    """
    plain = _plain(value)
    if isinstance(plain, Fault) or not plain.strip():
        return plain if isinstance(plain, Fault) else Fault("an empty label", missing=True)
    number = plain.strip()
    # Not float(): it takes nan and 1_000, too.
    if _NUMBER.fullmatch(number) and abs(float(number)) <= _LARGEST:
        return number
    comma = re.fullmatch(r"-?\d+,\d+", number)
    return Fault(
        f"label {number!r}",
        expected="a finite number (regression)",
        remedy="write a decimal point" if comma else "correct the line",
    )


def read_list(text: str, known: Collection[str] = ()) -> Sequence[object] | Fault | None:
    """Take a cell as a list that was written as text: a JSON list is one, a list as Python prints it is refused.

    Args:
        text: of the cell.
        known: texts that are no lists, however they look.

    Returns:
        Its items; or None where it is another text.

    Example:
        >>> read_list('["a", "b"]'), read_list("a [b]")
        (['a', 'b'], None)
    """
    bare = text.strip()
    if not (bare.startswith("[") and bare.endswith("]")) or bare in known:
        return None
    try:
        return cast("list[object]", json.loads(bare))
    except (ValueError, RecursionError):
        if _PRINTED.match(bare) is None:
            return None
        return Fault(f"a list as Python prints it, {bare[:40]!r}", remedy='write it as JSON: ["a", "b"]')


def canonical(label: str) -> str:
    """Write a whole number without a decimal point, and leave every other label as it is.

    Example:
        >>> canonical("2.0"), canonical("2.50"), canonical("v2.0")
        ('2', '2.50', 'v2.0')
    """
    label = label.strip()
    return str(int(label.partition(".")[0])) if _WHOLE.fullmatch(label) else label


def likeness(label: str) -> object:
    """A key that is equal for labels which a reader would take for one: `1.5` and `1.50`, `Good` and `"good"`.

    Single letters differ by case: they are classes of their own where letters are recognised.
    """
    seen = "".join(char for char in unicodedata.normalize("NFKC", label) if unicodedata.category(char) != "Cf")
    bare = " ".join(seen.split()).strip("\"'")
    if _NUMBER.fullmatch(bare):
        return float(bare)
    if bare.casefold() in {"true", "false"}:  # which JSON and spreadsheets write for 1 and 0
        return float(bare.casefold() == "true")
    return bare.casefold() if len(bare) > 1 else bare


def _plain(value: object) -> str | Fault:
    """Turn a cell into a text, or say why that is none."""
    if value is None:
        return Fault("null", missing=True)
    if value is ABSENT:
        return Fault("nothing", missing=True)
    if isinstance(value, str):
        try:
            value.encode()
        except UnicodeEncodeError as error:
            return Fault(f"half a surrogate pair (\\u{ord(value[error.start]):04x}) as character {error.start + 1}")
        return value
    if isinstance(value, float | Decimal):
        if math.isnan(value):
            return Fault("NaN", missing=True)
        if math.isinf(value):
            return Fault("an infinite number")
        return str(int(value)) if value == int(value) else str(value)
    if isinstance(value, bool | int):
        return str(value)
    kind = type(value)
    return Fault(_KINDS.get(kind, f"a value of type {kind.__name__}"))
