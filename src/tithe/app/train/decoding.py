"""Texts of files: from bytes in the encoding that they are in, or the line, the column and the likely encoding."""

from __future__ import annotations

import codecs
from pathlib import Path

from tithe.errors import TitheError

# The longest first: a mark of UTF-32 begins with one of UTF-16.
_MARKS = (
    (codecs.BOM_UTF8, "utf-8-sig"),
    (codecs.BOM_UTF32_LE, "utf-32"),
    (codecs.BOM_UTF32_BE, "utf-32"),
    (codecs.BOM_UTF16_LE, "utf-16"),
    (codecs.BOM_UTF16_BE, "utf-16"),
)

_KINDS: tuple[tuple[bytes, str, str], ...] = (
    (b"\x1f\x8b", "a gzip archive", "unpack it (gunzip)"),
    (b"BZh", "a bzip2 archive", "unpack it (bunzip2)"),
    (b"\xfd7zXZ\x00", "an xz archive", "unpack it (unxz)"),
    (b"\x28\xb5\x2f\xfd", "a zstd archive", "unpack it (unzstd)"),
    (b"7z\xbc\xaf\x27\x1c", "a 7z archive", "unpack it"),
    (b"Rar!", "a rar archive", "unpack it"),
    (b"\xd0\xcf\x11\xe0", "an old spreadsheet (xls)", "save it as CSV in the spreadsheet program"),
    (b"PAR1", "a parquet file", "rename it to end in .parquet"),
    (b"ARROW1", "an Arrow file", "write it as parquet or CSV"),
    (b"%PDF", "a PDF", "write the rows to a CSV file"),
    (b"SQLite format 3", "an SQLite database", "export the table as CSV"),
    (b"\x93NUMPY", "a numpy array", "write the rows to a CSV file"),
    (b"\x89PNG", "a picture", "correct the path"),
    (b"\xff\xd8\xff", "a picture", "correct the path"),
)


def kind_of(content: bytes) -> tuple[str, str] | None:
    """Say what a file that should hold text is instead, and what to do; None where it may be text."""
    if content.startswith(b"PK\x03\x04"):
        if b"xl/" in content[:4096] or b"xl/workbook" in content or b"opendocument.spreadsheet" in content[:200]:
            return "a spreadsheet (xlsx or ods)", "save it as CSV in the spreadsheet program"
        return "a zip archive", "unpack it (unzip)"
    start = content[:200].lstrip(b"\xef\xbb\xbf \t\r\n").lower()
    if start.startswith((b"<!doctype html", b"<html")):
        return "a web page (HTML)", "download the file itself, not the page that shows it"
    return next(((what, remedy) for mark, what, remedy in _KINDS if content.startswith(mark)), None)


def read_bytes(path: Path, place: str | None = None) -> bytes:
    """Read all bytes of a file.

    Raises:
        TitheError: the system refuses.
    """
    try:
        return path.read_bytes()
    except OSError as error:
        raise TitheError(
            place or str(path),
            found=(error.strerror or type(error).__name__).lower() + (f" ({path})" if place else ""),
            expected="a file that can be read",
            remedy="check the path, and that you may read it",
        ) from error


def decode(content: bytes, source: str, *, encoding: str | None = None, key: str | None = None) -> str:
    """Turn the bytes of a file into text: UTF-8, what a mark at its beginning says, or the encoding that is told.

    Args:
        content: of the file.
        source: the name of the file, for messages.
        encoding: what the user says it is in; None where nothing was said.
        key: how the user may say it, for messages; None where it has to be UTF-8.

    Raises:
        TitheError: the bytes are not text in that encoding; it names line, column and the likely one.
    """
    marked = next((name for mark, name in _MARKS if content.startswith(mark)), None)
    name = marked or encoding or "utf-8"
    if marked is None and encoding is not None and _is_utf8_instead(content, encoding):
        raise TitheError(
            source,
            found=f"UTF-8, which reads as garbage in {encoding}",
            expected=f"{encoding}, as {key} says",
            remedy="save all files in one encoding, or remove encoding",
        )
    try:
        text = content.decode(name)
    except UnicodeDecodeError as error:
        raise _undecodable(content, source, name, error.start, key) from error
    if "\0" in text and (start := content.find(b"\0")) >= 0:
        raise _undecodable(content, source, name, start, key)
    return text


def _is_utf8_instead(content: bytes, encoding: str) -> bool:
    """Whether bytes are UTF-8 beyond doubt, and would be other text in the encoding that is told."""
    if 0 in content:
        return False
    try:
        text = content.decode("utf-8")
    except UnicodeDecodeError:
        return False
    try:
        return content.decode(encoding) != text
    except UnicodeDecodeError:
        return True


def _undecodable(content: bytes, source: str, name: str, start: int, key: str | None) -> TitheError:
    likely = _likely(content)
    before = content[:start]
    is_marked = content.startswith(tuple(mark for mark, _ in _MARKS))
    if is_marked:
        place, found, likely = source, f"{name.removesuffix('-sig').upper()} that is damaged or cut off", None
    elif likely is None:
        line, begin = before.count(b"\n") + 1, before.rfind(b"\n") + 1
        place, found = f"{source} line {line} column {start - begin + 1}", f"a byte 0x{content[start]:02x}"
    elif likely.startswith("utf-16"):
        place, found = f"{source} line 1", f"text that is not {name.upper()}, most likely {likely.upper()}"
    else:
        line, begin = before.count(b"\n") + 1, before.rfind(b"\n") + 1
        word = content[begin:].split(b"\n")[0].decode(likely, errors="replace").strip()
        column = len(content[begin:start].decode(name, errors="replace")) + 1
        place = f"{source} line {line} column {column}"
        found = f"a byte 0x{content[start]:02x} that is not {name.upper()}; in {likely} the line reads {word[:60]!r}"
    remedy = "save the file again" if is_marked else "save the file as UTF-8"
    if key is not None and likely is not None:
        remedy = f'add encoding = "{likely}" to [data] if that is what it is, or save the file as UTF-8'
    return TitheError(place, found=found, expected=f"text in {name.upper()}", remedy=remedy)


def _likely(content: bytes) -> str | None:
    """Guess an encoding that is not UTF-8."""
    sample = content[: 1 << 16]
    even, odd = sample[0::2].count(0), sample[1::2].count(0)
    if odd > len(sample) // 8 and even < odd // 4:
        return "utf-16-le"
    if even > len(sample) // 8 and odd < even // 4:
        return "utf-16-be"
    if 0 in sample:
        return None
    for name in ("cp1252", "latin-1"):
        try:
            content.decode(name)
        except UnicodeDecodeError:
            continue
        return name
    return None


def check_encoding(name: str) -> str | None:
    """Say what is wrong with the name of an encoding, or None."""
    try:
        found = codecs.lookup(name)
    except (LookupError, ValueError):
        return f"no encoding {name!r}"
    return None if getattr(found, "_is_text_encoding", True) else f"{name!r}, which is no encoding of text"
