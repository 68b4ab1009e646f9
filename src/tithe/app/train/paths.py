"""Paths of a recipe: what may be written, and where it leads."""

from __future__ import annotations

import os
import re
import tempfile
from pathlib import Path

from tithe.app.section import refuse

# A folder after a backslash, as TOML reads it in "…"; the letter stands for itself here.
_ESCAPES = {"\b": "/b", "\t": "/t", "\n": "/n", "\f": "/f", "\r": "/r", "\x1b": "/e"}
_VARIABLE = re.compile(r"\$(?:\{(\w+)\}|(\w+))")


def check_path(value: str) -> str:
    r"""Refuse a text that names another path than it seems to.

    Raises:
        PydanticCustomError: it is empty, holds control characters (`"runs\first"` is a form feed in TOML) or
                backslashes where those part no folders, or names a user or variable that there is not.
    """
    controls = sorted({char for char in value if ord(char) < 32 or ord(char) == 127})
    if controls:
        spelt = "".join(_ESCAPES.get(char, char) for char in value)
        raise refuse(
            None,
            found=f"the control character {', '.join(map(repr, controls))} in {value!r}",
            expected='a path; in "…" a backslash begins an escape',
            remedy=f'write "{spelt}"' if set(controls) <= set(_ESCAPES) else "write the path without it",
        )
    if not value.strip():
        raise refuse(None, found="an empty text", expected="a path", remedy="write a path, or remove the key")
    if "\\" in value and os.sep == "/":
        raise refuse(
            None,
            found=f"a backslash in {value!r}, which parts no folders here",
            expected="folders parted by /",
            remedy=f'write "{value.replace(chr(92), "/")}"',
        )
    for match in _VARIABLE.finditer(value):
        if (match[1] or match[2]) not in os.environ:
            raise refuse(
                None,
                found=f"{match[0]} in {value!r}, a variable that is not set",
                expected="a path",
                remedy=f"set {match[1] or match[2]} in the environment, or write the path itself",
            )
    try:
        expand(value)
    except RuntimeError as error:
        raise refuse(
            None, found=f"no such user in {value!r}", expected="~/… or ~user/…", remedy="write the whole path"
        ) from error
    return value


def expand(value: str) -> Path:
    """Turn `~` and variables of the environment into folders.

    Example:
        >>> expand("~/runs") == Path.home() / "runs"
        True
    """
    return Path(os.path.expandvars(value)).expanduser()


def exists(path: Path) -> bool:
    """Whether there is something at a path that may be too long, or lie below what is no folder."""
    return os.path.exists(path)


def unwritable(folder: Path) -> str | None:
    """Say what keeps a folder from being made and written to, without making it; None where nothing does.

    A file without a name is written to the folder above it that there is: permissions alone do not tell.
    """
    for ancestor in (folder, *folder.parents):
        try:
            os.lstat(ancestor)
        except (FileNotFoundError, NotADirectoryError):
            continue
        except OSError as error:
            return f"{ancestor}: {(error.strerror or 'no folder').lower()}"
        if not os.path.isdir(ancestor):
            kind = "a link to nothing" if not os.path.exists(ancestor) else "a file"
            return f"{kind} at {ancestor}"
        try:
            with tempfile.TemporaryFile(dir=ancestor):
                return None
        except OSError as error:
            return f"a folder at {ancestor} that cannot be written to ({(error.strerror or 'no reason given').lower()})"
    return None
