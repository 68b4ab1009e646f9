"""Chats as tokens: the tokenizer's own template, and a loss on what the assistant says."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, cast, final

from tithe.app.train.cells import Fault, read_text
from tithe.app.train.recipe import Recipe
from tithe.app.train.rows import Table
from tithe.app.train.skipping import Unusable
from tithe.app.train.tasks.text import IGNORED
from tithe.errors import TitheError

ROLES = ("system", "developer", "user", "assistant", "tool", "function")
_ALIKE = {"human": "user", "gpt": "assistant", "bot": "assistant", "model": "assistant", "ai": "assistant"}
_EXPECTED = 'a list of messages, each {"role": "user", "content": "…"}'
_ASSISTANT = "assistant"


def read_messages(value: object) -> Any:
    """Take a cell as the messages of a chat, or say what is wrong with it.

    Example:
        >>> read_messages([{"role": "user", "content": "Hello"}])
        ({'role': 'user', 'content': 'Hello'},)
    """
    if not isinstance(value, list | tuple):
        plain = read_text(value)
        found = plain.found if isinstance(plain, Fault) else f"the text {plain[:40]!r}"
        missing = isinstance(plain, Fault) and plain.missing
        return Fault(found, missing=missing, expected=_EXPECTED, remedy="write the messages as a list")
    messages = cast("Sequence[object]", value)
    if not messages:
        return Fault("no messages", missing=True, expected=_EXPECTED, remedy="write the messages, or remove the line")
    read: list[dict[str, Any]] = []
    for number, message in enumerate(messages, start=1):
        made = _read_message(number, message)
        if isinstance(made, Fault):
            return made
        read.append(made)
    return tuple(read)


def _read_message(number: int, message: object) -> dict[str, Any] | Fault:
    where = f"message {number}"
    if not isinstance(message, Mapping):
        return Fault(f"{where} that is {type(message).__name__}", expected=_EXPECTED, remedy="correct the line")
    # Parquet gives every message all the keys that one of them has.
    told = {str(key): held for key, held in cast("Mapping[object, object]", message).items() if held is not None}
    if "role" not in told:
        other = next((key for key in ("from", "author", "speaker") if key in told), None)
        remedy = f'rename {other!r} to "role" in every message' if other else 'add "role"'
        return Fault(f"{where} without a role", expected=_EXPECTED, remedy=remedy)
    role = told["role"]
    if role not in ROLES:
        close = _ALIKE.get(str(role).casefold()) or (str(role).casefold() if str(role).casefold() in ROLES else None)
        return Fault(
            f"{where} of the role {role!r}",
            expected=f"one of {', '.join(ROLES)}",
            remedy=f'write "role": "{close}"' if close else "correct the role",
        )
    if "content" not in told and "tool_calls" not in told:
        other = next((key for key in ("value", "text", "message") if key in told), None)
        remedy = f'rename {other!r} to "content" in every message' if other else 'write "content"'
        return Fault(f"{where} (of the {role}) without content", expected=_EXPECTED, remedy=remedy)
    content = told.get("content", "")
    parts: Sequence[object] = cast("Sequence[object]", content) if isinstance(content, list | tuple) else [content]
    for part in parts:
        text = part.get("text") if isinstance(part, Mapping) else part
        plain = read_text(text) if isinstance(text, str) else Fault(f"{type(text).__name__}, no text")
        empty_is_fine = "tool_calls" in told or role in {"tool", "function"}
        if isinstance(plain, Fault) and not (plain.missing and empty_is_fine):
            return Fault(
                f"{where} (of the {role}) whose content is {plain.found}",
                expected=_EXPECTED,
                remedy="write a text, or remove the message",
            )
    return told


@final
@dataclass(frozen=True)
class Chats:
    """Writes chats as tokens by the template of a tokenizer.

    Args:
        tokenizer: with a chat template.
        recipe: whose rows they are.
    """

    tokenizer: Any
    recipe: Recipe

    def check(self, place: str) -> None:
        """Look for the chat template.

        Raises:
            TitheError: the tokenizer has none.
        """
        if self.tokenizer.chat_template is None:
            raise TitheError(
                place,
                found="a tokenizer without a chat template",
                expected="one, which says how messages are written as text",
                remedy='use the tokenizer of a chat model (tokenizer = "..."), or put a template into '
                "chat_template.jinja beside its tokenizer_config.json",
            )

    def encode(self, rows: Table, unusable: Unusable) -> tuple[list[tuple[list[int], list[int]]], list[str]]:
        """The tokens of every chat, and those of them that the assistant says.

        Args:
            rows: of chats.
            unusable: takes the chats that the template refuses.

        Returns:
            Pieces, and what the user should know of them.
        """
        pieces: list[tuple[list[int], list[int]]] = []
        whole = 0
        for row, messages in enumerate(rows.text):
            place = rows.place(row)
            if not any(message["role"] == _ASSISTANT for message in messages):
                unusable.add(
                    TitheError(
                        place,
                        found="a chat in which the assistant says nothing",
                        expected="at least one message of the assistant, which is what is learned",
                        remedy="remove the line, or correct the roles",
                    )
                )
                continue
            try:
                ids, said = self.tokens(messages)
            # A template may raise anything: jinja's errors, KeyError of a field that it reads …
            except Exception as error:
                told = (str(error).strip().splitlines() or [type(error).__name__])[0]
                unusable.add(
                    TitheError(
                        place,
                        found=f"messages that the tokenizer's chat template refuses: {told}",
                        expected="roles in the order that the template takes",
                        remedy="correct the messages",
                    )
                )
                continue
            whole += said is None
            labels = ids if said is None else [token if own else IGNORED for token, own in zip(ids, said, strict=True)]
            pieces.append((ids, labels))
        if not whole:
            return pieces, []
        note = "its template does not show which tokens are the assistant's, so every token is learned"
        return pieces, [note if whole == len(pieces) else f"in {whole} of {len(pieces)} chats {note}"]

    def tokens(self, messages: Sequence[Mapping[str, Any]]) -> tuple[list[int], list[bool] | None]:
        """A chat as tokens, and which of them the assistant says; None where the template does not show it."""
        if "{% generation" in str(self.tokenizer.chat_template).replace("{%-", "{%") and self.tokenizer.is_fast:
            made = self.tokenizer.apply_chat_template(
                list(messages), tokenize=True, return_dict=True, return_assistant_tokens_mask=True
            )
            mask = [bool(own) for own in made["assistant_masks"]]
            return list(made["input_ids"]), mask if any(mask) else None
        text = self._render(messages)
        ids = self._encode(text)
        parts = self._parts(messages, text)
        if parts is None:
            return ids, None
        pieces = [(self._encode(part), own) for part, own in parts if part]
        # Where tokens reach over the border of a turn, they are nobody's alone.
        if [token for piece, _ in pieces for token in piece] != ids:
            return ids, None
        return ids, [own for piece, own in pieces for _ in piece]

    def prompt(self, messages: Sequence[Mapping[str, Any]]) -> list[int]:
        """The tokens after which the assistant is to speak."""
        asked = messages[:-1] if messages[-1]["role"] == _ASSISTANT and len(messages) > 1 else messages
        return self._encode(self._render(asked, ask=True))

    def _render(self, messages: Sequence[Mapping[str, Any]], *, ask: bool = False) -> str:
        made = self.tokenizer.apply_chat_template(list(messages), tokenize=False, add_generation_prompt=ask)
        return str(made)

    def _encode(self, text: str) -> list[int]:
        return list(self.tokenizer(text, add_special_tokens=False, verbose=False)["input_ids"])

    def _parts(self, messages: Sequence[Mapping[str, Any]], text: str) -> list[tuple[str, bool]] | None:
        """Part the text of a chat into what the assistant says and the rest, as far as prefixes show it."""
        parts, done = list[tuple[str, bool]](), 0
        for number, message in enumerate(messages):
            if message["role"] != _ASSISTANT:
                continue
            try:
                before, after = self._render(messages[:number], ask=True), self._render(messages[: number + 1])
            except Exception:  # some templates want whole chats
                return None
            if not text.startswith(after) or not after.startswith(before) or len(before) < done:
                return None
            parts += [(text[done : len(before)], False), (text[len(before) : len(after)], True)]
            done = len(after)
        return [*parts, (text[done:], False)]
