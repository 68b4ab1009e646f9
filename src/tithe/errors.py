"""Define the one error family of the library: each error says what was found, what was expected, and the remedy."""


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


class TitheWarning(UserWarning):
    """A warning about something that the user can act on."""
