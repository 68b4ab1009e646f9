"""Multi-label classification: any number of classes a text, or a pair of texts."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from types import MappingProxyType
from typing import Any, cast

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from tithe.app.train.cells import ABSENT, Fault, read_label, read_list, read_text
from tithe.app.train.metrics import micro_f1
from tithe.app.train.recipe import Recipe
from tithe.app.train.rows import Batch
from tithe.app.train.sections import DataSection
from tithe.app.train.tasks.base import Predictor, Rows, check_outputs, output_of
from tithe.app.train.tasks.classes import class_numbers, class_order
from tithe.app.train.tasks.text import TextTask
from tithe.errors import TitheError

_FLAGS = {"0", "1", "True", "False"}
_SEPARATORS = (",", ";", "|", "/", " ")


class MultiLabel(TextTask):
    """Each class is one question, answered yes or no."""

    name = "multi-label"
    architecture = "AutoModelForSequenceClassification"
    settings = MappingProxyType({"problem_type": "multi_label_classification"})

    def cell(self, data: DataSection, key: str, value: object, names: Sequence[str]) -> Any:
        """Take a list of classes, or a text of classes with `separator` between them; an empty one means none."""
        if key != "label":
            return read_text(value)
        expected = f"a list of classes, or a text of them parted by {data.separator!r}"
        if value is None or value is ABSENT:
            found = "null" if value is None else "nothing"
            return Fault(found, missing=True, expected=expected, remedy="write the classes, or [] for none")
        known = set(data.labels or ())
        listed = read_list(value, known) if isinstance(value, str) else None
        if isinstance(listed, Fault):
            return Fault(listed.found, expected=expected, remedy=listed.remedy)
        if listed is not None:
            value = listed
        if isinstance(value, str):
            value = [part for part in value.split(data.separator) if part.strip()]
        items = cast("Sequence[object]", value if isinstance(value, list | tuple) else [value])
        read = [read_label(item, names, known) for item in items]
        for item in read:
            if isinstance(item, Fault):
                return Fault(item.found, expected=expected, remedy="correct the line")
        if len(set(read)) < len(read):
            twice = next(item for item in read if read.count(item) > 1)
            remedy = (
                "write the names of a row's classes, not 0 or 1 for each" if set(read) <= _FLAGS else "write it once"
            )
            return Fault(f"the class {twice!r} twice", expected=expected, remedy=remedy)
        return tuple(read)

    def blank(self, text: Any, classes: Sequence[str]) -> Any:
        """No class stands in."""
        return ()

    def classes_in(self, label: Any) -> Iterable[str]:
        """The label is a tuple of classes."""
        return cast("tuple[str, ...]", label)

    def classes(self, recipe: Recipe, train: Rows) -> tuple[str, ...]:
        """There are at least two classes, and rows that differ in them."""
        classes = class_order(recipe, train, self.classes_in)
        if recipe.data.labels is None:
            _check_separator(recipe, train, classes)
        if all(len(label) == len(classes) for label in train.label):
            flags = set(classes) <= _FLAGS
            raise TitheError(
                train.place(0),
                found=f"every class ({', '.join(classes[:12])}) in every row",
                expected="rows that differ in their classes",
                remedy="write the names of a row's classes, not 0 or 1 for each" if flags else "check [data] label",
            )
        return classes

    def targets(self, recipe: Recipe, rows: Rows, classes: tuple[str, ...]) -> Tensor:
        """(N, outputs), float32: one for each class that a row has."""
        targets = torch.zeros(len(rows.label), self.num_outputs(recipe, classes))
        for row, numbers in enumerate(class_numbers(recipe, rows, classes, self.classes_in)):
            targets[row, numbers] = 1.0
        return targets

    def blank_targets(self, data: DataSection, num: int, tokens: int, outputs: int) -> Tensor:
        """A number for each class."""
        return torch.empty(num, outputs)

    def loss(self, model: nn.Module, batch: Batch) -> Tensor:
        """Mean binary cross-entropy over the classes of a batch."""
        return F.binary_cross_entropy_with_logits(output_of(model, batch).float(), batch["labels"])

    def tally(self, model: nn.Module, batch: Batch) -> Tensor:
        """The classes that are answered (more likely than not), and those that are right."""
        answers_NC = output_of(model, batch).float() > 0
        return torch.cat([answers_NC.double(), batch["labels"].double()], dim=1)

    def score(self, metric: str, tally: Tensor, classes: Sequence[str] = ()) -> float:
        """F1 over all classes of all rows together, or the share of rows in which every class is right."""
        answers_NC, targets_NC = tally.chunk(2, dim=1)
        if metric == "exact_match":
            return float((answers_NC == targets_NC).all(1).double().mean())
        hits = float((answers_NC * targets_NC).sum())
        return micro_f1(hits, float(answers_NC.sum()), float(targets_NC.sum()))

    def check(self, recipe: Recipe, model: nn.Module, batch: Batch, num_classes: int) -> None:
        """Compare the number of outputs with the number of classes."""
        wanted = recipe.model.num_labels or num_classes
        output, num = output_of(model, batch), len(batch["labels"])
        check_outputs(recipe, output, num, num_classes, wanted=wanted, per_token=False)

    def predict(self, model: nn.Module, batch: Batch, how: Predictor) -> list[dict[str, Any]]:
        """The classes that are more likely than not, and the probability of each."""
        rows: list[dict[str, Any]] = []
        for values in output_of(model, batch).float().sigmoid()[:, : len(how.labels)].tolist():
            found = {name: round(value, 6) for name, value in zip(how.labels, values, strict=True)}
            rows.append({"labels": [name for name, value in found.items() if value > 0.5], "probabilities": found})
        return rows


def _check_separator(recipe: Recipe, train: Rows, classes: Sequence[str]) -> None:
    """Refuse a class that is made of others: a separator that the recipe does not name was taken for a letter.

    Raises:
        TitheError: there is one; it names its line.
    """
    names = {name.casefold() for name in classes}
    for name in classes:
        for separator in _SEPARATORS:
            parts = [part.strip().casefold() for part in name.split(separator)]
            if len(parts) > 1 and names.issuperset(parts):
                row = next(row for row, label in enumerate(train.label) if name in label)
                raise TitheError(
                    train.place(row),
                    found=f"the class {name!r} beside {', '.join(map(repr, name.split(separator)))}",
                    expected=f"classes parted by {recipe.data.separator!r} ({recipe.place('data', 'separator')})",
                    remedy=f"set separator = {separator!r} in [data], or list every class in labels if it is one",
                )
