"""Quotes as tables of at most 80 columns, and what to know about them."""

from __future__ import annotations

from collections.abc import Iterator

from rich.console import Console
from rich.table import Table

from tithe.app.price.offers import OFFERS
from tithe.app.price.quote import Quote, Quotes
from tithe.app.terminal import human, megabytes, table
from tithe.delta.ranges import fold, shorten

_LAYERS = 6
_PATH = 40


def show(quotes: Quotes, console: Console) -> None:
    """Print the quotes as tables, and notes."""
    console.print(_title(quotes), markup=False)
    for made in (_memory(quotes), _work(quotes), *_layers(quotes), *([_fits(quotes)] if quotes.memory else [])):
        console.print()
        console.print(made)
    console.print()
    for name, reason in quotes.left_out.items():
        console.print(f"{name} is left out: {reason}", markup=False)
    for note in _notes(quotes):
        console.print(f"- {note}", markup=False)


def _title(quotes: Quotes) -> str:
    given = [f"batch {quotes.batch}", quotes.dtype, quotes.optimizer, f"budget {_budget(quotes)}"]
    return f"{quotes.subject}: {', '.join(given)}"


def _budget(quotes: Quotes) -> str:
    budget = quotes.budget
    if budget.fraction is not None:
        return f"{100 * budget.fraction:g} %"
    return human(budget.bytes) if budget.bytes is not None else f"{budget.of(0):,} elements"


def _memory(quotes: Quotes) -> Table:
    heads = ["weights", "batch", "θ+index", "optim", "grads", "kept", "work", "PEAK"]
    compared = any(quotes.times_less(row) is not None for row in quotes.rows)
    title = "Memory at the highest moment of a step, MB: columns add up to the peak"
    made = table(["method", *heads, *(["×less"] if compared else [])], title=title)
    for row in quotes.rows:
        times = quotes.times_less(row)
        less = [] if times is None else [f"{times:.1f}" if times < 100 else f"{times:.0f}"]
        made.add_row(row.method, *map(_tight, row.parts.values()), _tight(row.peak), *less)
    return made


def _tight(size: int) -> str:
    """Megabytes in at most six characters, as far as a machine's memory goes."""
    value = size / 1e6
    return megabytes(size) if value < 1000 else f"{value:.0f}" if value < 1e6 else f"{value / 1e6:.1f}e6"


def _count(values: int) -> str:
    """A count in at most seven characters."""
    for unit, scale in ((" G", 1e9), (" M", 1e6), (" k", 1e4)):
        if values >= scale:
            return f"{values / (1e3 if unit == ' k' else scale):.1f}{unit}"
    return f"{values:,}"


def _giga(flops: int | None) -> str:
    return "" if flops is None else f"{flops / 1e9:,.2f}" if flops < 1e12 else f"{flops / 1e9:,.0f}"


def _work(quotes: Quotes) -> Table:
    heads = ["trained", "forward", "input ∇", "weight ∇", "kept MB", "send MB", "file MB"]
    made = table(["method", *heads], title="Work of a step: GFLOPs, the most kept for backward, bytes that ranks send")
    for row in quotes.rows:
        flops = row.flops
        counts = (None,) * 3 if flops is None else (flops.forward, flops.input_gradient, flops.weight_gradient)
        sizes = map(megabytes, (row.kept, row.sent, row.file))
        made.add_row(row.method, _count(row.trained), *map(_giga, counts), *sizes)
    return made


def _layers(quotes: Quotes) -> Iterator[Table]:
    """The modules that keep most, over all methods, as many methods side by side as there is room for."""
    rows = quotes.rows
    most: dict[str, int] = {}
    for row in rows:
        for path, size in row.layers.items():
            most[path] = max(most.get(path, 0), size)
    alike = [(path, tuple(row.layers.get(path, 0) for row in rows)) for path in most]
    groups = {said or "(outermost)": paths for said, paths in fold(alike).items()}
    ranked = sorted(groups, key=lambda said: (-sum(most[path] for path in groups[said]), said))
    if len(ranked) > _LAYERS:
        groups[f"({len(ranked) - _LAYERS} more)"] = [path for said in ranked[_LAYERS:] for path in groups[said]]
        ranked = [*ranked[:_LAYERS], f"({len(ranked) - _LAYERS} more)"]
    names = shorten(ranked, _PATH)
    cells = [[megabytes(sum(row.layers.get(path, 0) for path in groups[said])) for said in ranked] for row in rows]
    columns = [(_short(row.method, 11), *column) for row, column in zip(rows, cells, strict=True)]
    wide = [2 + max(map(len, column)) for column in columns]
    room = 78 - min(_PATH, max(6, *map(len, names), 0))
    start = 0
    while start < len(columns):
        stop = start + 1
        while stop < len(columns) and sum(wide[start : stop + 1]) <= room:
            stop += 1
        title = "Layers that keep most for backward, MB; those alike are added up" if start == 0 else None
        made = table(["module", *(column[0] for column in columns[start:stop])], title=title)
        for place, name in enumerate(names):
            made.add_row(_clip(name, _PATH), *(column[1 + place] for column in columns[start:stop]))
        yield made
        start = stop


def _short(name: str, width: int) -> str:
    return name if len(name) <= width else name.replace(" + ", "+").replace(" only", "")[:width]


def _clip(path: str, room: int) -> str:
    return path if len(path) <= room else "…" + path[1 - room :]


def _fits(quotes: Quotes) -> Table:
    memory = quotes.memory or 0
    heads = ["micro-batch", "makes the batch", "peak MB", "largest selection"]
    made = table(["method", *heads], title=f"What fits in {human(memory)}")
    for row in quotes.rows:
        made.add_row(row.method, *_fit(row))
    return made


def _fit(row: Quote) -> tuple[str, str, str, str]:
    fit = row.fit
    if fit is None:
        return "", "", "", ""
    if fit.micro_batch == 0:
        return "none", "one sample takes", megabytes(fit.peak), ""
    steps = "at once" if fit.steps == 1 else f"{fit.steps} micro-batches"
    return (
        f"{fit.micro_batch:,}",
        steps,
        megabytes(fit.peak),
        "" if fit.fraction is None else f"{100 * fit.fraction:g} %",
    )


def _notes(quotes: Quotes) -> list[str]:
    notes = [
        "work: the transient working set, a layer's input and output and what they are made from. It is the floor "
        "of any peak; a smaller micro-batch lowers it.",
        'grads and kept are values at the peak, not totals; for all gradients see "send".',
        "×less: how many times less the peak is than that of full training.",
        "Python and torch themselves come on top (some hundred MB), and kernels' scratch memory.",
    ]
    names = {row.method for row in quotes.rows}
    notes += dict.fromkeys(offer.note for offer in OFFERS.values() if offer.note and offer.name in names)
    for row in quotes.rows:
        if row.basis:
            notes.append(
                f"{row.method} assumes {quotes.checkpoints} checkpoints (--checkpoints) of {quotes.bits} bits per "
                f"weight. It also reads a mapped file, {human(row.basis)}, on each step, not counted above; on a GPU "
                "the codes are in device memory. Ranks divide it, and send as much as in full training."
            )
    if quotes.memory:
        notes.append(
            "Micro-batches: gradients add up over them, and stay in memory meanwhile. The sum equals that of the whole "
            "batch where no layer mixes samples: frozen norms do not (sparse methods, LoRA with them frozen); norms "
            "that train on batch statistics do. At --batch or the micro-batch, the largest selection is of the round "
            "fractions 1, 2, 5 × 10⁻ⁿ."
        )
    return notes
