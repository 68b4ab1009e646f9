"""Markdown tables and plots of docs/benchmarks, from the committed results: `python -m benchmarks.tables`."""

from __future__ import annotations

import argparse
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path

from benchmarks import (
    accuracy_tables,
    average_tables,
    causal_tables,
    cost_tables,
    estimator_tables,
    language_tables,
    masks_tables,
    memory_tables,
    pruning_tables,
    saved_tables,
    sparse_tables,
    speed_tables,
    suggested_tables,
    transfer_tables,
)
from benchmarks.records import RESULTS

DOCS = Path(__file__).parents[1] / "docs" / "benchmarks"
PAGES: dict[str, Callable[[Path, Path], str]] = {
    "which-mask": accuracy_tables.which_mask,
    "masks": masks_tables.masks,
    "accuracy": accuracy_tables.accuracy,
    "step": cost_tables.step,
    "scoring": cost_tables.scoring,
    "delta": cost_tables.delta,
    "growth": cost_tables.growth,
    "transfer": transfer_tables.transfer,
    "memory": memory_tables.memory,
    "saved": saved_tables.saved,
    "causal": causal_tables.causal,
    "estimator": estimator_tables.estimator,
    "speed": speed_tables.speed,
    "sparse": sparse_tables.sparse,
    "average": average_tables.average,
    "pruning": pruning_tables.pruning,
    "language": language_tables.language,
    "rates": suggested_tables.rates,
}
START, END = "<!-- results: written by python -m benchmarks.tables -->", "<!-- end of results -->"


def write(page: Path, results: str) -> None:
    """Put the results between the page's two marks, the words around them left alone; a new page gets the marks."""
    block = f"{START}\n\n{results.strip()}\n\n{END}"
    if not page.exists():
        page.write_text(f"# {page.stem.replace('-', ' ').capitalize()}\n\n{block}\n")
        return
    before, _, rest = page.read_text().partition(START)
    page.write_text(before + block + rest.partition(END)[2])


def main(argv: Sequence[str] | None = None, pages: Iterable[str] = PAGES) -> None:
    """Write every page whose results are there."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--results", type=Path, default=RESULTS)
    parser.add_argument("--docs", type=Path, default=DOCS)
    args = parser.parse_args(argv)
    args.docs.mkdir(parents=True, exist_ok=True)
    for name in pages:
        results = PAGES[name](args.results, args.docs)
        if results:
            write(args.docs / f"{name}.md", results)
            print(f"{args.docs / name}.md")


if __name__ == "__main__":
    main()
