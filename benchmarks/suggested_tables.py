"""The page on suggested learning rates: beside the best rate of each grid."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from benchmarks.markdown import origin, table
from benchmarks.plots import rates_against_best
from benchmarks.records import Record, lines
from benchmarks.suggested import APART, DENSITY, GRIDS, IMAGES, quality

FACTOR = 3


@dataclass(frozen=True)
class Found:
    """A pair's suggestion and its grid.

    Args:
        task: as the page calls it.
        mask: which.
        suggestion: record of the suggestion.
        grid: records of runs, by rate.
        at: record of the run at the suggested rate, where there is one.
        chosen_on: whether something of the suggestion was decided on this pair.
    """

    task: str
    mask: str
    suggestion: Record
    grid: Mapping[float, Record]
    at: Record | None
    chosen_on: bool

    @property
    def best(self) -> float:
        """The best rate of the grid."""
        return max(self.grid, key=lambda rate: quality(self.grid[rate]))

    @property
    def ratio(self) -> float:
        """The suggested rate as a multiple of the best."""
        return self.suggestion["suggested"] / self.best

    @property
    def row(self) -> Sequence[object]:
        """Of the table."""
        spread = f"{self.grid[self.best]['validation']:.1f}"
        tried = ", ".join(f"{rate:g}" for rate in sorted(self.grid))
        return (
            f"{self.task}, {self.mask}",
            f"{self.suggestion['suggested']:.2g}",
            f"{self.suggestion['of_one_batch']:.2g}",
            f"{self.best:g}",
            f"{self.ratio:.2f}",
            spread,
            "—" if self.at is None else f"{self.at['validation']:.1f}",
            tried,
        )


HEADER = ("task, mask", "suggested", "by one batch", "best", "ratio", "at the best", "at the suggested", "grid")


def rates(results: Path, docs: Path) -> str:
    """Every pair, the pairs that something was decided on apart, and a plot of both."""
    records = list(lines(results / "suggested.jsonl"))
    pairs = [*_images(records), *_texts(records, results)]
    pairs = [pair for pair in pairs if len(pair.grid) > 2]
    if not pairs:
        return ""
    told = [(pair.mask.split()[0], pair.best, pair.suggestion["suggested"], pair.chosen_on) for pair in pairs]
    rates_against_best(told, FACTOR, docs / "rates.png")
    parts: list[str] = []
    for title, chosen_on in (("Pairs apart from the development", False), ("The pairs of the development", True)):
        some = [pair for pair in pairs if pair.chosen_on is chosen_on]
        if some:
            parts += [f"## {title}", table(HEADER, [pair.row for pair in some]), _summary(some)]
    return "\n\n".join([*parts, "![Suggested rates against the best of a grid](rates.png)", origin(records)])


def _summary(pairs: Sequence[Found]) -> str:
    within = sum(1 / FACTOR <= pair.ratio <= FACTOR for pair in pairs)
    ratios = sorted(pair.ratio for pair in pairs)
    gains = [pair.at["validation"] - pair.grid[pair.best]["validation"] for pair in pairs if pair.at is not None]
    told = f"Within a factor of {FACTOR}: {within} of {len(pairs)}. Ratios from {ratios[0]:.2f} to {ratios[-1]:.2f}."
    if gains:
        mean = sum(gains) / len(gains)
        told += f" Accuracy at the suggested rate, against the best of the grid: {mean:+.1f} points in the mean,"
        told += f" {min(gains):+.1f} at worst."
    return told


def _images(records: Iterable[Record]) -> Iterable[Found]:
    own = [r for r in records if r["task"] in IMAGES]
    for one in (r for r in own if r["rate"] is None):
        runs = {r["rate"]: r for r in own if (r["task"], r["method"]) == (one["task"], one["method"]) and r["rate"]}
        at = runs.pop(one["suggested"], None)
        yield Found(f"{one['task']}, {DENSITY:.0%}", one["method"], one, runs, at, one["task"] not in APART)


def _texts(records: Iterable[Record], results: Path) -> Iterable[Found]:
    for one in records:
        grid = GRIDS.get(one["task"])
        if grid is not None and one["rate"] is None:
            runs = {r["rate"]: r for r in lines(results / grid.file) if grid.holds(r, one["method"])}
            mask = one["method"].replace(" loaded static", "")
            yield Found(grid.title, mask, one, runs, None, chosen_on=one["task"] not in APART)
