"""Limit what may be spent: bytes, elements, a fraction or FLOPs, as one comparable value."""

from __future__ import annotations

import math
import re
from dataclasses import dataclass, fields
from typing import Any

from tithe.errors import TitheError

_UNITS = {"b": 1, "kb": 10**3, "mb": 10**6, "gb": 10**9, "kib": 2**10, "mib": 2**20, "gib": 2**30}


@dataclass(frozen=True, init=False)
class Budget:
    """A budget limits what a plan may spend, in exactly one measure.

    Args:
        size: bytes, as a whole number or as text ("64MB", "1.5GiB").
        elements: a count of values.
        fraction: of what selecting everything would cost, in (0, 1].
        flops: floating-point operations.

    Raises:
        TitheError: when not exactly one measure is given, it is no number or not positive, a count is not whole, or the
            text has no known unit.

    Example:
        >>> Budget("64MB").bytes, Budget(fraction=0.01).of(200)
        (64000000, 2)
    """

    bytes: int | None
    elements: int | None
    fraction: float | None
    flops: int | None

    def __init__(
        self,
        size: str | int | None = None,
        *,
        elements: int | None = None,
        fraction: float | None = None,
        flops: int | None = None,
    ) -> None:
        given = {"bytes": _bytes(size), "elements": elements, "fraction": fraction, "flops": flops}
        for name, value in given.items():
            object.__setattr__(self, name, value)
        named = {name: value for name, value in given.items() if value is not None}
        if len(named) != 1:
            raise TitheError(
                "Budget",
                found=f"{len(named)} measures ({', '.join(named) or 'none'})",
                expected="exactly one of bytes, elements, fraction, flops",
                remedy='write Budget("64MB"), Budget(elements=27_946) or Budget(fraction=0.01)',
            )
        name, value = next(iter(named.items()))
        if not _is_number(value) or (name != "fraction" and math.isfinite(value) and value != int(value)):
            raise TitheError(
                "Budget",
                found=f"{name}={value!r}",
                expected="a number" if name == "fraction" else f"a whole number of {name}",
                remedy=_instead(name, value),
            )
        if not (math.isfinite(value) and value > 0) or (name == "fraction" and value > 1):
            raise TitheError(
                "Budget",
                found=f"{name}={value}",
                expected="a fraction in (0, 1]" if name == "fraction" else "a positive number",
                remedy=written_as_percent("fraction", value, "give a limit that leaves something to select")
                if name == "fraction"
                else "give a limit that leaves something to select",
            )

    def of(self, total: int) -> int:
        """Return the limit as a whole number when selecting everything costs `total`; a fraction is rounded down.

        The tiny slack keeps 0.29 · 100 at 29 where binary fractions would give 28.
        """
        if self.fraction is not None:
            return math.floor(self.fraction * total + 1e-9)
        return int(next(value for field in fields(self) if (value := getattr(self, field.name)) is not None))


def _bytes(size: str | int | None) -> int | None:
    if size is None or not isinstance(size, str):
        return size
    percent = re.fullmatch(r"\s*([0-9]*\.?[0-9]+)\s*%\s*", size)
    if percent is not None and 0 < float(percent[1]) <= 100:
        raise TitheError(
            "Budget",
            found=repr(size),
            expected="a number of bytes with its unit",
            remedy=f"write Budget(fraction={float(percent[1]) / 100:g})",
        )
    match = re.fullmatch(r"\s*([0-9]*\.?[0-9]+)\s*([a-zA-Z]+)\s*", size)
    if match is None or match[2].lower() not in _UNITS:
        raise TitheError(
            "Budget", found=repr(size), expected="a number and a unit of " + ", ".join(_UNITS), remedy='write "64MB"'
        )
    return int(float(match[1]) * _UNITS[match[2].lower()])


def _is_number(value: object) -> bool:
    return isinstance(value, (int, float)) and not isinstance(value, bool)


def _instead(name: str, value: Any) -> str:
    """What a measure that is no count was most likely meant to be."""
    if name != "fraction" and _is_number(value) and 0 < value < 1:
        return f"write Budget(fraction={value:g}) for that part of what selecting everything would cost"
    return 'write Budget("64MB"), Budget(elements=27_946) or Budget(fraction=0.01)'


def written_as_percent(name: str, value: Any, otherwise: str) -> str:
    """Return the remedy for a fraction out of range: that number of percent written as one, or else `otherwise`.

    Args:
        name: of the setting.
        value: what was given.
        otherwise: the remedy where it was not meant as percent.

    Example:
        >>> written_as_percent("density", 5, "try 0.005")
        'write density=0.05 for 5 %'
    """
    if _is_number(value) and 1 < value <= 100:
        return f"write {name}={value / 100:g} for {value:g} %"
    return otherwise
