"""Which parameters a plan may choose from, which it trains whole: globs over parameter names."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from fnmatch import fnmatchcase

import torch
from torch import nn
from torch._subclasses.fake_tensor import FakeTensor

from tithe.errors import TitheError


@dataclass(frozen=True)
class Split:
    """The parameters of a model by their part in a plan; each distinct tensor once, under its first name.

    Args:
        floats: every floating-point parameter.
        head: those trained whole.
        candidates: those to choose from.
        alias: every name, those of tied tensors included → its first name.
    """

    floats: dict[str, nn.Parameter]
    head: dict[str, nn.Parameter]
    candidates: dict[str, nn.Parameter]
    alias: dict[str, str]


def split_parameters(model: nn.Module, *, where: str | Sequence[str], head: str | Sequence[str]) -> Split:
    """Sort a model's parameters into head, candidates and the rest.

    Raises:
        TitheError: when the model has nothing trainable, a glob matches nothing, or nothing is left to choose from.
    """
    named = list(model.named_parameters(remove_duplicate=False))
    first: dict[int, str] = {}
    alias = {name: first.setdefault(id(p), name) for name, p in named}
    floats = {name: p for name, p in model.named_parameters() if torch.is_floating_point(p)}
    trainable = {name: p for name, p in floats.items() if p.requires_grad}
    if not trainable:
        raise TitheError(
            type(model).__name__,
            found=f"no floating-point parameter that requires a gradient among {len(alias)}",
            expected="at least one",
            remedy="load the model in a floating-point dtype, or call model.requires_grad_(True)",
        )
    _check_overlap(floats)
    names_by_first: dict[str, list[str]] = {}
    for name, origin in alias.items():
        names_by_first.setdefault(origin, []).append(name)
    in_head = _matching("head", _patterns(head), floats, names_by_first)
    in_where = _matching("where", _patterns(where), floats, names_by_first)
    candidates = {name: p for name, p in trainable.items() if name in in_where and name not in in_head}
    if not candidates:
        raise TitheError(
            "where",
            found="only parameters that belong to the head or require no gradient",
            expected="at least one parameter to choose from",
            remedy="widen where=, or narrow head=",
        )
    return Split(floats, {name: floats[name] for name in floats if name in in_head}, candidates, alias)


def _patterns(globs: str | Sequence[str]) -> list[str]:
    return [globs] if isinstance(globs, str) else list(globs)


def _matching(
    setting: str, patterns: Iterable[str], floats: Mapping[str, nn.Parameter], spelled: Mapping[str, Iterable[str]]
) -> set[str]:
    """First names matched by any pattern and by no "!" pattern; only "!" patterns mean all but those."""
    patterns = list(patterns)
    wanted = [p for p in patterns if not p.startswith("!")]
    unwanted = [p[1:] for p in patterns if p.startswith("!")]
    matched: dict[str, set[str]] = {
        pattern: {name for name in floats if any(fnmatchcase(other, pattern) for other in spelled[name])}
        for pattern in [*wanted, *unwanted]
    }
    for pattern, found in matched.items():
        if not found:
            raise TitheError(
                f"{setting}={pattern!r}",
                found="no floating-point parameter of that name",
                expected="a glob over names such as " + ", ".join(list(floats)[:3]),
                remedy="print([name for name, _ in model.named_parameters()]) shows them all",
            )
    base = set[str]().union(*(matched[p] for p in wanted)) if wanted or not unwanted else set(floats)
    return base.difference(*(matched[p] for p in unwanted))


def _check_overlap(floats: Mapping[str, nn.Parameter]) -> None:
    """Refuse two parameters over the same memory: one would change without the other's selection knowing."""
    seen: dict[tuple[object, int], str] = {}
    for name, parameter in floats.items():
        if parameter.is_meta or isinstance(parameter, FakeTensor) or not parameter.numel():
            continue
        other = seen.setdefault((parameter.device, parameter.data_ptr()), name)
        if other != name:
            raise TitheError(
                name,
                found=f"memory shared with {other} through another Parameter",
                expected="tied weights to be one Parameter",
                remedy=f"assign the same nn.Parameter object to both, as {other} = {name} does",
            )
