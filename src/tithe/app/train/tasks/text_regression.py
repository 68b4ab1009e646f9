"""Text regression: one number a text, or a pair of texts."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from tithe.app.train import metrics
from tithe.app.train.cells import read_number, read_text
from tithe.app.train.recipe import Recipe
from tithe.app.train.rows import Batch
from tithe.app.train.sections import DataSection
from tithe.app.train.tasks.base import Predictor, Rows, check_outputs, output_of, stacked
from tithe.app.train.tasks.text import TextTask


class TextRegression(TextTask):
    """One number for each text."""

    name = "text-regression"
    architecture = "AutoModelForSequenceClassification"

    def cell(self, data: DataSection, key: str, value: object, names: Sequence[str]) -> Any:
        """Take a number or a text."""
        return read_number(value) if key == "label" else read_text(value)

    def blank(self, text: Any, classes: Sequence[str]) -> Any:
        """A zero stands in."""
        return "0"

    def classes(self, recipe: Recipe, train: Rows) -> tuple[str, ...]:
        """There are no classes."""
        return ()

    def targets(self, recipe: Recipe, rows: Rows, classes: tuple[str, ...]) -> Tensor:
        """(N,), float32: each row's value."""
        return torch.tensor([float(label) for label in rows.label], dtype=torch.float32)

    def blank_targets(self, data: DataSection, num: int, tokens: int, outputs: int) -> Tensor:
        """A value for each text."""
        return torch.empty(num)

    def loss(self, model: nn.Module, batch: Batch) -> Tensor:
        """Mean squared error of a batch."""
        return F.mse_loss(output_of(model, batch).squeeze(-1), batch["labels"])

    def tally(self, model: nn.Module, batch: Batch) -> Tensor:
        """The number that is answered, and the right one."""
        return stacked([output_of(model, batch).float().squeeze(-1), batch["labels"]])

    def score(self, metric: str, tally: Tensor, classes: Sequence[str] = ()) -> float:
        """A correlation of the two numbers."""
        answers, targets = tally.unbind(1)
        return metrics.VALUES[metric](answers, targets)

    def check(self, recipe: Recipe, model: nn.Module, batch: Batch, num_classes: int) -> None:
        """Look for one output an example."""
        check_outputs(recipe, output_of(model, batch), len(batch["labels"]), 0, wanted=1, per_token=False)

    def predict(self, model: nn.Module, batch: Batch, how: Predictor) -> list[dict[str, Any]]:
        """The value that is answered."""
        return [{"value": value} for value in output_of(model, batch).float().squeeze(-1).tolist()]
