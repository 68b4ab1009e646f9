"""The rule for `F.embedding`: gradients of the selected rows only, no dense table of gradients.

Shapes: ids (...), gy (..., D), the table (V, D).
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from tithe.rules.base import Rule
from tithe.rules.dispatch import Call, asking, register
from tithe.rules.sparse.probes import SquareProbe
from tithe.rules.theta import Binding


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

    Renormalised tables and gradients scaled by frequency go through graft.
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
