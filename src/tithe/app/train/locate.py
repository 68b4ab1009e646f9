"""Which line of a TOML text a key stands on: `tomllib` reads values but forgets where they were."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

_HEADER = re.compile(r"^\s*\[\[?\s*(?P<path>[^\[\]]+?)\s*\]\]?\s*(#.*)?$")
_KEY = re.compile(
    r"""^\s*(?P<path>(?:[A-Za-z0-9_-]+|"[^"]*"|'[^']*')(?:\s*\.\s*(?:[A-Za-z0-9_-]+|"[^"]*"|'[^']*'))*)\s*=(?P<value>.*)$"""
)
_PART = re.compile(r"""[A-Za-z0-9_-]+|"[^"]*"|'[^']*'""")
_STRING = re.compile(r""""(?:\\.|[^"\\])*"|'[^']*\'""")


@dataclass(frozen=True)
class Lines:
    """Line numbers of the tables and keys of a TOML text, and the settings given on the command line instead.

    Args:
        source: the name to print for the file.
        lines: path of a key (or of a table) → its line, from 1.
        overridden: dotted paths that were set outside the file.
    """

    source: str
    lines: Mapping[tuple[str, ...], int] = field(default_factory=dict[tuple[str, ...], int])
    overridden: frozenset[tuple[str, ...]] = frozenset()

    def place(self, *path: str) -> str:
        r"""Say where a key stands, or the closest table around it.

        Example:
            >>> locate("[run]\nseed = 1\n", "a.toml").place("run", "seed")
            'a.toml line 2: [run] seed'
        """
        label = f"[{path[0]}]" + (f" {'.'.join(path[1:])}" if path[1:] else "") if path else "recipe"
        for stop in range(len(path), 0, -1):
            if path[:stop] in self.overridden:
                return f"--set {'.'.join(path[:stop])}: {label}"
            if path[:stop] in self.lines:
                return f"{self.source} line {self.lines[path[:stop]]}: {label}"
        return f"{self.source}: {label}"


def locate(text: str, source: str, overridden: Sequence[tuple[str, ...]] = ()) -> Lines:
    """Find the line of every table header and key in a valid TOML text.

    Keys of an inline table stand on the line of the key that holds it; strings and arrays over several lines are
    stepped over.

    Args:
        text: the TOML text.
        source: the name to print for it.
        overridden: paths of the keys that were set on the command line.
    """
    lines: dict[tuple[str, ...], int] = {}
    table: tuple[str, ...] = ()
    closing, depth = "", 0
    for number, line in enumerate(text.splitlines(), start=1):
        if closing:
            closing, line = ("", line.split(closing, 1)[1]) if closing in line else (closing, "")
            depth += _depth(line)
            continue
        if depth > 0:
            value = line
        elif match := _HEADER.match(line):
            table = _parts(match["path"])
            lines.setdefault(table, number)
            continue
        elif match := _KEY.match(line):
            lines.setdefault(table + _parts(match["path"]), number)
            value = match["value"]
        else:
            continue
        closing = _unclosed(value)
        depth = max(0, depth + (0 if closing else _depth(value)))
    return Lines(source, lines, frozenset(overridden))


def _parts(path: str) -> tuple[str, ...]:
    return tuple(part.strip("\"'") for part in _PART.findall(path))


def _unclosed(value: str) -> str:
    for quote in ('"""', "'''"):
        if value.count(quote) % 2:
            return quote
    return ""


def _depth(value: str) -> int:
    bare = _STRING.sub("", value).split("#", 1)[0]
    return bare.count("[") + bare.count("{") - bare.count("]") - bare.count("}")
