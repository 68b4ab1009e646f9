"""Define the one error family of the library: each error says what was found, what was expected, and the remedy."""

from __future__ import annotations

from functools import partial
from typing import Any


class TitheError(Exception):
    """An action that the library refuses, described so that the reader can act on it.

    Args:
        place: what the error is about: a module or parameter path, a file, a setting.
        found: what is there.
        expected: what should be there.
        remedy: what the reader can do about it.

    Example:
        >>> print(TitheError("classifier.*", found="no parameter", expected="at least one", remedy="check head="))
        classifier.*: found no parameter; expected at least one. Remedy: check head=
    """

    def __init__(self, place: str, *, found: str, expected: str, remedy: str) -> None:
        super().__init__(f"{place}: found {found}; expected {expected}. Remedy: {remedy}")
        self.place, self.found, self.expected, self.remedy = place, found, expected, remedy

    def __reduce__(self) -> tuple[Any, ...]:
        """Let another process have it: an error of a worker or a rank is pickled on its way."""
        told = {"found": self.found, "expected": self.expected, "remedy": self.remedy}
        return partial(type(self), self.place, **told), ()


class TitheWarning(UserWarning):
    """A warning about something that the user can act on."""
