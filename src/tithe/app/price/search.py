"""The largest number that fits, with few looks at what numbers take."""

from __future__ import annotations

from collections.abc import Callable

_GUESSES = 8


def largest(cost: Callable[[int], int], limit: int, most: int) -> int:
    """The largest n in [0, most] with cost(n) ≤ limit; n = 0 costs nothing.

    Guesses along a straight line and closes in on the edge: exact wherever costs grow with n, and for costs that grow
    evenly after about four looks. What is returned was looked at, and so was the next larger number.

    Example:
        >>> looks = []
        >>> largest(lambda n: looks.append(n) or 100 + 7 * n, 1000, most=10**6), looks
        (128, [1, 2, 128, 129])
    """
    known: dict[int, int] = {}

    def fits(n: int) -> bool:
        if n not in known:
            known[n] = cost(n)
        return known[n] <= limit

    if most < 1 or not fits(1):
        return 0
    low, high = 1, most + 1  # low fits, high does not
    guess = 2
    while high - low > 1:
        guess = min(max(guess, low + 1), high - 1)
        if len(known) > _GUESSES:  # costs do not grow evenly: halve
            guess = (low + high) // 2
        if fits(guess):
            low = guess
        else:
            high = guess
        below = max((n for n in known if n < low), default=None)
        left = low if high in known else below
        right = high if high in known else low
        if left is None:
            guess = 2
            continue
        slope = (known[right] - known[left]) / (right - left)
        ahead = (limit - known[low]) / slope if slope > 0 else float(most)
        guess = low + int(min(ahead, most))
        if guess <= low:  # the line says that this is the edge: look just behind it
            guess = low + 1
        elif guess >= high:
            guess = high - 1
    return low
