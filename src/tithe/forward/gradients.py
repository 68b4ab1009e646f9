"""Tell a forward pass that needs gradients, because its loss takes one within itself, from one that fails."""

from __future__ import annotations


def asked_for_gradient(error: RuntimeError) -> bool:
    """Return whether a pass without gradients failed because it takes a gradient, as a penalty on one does."""
    return "does not require grad" in str(error)
