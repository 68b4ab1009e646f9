"""Docstrings begin with a sentence: each public one says in more than three words what its name is or does."""

from __future__ import annotations

import ast
from collections.abc import Iterator
from pathlib import Path

import pytest

PACKAGE = Path(__file__).parents[1] / "src" / "tithe"
FEWEST_WORDS = 4

Documented = ast.FunctionDef | ast.AsyncFunctionDef | ast.ClassDef


def public(body: list[ast.stmt], prefix: str) -> Iterator[tuple[str, Documented]]:
    """Dotted name and node of the public classes, functions and methods, those in classes included."""
    for node in body:
        if isinstance(node, Documented) and not node.name.startswith("_"):
            name = f"{prefix}.{node.name}"
            yield name, node
            if isinstance(node, ast.ClassDef):
                yield from public(node.body, name)


def first_sentences(room: str) -> Iterator[tuple[str, str]]:
    """Place and first line of each public docstring of a room, a file or a folder right under src/tithe."""
    folder = PACKAGE / room
    for path in sorted(folder.rglob("*.py")) if folder.is_dir() else [PACKAGE / f"{room}.py"]:
        for name, node in public(ast.parse(path.read_text("utf-8")).body, path.stem):
            docstring = ast.get_docstring(node)
            if docstring is not None:
                yield f"{path.relative_to(PACKAGE)}:{node.lineno} {name}", docstring.splitlines()[0]


ROOMS = sorted({path.stem for path in PACKAGE.iterdir() if path.is_dir() or path.suffix == ".py"} - {"__pycache__"})


@pytest.mark.parametrize("room", ROOMS)
def test_every_public_docstring_begins_with_a_sentence(room: str) -> None:
    short = [f"{place}: {line}" for place, line in first_sentences(room) if len(line.split()) < FEWEST_WORDS]
    assert short == []
