"""Classes: their order, whether two are one that is written in two ways, and their numbers."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from typing import Any

from tithe.app.train.cells import likeness
from tithe.app.train.recipe import Recipe
from tithe.app.train.tasks.base import Rows
from tithe.errors import TitheError


def class_order(recipe: Recipe, train: Rows, classes_in: Callable[[Any], Iterable[str]]) -> tuple[str, ...]:
    """The classes in the order of the model's outputs: the recipe's, else the data set's own, else that of the names.

    Args:
        recipe: the run.
        train: the training rows.
        classes_in: the classes that a row's label is made of.

    Raises:
        TitheError: there is one class only, two that are written alike, or more than the model has outputs.
    """
    seen = [(row, name) for row, label in enumerate(train.label) for name in classes_in(label)]
    labels = recipe.data.labels or train.names
    if not labels:
        labels = _order([name for _, name in seen])
        _check_spelling(train, seen, labels)
    names = {name for _, name in seen}
    if len(names) < 2 and len(labels) < 2:
        raise TitheError(
            train.place(0),
            found=f"only the label {seen[0][1]!r}" if seen else "no label in any row",
            expected="at least two classes",
            remedy="check [data] label, or add rows of other classes",
        )
    num_labels = recipe.model.num_labels
    if num_labels is not None and len(labels) > num_labels:
        row = next((row for row, label in seen if label == labels[num_labels]), 0)
        raise TitheError(
            train.place(row),
            found=f"label {labels[num_labels]!r}, class number {num_labels + 1} of {len(labels)}",
            expected=f"{num_labels} classes ({recipe.place('model', 'num_labels')})",
            remedy="raise num_labels, or correct the label",
        )
    return labels


def _order(labels: Sequence[str]) -> tuple[str, ...]:
    names = set(labels)
    if all(name.removeprefix("-").isdecimal() for name in names):
        return tuple(sorted(names, key=int))
    return tuple(sorted(names))


def _check_spelling(train: Rows, seen: Sequence[tuple[int, str]], labels: Sequence[str]) -> None:
    """Refuse two labels that a reader would take for one: they would be two outputs."""
    first: dict[str, int] = {}
    for row, name in seen:
        first.setdefault(name, row)
    alike: dict[object, str] = {}
    for label in labels:
        other = alike.setdefault(likeness(label), label)
        if other != label:
            one, two = sorted((other, label), key=lambda name: first[name])
            raise TitheError(
                train.place(first[two]),
                found=f"the label {two!r} beside {one!r} ({train.place(first[one])})",
                expected="one way to write a class",
                remedy="write them alike, or list every class in [data] labels if they are two",
            )


def class_numbers(
    recipe: Recipe, rows: Rows, classes: tuple[str, ...], classes_in: Callable[[Any], Iterable[str]]
) -> list[list[int]]:
    """The numbers of the classes that each row's label is made of.

    Raises:
        TitheError: a label is none of the classes; it names the line.
    """
    number, numbers = {label: index for index, label in enumerate(classes)}, list[list[int]]()
    for row, label in enumerate(rows.label):
        own = list(classes_in(label))
        if unknown := next((name for name in own if name not in number), None):
            known = ", ".join(classes[:12]) + (", …" if len(classes) > 12 else "")
            origin = recipe.place("data", "labels") if recipe.data.labels else "the training split"
            raise TitheError(
                rows.place(row),
                found=f"label {unknown!r}",
                expected=f"one of {known} ({origin})",
                remedy="correct the line, or list every label in [data] labels",
            )
        numbers.append([number[name] for name in own])
    return numbers
