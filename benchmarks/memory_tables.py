"""The page on memory: one step, how it grows, the smallest limit, and the bar of one network."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path

from benchmarks import memory_plots
from benchmarks.markdown import megabytes, origin, table
from benchmarks.records import Record, lines

IN_THE_BAR = {
    "full": "full fine-tuning",
    "LoRA r4": "LoRA r4 (PEFT)",
    "TraDy, 5 %": "Tithe: TraDy, 5 %",
    "TraDy, 5 %, micro-batches of 1": "Tithe, micro-batches of 1",
}
SHADES = dict(zip(memory_plots.PARTS, "█▓▒░", strict=True))
WIDTH = 56


def memory(results: Path, docs: Path) -> str:
    """Everything that is there."""
    steps = {r["method"]: r for r in reversed(list(lines(results / "memory.jsonl")))}
    if "full" not in steps:
        return ""
    parts = [
        "## One step",
        bar(steps, docs),
        step_table(steps),
        "### To reach",
        reach_table(steps),
        "### What is kept for backward, by the layer that keeps it",
        kept_table(steps),
    ]
    limited = list(lines(results / "limited.jsonl"))
    if limited:
        parts += ["## The smallest limit", limited_table(limited)]
    growth = list(lines(results / "memory_growth.jsonl"))
    if growth:
        parts += ["## Growth", growth_tables(growth, steps["full"]["standing_bytes"], docs)]
    return "\n\n".join([*parts, origin([*steps.values(), *growth, *limited])])


def bar(steps: Mapping[str, Record], docs: Path) -> str:
    """The figure and its text: what is alive at the peak of a step."""
    rows = [(label, _parts(steps[method])) for method, label in IN_THE_BAR.items()]
    memory_plots.memory_bar(rows, docs / "memory-bar.png")
    return "\n\n".join(["![What is alive at the peak of one training step](memory-bar.png)", text_bars(rows)])


def _parts(row: Record) -> dict[str, float]:
    kinds = row["by_kind"]
    sizes = (row["standing_bytes"], kinds["gradients"], kinds["kept"], kinds["other"])
    return {part: size / 1e6 for part, size in zip(memory_plots.PARTS, sizes, strict=True)}


def text_bars(rows: Sequence[tuple[str, Mapping[str, float]]]) -> str:
    """The same bars in a block of text."""
    scale = WIDTH / max(sum(parts.values()) for _, parts in rows)
    out = ["```text"]
    for label, parts in rows:
        done, drawn = 0.0, ""
        for part, shade in SHADES.items():
            done += parts[part]
            drawn += shade * (round(done * scale) - len(drawn))
        out.append(f"{label:<30}{done:>5.0f} MB {drawn or '▏'}")
    legend = "   ".join(f"{shade} {part}" for part, shade in SHADES.items())
    return "\n".join([*out, f"{'':<30}{'':>5}    {legend}", "```"])


def _peak(row: Record, weights: int) -> int:
    """Beyond the network's own weights: what a method adds to them counts, between steps and within one."""
    return row["peak_bytes"] + row["standing_bytes"] - weights


def step_table(steps: Mapping[str, Record]) -> str:
    """Bytes and seconds of every method."""
    full = steps["full"]
    weights = full["standing_bytes"]
    cells = [
        [
            name,
            f"{r['trained']:,}",
            "" if r["channels"] is None else f"{r['channels']} in {r['layers']}",
            megabytes(r["saved_bytes"]),
            _times(full["saved_bytes"] / r["saved_bytes"]),
            megabytes(_peak(r, weights)),
            _times(_peak(full, weights) / _peak(r, weights)),
            f"{r['cpu_ms']:.0f}",
            f"{r['cpu_ms'] / full['cpu_ms']:.2f}",
        ]
        for name, r in steps.items()
    ]
    header = ["", "trained", "channels, layers", "kept MB", "less", "peak MB", "less", "CPU ms", "of full"]
    return table(header, cells)


def reach_table(steps: Mapping[str, Record]) -> str:
    """The figures to reach, each with the floor under it."""
    full = steps["full"]
    weights = full["standing_bytes"]
    layer = f"{full['floor_layer']}'s input and output {megabytes(full['floor_bytes'])} MB"
    rows: list[list[str]] = []
    for name, row in steps.items():
        whole = name.startswith(("TraDy", "every layer")) and "micro" not in name
        single = name.startswith("TraDy") and name.endswith("micro-batches of 1")
        saved, peak = full["saved_bytes"] / row["saved_bytes"], _peak(full, weights) / _peak(row, weights)
        cpu = row["cpu_ms"] / full["cpu_ms"]
        if whole:
            kept = ", ".join(f"{kind} {size / 1e6:.2f}" for kind, size in list(row["saved_by_layer"].items())[:2])
            rows.append(_line(f"{name}: kept, times less", saved, 50, True, f"{kept} MB"))
            rows.append(_line(f"{name}: peak, times less", peak, 5, True, f"{layer}, and the block's input"))
            rows.append(_line(f"{name}: CPU time of full", cpu, 0.7, False, ""))
        elif single:
            head = f"an eighth of that, and the head's gradient {4 * 1281000 / 1e6:.1f} MB between micro-batches"
            rows.append(_line(f"{name}: peak, times less", peak, 20, True, head))
            equal = f"{row['gradient_difference']:.0e} in float32, {row['gradient_difference_float64']:.0e} in float64"
            rows.append([f"{name}: gradients equal the whole batch's, largest relative difference", equal, "", "", ""])
    return table(["", "measured", "to reach", "reached", "the floor, or what is left"], rows)


