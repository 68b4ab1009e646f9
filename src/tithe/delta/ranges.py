"""Write names of layers short: identical layers as one (`layer.{0-11}.query`), long names without their middle."""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Hashable, Iterable, Iterator, Sequence

_NUMBER = re.compile(r"(?<![^.])\d+(?![^.])")


def fold(names: Iterable[tuple[str, Hashable]]) -> dict[str, list[str]]:
    """Fold names that differ in one number alone, follow each other, and are alike in all else that is said of them.

    Two that are alike by chance among many that are not stay apart: three are folded, or all that there are. Where a
    name has several numbers, the one is folded in which it has most of its like.

    Args:
        names: each with what has to be equal; in order.

    Returns:
        Folded name → the names that it stands for, in the order of the first of each.

    Example:
        >>> fold([("layer.0.key", 4), ("layer.1.key", 4), ("layer.2.key", 4), ("head", 4)])
        {'layer.{0-2}.key': ['layer.0.key', 'layer.1.key', 'layer.2.key'], 'head': ['head']}
    """
    said = dict(names)
    ways = {name: [(name[: m.start()], name[m.end() :], int(m[0])) for m in _NUMBER.finditer(name)] for name in said}
    num_like = Counter((*way[:2], said[name]) for name, found in ways.items() for way in found)
    num_there = Counter(way[:2] for found in ways.values() for way in found)
    groups: dict[Hashable, list[tuple[int, str]]] = {}
    for name, found in ways.items():
        best = max(found, key=lambda way: num_like[(*way[:2], said[name])], default=(name, "", 0))
        groups.setdefault((*best[:2], said[name]), []).append((best[2], name))
    folded: dict[str, str] = {}
    for run in (run for members in groups.values() for run in _runs(sorted(members))):
        first, last = run[0], run[-1]
        head, tail = next((way[:2] for way in ways[first[1]] if f"{way[0]}{last[0]}{way[1]}" == last[1]), ("", ""))
        if len(run) > 2 or len(run) == num_there[head, tail] > 1:
            folded.update(dict.fromkeys((name for _, name in run), f"{head}{{{first[0]}-{last[0]}}}{tail}"))
    result: dict[str, list[str]] = {}
    for name in said:
        result.setdefault(folded.get(name, name), []).append(name)
    return result


def _runs(members: Sequence[tuple[int, str]]) -> Iterator[list[tuple[int, str]]]:
    """The parts of a sorted list in which each number follows the one before."""
    run: list[tuple[int, str]] = []
    for member in members:
        if run and member[0] != run[-1][0] + 1:
            yield run
            run = []
        run.append(member)
    if run:
        yield run


def shorten(names: Sequence[str], width: int) -> list[str]:
    """Leave parts out of the middle of names that are too long, never a number, and never so that two become one.

    Returns:
        A text for each name; the whole name, however long, where no shorter one tells it apart.

    Example:
        >>> shorten(["bert.encoder.layer.10.attention.self.query.weight"], 44)
        ['bert.….layer.10.attention.self.query.weight']
    """
    short = [_short(name, width) for name in names]
    count = Counter(short)
    return [name if count[text] > 1 else text for name, text in zip(names, short, strict=True)]


def _short(name: str, width: int) -> str:
    parts = name.split(".")
    numbered = [part[:1].isdigit() or part[:1] == "{" for part in parts]
    for counts in (False, True):  # what a number counts is left out only where nothing else is enough
        for length in range(1, len(parts) - 2):
            for start in range(1, len(parts) - length - 1):  # the last two say what it is
                stop = start + length
                text = ".".join([*parts[:start], "…", *parts[stop:]])
                if len(text) <= width < len(name) and not any(numbered[start : stop + (not counts)]):
                    return text
    return name
