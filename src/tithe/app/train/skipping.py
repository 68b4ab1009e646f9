"""Rows and pictures that cannot be used: all of them are found before one is refused, or they are left out by wish."""

from __future__ import annotations

from tithe.app.train.recipe import Recipe
from tithe.errors import TitheError

_NAMED = 5


class Unusable:
    """Collects what cannot be used of one split.

    Args:
        recipe: says whether it may be left out: `[data] skip_bad`.
    """

    def __init__(self, recipe: Recipe) -> None:
        self._skips = recipe.data.skip_bad
        self._errors: list[TitheError] = []

    def add(self, error: TitheError) -> None:
        """Note a row or a picture by the error that it is to be refused with."""
        self._errors.append(error)

    def settle(self) -> tuple[str, ...]:
        """Return what is left out, each by its place and what was found there.

        Raises:
            TitheError: there is something, and the recipe does not say `skip_bad = true`.
        """
        if not self._errors or self._skips:
            return tuple(f"{error.place}: {error.found}" for error in self._errors)
        first, others = self._errors[0], self._errors[1:]
        more = "" if not others else f" (and {len(others)} more: {listed([error.place for error in others])})"
        raise TitheError(
            first.place,
            found=f"{first.found}{more}",
            expected=first.expected,
            remedy=f"{first.remedy}, or leave such out with skip_bad = true in [data]",
        )


def listed(places: list[str]) -> str:
    """Name the first of some places, and say that there are more."""
    return "; ".join(places[:_NAMED]) + ("; …" if len(places) > _NAMED else "")