def _line(what: str, value: float, reach: float, more: bool, floor: str) -> list[str]:
    reached = value >= reach if more else value <= reach
    return [what, f"{value:.3g}", f"{'≥' if more else '≤'} {reach:g}", "yes" if reached else "no", floor]


def kept_table(steps: Mapping[str, Record]) -> str:
    """Saved bytes by kind of layer."""
    merged = {name: _by_group(r["saved_by_layer"]) for name, r in steps.items()}
    groups = ["convolutions", "norms", "activations", "the rest"]
    cells = [
        [name, *(f"{sizes.get(group, 0) / 1e6:.2f}" for group in groups), *_told(steps[name])]
        for name, sizes in merged.items()
    ]
    return table(["MB", *groups, "kept, predicted ÷ measured", "peak, predicted ÷ measured"], cells)


def _by_group(sizes: Mapping[str, int]) -> dict[str, int]:
    out: dict[str, int] = {}
    for kind, size in sizes.items():
        group = "the rest"
        for part, words in (("convolutions", "Conv"), ("norms", "BatchNorm"), ("activations", "ReLU")):
            group = part if words in kind and kind != "ConvNorm" else group
        out[group] = out.get(group, 0) + size
    return out


def _told(row: Record) -> list[str]:
    if row["predicted_saved_bytes"] is None:
        return ["", ""]
    return [f"{row[f'predicted_{what}_bytes'] / row[f'{what}_bytes']:.4f}" for what in ("saved", "peak")]


def limited_table(records: Sequence[Record]) -> str:
    """The smallest limits, largest first."""
    rows = {r["method"]: r for r in records}
    imports = rows["imports alone"]["smallest_megabytes"]
    full = rows.get("full")
    cells = [
        [
            name,
            r["smallest_megabytes"],
            r["smallest_megabytes"] - imports if name != "imports alone" else "",
            _of(r, full, imports) if full is not None and name != "imports alone" else "",
            _ending(r["below"]),
        ]
        for name, r in sorted(rows.items(), key=lambda item: -item[1]["smallest_megabytes"])
    ]
    return table(["", "smallest M, MB", "without imports", "full takes", "how it ends below"], cells)


def _ending(words: str) -> str:
    kind = words.partition(":")[0]
    return f"{kind}: can't allocate memory" if "can't allocate memory" in words else words[:80].replace("|", "/")


def _of(row: Record, full: Record, imports: int) -> str:
    return _times((full["smallest_megabytes"] - imports) / (row["smallest_megabytes"] - imports))


def _times(ratio: float) -> str:
    return f"{ratio:,.1f}×" if ratio < 100 else f"{ratio:,.0f}×"


def growth_tables(records: Sequence[Record], weights: int, docs: Path) -> str:
    """Peak, kept bytes and seconds over the batch and the resolution, and their plot."""
    methods = list(dict.fromkeys(r["method"] for r in reversed(records)))
    methods = ["full", *(m for m in methods if "LoRA" in m), *sorted(m for m in methods if "TraDy" in m)]
    at = {(r["method"], r["batch"], r["side"]): r for r in records}
    settings = sorted({(r["batch"], r["side"]) for r in records if ("full", r["batch"], r["side"]) in at})
    done = [r for r in records if (r["batch"], r["side"]) in settings]
    memory_plots.growth(done, methods, weights, docs / "memory-growth.png")
    rows: list[list[str]] = []
    by_batch = [s for s in settings if s[1] == 224]
    by_side = sorted((s for s in settings if s[0] == 8 and s[1] != 224), key=lambda s: s[1])
    for batch, side in [*by_batch, *by_side]:
        found = [at[m, batch, side] for m in methods]
        peaks = [_mb(_peak(r, weights), r) for r in found]
        saved = [_mb(r["saved_bytes"], r) for r in found]
        seconds = [f"{r['cpu_ms'] / 1e3:.2f}" if r["measured"] else "—" for r in found]
        rows.append([f"{batch} × {side}²", *(" / ".join(cell) for cell in zip(peaks, saved, seconds, strict=True))])
    header = ["batch", *methods]
    said = (
        "Each cell: peak without the weights, MB / kept for backward, MB / CPU seconds. "
        "A star marks a prediction: the step itself was not run."
    )
    return "\n\n".join([said, table(header, rows), "![Growth of bytes and seconds](memory-growth.png)"])


def _mb(num_bytes: int, row: Record) -> str:
    return f"{num_bytes / 1e6:.4g}" + ("" if row["measured"] else "\\*")
