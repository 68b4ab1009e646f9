"""What is wrong with a text that is not TOML: the line, and how it is to be written, tried before it is said."""

from __future__ import annotations

import math
import re
import tomllib
from collections.abc import Iterator

from tithe.errors import TitheError

_PLAIN = str.maketrans(
    {
        **dict.fromkeys("“”„‟«»″＂", '"'),
        **dict.fromkeys("‘’‚‛′＇", "'"),
        **dict.fromkeys("\u00a0\u2000\u2001\u2002\u2003\u2007\u2009\u202f\u3000", " "),
        **dict.fromkeys("\u200b\u200c\u200d\u2060\ufeff", ""),
        **dict.fromkeys("–—−", "-"),
        "＝": "=",
        "：": ":",
        "，": ",",
        "［": "[",
        "］": "]",
    }
)
_PAIR = re.compile(r"^(?P<key>[\w.\-\"' ]+?)\s*(?:=\s*=|:=|=>|->|=|:)\s*(?P<value>.*)$")
_SPACED = re.compile(r"^(?P<key>[\w\-]+)\s+(?P<value>\S.*)$")
_COMMENT = re.compile(r"""^(?P<value>(?:"(?:\\.|[^"\\])*"|'[^']*'|[^"'#])*?)\s*(?P<comment>(?:#|//\s|--\s).*)?$""")
_NUMBER = re.compile(r"(?P<sign>[+-]?)(?P<whole>\d*)(?:[.,](?P<part>\d*))?(?P<power>[eE][+-]?\d+)?(?P<percent>\s*%)?")
_GROUPED = re.compile(r"[+-]?\d{1,3}([,' ]\d{3})+")
_YES, _NO = ("true", "yes", "on"), ("false", "no", "off")
_NOTHING = ("", "none", "null", "nil", "undefined", "~", "n/a")


def explain_toml(text: str, source: str, error: tomllib.TOMLDecodeError) -> TitheError:
    """Say which line of a text is not TOML, and how to write it.

    Args:
        text: the whole text.
        source: the name of the file.
        error: that `tomllib` raised.
    """
    lines = text.split("\n")
    at, column = _position(error)
    said = str(error).split(" (at ", maxsplit=1)[0]
    number = min(int(min(at, len(lines))), len(lines))
    if _is_twice(said) and (not lines[number - 1].lstrip().startswith("[") or lines[number - 1].rstrip().endswith("]")):
        return _twice(lines, source, number, said)
    # What is not closed is found only further down: the lines before are tried as well.
    for candidate in range(number, max(0, number - 100), -1):
        line = lines[candidate - 1]
        if not line.strip() or line.lstrip().startswith("#"):
            continue
        for repaired in _repairs(line):
            if repaired == line or not _gets_further(lines, candidate, repaired, at):
                continue
            place = f"{source} line {candidate}" + (f" column {column}" if candidate == at else "")
            remedy = f"write `{repaired.strip()}`" if repaired.strip() else "remove the line, for the usual value"
            return TitheError(place, found=f"`{line.strip()}` ({said})", expected="TOML", remedy=remedy)
    while number > 1 and not lines[number - 1].strip():
        number -= 1
    return TitheError(
        f"{source} line {number}" + (f" column {column}" if number == at else ""),
        found=f"`{lines[number - 1].strip()}` ({said})",
        expected="TOML",
        remedy='write `key = value`, texts in "quotes"',
    )


def _position(error: tomllib.TOMLDecodeError) -> tuple[float, int]:
    match = re.search(r"\(at line (\d+), column (\d+)\)", str(error))
    return (int(match[1]), int(match[2])) if match else (math.inf, 0)


def _gets_further(lines: list[str], number: int, repaired: str, before: float) -> bool:
    """Whether the text is TOML up to the lines after a repaired one, or what follows it is."""
    try:
        tomllib.loads("\n".join([*lines[: number - 1], repaired, *lines[number:]]))
    except RecursionError:
        return False
    except tomllib.TOMLDecodeError as error:
        at, _ = _position(error)
        return at > before or (math.isinf(before) and number < at < math.inf) or _is_twice(str(error))
    return True


def _is_twice(said: str) -> bool:
    return any(word in said for word in ("twice", "overwrite", "mutate"))


def _twice(lines: list[str], source: str, number: int, said: str) -> TitheError:
    line, header, same = lines[number - 1].strip(), "", list[int]()
    sought = line if line.startswith("[") else _key(line)
    for at, other in enumerate(lines[: number - 1], start=1):
        if other.strip().startswith("["):
            header = other.strip()
            same = [*same, at] if header == sought else same if line.startswith("[") else []
        elif not line.startswith("[") and _key(other) == sought:
            same.append(at)
    first = f" as on line {same[-1]}" if same else ""
    return TitheError(
        f"{source} line {number}",
        found=f"`{line}`{first} ({said})",
        expected="every key and every section once",
        remedy=f"remove line {number}, or line {same[-1]}" if same and not line.startswith("[") else "join the two",
    )


