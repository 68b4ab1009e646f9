"""Plain text: a file, or a folder of files, as texts to learn from."""

from __future__ import annotations

import re
from collections.abc import Iterator
from pathlib import Path

from tithe.app.train.cells import Fault, read_text
from tithe.app.train.decoding import decode, kind_of, read_bytes
from tithe.app.train.pictures import is_hidden
from tithe.app.train.recipe import Recipe
from tithe.app.train.rows import Table
from tithe.app.train.skipping import Unusable
from tithe.errors import TitheError

TEXT = (".txt", ".text")
"""How the names of the text files in a folder end."""

_BREAK = re.compile(r"\n[ \t]*\n\s*")


def read_documents(recipe: Recipe, split: str, path: Path) -> Table:
    """Read the texts of a file, or of all text files in a folder and the folders inside it.

    `[data] documents` says what one text is: a file, a line, or a paragraph, which a blank line ends.

    Raises:
        TitheError: a file is empty, cannot be read or is not text, or the folder holds none; it names the line.
    """
    unusable, whole = Unusable(recipe), recipe.data.documents == "file"
    files = _files(recipe, split, path)
    texts, places = list[str](), list[str]()
    for file in files:
        name = file.name if file == path else str(file.relative_to(path))
        content = read_bytes(file)
        if not content.strip():
            unusable.add(
                TitheError(str(file), found="an empty file", expected="a text", remedy="write the file, or remove it")
            )
            continue
        if (kind := kind_of(content)) is not None:
            raise TitheError(str(file), found=f"{kind[0]}, not text", expected="plain text", remedy=kind[1])
        key = None if recipe.data.encoding is None else recipe.place("data", "encoding")
        text = decode(content, name, encoding=recipe.data.encoding, key=key or "[data] encoding")
        text = text.replace("\r\n", "\n").replace("\r", "\n")
        for line, part in [(1, text)] if whole else _parts(text, recipe.data.documents):
            place = f"{name} line {line}" if not whole else name
            read = read_text(part)
            if isinstance(read, Fault):
                unusable.add(TitheError(place, found=read.found, expected="a text", remedy="correct the file"))
                continue
            texts.append(part)
            places.append(place)
    skipped = unusable.settle()
    if not texts:
        raise TitheError(
            recipe.place("data", split),
            found=f"no text in {path.name}" + (f": {skipped[0]}" if skipped else ""),
            expected="at least one",
            remedy="write the file again, or correct the path",
        )
    labels = ("",) * len(texts)
    return Table(path.name, tuple(texts), None, labels, None, skipped=skipped, running=whole, places=tuple(places))


def _files(recipe: Recipe, split: str, path: Path) -> list[Path]:
    if not path.is_dir():
        return [path]
    found = [
        file
        for file in sorted(path.rglob("*"))
        if file.suffix.lower() in TEXT and file.is_file() and not any(map(is_hidden, file.relative_to(path).parts))
    ]
    if not found:
        raise TitheError(
            recipe.place("data", split),
            found=f"no text file in the folder {path}",
            expected=f"files ending in {', '.join(TEXT)}",
            remedy="correct the path, or name the files so",
        )
    return found


def _parts(text: str, kind: str) -> Iterator[tuple[int, str]]:
    """The lines or paragraphs that are not blank, each with the line that it begins on."""
    if kind == "line":
        yield from ((line, part) for line, part in enumerate(text.split("\n"), start=1) if part.strip())
        return
    at, line = 0, 1
    for match in [*_BREAK.finditer(text), None]:
        part = text[at : match.start() if match else len(text)]
        lead = len(part) - len(part.lstrip("\n"))
        if part.strip():
            yield line + part[:lead].count("\n"), part.strip("\n")
        end = match.end() if match else len(text)
        line, at = line + text[at:end].count("\n"), end


def cut_tail(text: str, part: float) -> tuple[str, str]:
    r"""Cut a text in two where a line, or else a word, ends; the second is about so large a part of it.

    Example:
        >>> cut_tail("one\ntwo\nthree\nfour\n", 0.3)
        ('one\ntwo\nthree\n', 'four\n')
    """
    aim = round(len(text) * (1 - part))
    for mark in ("\n", " "):
        ends = [at + 1 for at in (text.rfind(mark, 0, aim), text.find(mark, aim)) if at >= 0]
        ends = [at for at in ends if text[:at].strip() and text[at:].strip()]
        if ends:
            best = min(ends, key=lambda at: abs(at - aim))
            # A line that ends far from there would hold out much more or less than was asked for.
            if mark == " " or abs(best - aim) <= len(text) // 20 + 1:
                return text[:best], text[best:]
    return text[:aim], text[aim:]
