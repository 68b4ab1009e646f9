"""Causal language modelling: every token is predicted from those before it, in texts or in an assistant's turns."""

from __future__ import annotations

import math
import weakref
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any, final

import torch
from torch import Tensor, nn
from torch.nn import functional as F

import tithe
from tithe.app.train.cells import read_text
from tithe.app.train.recipe import Recipe
from tithe.app.train.rows import Batch, Table, Targets
from tithe.app.train.sections import DataSection
from tithe.app.train.skipping import Unusable
from tithe.app.train.tasks.base import Encoder, Predictor, Rows, output_of, stacked
from tithe.app.train.tasks.chat import Chats, read_messages
from tithe.app.train.tasks.text import IGNORED, TextTask, masks, padded
from tithe.errors import TitheError

Piece = tuple[list[int], list[int]]
"""Tokens, and for each the same token where it is predicted, else `IGNORED`."""


class CausalLm(TextTask):
    """Every next token of a text, or of the assistant's turns in a chat."""

    name = "causal-lm"
    architecture = "AutoModelForCausalLM"
    needs_head = False
    generates = True
    has_targets = False

    def columns(self, data: DataSection) -> dict[str, str]:
        """A text, or the messages of a chat."""
        return {"text": data.text} if data.messages is None else {"messages": data.messages}

    def cell(self, data: DataSection, key: str, value: object, names: Sequence[str]) -> Any:
        """Take a text, or the messages of a chat."""
        return read_messages(value) if key == "messages" else read_text(value)

    def blank(self, text: Any, classes: Sequence[str]) -> Any:
        """Nothing has to stand in."""
        return ""

    def classes(self, recipe: Recipe, train: Rows) -> tuple[str, ...]:
        """There are no classes."""
        return ()

    def encoder(self, recipe: Recipe, tokenizer: Any, length: int) -> Encoder:
        """Texts or chats, each alone or one after the other."""
        chats = None if recipe.data.messages is None else Chats(tokenizer, recipe)
        if chats is not None:
            chats.check(recipe.place("data", "messages"))
        return CausalEncoder(tokenizer, length, recipe.data.packing, chats, recipe)

    def targets(self, recipe: Recipe, rows: Rows, classes: tuple[str, ...]) -> Targets:
        """The texts are their own targets."""
        return [None] * len(rows.label)

    def blank_targets(self, data: DataSection, num: int, tokens: int, outputs: int) -> Tensor:
        """A token for each token."""
        return torch.ones(num, tokens, dtype=torch.int64)

    def loss(self, model: nn.Module, batch: Batch) -> Tensor:
        """The mean over all tokens that are predicted."""
        return next_token_loss(model, batch)

    def tally(self, model: nn.Module, batch: Batch) -> Tensor:
        """The sum of the losses, in the row of the first sample, and the predicted tokens of each."""
        count_N = (batch["labels"][:, 1:] != IGNORED).sum(1)
        sums_N = torch.zeros(len(count_N), dtype=torch.float64, device=count_N.device)
        sums_N[0] = next_token_loss(model, batch).double() * count_N.sum()
        return stacked([sums_N, count_N])

    def score(self, metric: str, tally: Tensor, classes: Sequence[str] = ()) -> float:
        """The mean loss of a token in nats, or its exponential, the perplexity."""
        total, count = tally.sum(0).tolist()
        loss = total / count
        # Beyond this, the perplexity is no number that a float holds.
        return loss if metric == "loss" else math.exp(min(loss, 700.0))

    def check(self, recipe: Recipe, model: nn.Module, batch: Batch, num_classes: int) -> None:
        """Look for logits of each token."""
        output, ids = output_of(model, batch), batch["labels"]
        if output.ndim != 3 or output.shape[:2] != ids.shape:
            raise TitheError(
                recipe.place("model"),
                found=f"an output of shape {tuple(output.shape)} for tokens {tuple(ids.shape)}",
                expected="logits of every next token: (texts, tokens, vocabulary)",
                remedy="use a causal language model",
            )
        _check_causal(recipe, model, batch, output)

    def prompts(self, how: Predictor, rows: Rows, targets: Targets) -> tuple[Sequence[Any], tuple[str, ...]]:
        """The tokens of each text or chat, of which the last count where they are too many."""
        encoder = how.encoder
        assert isinstance(encoder, CausalEncoder)
        assert isinstance(rows, Table)
        if encoder.chats is not None:
            made = [(ids, [IGNORED] * len(ids)) for ids in map(encoder.chats.prompt, rows.text)]
        else:
            end = encoder.tokenizer.eos_token_id  # a text that is to go on does not end
            encoded = encoder.tokenizer(list(rows.text), verbose=False)["input_ids"]
            texts = [ids[:-1] if len(ids) > 1 and ids[-1] == end else ids for ids in encoded]
            made = [(ids, ids) for ids in texts]
        room = encoder.max_length if how.positions is None else min(encoder.max_length, how.positions - how.new_tokens)
        longer = sum(len(ids) > room for ids, _ in made)
        note = f"{longer} of {len(made)} rows are longer than {room} tokens: only their last are read"
        return [(ids[-room:], labels[-room:]) for ids, labels in made], (note,) if longer else ()

    def predict(self, model: nn.Module, batch: Batch, how: Predictor) -> list[dict[str, Any]]:
        """The perplexity of each text, and how the model goes on."""
        inputs, labels, rows = batch["inputs"], batch["labels"], list[dict[str, Any]]()
        assert isinstance(inputs, dict)
        logits = output_of(model, batch)
        for row, mask in enumerate(inputs["attention_mask"].bool()):
            own = labels[row][mask]
            losses = F.cross_entropy(logits[row][mask][:-1].float(), own[1:], ignore_index=IGNORED, reduction="none")
            known = own[1:] != IGNORED
            told: dict[str, Any] = {"tokens": len(own)}
            if bool(known.any()):
                told["perplexity"] = round(math.exp(min(float(losses[known].mean()), 700.0)), 4)
            if how.new_tokens:
                told["continuation"] = continuation(model, inputs["input_ids"][row][mask], how)
            rows.append(told)
        return rows


