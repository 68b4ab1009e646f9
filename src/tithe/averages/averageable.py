"""Whether a mean of the numbers that checkpoints store is a mean of the weights that they stand for.

It is not for codes that a scale turns into weights, for integers and flags that differ, and for factors of a product:
the mean of B A is not the mean of B times the mean of A. It is where all but one of the factors are the same in all.
"""

from __future__ import annotations

import json
import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Final

import torch
from torch import Tensor

from tithe.averages.entry import Entry
from tithe.averages.safetensors_ranges import Form
from tithe.averages.stacked import PlainRows, Rows
from tithe.errors import TitheError

_AT_ONCE: Final = 1 << 20
"""Entries that are compared at a time."""

_COUNTS: Final = re.compile(
    r"(?:.*_)?(?:n|num|counts?|counters?|steps?|tracked|updates?|seen|hits|usage|tokens|ages?|ptr|pointer|epochs?"
    r"|iters?|iterations?|batches|calls|samples)(?:_.*)?"
)
"""Names of integers that count what happened: an average has those of the last checkpoint."""

_SCALE: Final = re.compile(r".*(scale|scb|absmax|quant_map|quant_state|qzeros|zero_?point|codebook|centroid).*", re.I)
"""Names of what turns codes into weights, with the name of the codes in front."""

_SCALE_BESIDE: Final = re.compile(
    r"_?(weight_|input_|output_|act_|w_)?(scales?|scb|absmax|quant_map|qzeros|zero_?points?|codebooks?|centroids)(_inv)?"
    r"|scale_(weight|input)",
    re.I,
)
"""Names of the same in a module of its own."""

_FACTOR: Final = re.compile(
    r"lora_(?:embedding_)?[ABEab](?:_weight)?|lora_(?:down|up|mid)|lora_magnitude_vector|dora_scale|hada_(?:w[12]|t[12])(?:_[ab])?"
    r"|lokr_(?:w[12]|t2)(?:_[ab])?|vera_(?:[AB]|lambda_[bd])|randlora_(?:[AB]|lambda|gamma)"
    r"|(?:b?oft)_(?:[Rrs]|diag|blocks)|hra_u|road_(?:theta|alpha)|vblora_(?:logits_[AB]|vector_bank)"
)
_MAGNITUDE: Final = re.compile(r"lora_magnitude_vector|dora_scale")
_CURVED: Final = re.compile(r"(?:b?oft|hra|road|vblora)_\w+")
"""Factors that weights do not follow in straight lines, whatever else is the same."""

_LINEAR: Final = ("IA3", "PROMPT_TUNING", "PREFIX_TUNING", "P_TUNING", "LN_TUNING", "TRAINABLE_TOKENS", "FOURIERFT")
_BY_FACTORS: Final = ("LORA", "ADALORA", "LOHA", "LOKR", "VERA", "OFT", "BOFT", "HRA", "ROAD", "RANDLORA", "VBLORA")
"""Kinds of adapters in peft: those whose weights follow what is trained, and those whose tensors are named above."""

_MEANING: Final = re.compile(
    r"model_type|architectures|.*head.*|.*act(ivation)?(_fn|_function)?|.*(eps|epsilon)|.*rope.*|.*norm.*|.*scal.*"
    r"|.*position.*|.*softcap.*|sliding_window|layer_types|tie_.*|peft_type|r|lora_alpha|use_(rs|do)lora|.*pattern"
    r"|random_loc_seed|n_frequency"
)
"""Keys of a configuration that say what the tensors are for: with another value they are other functions."""


def check_averageable(rows: Rows, counted: Sequence[int]) -> None:
    """Refuse checkpoints that no average of their tensors stands for.

    Args:
        rows: the checkpoints.
        counted: those of them that count; one alone is its own average.

    Raises:
        TitheError: naming a checkpoint, the tensor, and what it is.
    """
    if len(counted) < 2:
        return
    for name, form in rows.forms.items():
        if form.averaged:
            check_numbers(rows, name)
        else:
            _check_integers(rows, counted, name, form)
    _check_factors(rows, counted)
    if isinstance(rows, PlainRows):
        _check_configurations([rows.entries[index] for index in counted])


def check_numbers(rows: Rows, name: str) -> None:
    """Refuse codes: integers, and numbers of 8 bits with a scale beside them.

    Args:
        rows: the checkpoints.
        name: of a tensor whose entries are to be added up.

    Raises:
        TitheError: naming the first checkpoint, the tensor and the scale.
    """
    form = rows.forms[name]
    scale = _scale_of(name, rows.forms) if form.dtype.itemsize == 1 or not form.averaged else None
    if not form.averaged or scale is not None:
        raise _quantised(rows.paths[0], name, form, f"with {scale} beside them" if scale else "without a scale")


def _check_integers(rows: Rows, counted: Sequence[int], name: str, form: Form) -> None:
    """Integers and flags are the same in all, or count something."""
    last = name.rpartition(".")[2]
    scales = bool(_SCALE.fullmatch(last))
    flag = form.dtype == torch.bool and form.numel == 1
    count = form.dtype.itemsize >= 4 and (form.numel == 1 or _COUNTS.fullmatch(last.lower()) is not None)
    if not scales and (flag or count):
        return
    other = differing(rows, counted, name)
    if other is None:
        return
    scale = _scale_of(name, rows.forms)
    if form.dtype == torch.bool:
        raise TitheError(
            str(rows.paths[other]),
            found=f"a mask {name} with other values than in {rows.paths[counted[0]]}",
            expected="the same in all: masks have no mean",
            remedy="multiply the weights by their masks, save them without masks, and average those",
        )
    if scales or scale is not None or form.dtype in (torch.int8, torch.uint8):
        raise _quantised(rows.paths[other], name, form, "that differ" if scale is None else f"with {scale} beside them")
    raise TitheError(
        str(rows.paths[other]),
        found=f"integers {name} ({form}) with other values than in {rows.paths[counted[0]]}",
        expected="the same in all: tables and indices have no mean",
        remedy="save weights as floating-point numbers; a table that all may share, with the same values in all",
    )


