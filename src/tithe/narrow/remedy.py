"""Look for what to leave whole so that a model runs narrow, and try it before it is offered."""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from fnmatch import fnmatchcase
from glob import escape

from tithe.coupling import Unfollowed
from tithe.errors import TitheError
from tithe.narrow.stage import Stage
from tithe.narrow.trial import Unfit

_TRIALS = 24
"""How many ways are tried."""

Refusal = Unfollowed | Unfit
Attempt = Callable[[Sequence[str]], Stage]


def with_remedy(
    refusal: Refusal, attempt: Attempt, spelled: Mapping[str, Sequence[str]], where: Sequence[str]
) -> TitheError:
    """Return the refusal with what helps, as far as something was found that does.

    Args:
        refusal: what went wrong.
        attempt: makes a stage in which the parameters that globs match are whole; raises a `Refusal` where that does
            not help either, and another `TitheError` where nothing is left that could be absent.
        spelled: parameters that may be absent: first name → all names.
        where: the globs of `attach`.
    """
    search = _Search(attempt, spelled)
    globs = search.find(refusal)
    own = [pattern for pattern in where if pattern != "*"]
    if globs:
        told = [*own, *(f"!{glob}" for glob in globs)]
        remedy = f"pass where={json.dumps(told[0] if len(told) == 1 else told)}, with which it was seen to run narrow"
    else:
        remedy = f"no where= was found that helps; {refusal.remedy if isinstance(refusal, Unfit) else _REWRITE}"
    told = TitheError(refusal.place, found=refusal.found, expected=refusal.expected, remedy=remedy)
    told.__cause__ = refusal.__cause__
    return told


_REWRITE = (
    "in that module, stay in tensors (no .item(), no if on a computed value: compute both and choose with torch.where)"
    " and use torch's own operators"
)


class _Search:
    def __init__(self, attempt: Attempt, spelled: Mapping[str, Sequence[str]]) -> None:
        self._attempt, self._spelled = attempt, spelled
        self._seen: set[tuple[str, ...]] = set()

    def find(self, refusal: Refusal, globs: Sequence[str] = ()) -> list[str]:
        """The globs to leave whole besides those; none where nothing was found.

        A glob after which the model fails in another place is a step on the way, and the search goes on from there.
        """
        for glob in self._candidates(refusal, globs):
            tried = _joined(globs, glob)
            if tuple(tried) in self._seen or not self._narrows(tried):
                continue
            if len(self._seen) == _TRIALS:
                break
            self._seen.add(tuple(tried))
            outcome = self._outcome(tried)
            if outcome is True:
                return tried
            if isinstance(outcome, (Unfollowed, Unfit)) and outcome.place != refusal.place:
                found = self.find(outcome, tried)
                if found:
                    return found
        return []

    def _outcome(self, globs: Sequence[str]) -> Refusal | bool | None:
        """Whether it works: True, the refusal, or None where nothing is left that could be absent."""
        try:
            self._attempt(globs)
        except (Unfollowed, Unfit) as refusal:
            return refusal
        except TitheError:
            return None
        return True

    def _candidates(self, refusal: Refusal, globs: Sequence[str]) -> Iterator[str]:
        """Globs worth trying: the module that failed and those around it, then what makes the channels it met."""
        module = refusal.module if isinstance(refusal, Unfit) else refusal.place
        parts = module.split(".") if module else []
        paths = [".".join(parts[:length]) for length in range(len(parts), 0, -1)]
        exact = [*(f"{escape(path)}.*" for path in paths), *refusal.suspects]
        alike = [wide for glob in exact if (wide := _widened(glob)) in map(_widened, globs)]
        yield from dict.fromkeys([*alike, *exact])
        if len(refusal.suspects) > 1:
            yield from (wide for glob in refusal.suspects if (wide := _widened(glob)) != glob)

    def _narrows(self, globs: Sequence[str]) -> bool:
        """Whether the last glob matches something, and something is left."""
        names = [name for spelled in self._spelled.values() for name in spelled]
        matched = any(fnmatchcase(name, globs[-1]) for name in names)
        return matched and not all(any(fnmatchcase(name, glob) for glob in globs) for name in names)


def _joined(globs: Sequence[str], glob: str) -> list[str]:
    """The globs and one more, which may stand for some of them."""
    return [*(one for one in globs if _widened(one) != glob), glob]


def _widened(glob: str) -> str:
    """The same layer in every block: numbers of a path become stars."""
    return re.sub(r"(?:(?<=\.)|^)\d+(?=\.)", "*", glob)