_SEEN = 1e-5
"""How much of what a changed token changes in its own logits may be rounding in those of tokens before it."""


def _check_causal(recipe: Recipe, model: nn.Module, batch: Batch, output: Tensor) -> None:
    """Change the second half of each text, and see whether the first half's logits stay: else a model sees the answers.

    Raises:
        TitheError: they do not.
    """
    inputs = batch["inputs"]
    assert isinstance(inputs, dict)
    ids, mask = inputs["input_ids"], inputs["attention_mask"].bool()
    one, other = ids[mask].min(), ids[mask].max()
    late = mask & (mask.cumsum(1) > mask.sum(1, keepdim=True) // 2)
    changed = torch.where(late, torch.where(ids == one, other, one), ids)
    after = output_of(model, {**batch, "inputs": {**inputs, "input_ids": changed}})
    moved_NT = (after.float() - output.float()).abs().amax(-1)
    early, own = moved_NT[mask & ~late], moved_NT[late]
    if not early.numel() or float(early.max()) <= _SEEN * float(own.max()):
        return
    has_switch = getattr(getattr(model, "config", None), "is_decoder", True) is False
    key = "scratch" if isinstance(recipe.model.scratch, dict) else "pretrained"
    where = "[model] scratch" if key == "scratch" else "the model's config.json"
    raise TitheError(
        recipe.place("model", key) if getattr(recipe.model, key) else recipe.place("model"),
        found=f"{type(model).__name__}, in which a token sees those after it, which it is to predict",
        expected="a model whose attention goes back only",
        remedy=f"write is_decoder = true into {where}, or use a causal language model"
        if has_switch
        else "use a causal language model",
    )


_WHOLE: weakref.WeakSet[nn.Module] = weakref.WeakSet()
"""Models of transformers whose loss cannot be taken in blocks of rows."""


def next_token_loss(model: nn.Module, batch: Batch) -> Tensor:
    """The one place where a language model's training loss is computed: the mean over the tokens that are predicted.

    Of a model of transformers it is the model's own, in blocks of rows, so that the logits never stand whole; of any
    other the logits are taken.

    Args:
        model: the network, perhaps in a wrapper that averages gradients.
        batch: token ids, their mask, and labels (N, T) that stand beside their own tokens.
    """
    import transformers

    inputs, labels = batch["inputs"], batch["labels"]
    inner = model.module if isinstance(model, nn.parallel.DistributedDataParallel) else model
    if isinstance(inner, transformers.PreTrainedModel):
        assert isinstance(inputs, dict)
        given = {**inputs, "labels": labels}
        if inner not in _WHOLE:
            try:
                return tithe.causal_loss(model, given)
            except TitheError:  # its logits are no function of one hidden state each: they have to stand whole
                _WHOLE.add(inner)
        return model(**given).loss
    logits_NTV = output_of(model, batch)
    return F.cross_entropy(logits_NTV[:, :-1].float().flatten(0, 1), labels[:, 1:].flatten(), ignore_index=IGNORED)


def continuation(model: Any, ids: Tensor, how: Predictor) -> str:
    """What a model of transformers writes after these tokens (T,), the likeliest token each time."""
    tokenizer = how.encoder.tokenizer
    written = model.generate(
        input_ids=ids[None],
        attention_mask=torch.ones_like(ids[None]),
        max_new_tokens=how.new_tokens,
        do_sample=False,
        num_beams=1,
        pad_token_id=tokenizer.pad_token_id,
        eos_token_id=tokenizer.eos_token_id,
    )
    return str(tokenizer.decode(written[0, len(ids) :], skip_special_tokens=True))


@final
@dataclass(frozen=True)
class CausalEncoder(Encoder):
    """Makes rows of at most `max_length` tokens: pieces of one text each, or texts one after the other.

    Args:
        tokenizer: a Hugging Face tokenizer.
        max_length: tokens of a row.
        packing: whether texts are put one after the other, each with its end, and cut into rows of one length.
        chats: how chats are written as tokens; None where rows are texts.
        recipe: whose rows they are.
    """

    tokenizer: Any
    max_length: int
    packing: bool
    chats: Chats | None
    recipe: Recipe

    def encode(self, rows: Rows, targets: Targets) -> tuple[Sequence[Any], tuple[str, ...]]:
        """Pieces of tokens with their labels."""
        assert isinstance(rows, Table)
        unusable = Unusable(self.recipe)
        pieces, notes = self.chats.encode(rows, unusable) if self.chats is not None else (self._texts(rows), [])
        longer = sum(len(ids) > self.max_length for ids, _ in pieces)
        skipped = unusable.settle()
        notes += [f"left out {len(skipped)} that cannot be used: {skipped[0]}"] if skipped else []
        if self.packing:
            made = list(packed(pieces, self.max_length))
        elif self.chats is not None:  # the second part of a chat would have nothing to follow from
            made = [(ids[: self.max_length], labels[: self.max_length]) for ids, labels in pieces]
        else:
            made = [part for piece in pieces for part in cut(piece, self.max_length)]
        kept = [piece for piece in made if predicted(piece)]
        if longer and not self.packing:
            what = "cut" if self.chats is not None else f"split into rows, {len(made)} in all"
            thing = "chats" if self.chats is not None else "texts"
            told = f"longer than {self.max_length} tokens ([data] max_length)"
            notes.append(f"{longer} of {len(pieces)} {thing} are {told}: {what}")
        if self.chats is not None and len(kept) < len(made):
            notes.append(f"left out {len(made) - len(kept)} of {len(made)} rows, in which the assistant says nothing")
        if not kept:
            raise TitheError(
                rows.place(0),
                found=f"{len(pieces)} rows without a token to predict",
                expected="texts of two tokens and more"
                if self.chats is None
                else f"what the assistant says within the first {self.max_length} tokens",
                remedy="check the texts" if self.chats is None else "raise max_length in [data]",
            )
        return kept, tuple(notes)

    def _texts(self, rows: Table) -> list[Piece]:
        """Each text with the token that ends it, where the tokenizer has one."""
        encoded = self.tokenizer(list(rows.text), verbose=False)["input_ids"]
        return [(ended, ended) for ids in encoded for ended in [self._ended(ids)]]

    def _ended(self, ids: list[int]) -> list[int]:
        end = self.tokenizer.eos_token_id
        return ids if end is None or (ids and ids[-1] == end) else [*ids, end]

    def join(self, items: Sequence[Any]) -> Batch:
        """Pad on the right; padding is neither seen nor predicted."""
        ids, labels = [ids for ids, _ in items], [labels for _, labels in items]
        inputs = {"input_ids": padded(ids, self.tokenizer.pad_token_id), "attention_mask": masks(ids)}
        return {"inputs": inputs, "labels": padded(labels, IGNORED)}

    def largest(self, items: Sequence[Any]) -> int:
        """Find the one of the most tokens."""
        return max(range(len(items)), key=lambda item: len(items[item][0]))

    def weights(self, items: Sequence[Any]) -> Sequence[int] | None:
        """Count the tokens that are predicted."""
        return [predicted(item) for item in items]


def predicted(piece: Piece) -> int:
    """Count the tokens of a row that are predicted: the first has nothing before it.

    Example:
        >>> predicted(([5, 6, 7], [5, 6, IGNORED]))
        1
    """
    return sum(label != IGNORED for label in piece[1][1:])


def cut(piece: Piece, length: int) -> list[Piece]:
    """Cut a text into pieces of at most `length` tokens.

    Example:
        >>> cut(([1, 2, 3], [1, 2, 3]), 2)
        [([1, 2], [1, 2]), ([3], [3])]
    """
    ids, labels = piece
    return [(ids[start : start + length], labels[start : start + length]) for start in range(0, len(ids), length)]


def packed(pieces: Iterable[Piece], length: int) -> Iterable[Piece]:
    """Put texts one after the other and cut them into rows of `length` tokens; the last may be shorter.

    Example:
        >>> [ids for ids, _ in packed([([1, 2, 3], [1, 2, 3]), ([4], [4])], 2)]
        [[1, 2], [3, 4]]
    """
    ids, labels = list[int](), list[int]()
    for more, beside in pieces:
        ids += more
        labels += beside
        whole = len(ids) // length * length
        yield from cut((ids[:whole], labels[:whole]), length)
        del ids[:whole], labels[:whole]
    if ids:
        yield ids, labels
