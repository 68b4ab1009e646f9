"""What every section of a recipe is: a frozen record of known keys, which may refuse what does not go together."""

from __future__ import annotations

from pydantic import BaseModel, ConfigDict
from pydantic_core import PydanticCustomError

REFUSED = "refused"
"""The type of an error whose context holds `found`, `expected`, `remedy`, and the `key` it is about or None."""


class Section(BaseModel):
    """One section: unknown keys are errors."""

    model_config = ConfigDict(extra="forbid", frozen=True, strict=False, str_strip_whitespace=True)

    def given(self, *names: str) -> list[str]:
        """Those of these keys that have a value."""
        return [name for name in names if getattr(self, name) is not None]


def refuse(key: str | None, *, found: str, expected: str, remedy: str) -> PydanticCustomError:
    """The error of a validator; `key` (dotted, from the section) is the one to point at, None for all of it."""
    return PydanticCustomError(REFUSED, "refused", {"key": key, "found": found, "expected": expected, "remedy": remedy})


def exactly_one(section: Section, *names: str) -> None:
    """Refuse a section that gives none or several of these keys."""
    given = section.given(*names)
    if len(given) != 1:
        raise refuse(
            None,
            found=" and ".join(given) or "none of them",
            expected=f"exactly one of {', '.join(names)}",
            remedy="keep one" if given else "add one",
        )