def _key(line: str) -> str:
    match = _PAIR.match(line.strip())
    return match["key"].strip().strip("\"'") if match else ""


def _repairs(line: str) -> Iterator[str]:
    """Ways to write a line, the most likely first; an empty one means that it is to go."""
    plain = "".join(char for char in line.translate(_PLAIN) if char == "\t" or ord(char) >= 32).strip()
    yield plain
    if plain.startswith(("//", "--", ";")):
        yield "# " + plain.lstrip("/-; ")
        return
    if plain.startswith("[") and "=" not in plain.partition("]")[0]:
        name, _, rest = plain.lstrip("[").partition("]")
        if "=" in rest:
            yield f"[{name.strip()}]\n{rest.strip('] ')}"
        else:
            yield f"[{plain.partition('#')[0].strip('[]{}():;, ')}]"
        return
    match = _PAIR.match(plain) or _SPACED.match(plain)
    if plain.startswith("="):
        return
    if match is None:
        yield f"[{plain.strip('[]{}():;,= ')}]"
        return
    key = match["key"].strip().strip("\"'").replace(" ", "_")
    parted = _COMMENT.match(match["value"])
    value, comment = (parted["value"], parted["comment"] or "") if parted else (match["value"], "")
    comment = f" # {comment.lstrip('#/- ')}" if comment else ""
    value = value.strip().rstrip(";").strip()
    value = value.removesuffix(",").strip()
    if value.casefold() in _NOTHING:
        if not value and plain.endswith(":"):
            yield f"[{key}]"
        yield ""
        return
    if re.match(r"\S+\s+[\w\-]+\s*=", value):
        yield "\n".join(re.split(r"\s+(?=[\w\-]+\s*=)", f"{key} = {value}"))
    for written in _values(value):
        yield f"{key} = {written}{comment}"


def _values(value: str) -> Iterator[str]:
    """Ways to write a value."""
    yield value
    if value.casefold() in _YES:
        yield "true"
    if value.casefold() in _NO:
        yield "false"
    yield from _numbers(value)
    if match := re.match(r"^[rRbBuUfF]{1,2}(?=[\"'])", value):
        value = value[match.end() :]
        if "\\" not in value:
            yield value
    if value[0] in "[({":
        yield from _collections(value)
        return
    # A backslash begins an escape in "…"; every path may be written with slashes.
    inner = re.sub(r"\\+", "/", value.strip("\"'"))
    yield '"' + inner.replace('"', "'") + '"'


def _numbers(value: str) -> Iterator[str]:
    if _GROUPED.fullmatch(value):
        yield re.sub(r"[,' ]", "", value)
    if power := re.fullmatch(r"10(?:\^|\*\*)\(?([+-]?\d+)\)?", value):
        yield f"1e{power[1]}"
    match = _NUMBER.fullmatch(value)
    if match is None or not (match["whole"] or match["part"]):
        return
    whole, part, power = (match["whole"].lstrip("0") or "0"), match["part"], match["power"] or ""
    written = match["sign"] + whole + ("" if part is None else f".{part or '0'}") + power
    yield f"{float(written) / 100:g}" if match["percent"] else written


def _collections(value: str) -> Iterator[str]:
    opened, closing = value[0], {"[": "]", "(": "]", "{": "}"}[value[0]]
    inner = value.lstrip("[({" if opened != "{" else "{").rstrip("])},; ")
    if opened == "{":
        pairs = [_PAIR.match(part.strip()) for part in inner.split(",") if part.strip()]
        if all(pairs):
            items = [(pair["key"].strip("\"' "), pair["value"].strip()) for pair in pairs if pair is not None]
            yield "{" + ", ".join(f"{key} = {item}" for key, item in items) + "}"
            yield "{" + ", ".join(f"{key} = {_written(item)}" for key, item in items) + "}"
        return
    inner = re.sub(r"([\"'])\s+(?=[\"'])", r"\1, ", inner)
    items = [part.strip() for part in inner.split(",") if part.strip()]
    yield "[" + ", ".join(items) + closing
    yield "[" + ", ".join(map(_written, items)) + closing


def _written(item: str) -> str:
    """The first way to write one item of a list or table that is TOML."""
    for written in _values(item):
        try:
            tomllib.loads(f"value = {written}")
        except (tomllib.TOMLDecodeError, RecursionError):
            continue
        return written
    return item
