"""What autograd tells of a forward pass: whether it needs gradients, and which leaves its output was computed from."""

from __future__ import annotations

from typing import Any

from torch import Tensor


def asked_for_gradient(error: RuntimeError) -> bool:
    """Return whether a pass without gradients failed because it takes a gradient, as a penalty on one does."""
    return "does not require grad" in str(error)


def graph_leaves(output: Tensor) -> list[Tensor]:
    """Return the leaves that a tensor was computed from: those to which a backward pass adds gradients."""
    found: dict[int, Tensor] = {}
    seen: set[Any] = set()
    waiting: list[Any] = [output.grad_fn]
    while waiting:
        node = waiting.pop()
        if node is None or node in seen:
            continue
        seen.add(node)
        if node.name() == "torch::autograd::AccumulateGrad":
            found[id(node.variable)] = node.variable
        waiting += [source for source, _ in node.next_functions]
    return list(found.values())
