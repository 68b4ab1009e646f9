"""Token classification: one class for each word of a text that comes in words."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, cast, final

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from tithe.app.train.cells import Fault, read_label, read_list, read_text
from tithe.app.train.metrics import micro_f1
from tithe.app.train.recipe import Recipe
from tithe.app.train.rows import Batch, Table, Targets
from tithe.app.train.sections import DataSection
from tithe.app.train.tasks.base import Encoder, Predictor, Rows, check_outputs, output_of, stacked
from tithe.app.train.tasks.classes import class_numbers, class_order
from tithe.app.train.tasks.text import IGNORED, TextTask, padded
from tithe.errors import TitheError

OUTSIDE = "O"
"""The class of words that belong to nothing; it is left out of F1."""


class TokenClassification(TextTask):
    """One class for each word: its first token is trained and scored, the others are left out."""

    name = "token-classification"
    architecture = "AutoModelForTokenClassification"

    def columns(self, data: DataSection) -> dict[str, str]:
        """The words, and their classes."""
        return {"text": data.text, "label": data.label}

    def cell(self, data: DataSection, key: str, value: object, names: Sequence[str]) -> Any:
        """Take a list, or a text of words parted by blanks, as tables without lists have it."""
        what = "classes" if key == "label" else "words"
        known = set(data.labels or ())
        if isinstance(value, str):
            listed = read_list(value)
            if isinstance(listed, Fault):
                return Fault(listed.found, expected=f"a list of {what}", remedy=listed.remedy)
            is_list = listed is not None and (key == "label" or all(isinstance(item, str) for item in listed))
            value = listed if is_list else value.split()
        if not isinstance(value, list | tuple):
            plain = read_text(value)
            found = plain if isinstance(plain, Fault) else Fault(f"the value {plain!r}")
            return Fault(found.found, missing=found.missing, expected=f"a list of {what}", remedy=f"write the {what}")
        items = cast("Sequence[object]", value)
        if not items:
            return Fault("an empty list", expected=f"a list of {what}", remedy="remove the line")
        read = [read_label(item, names, known) if key == "label" else read_text(item) for item in items]
        for number, item in enumerate(read, start=1):
            if isinstance(item, Fault):
                return Fault(
                    f"{item.found} as number {number}", expected=f"a list of {what}", remedy="correct the line"
                )
        if key == "label" and (marked := [item for item in read if item == str(IGNORED) and item not in known]):
            return Fault(
                f"the class {marked[0]}, which stands for a token that is left out",
                expected="the class of each word",
                remedy="write the classes of words, before they were aligned with tokens",
            )
        return tuple(read)

    def row_fault(self, cells: Mapping[str, Any]) -> tuple[str, Fault] | None:
        """There is one class for each word."""
        words, classes = len(cells["text"]), len(cells["label"])
        if words == classes:
            return None
        return "label", Fault(
            f"{classes} classes for {words} words", expected="a class for each word", remedy="correct the line"
        )

    def blank(self, text: Any, classes: Sequence[str]) -> Any:
        """The first class stands in for each word."""
        return (classes[0],) * len(text)

    def classes_in(self, label: Any) -> Iterable[str]:
        """The classes of a row's words."""
        return cast("tuple[str, ...]", label)

    def classes(self, recipe: Recipe, train: Rows) -> tuple[str, ...]:
        """There are at least two classes."""
        return class_order(recipe, train, self.classes_in)

    def targets(self, recipe: Recipe, rows: Rows, classes: tuple[str, ...]) -> Targets:
        """A list of class numbers for each row."""
        return class_numbers(recipe, rows, classes, self.classes_in)

    def encoder(self, recipe: Recipe, tokenizer: Any, length: int) -> Encoder:
        """Words as tokens; the tokenizer has to say which token belongs to which word."""
        if not tokenizer.is_fast:
            raise TitheError(
                recipe.place("model", "tokenizer"),
                found=f"{type(tokenizer).__name__}, which does not say which token belongs to which word",
                expected="a fast tokenizer (one with a tokenizer.json)",
                remedy="use another tokenizer",
            )
        return WordEncoder(tokenizer, length)

    def blank_targets(self, data: DataSection, num: int, tokens: int, outputs: int) -> Tensor:
        """A class for each token."""
        return torch.zeros(num, tokens, dtype=torch.int64)

    def loss(self, model: nn.Module, batch: Batch) -> Tensor:
        """Mean cross-entropy over the words of a batch."""
        return F.cross_entropy(output_of(model, batch).flatten(0, 1), batch["labels"].flatten(), ignore_index=IGNORED)

    def tally(self, model: nn.Module, batch: Batch) -> Tensor:
        """Of each row: its words, those that are right, and of each class the hits, the answers and the right ones."""
        logits_NTC, labels_NT = output_of(model, batch).float(), batch["labels"]
        answers_NT, num = logits_NTC.argmax(-1), logits_NTC.shape[-1]
        seen_NT = labels_NT != IGNORED
        hits_NT = seen_NT & (answers_NT == labels_NT)
        columns = [seen_NT.sum(1), hits_NT.sum(1)]
        for number in range(num):
            answered, right = seen_NT & (answers_NT == number), seen_NT & (labels_NT == number)
            columns += [(answered & right).sum(1), answered.sum(1), right.sum(1)]
        return stacked(columns)

    def score(self, metric: str, tally: Tensor, classes: Sequence[str] = ()) -> float:
        """The share of words that are right, or F1 over the words that belong to something."""
        words, hits, *counts = tally.sum(0).tolist()
        if metric == "accuracy":
            return hits / words
        skipped = classes.index(OUTSIDE) if OUTSIDE in classes else -1
        kept = [counts[at : at + 3] for at in range(0, len(counts), 3) if at != 3 * skipped]
        return micro_f1(*(sum(column) for column in zip(*kept, strict=True)))

    def check(self, recipe: Recipe, model: nn.Module, batch: Batch, num_classes: int) -> None:
        """Compare the number of outputs with the number of classes."""
        wanted = recipe.model.num_labels or num_classes
        output, num = output_of(model, batch), len(batch["labels"])
        check_outputs(recipe, output, num, num_classes, wanted=wanted, per_token=True)

    def predict(self, model: nn.Module, batch: Batch, how: Predictor) -> list[dict[str, Any]]:
        """The most likely class of each word; of words that were cut off, none."""
        best = output_of(model, batch).float()[..., : len(how.labels)].argmax(-1)
        return [
            {"tags": [how.labels[int(number)] for number in answers[labels != IGNORED]]}
            for answers, labels in zip(best, batch["labels"], strict=True)
        ]


