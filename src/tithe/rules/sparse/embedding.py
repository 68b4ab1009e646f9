"""The rule for `F.embedding`: gradients of the selected rows only, no dense table of gradients.

A table with `max_norm` is scaled down in place by each look-up, as stock does it. Where a plan froze it, what is looked
up is scaled instead, to the same output; where a part of it is selected, the rest would move with it: it is refused.

Shapes: ids (...), gy (..., D), the table (V, D).
"""

from __future__ import annotations

from typing import Any, TypeGuard

import torch
import torch.nn.functional as F
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensor

from tithe.errors import TitheError
from tithe.rules.base import Rule
from tithe.rules.dispatch import Call, Carrier, another, asked_first, asking, graft, raw, register
from tithe.rules.sparse.probes import SquareProbe
from tithe.rules.theta import Binding, SharedTheta


class EmbeddingRule(Rule):
    """A look-up table of which single entries are selected; keeps the ids, which live anyway.

    Args:
        binding: the table's binding.
        padding_idx: the row that gets no gradient, or None.
    """

    twice = True

    def __init__(self, binding: Binding, padding_idx: int | None) -> None:
        self.binding, self.padding_idx = binding, padding_idx

    def forward(self, x: Tensor, weight: Tensor, bias: Tensor | None) -> tuple[Tensor, tuple[Tensor, ...]]:
        """The look-up y = w[ids] as stock does it."""
        return F.embedding(x, weight, self.padding_idx), ()

    def keep(self, x: Tensor, extra: tuple[Tensor, ...], need_x: bool) -> tuple[Tensor, ...]:
        """The ids and nothing else."""
        return (x,)

    def backward(
        self, gy: Tensor, weight: Tensor, kept: tuple[Tensor, ...], need_x: bool, need_bias: bool
    ) -> tuple[Tensor | None, Tensor | None, Tensor | None, Tensor | None]:
        """Rows of gy whose id is a touched row, added up per row; then gather."""
        num_rows, width = weight.shape
        ids, gy_ND = kept[0].reshape(-1), gy.reshape(-1, width)
        probe, touch = self.binding.probe, self.binding.touch
        if probe is not None:
            gy_ND = gy_ND if self.padding_idx is None else gy_ND * (ids != self.padding_idx)[:, None]
            if probe.hears:
                probe.rows(kept[0], gy_ND.view_as(gy))
            return None, None, None, None
        assert touch is not None, "a rule is only built for a selected or a probed table"
        # Every untouched row shares one spare slot at the end, so that no shape depends on the ids.
        num_touched = touch.rows.numel()
        slot = torch.full((num_rows,), num_touched, dtype=torch.int64, device=ids.device)
        slot[touch.rows] = torch.arange(num_touched, device=ids.device)
        if self.padding_idx is not None:
            slot[self.padding_idx] = num_touched
        sums = gy.new_zeros(num_touched + 1, width).index_add_(0, slot.index_select(0, ids), gy_ND)
        return None, None, sums.reshape(-1).index_select(0, touch.at(True, False)), None


@register(F.embedding, keeps="the ids", stock="the ids; the gradient is a whole table", probes=True, cast="")
def embedding(
    input: Tensor,
    weight: Tensor,
    padding_idx: int | None = None,
    max_norm: float | None = None,
    norm_type: float = 2.0,
    scale_grad_by_freq: bool = False,
    sparse: bool = False,
) -> Call:
    """The look-up y = w[ids]; ∇w sums gy over the places of each selected row.

    Gradients scaled by frequency go through graft.
    """
    binding = asking(weight)
    if binding is None or max_norm is not None or scale_grad_by_freq:
        return NotImplemented
    if padding_idx is not None and padding_idx < 0:
        padding_idx += weight.shape[0]
    probe = binding.probe
    if isinstance(probe, SquareProbe) and probe.expand and input.shape[:1] == (1,):
        # Positions shared by all samples are looked up once per sample, so that their gradients arrive apart.
        input = input.expand(probe.num_samples, *input.shape[1:])
    return Call(lambda ids, of_weight, _: EmbeddingRule(of_weight, padding_idx), input, weight)


