"""Merge fine-tunings of one base: several tasks in one model, one tensor of all of them in memory at a time.

    τ_i = w_i − b            w = b + scale · merged(τ_1 … τ_n)

References:
    P. Yadav, D. Tam, L. Choshen, C. Raffel, M. Bansal. TIES-Merging: Resolving Interference When Merging Models.
    NeurIPS 2023, arXiv 2306.01708, section 3: trim, elect sign, disjoint merge.
    D. Marczak, S. Magistri, S. Cygert, B. Twardowski, A. Bagdanov, J. van de Weijer. No Task Left Behind: Isotropic
    Model Merging with Common and Task-Specific Subspaces. ICML 2025, arXiv 2502.04959, section 4.2: Iso-C.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Final, Literal, get_args

import torch
from torch import Tensor

from tithe.averages.average import Averaged, write_merged
from tithe.averages.averageable import check_averageable
from tithe.averages.entry import Entry
from tithe.averages.history import History
from tithe.averages.safetensors_ranges import Form
from tithe.averages.stacked import PlainRows, computed_dtype
from tithe.averages.weighted_sum import Block, Piece, Progress
from tithe.errors import TitheError
from tithe.select.topk import largest

MergeMethod = Literal["ties", "iso-c"]

_PIECE: Final = 1 << 22
"""Entries of a merged tensor that are handed on at once."""


def trim(vectors: Tensor, density: float) -> Tensor:
    """Keep of each task vector the entries of largest size, and set the others to zero.

    Args:
        vectors: (n, …), float: a task vector a row.
        density: the share of entries that is kept, in (0, 1]: max(1, ⌊density · entries⌋), ties by index.

    Returns:
        A new tensor of the same shape.

    Example:
        >>> trim(torch.tensor([[1.0, -3.0, 2.0, 0.5]]), 0.5)
        tensor([[ 0., -3.,  2.,  0.]])
    """
    rows = vectors.reshape(len(vectors), -1)
    kept = torch.zeros_like(rows)
    count = max(1, int(density * rows.shape[1]))
    for row, out in zip(rows, kept, strict=True):
        places = largest(row.abs(), count)
        out[places] = row[places]
    return kept.view_as(vectors)


def merge_ties(vectors: Tensor, weights: Tensor) -> Tensor:
    """Merge trimmed task vectors: of each entry the mean of those that have the sign of the weighted sum.

        γ = sign(Σ_i α_i τ_i), + where it is 0        merged = Σ_{i: sign τ_i = γ} α_i τ_i / Σ_{i: sign τ_i = γ} α_i

    Args:
        vectors: (n, …), float, zero where trimmed.
        weights: α, (n,), positive.

    Returns:
        (…), zero where no vector has that sign.

    Example:
        >>> merge_ties(torch.tensor([[1.0, 4.0, 0.0], [3.0, -1.0, 0.0]]), torch.ones(2))
        tensor([2., 4., 0.])
    """
    alpha = weights.to(vectors).view(-1, *[1] * (vectors.dim() - 1))
    weighted = alpha * vectors
    elected = torch.where(weighted.sum(0) >= 0, 1.0, -1.0)
    agree = vectors.sign() == elected
    total = (alpha * agree).sum(0)
    return (weighted * agree).sum(0) / torch.where(total == 0, 1.0, total)


def merge_isotropic(vectors: Tensor, weights: Tensor) -> Tensor:
    """Merge task matrices into one whose singular values are all the same: the sum's directions, of equal strength.

        Σ_i α_i τ_i = U diag(σ) Vᵀ        merged = mean(σ) · U Vᵀ

    Directions whose singular value is rounding (σ_j ≤ max(m, n) · ε · σ_1) have none to speak of and stay out, though
    they count in the mean; the authors' code fills them with whatever the decomposition returns there. What is no
    matrix is averaged, as by the authors: Σ_i α_i τ_i / n. So is a sum that is not finite, which has no decomposition.

    Args:
        vectors: (n, …), float32 or float64.
        weights: α, (n,).

    Returns:
        (…).

    Example:
        >>> merge_isotropic(torch.diag(torch.tensor([3.0, 1.0]))[None], torch.ones(1))
        tensor([[2., 0.],
                [0., 2.]])
    """
    total = torch.einsum("n,n...->...", weights.to(vectors), vectors)
    if total.dim() != 2 or total.numel() == 0 or not bool(total.isfinite().all()):
        return total / len(vectors)
    u, sigma, vt = torch.linalg.svd(total, full_matrices=False)
    rounding = max(total.shape) * torch.finfo(total.dtype).eps * sigma[0]
    return (u * (sigma > rounding)) @ vt * sigma.mean()


class _Merged:
    """The source of a merged model, a tensor at a time.

    Args:
        entries: the fine-tuned models, and the base after them.
        merge: (n, …) task vectors → what is added to the base.
        progress: called with the bytes that were read, and how many there are to read.
    """

    def __init__(
        self, entries: Sequence[Entry], merge: Callable[[Tensor], Tensor], progress: Progress | None = None
    ) -> None:
        self._entries, self._merge, self._progress = entries, merge, progress

    def blocks(self, forms: Mapping[str, Form]) -> Iterator[tuple[Block, Tensor]]:
        """Yield base plus merged task vectors, computed in float32, or float64 for tensors of float64.

        Tensors that are no floating-point numbers are the base's.
        """
        total, done = sum(form.nbytes for form in forms.values()) * len(self._entries), 0
        for name, form in forms.items():
            values = self._tensor(name, form).reshape(-1)
            for start in range(0, max(form.numel, 1), _PIECE):
                stop = min(start + _PIECE, form.numel)
                yield Block(form.dtype, (Piece(name, start, stop),)), values[start:stop]
            done += form.nbytes * len(self._entries)
            if self._progress is not None:
                self._progress(done, total)

    def _tensor(self, name: str, form: Form) -> Tensor:
        *tuned, base = self._entries
        if not form.averaged or not form.numel:
            return base.tensor(name)
        start = _finite(base, name).to(computed_dtype(form.dtype))
        vectors = torch.empty(len(tuned), *form.shape, dtype=start.dtype)
        for row, entry in zip(vectors, tuned, strict=True):
            torch.sub(_finite(entry, name).to(start.dtype), start, out=row)
        merged = start.add_(self._merge(vectors)).to(form.dtype)
        if not bool(merged.float().isfinite().all()):
            raise _beyond(name, form.dtype)
        return merged


def _numbers(weights: Sequence[float] | None, count: int) -> list[float]:
    """The weights as numbers; none of what is no list of numbers."""
    try:
        return [1.0] * count if weights is None else [float(weight) for weight in weights]
    except (TypeError, ValueError):
        return []


def _beyond(name: str, dtype: torch.dtype) -> TitheError:
    return TitheError(
        name,
        found=f"a merged tensor beyond the range of {dtype}",
        expected="one that keeps within it",
        remedy="lower scale or weights, or leave out the model whose weights are so large",
    )


def _finite(entry: Entry, name: str) -> Tensor:
    values = entry.tensor(name)
    if values.is_complex() or not bool(values.float().isfinite().all()):
        kind = "complex numbers" if values.is_complex() else "values that are not finite"
        raise TitheError(
            str(entry.path), found=f"{kind} in {name}", expected="finite real weights", remedy="leave this model out"
        )
    return values


def merge_tasks(
    base: str | Path,
    checkpoints: str | Path | Sequence[str | Path],
    output: str | Path,
    method: MergeMethod = "ties",
    *,
    weights: Sequence[float] | None = None,
    density: float = 0.2,
    scale: float = 1.0,
    progress: Progress | None = None,
    report: Callable[[Averaged], object] | None = None,
) -> Path:
    """Merge fine-tunings of one base into one model of their format, one tensor of all of them in memory at a time.

        w = b + scale · merged(w_1 − b, …, w_n − b)

    "ties" keeps of each task vector the share `density` of largest entries, tensor by tensor, elects a sign for each
    entry and averages the vectors that have it (`merge_ties`). "iso-c" gives all directions of the summed matrix the
    same strength (`merge_isotropic`); other tensors are averaged. Tensors are merged in float32 (float64 of float64).

    Departures: TIES trims each tensor by itself, as mergekit does, where the paper trims whole models. A matrix's
    merging by "iso-c" takes a singular value decomposition, O(m n min(m, n)) operations.

    Args:
        base: the model that all were fine-tuned from: a safetensors file, a Hugging Face folder, or a `.pt` file.
        checkpoints: the fine-tuned models, of the same tensors as the base.
        output: the new file or folder, in the format of the checkpoints, whose configuration and tokenizer it gets; it
            must not exist.
        method: "ties" or "iso-c".
        weights: α, a positive number a checkpoint; None for one each.
        density: of TIES, in (0, 1].
        scale: of the merged vector, chosen on validation data; the papers' values are near 1.
        progress: called now and then with the bytes read, and how many there are to read.
        report: called with what was merged, when it is written.

    Returns:
        `output`.

    Raises:
        TitheError: when a checkpoint is missing, damaged, a delta, of other tensors than the base, or has a value that
            is not finite or that no sum stands for; a merged tensor is beyond the range of its dtype; a setting is out
            of range; the output exists, or there is no room.

    Example:
        >>> import tempfile, safetensors.torch as st
        >>> folder = Path(tempfile.mkdtemp())
        >>> for name, values in (("base", [0.0, 0.0]), ("a", [1.0, 2.0]), ("b", [3.0, -1.0])):
        ...     st.save_file({"weight": torch.tensor(values)}, folder / f"{name}.safetensors")
        >>> tuned = [folder / "a.safetensors", folder / "b.safetensors"]
        >>> path = merge_tasks(folder / "base.safetensors", tuned, folder / "merged.safetensors", density=1.0)
        >>> st.load_file(path)["weight"]
        tensor([2., 2.])
    """
    given = [checkpoints] if isinstance(checkpoints, (str, Path)) else list(checkpoints)
    _check_settings(method, density, scale)
    # The base comes last: what is not merged, counters and what else a `.pt` file holds, is the last one's.
    base_rows, tuned = History(base).rows, History(given).rows
    for rows in (base_rows, tuned):
        if not isinstance(rows, PlainRows):
            raise TitheError(
                str(rows.paths[0]),
                found="a delta, or a coded history",
                expected="whole checkpoints",
                remedy="write each delta into the base first (tithe merge)",
            )
    assert isinstance(base_rows, PlainRows)
    assert isinstance(tuned, PlainRows)
    if len(base_rows) != 1:
        raise TitheError(
            str(base), found=f"{len(base_rows)} checkpoints", expected="one base", remedy="name one of them"
        )
    alpha = _numbers(weights, len(tuned))
    if len(alpha) != len(tuned) or not all(0 < weight < math.inf for weight in alpha):
        raise TitheError(
            "merge_tasks",
            found=f"weights={weights!r} for {len(tuned)} checkpoints",
            expected="one positive number a checkpoint",
            remedy="name the weights in the order of the checkpoints; their default is one each",
        )
    history = History([*tuned.paths, *base_rows.paths])
    check_averageable(history.rows, range(len(history)))
    factors = torch.tensor(alpha, dtype=torch.float64)

    def merge(vectors: Tensor) -> Tensor:
        if method == "ties":
            return merge_ties(trim(vectors, density), factors).mul_(scale)
        return merge_isotropic(vectors, factors).mul_(scale)

    def summing(entries: Sequence[Entry], first: bool) -> _Merged:
        if not first:
            check_averageable(PlainRows(entries), range(len(entries)))
        return _Merged(entries, merge, progress if first else None)

    told = write_merged(history, Path(output), summing)
    told = replace(told, checkpoints=told.checkpoints[:-1])
    if report is not None:
        report(replace(told, weights=tuple(alpha)))
    return Path(output)


def _check_settings(method: str, density: float, scale: float) -> None:
    for name, value, fine, expected in (
        ("method", method, method in get_args(MergeMethod), " or ".join(map(repr, get_args(MergeMethod)))),
        ("density", density, isinstance(density, (int, float)) and 0 < density <= 1, "a share in (0, 1]"),  # pyright: ignore[reportUnnecessaryIsInstance]
        ("scale", scale, isinstance(scale, (int, float)) and math.isfinite(scale), "a finite number"),  # pyright: ignore[reportUnnecessaryIsInstance]
    ):
        if not fine:
            raise TitheError("merge_tasks", found=f"{name}={value!r}", expected=expected, remedy=f"change {name}")
