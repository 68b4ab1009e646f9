"""Text classification: one class a text, or a pair of texts."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from tithe.app.train import metrics
from tithe.app.train.cells import read_label, read_text
from tithe.app.train.recipe import Recipe
from tithe.app.train.rows import Batch
from tithe.app.train.sections import DataSection
from tithe.app.train.tasks.base import Predictor, Rows, Task, check_outputs, output_of, stacked
from tithe.app.train.tasks.classes import class_numbers, class_order
from tithe.app.train.tasks.text import TextTask


class Classification(Task):
    """One class for each row, whatever a row is."""

    def cell(self, data: DataSection, key: str, value: object, names: Sequence[str]) -> Any:
        """Take a label or a text."""
        return read_label(value, names, set(data.labels or ())) if key == "label" else read_text(value)

    def blank(self, text: Any, classes: Sequence[str]) -> Any:
        """The first class stands in."""
        return classes[0]

    def classes_in(self, label: Any) -> Iterable[str]:
        """The label is the class itself."""
        return (label,)

    def classes(self, recipe: Recipe, train: Rows) -> tuple[str, ...]:
        """There are at least two classes."""
        return class_order(recipe, train, self.classes_in)

    def targets(self, recipe: Recipe, rows: Rows, classes: tuple[str, ...]) -> Tensor:
        """(N,), int64: the number of each row's class."""
        return torch.tensor([number for (number,) in class_numbers(recipe, rows, classes, self.classes_in)])

    def blank_targets(self, data: DataSection, num: int, tokens: int, outputs: int) -> Tensor:
        """A class for each text."""
        return torch.zeros(num, dtype=torch.int64)

    def loss(self, model: nn.Module, batch: Batch) -> Tensor:
        """Mean cross-entropy of a batch."""
        return F.cross_entropy(output_of(model, batch), batch["labels"])

    def tally(self, model: nn.Module, batch: Batch) -> Tensor:
        """The class that is answered, and the one that is right."""
        return stacked([output_of(model, batch).float().argmax(-1), batch["labels"]])

    def score(self, metric: str, tally: Tensor, classes: Sequence[str] = ()) -> float:
        """Accuracy, F1 or the Matthews correlation."""
        answers, targets = tally.long().unbind(1)
        return metrics.CLASSES[metric](answers, targets)

    def check(self, recipe: Recipe, model: nn.Module, batch: Batch, num_classes: int) -> None:
        """Compare the number of outputs with the number of classes."""
        wanted = recipe.model.num_labels or num_classes
        output, num = output_of(model, batch), len(batch["labels"])
        check_outputs(recipe, output, num, num_classes, wanted=wanted, per_token=False)

    def predict(self, model: nn.Module, batch: Batch, how: Predictor) -> list[dict[str, Any]]:
        """The most likely class, and its probability."""
        best = output_of(model, batch).float().softmax(-1)[:, : len(how.labels)].max(-1)
        return [
            {"label": how.labels[number], "probability": round(probability, 6)}
            for number, probability in zip(best.indices.tolist(), best.values.tolist(), strict=True)
        ]


class TextClassification(Classification, TextTask):
    """One class for each text."""

    name = "text-classification"
    architecture = "AutoModelForSequenceClassification"