def _moves_whole(carrier: Carrier) -> bool:
    """Whether a plan trains all of a table with `max_norm`, which is stock training then; not so for a frozen one.

    Raises:
        TitheError: when some of its entries are selected or scored, or it moves in a span.
    """
    binding = carrier.binding
    if not binding.active:
        return False
    if binding.probe is None and binding.selection.whole and not isinstance(binding.common, SharedTheta):
        return True
    raise TitheError(
        binding.name,
        found="a table that each look-up scales down to max_norm, in place, the entries that are not selected too",
        expected="weights that move where they are selected, by the optimizer alone",
        remedy=f'train it whole with head="{binding.name}", leave it out with where="!{binding.name}", or set max_norm'
        " to None on its module",
    )


def _stands(weight: Any) -> TypeGuard[Carrier]:
    """Whether a plan carries the table that is there; what `functional_call` put in its place is stock's to scale."""
    if not isinstance(weight, Carrier):
        return False
    return raw(weight) is weight.binding.weight and another(weight) is None


def _scaled(
    carrier: Carrier, ids: Tensor, padding_idx: int | None, max_norm: float, norm_type: float
) -> tuple[Tensor, Tensor, int | None]:
    """A copy of a frozen table, or of its rows alone where they are fewer, scaled: (rows, ids into them, padding)."""
    table = raw(carrier).detach()
    num_rows = table.shape[0]
    if ids.is_nested or ids.numel() >= num_rows:
        rows, flat, place = table.clone(), ids.values() if ids.is_nested else ids, ids
    else:
        flat = torch.arange(ids.numel(), device=ids.device)
        place, rows = flat.view(ids.shape), table.index_select(0, ids.reshape(-1))
        if padding_idx is not None:
            padding_idx %= num_rows
            place = place.masked_fill(ids == padding_idx, ids.numel())
            rows, padding_idx = torch.cat([rows, table[padding_idx : padding_idx + 1]]), ids.numel()
    if not (rows.is_meta or isinstance(rows, FakeTensor)):
        torch.embedding_renorm_(rows, flat.contiguous(), max_norm, norm_type)
    return rows, place, padding_idx


@asked_first(F.embedding)
def embedding_with_norm(
    input: Tensor,
    weight: Tensor,
    padding_idx: int | None = None,
    max_norm: float | None = None,
    norm_type: float = 2.0,
    scale_grad_by_freq: bool = False,
    sparse: bool = False,
) -> Any:
    """The look-up with `max_norm`: stock's where all of the table is trained, of scaled rows where it is frozen."""
    if max_norm is None or not _stands(weight):
        return NotImplemented
    if not _moves_whole(weight):
        rows, place, padding_idx = _scaled(weight, input, padding_idx, max_norm, norm_type)
        return F.embedding(place, rows, padding_idx)
    y = F.embedding(input, graft(weight), padding_idx, max_norm, norm_type, scale_grad_by_freq, sparse)
    weight.binding.refresh()
    return y


@asked_first(F.embedding_bag)
def embedding_bag_with_norm(
    input: Tensor,
    weight: Tensor,
    offsets: Tensor | None = None,
    max_norm: float | None = None,
    norm_type: float = 2,
    scale_grad_by_freq: bool = False,
    mode: str = "mean",
    sparse: bool = False,
    per_sample_weights: Tensor | None = None,
    include_last_offset: bool = False,
    padding_idx: int | None = None,
) -> Any:
    """The same for sums, means and maxima of bags."""
    if max_norm is None or not _stands(weight):
        return NotImplemented
    more = (scale_grad_by_freq, mode, sparse, per_sample_weights, include_last_offset)
    if not _moves_whole(weight):
        rows, place, padding_idx = _scaled(weight, input, padding_idx, max_norm, norm_type)
        return F.embedding_bag(place, rows, offsets, None, norm_type, *more, padding_idx)
    y = F.embedding_bag(input, graft(weight), offsets, max_norm, norm_type, *more, padding_idx)
    weight.binding.refresh()
    return y


@asked_first(torch.embedding_renorm_)
def embedding_renorm_(input: Tensor, indices: Tensor, max_norm: float, norm_type: float) -> Any:
    """The scaling alone, by name: of a table that a plan carries it is refused unless all of it is trained."""
    if not _stands(input):
        return NotImplemented
    if not _moves_whole(input):
        raise TitheError(
            input.binding.name,
            found="a frozen table that is scaled in place",
            expected="weights that stay as they are",
            remedy=f'train it whole with head="{input.binding.name}"',
        )
    with torch.no_grad():
        torch.embedding_renorm_(raw(input), indices, max_norm, norm_type)
    input.binding.refresh()
    return input
