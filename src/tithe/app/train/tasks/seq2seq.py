"""Sequence to sequence: a text is turned into another, such as a translation or a summary."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, final

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from tithe.app.train.cells import read_text
from tithe.app.train.recipe import Recipe
from tithe.app.train.rows import Batch, Table, Targets
from tithe.app.train.sections import DataSection
from tithe.app.train.tasks.base import Encoder, Predictor, Rows, stacked
from tithe.app.train.tasks.text import IGNORED, TextTask, cut_note, masks, padded
from tithe.errors import TitheError


class Seq2Seq(TextTask):
    """A target text for each source text, by an encoder and a decoder."""

    name = "seq2seq"
    architecture = "AutoModelForSeq2SeqLM"
    needs_head = False
    generates = True

    def columns(self, data: DataSection) -> dict[str, str]:
        """The source, and the target."""
        return {"text": data.text, "label": data.label}

    def cell(self, data: DataSection, key: str, value: object, names: Sequence[str]) -> Any:
        """Take a cell as a text."""
        return read_text(value)

    def blank(self, text: Any, classes: Sequence[str]) -> Any:
        """A blank stands in."""
        return " "

    def classes(self, recipe: Recipe, train: Rows) -> tuple[str, ...]:
        """There are no classes."""
        return ()

    def targets(self, recipe: Recipe, rows: Rows, classes: tuple[str, ...]) -> Targets:
        """The target texts, as they are."""
        return rows.label

    def encoder(self, recipe: Recipe, tokenizer: Any, length: int) -> Encoder:
        """Sources with their targets."""
        return PairEncoder(tokenizer, length, recipe.data.max_target_length)

    def blank_targets(self, data: DataSection, num: int, tokens: int, outputs: int) -> Tensor:
        """As many tokens as a target may have."""
        return torch.ones(num, data.max_target_length, dtype=torch.int64)

    def loss(self, model: nn.Module, batch: Batch) -> Tensor:
        """The mean over the target's tokens, which the model computes in its own forward."""
        return _run(model, batch)["loss"]

    def tally(self, model: nn.Module, batch: Batch) -> Tensor:
        """Of each row: the sum of its losses, its tokens, and whether all of them are the likeliest.

        The likeliest token at each place, after the right ones before it, is right everywhere if and only if writing
        the likeliest token each time writes the target: an exact match takes no generation.
        """
        logits_NTV, labels_NT = _run(model, batch)["logits"].float(), batch["labels"]
        losses_NT = F.cross_entropy(logits_NTV.transpose(1, 2), labels_NT, ignore_index=IGNORED, reduction="none")
        wrong_NT = (logits_NTV.argmax(-1) != labels_NT) & (labels_NT != IGNORED)
        return stacked([losses_NT.double().sum(1), (labels_NT != IGNORED).sum(1), ~wrong_NT.any(1)])

    def score(self, metric: str, tally: Tensor, classes: Sequence[str] = ()) -> float:
        """The mean loss of a token in nats, or the share of targets that are written exactly."""
        losses, counts, exact = tally.unbind(1)
        return float(losses.sum() / counts.sum()) if metric == "loss" else float(exact.mean())

    def check(self, recipe: Recipe, model: nn.Module, batch: Batch, num_classes: int) -> None:
        """Look for logits of each token of the target."""
        output, labels = _run(model, batch)["logits"], batch["labels"]
        if output.ndim != 3 or output.shape[:2] != labels.shape:
            raise TitheError(
                recipe.place("model"),
                found=f"an output of shape {tuple(output.shape)} for targets of {tuple(labels.shape)} tokens",
                expected="logits of every token of the target: (texts, tokens, vocabulary)",
                remedy="use a model with an encoder and a decoder",
            )

    def predict(self, model: nn.Module, batch: Batch, how: Predictor) -> list[dict[str, Any]]:
        """What the model writes, the likeliest token each time."""
        inputs, tokenizer = batch["inputs"], how.encoder.tokenizer
        assert isinstance(inputs, dict)
        generate: Any = model.generate
        written = generate(
            input_ids=inputs["input_ids"],
            attention_mask=inputs["attention_mask"],
            max_new_tokens=how.new_tokens or 1,
            do_sample=False,
            num_beams=1,
        )
        return [{"text": text} for text in tokenizer.batch_decode(written, skip_special_tokens=True)]


def _run(model: nn.Module, batch: Batch) -> Any:
    """Run a model that is told the labels: it makes the decoder's input of them, the target one place later."""
    inputs = batch["inputs"]
    assert isinstance(inputs, dict)
    return model(**inputs, labels=batch["labels"])


@final
@dataclass(frozen=True)
class PairEncoder(Encoder):
    """Makes batches of source and target texts.

    Args:
        tokenizer: a Hugging Face tokenizer.
        max_length: tokens that a source is cut to.
        max_target_length: tokens that a target is cut to.
    """

    tokenizer: Any
    max_length: int
    max_target_length: int

    def encode(self, rows: Rows, targets: Targets) -> tuple[Sequence[Any], tuple[str, ...]]:
        """The tokens of both texts."""
        assert isinstance(rows, Table)
        sources, wanted = list(rows.text), [str(target) for target in targets]
        given = self.tokenizer(sources, truncation=True, max_length=self.max_length)["input_ids"]
        right = self.tokenizer(text_target=wanted, truncation=True, max_length=self.max_target_length)["input_ids"]
        notes: list[str] = []
        for what, texts, tokens, length, key in (
            ("sources", sources, given, self.max_length, "max_length"),
            ("targets", wanted, right, self.max_target_length, "max_target_length"),
        ):
            full = [row for row, ids in enumerate(tokens) if len(ids) >= length]
            for note in cut_note(self.tokenizer, [texts], full, length):
                notes.append(note.replace(" texts ", f" {what} ").replace("max_length", key))
        return list(zip(given, right, strict=True)), tuple(notes)

    def join(self, items: Sequence[Any]) -> Batch:
        """Pad both on the right."""
        given, right = [given for given, _ in items], [right for _, right in items]
        pad = self.tokenizer.pad_token_id
        inputs = {"input_ids": padded(given, pad), "attention_mask": masks(given)}
        return {"inputs": inputs, "labels": padded(right, IGNORED)}

    def largest(self, items: Sequence[Any]) -> int:
        """The one of the most tokens, source and target together."""
        return max(range(len(items)), key=lambda item: len(items[item][0]) + len(items[item][1]))

    def weights(self, items: Sequence[Any]) -> Sequence[int] | None:
        """Count the tokens of each target."""
        return [len(right) for _, right in items]
