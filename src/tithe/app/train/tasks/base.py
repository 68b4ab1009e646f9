"""What a task is: how cells become rows, rows batches, a batch a loss, and outputs metrics and predictions."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from types import MappingProxyType
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from tithe.app.train.cells import Fault
from tithe.app.train.images import Images
from tithe.app.train.recipe import Recipe
from tithe.app.train.rows import Batch, Table, Targets
from tithe.app.train.sections import DataSection
from tithe.app.train.terms import TERMS, Terms
from tithe.errors import TitheError

Rows = Table | Images


class Encoder(ABC):
    """Makes batches of rows."""

    tokenizer: Any
    """The tokenizer that is written beside the model; None for images."""

    @abstractmethod
    def encode(self, rows: Rows, targets: Targets) -> tuple[Sequence[Any], tuple[str, ...]]:
        """Turn rows into items, of which batches are made.

        Args:
            rows: of one split.
            targets: what the task made of their labels, one a row.

        Returns:
            The items, which need not be as many as rows; and what the user should know of how they were made.

        Raises:
            TitheError: a row cannot be encoded; it names the line.
        """

    @abstractmethod
    def join(self, items: Sequence[Any]) -> Batch:
        """Make a batch of items."""

    @abstractmethod
    def largest(self, items: Sequence[Any]) -> int:
        """Find the largest item, the first of several: a batch with it is as large as batches can be."""

    def statistics(self) -> dict[str, Any]:
        """The keys of `[data]` that were measured on the training rows, with their values."""
        return {}

    def weights(self, items: Sequence[Any]) -> Sequence[int] | None:
        """Count in each item what the mean loss of a batch is a mean of, such as predicted tokens; None: items."""
        return None


@dataclass(frozen=True)
class Predictor:
    """What `tithe predict` needs besides a model on a device.

    Args:
        labels: the classes in the order of the outputs.
        encoder: of the run.
        new_tokens: how many tokens are generated at most, where the task generates.
        positions: of a text that the model has learned; None where they are computed.
    """

    labels: tuple[str, ...]
    encoder: Encoder
    new_tokens: int
    positions: int | None = None


class Task(ABC):
    """One task. Objects hold no state: everything they need is handed to them."""

    name: ClassVar[str]
    """How a recipe calls it."""
    architecture: ClassVar[str]
    """The class of transformers that loads a model for it, such as "AutoModelForCausalLM"."""
    settings: ClassVar[Mapping[str, Any]] = MappingProxyType({})
    """What the model's configuration is told, besides the number of labels."""
    needs_head: ClassVar[bool] = True
    """Whether a model has to have a head that is new to the task."""
    has_targets: ClassVar[bool] = True
    """Whether rows say what is right, so that answers can be scored."""
    generates: ClassVar[bool] = False
    """Whether answers are texts that the model writes."""

    @property
    def terms(self) -> Terms:
        """What a recipe may say of it."""
        return TERMS[self.name]

    # -------------------------------------------------------------------------------------------------------- rows

    def columns(self, data: DataSection) -> dict[str, str]:
        """The columns that are read, key of `[data]` → name; "text" or "messages" is the input, "label" the target."""
        wanted = {"text": data.text, "label": data.label}
        return wanted if data.text_pair is None else {**wanted, "text_pair": data.text_pair}

    @abstractmethod
    def cell(self, data: DataSection, key: str, value: object, names: Sequence[str]) -> Any:
        """Take one cell of a row.

        Args:
            data: the recipe's section.
            key: of `[data]` that names the column.
            value: of the cell.
            names: of the classes, where cells are their numbers.

        Returns:
            What the row gets, or a `Fault`.
        """

    def row_fault(self, cells: Mapping[str, Any]) -> tuple[str, Fault] | None:
        """Say what is wrong with a row whose cells are each right, and under which key."""
        return None

    def classes_in(self, label: Any) -> Iterable[str]:
        """The classes that a row's label is made of; none where the task knows no classes."""
        return ()

    @abstractmethod
    def classes(self, recipe: Recipe, train: Rows) -> tuple[str, ...]:
        """The classes in the order of the model's outputs; empty where the task knows none.

        Raises:
            TitheError: they are not classes that can be told apart.
        """

    @abstractmethod
    def targets(self, recipe: Recipe, rows: Rows, classes: tuple[str, ...]) -> Targets:
        """Turn labels into what the model is trained on, one a row.

        Raises:
            TitheError: a label is none of the classes; it names the line.
        """

    def num_outputs(self, recipe: Recipe, classes: Sequence[str]) -> int:
        """Count the outputs that the model is to have."""
        return recipe.model.num_labels or max(1, len(classes))

    @abstractmethod
    def blank_targets(self, data: DataSection, num: int, tokens: int, outputs: int) -> Tensor:
        """Targets (num, …) of the largest shape, for a price; their values do not matter.

        Args:
            data: the recipe's section.
            num: samples.
            tokens: of an input, where inputs are texts.
            outputs: of the model.
        """

    # ------------------------------------------------------------------------------------------------------- model

    @abstractmethod
    def loss(self, model: nn.Module, batch: Batch) -> Tensor:
        """The mean loss of a batch, over what `Encoder.weights` counts."""

    @abstractmethod
    def tally(self, model: nn.Module, batch: Batch) -> Tensor:
        """Run the model, which is in evaluation mode, and note of each sample what the metrics need.

        Returns:
            (N, width), float64, on the model's device.
        """

    @abstractmethod
    def score(self, metric: str, tally: Tensor, classes: Sequence[str] = ()) -> float:
        """A metric of a split.

        Args:
            metric: one of the task's.
            tally: (N, width), of all its samples.
            classes: in the order of the model's outputs.
        """

    @abstractmethod
    def check(self, recipe: Recipe, model: nn.Module, batch: Batch, num_classes: int) -> None:
        """Run the model on a batch, and compare what it gives with what the data asks for.

        Raises:
            TitheError: the number of outputs is another.
        """

    @abstractmethod
    def blank(self, text: Any, classes: Sequence[str]) -> Any:
        """A label that a row without one may have while it is answered: any that `targets` takes."""

    def prompts(self, how: Predictor, rows: Rows, targets: Targets) -> tuple[Sequence[Any], tuple[str, ...]]:
        """Turn rows into items that are answered, one a row; returns what the user should know of it, too."""
        return how.encoder.encode(rows, targets)

    @abstractmethod
    def predict(self, model: nn.Module, batch: Batch, how: Predictor) -> list[dict[str, Any]]:
        """What the model says of each sample, as the columns of a row."""


