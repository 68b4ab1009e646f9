"""The selected gradient of a vector that broadcasts along the last axis: a bias, a norm's scale or shift."""

from __future__ import annotations

from torch import Tensor

from tithe.rules.theta import Binding


def selected_sum(binding: Binding, terms: Tensor, factor: Tensor | None = None) -> Tensor | None:
    """Σ over all but the last axis of `terms` · `factor`, at the selected entries.

    Args:
        binding: the vector's binding; a probe takes the terms instead, and gets no gradient.
        terms: (..., D).
        factor: (..., D), or None for ones.

    Returns:
        (K,), in the order of the flat indices; None for a probe.
    """
    if binding.probe is not None:
        if binding.probe.hears:
            binding.probe.vector(terms if factor is None else terms * factor)
        return None
    # A few columns are cheaper to copy out than all are to sum; summing all first is bitwise what stock does.
    few = binding.indices.numel() * 4 < terms.shape[-1]
    if few:
        terms = terms.index_select(-1, binding.indices)
        factor = None if factor is None else factor.index_select(-1, binding.indices)
    products = terms if factor is None else terms * factor
    # No reshape: of a permuted tensor it is a copy, and a compiled graph may have taken it for a view.
    sums = products.sum(tuple(range(products.dim() - 1))) if products.dim() > 1 else products
    return sums if few else sums.index_select(0, binding.indices)