def _quantised(path: Path, name: str, form: Form, why: str) -> TitheError:
    kind = str(form.dtype).removeprefix("torch.")
    return TitheError(
        str(path),
        found=f"quantised weights: {name}, codes of {kind} {why}",
        expected="weights as floating-point numbers; the mean of codes is not the mean of weights",
        remedy="dequantise each checkpoint first (codes times scales; model.dequantize() of transformers), average"
        " those, and quantise the average",
    )


def _scale_of(name: str, forms: Mapping[str, Form]) -> str | None:
    """The tensor that scales another, by its name: in the same module, or with the other's name in front."""
    module, _, last = name.rpartition(".")
    for other in forms:
        if other == name or not other.startswith(module):
            continue
        parent, _, end = other.rpartition(".")
        of_it = other.startswith((name + ".", name + "_")) and _SCALE.fullmatch(end)
        beside = parent == module and _SCALE_BESIDE.fullmatch(end)
        if (of_it or beside) and not _SCALE.fullmatch(last):
            return other
    return None


def differing(rows: Rows, counted: Sequence[int], name: str) -> int | None:
    """Return the first of some checkpoints in which a tensor is not, bit for bit, what it is in the first of them."""
    form = rows.forms[name]
    for start in range(0, form.numel, _AT_ONCE):
        stop = min(start + _AT_ONCE, form.numel)
        found = [None if index not in counted else row for index, row in enumerate(rows.ranges(name, start, stop))]
        first = found[counted[0]]
        assert first is not None
        for index in counted[1:]:
            other = found[index]
            if other is not None and not torch.equal(_bits(first), _bits(other)):
                return index
    return None


def _bits(values: Tensor) -> Tensor:
    return values.contiguous().view(torch.uint8)


def _check_factors(rows: Rows, counted: Sequence[int]) -> None:
    """Of the factors of a product one may differ."""
    products: dict[str, list[str]] = {}
    for name in rows.forms:
        for module, _ in _factors(name, rows.forms):
            products.setdefault(module, []).append(name)
    for names in products.values():
        told = {name: factor for name in names for _, factor in _factors(name, rows.forms)}
        changed = [name for name in names if differing(rows, counted, name) is not None]
        directions = [name for name in changed if not _MAGNITUDE.fullmatch(told[name])]
        curved = any(_CURVED.fullmatch(told[name]) for name in changed)
        curved = curved or (bool(directions) and any(_MAGNITUDE.fullmatch(told[name]) for name in names))
        if curved or len({told[name] for name in changed}) > 1:
            masked = any(told[name] == "mask" for name in names)
            other = differing(rows, counted, changed[0])
            assert other is not None
            raise TitheError(
                str(rows.paths[other]),
                found=f"factors of one weight that differ: {', '.join(changed)}",
                expected="weights, or one factor that differs; the mean of products is not the product of means",
                remedy="make the pruned weights permanent (torch.nn.utils.prune.remove), and average those"
                if masked
                else "merge each adapter into its base (merge_and_unload() of peft), save the whole models, and average"
                " those",
            )


def _factors(name: str, forms: Mapping[str, Form]) -> list[tuple[str, str]]:
    """The module and the kind of a tensor that is a factor of a weight; nothing for others."""
    parts = name.split(".")
    for place, part in enumerate(parts):
        if _FACTOR.fullmatch(part):
            return [(".".join(parts[:place]), part)]
        if part in ("down", "up") and place and parts[place - 1].endswith("lora"):
            return [(".".join(parts[:place]), part)]
    for kind in ("orig", "mask"):
        stem = name.removesuffix("_" + kind)
        if stem != name and {stem + "_orig", stem + "_mask"} <= set(forms):
            return [(stem, kind)]
    return []


def _check_configurations(entries: Sequence[Entry]) -> None:
    """Folders have configurations that mean the same, and no adapter of a kind that averages make no sense of."""
    for file in ("config.json", "adapter_config.json"):
        told = [(entry, _configuration(entry.folder / file)) for entry in entries if entry.folder is not None]
        there = [(entry, content) for entry, content in told if content is not None]
        for entry, content in there:
            kind = content.get("peft_type")
            if kind is not None and kind not in (*_LINEAR, *_BY_FACTORS):
                raise TitheError(
                    str(entry.path),
                    found=f"an adapter of peft_type {kind}",
                    expected="weights, or an adapter that the weights follow in straight lines",
                    remedy="merge each adapter into its base (merge_and_unload() of peft), save the whole models, and"
                    " average those",
                )
            first_entry, first = there[0]
            for key in sorted(set(first) | set(content)):
                if _MEANING.fullmatch(key) and first.get(key) != content.get(key):
                    raise TitheError(
                        str(entry.path),
                        found=f"{key} = {content.get(key)!r} in {file}",
                        expected=f"{first.get(key)!r}, as in {first_entry.path}",
                        remedy="average checkpoints of one architecture",
                    )


def _configuration(path: Path) -> dict[str, Any] | None:
    """What a configuration says; None where there is none that can be read."""
    try:
        content: Any = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError):
        return None
    return content if isinstance(content, dict) else None