def output_of(model: nn.Module, batch: Batch) -> Tensor:
    """Run the model on a batch, and return its logits."""
    inputs = batch["inputs"]
    output: Any = model(**inputs) if isinstance(inputs, dict) else model(inputs)
    return output if isinstance(output, Tensor) else output["logits"]


def check_outputs(recipe: Recipe, output: Tensor, num: int, num_classes: int, *, wanted: int, per_token: bool) -> None:
    """Compare the shape of a model's output with the classes in the data.

    Args:
        recipe: the run.
        output: of the model.
        num: samples that it is of.
        num_classes: in the data; 0 for a regression.
        wanted: outputs that the model should have.
        per_token: whether there is an output for each token.

    Raises:
        TitheError: it is another; it names both numbers.
    """
    if output.ndim == 2 + per_token and len(output) == num and output.shape[-1] == wanted:
        return
    key = "num_labels" if recipe.model.num_labels is not None else "callable"
    place = recipe.place("model", key) if getattr(recipe.model, key) is not None else recipe.place("model")
    if output.ndim != 2 + per_token or len(output) != num:
        raise TitheError(
            place,
            found=f"an output of shape {tuple(output.shape)} for {num} examples",
            expected=f"({num}, {wanted}): one row an example"
            if not per_token
            else f"({num}, tokens, {wanted}): one row a token",
            remedy="return the logits of the classes" if num_classes else "return one value an example",
        )
    found = output.shape[-1]
    told = f"{num_classes} classes in the data" if num_classes else "one value an example"
    if num_classes and found > num_classes:
        remedy = f"set num_labels = {found} in [model], and leave the last {found - num_classes} unused"
        remedy += ", or let the callable return num_labels outputs"
    else:
        remedy = "let the callable return as many outputs as its argument num_labels says"
    raise TitheError(place, found=f"a model with {found} outputs", expected=f"{wanted}: {told}", remedy=remedy)


def stacked(columns: Sequence[Tensor]) -> Tensor:
    """Make a tally (N, width) of columns (N,)."""
    return torch.stack([column.double() for column in columns], dim=1)
