"""Checksums of recorded checkpoints: damage on the disk is named when it is read, never taken for weights.

The metadata key `tithe_checksums` of a safetensors file holds numbers of 32 bits in hexadecimal: the CRC-32 of the
header, with zeros in its own place, and that of each page of the data. A page is checked when something of it is read
for the first time. Of ranges that begin or end within a page only the rest of the page is read besides, so that
streaming a checkpoint reads every byte about once, and CRC-32 takes 4 GB/s.
"""

from __future__ import annotations

import re
from io import RawIOBase
from pathlib import Path
from typing import Final
from zlib import crc32

from tithe.errors import TitheError

KEY: Final = "tithe_checksums"
PAGE: Final = 1 << 17
"""Bytes: small, so that a few columns are checked without reading many; eight digits each are short beside them."""

_DIGITS: Final = 8
_PLACE: Final = f'"{KEY}":"'.encode()


def blank(num_bytes: int) -> str:
    """Return what stands for the checksums of so many bytes of data until they are known."""
    return "0" * (_DIGITS * (1 + -(-num_bytes // PAGE)))


class Summing:
    """Checksums of data that is written from its beginning to its end."""

    def __init__(self) -> None:
        self._done: list[int] = []
        self._open, self._size = 0, 0

    def add(self, data: memoryview) -> None:
        """Take the next bytes up."""
        while data:
            part = data[: PAGE - self._size]
            self._open, self._size = crc32(part, self._open), self._size + len(part)
            if self._size == PAGE:
                self._done.append(self._open)
                self._open, self._size = 0, 0
            data = data[len(part) :]

    def filled(self, header: bytes) -> bytes:
        """Return a header, its length in front, with the checksums in the place of the blank ones."""
        sums = [*self._done, self._open] if self._size else self._done
        text = "".join(f"{number:08x}" for number in sums).encode()
        at = header.index(_PLACE) + len(_PLACE)
        whole = header[: at + _DIGITS] + text + header[at + _DIGITS + len(text) :]
        return whole[:at] + f"{crc32(whole):08x}".encode() + whole[at + _DIGITS :]


class Pages:
    """The checksums of a file that is read.

    Args:
        path: the file.
        header: all before the data.
        told: what the header's metadata say.
        size: of the file, in bytes.

    Raises:
        ValueError: when the header is not what was written.
    """

    def __init__(self, path: Path, header: bytes, told: str, size: int) -> None:
        self._path, self._start, self._stop = path, len(header), size
        at = header.find(_PLACE) + len(_PLACE)
        plain = header[:at] + b"0" * _DIGITS + header[at + _DIGITS :]
        if not re.fullmatch(r"[0-9a-f]+", told) or len(told) != len(blank(size - len(header))):
            raise ValueError("damaged checksums")
        numbers = [int(told[place : place + _DIGITS], 16) for place in range(0, len(told), _DIGITS)]
        if crc32(plain) != numbers[0]:
            raise ValueError("a header that is not what was recorded")
        self._sums = numbers[1:]
        self._checked = bytearray(len(self._sums))

    def check(self, file: RawIOBase, place: int, data: memoryview) -> None:
        """Check the pages that some data lies in, as far as they were not before.

        Args:
            file: open, to read the rest of the first page and of the last one from.
            place: where the data begins in the file, in bytes.
            data: what was read there.

        Raises:
            TitheError: when a page is not what was recorded.
            EOFError: when the file ends within one.
        """
        end = place + len(data)
        for page in range((place - self._start) // PAGE, -(-(end - self._start) // PAGE)):
            if self._checked[page]:
                continue
            first = self._start + page * PAGE
            last = min(first + PAGE, self._stop)
            found = crc32(_read(file, first, place))
            found = crc32(data[max(first - place, 0) : max(last - place, 0)], found)
            found = crc32(_read(file, end, last), found)
            if found != self._sums[page]:
                raise TitheError(
                    str(self._path),
                    found=f"bytes {first:,} to {last:,} that are not what was recorded",
                    expected="what history.record wrote",
                    remedy="restore the file from a copy; skip_damaged=True opens the history without it",
                )
            self._checked[page] = True

    def check_all(self) -> None:
        """Read the file through, and check every page.

        Raises:
            TitheError: when one is not what was recorded.
            OSError: when the file cannot be read.
            EOFError: when it ends before.
        """
        with self._path.open("rb", buffering=0) as file:
            for first in range(self._start, self._stop, PAGE):
                self.check(file, first, memoryview(_read(file, first, min(first + PAGE, self._stop))))


def _read(file: RawIOBase, start: int, stop: int) -> bytes:
    """Bytes [start, stop) of a file; none where there is nothing between.

    Raises:
        EOFError: when the file ends before.
    """
    parts: list[bytes] = []
    if start < stop:
        file.seek(start)
    while start < stop:
        part = file.read(stop - start)
        if not part:
            raise EOFError
        parts.append(part)
        start += len(part)
    return b"".join(parts)