@final
@dataclass(frozen=True)
class WordEncoder(Encoder):
    """Makes batches of words with a class for each.

    Args:
        tokenizer: a fast Hugging Face tokenizer.
        max_length: tokens that a row is cut to.
    """

    tokenizer: Any
    max_length: int

    def encode(self, rows: Rows, targets: Targets) -> tuple[Sequence[Any], tuple[str, ...]]:
        """Tokens with the class of the word that each begins; the rest is left out."""
        assert isinstance(rows, Table)
        settings: dict[str, Any] = {"is_split_into_words": True, "truncation": True, "max_length": self.max_length}
        made = self.tokenizer([list(words) for words in rows.text], **settings)
        items, cut, silent = list[Any](), 0, 0
        for row, numbers in enumerate(targets):
            owners, before, labels = made.word_ids(row), None, list[int]()
            for owner in owners:
                labels.append(IGNORED if owner is None or owner == before else int(numbers[owner]))
                before = owner
            reached = {owner for owner in owners if owner is not None}
            cut += len(numbers) - 1 > max(reached, default=-1)
            silent += len(reached) < max(reached, default=-1) + 1
            if not reached:
                raise TitheError(
                    rows.place(row),
                    found="words of which the tokenizer makes no token",
                    expected="at least one token",
                    remedy="correct the line",
                )
            items.append(({key: made[key][row] for key in made}, labels))
        notes: list[str] = []
        if cut:
            notes.append(
                f"{cut} of {len(items)} rows are longer than {self.max_length} tokens ([data] max_length): cut"
            )
        if silent:
            notes.append(f"{silent} of {len(items)} rows have words of which the tokenizer makes no token: left out")
        return items, tuple(notes)

    def join(self, items: Sequence[Any]) -> Batch:
        """Pad to tensors (N, longest)."""
        inputs = dict(self.tokenizer.pad([item for item, _ in items], padding_side="right", return_tensors="pt"))
        return {"inputs": inputs, "labels": padded([labels for _, labels in items], IGNORED)}

    def largest(self, items: Sequence[Any]) -> int:
        """Find the one of the most tokens."""
        return max(range(len(items)), key=lambda item: len(items[item][1]))

    def weights(self, items: Sequence[Any]) -> Sequence[int] | None:
        """Count the words of each row."""
        return [sum(label != IGNORED for label in labels) for _, labels in items]
