"""What autograd tells of a forward pass: whether it needs gradients, and which leaves its output was computed from."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor


def asked_for_gradient(error: RuntimeError) -> bool:
    """Return whether a pass without gradients failed because it takes a gradient, as a penalty on one does."""
    return "does not require grad" in str(error)


def graph_leaves(output: Tensor) -> list[Tensor]:
    """Return the leaves that a tensor was computed from: those to which a backward pass adds gradients."""
    leaves = (node.variable for node in _nodes(output) if node.name() == "torch::autograd::AccumulateGrad")
    return list({id(leaf): leaf for leaf in leaves}.values())


def graph_dtypes(output: Tensor) -> set[torch.dtype]:
    """Return the floating-point dtypes of what lies between a tensor and the leaves that it was computed from.

    What a checkpoint or a compiled region computes inside is not seen, what comes out of it is.
    """
    told = (made.dtype for node in _nodes(output) for made in getattr(node, "_input_metadata", ()))
    return {dtype for dtype in told if dtype.is_floating_point}


def _nodes(output: Tensor) -> Iterator[Any]:
    """Each operation of the graph that a tensor was computed by, once."""
    seen: set[Any] = set()
    waiting: list[Any] = [output.grad_fn]
    while waiting:
        node = waiting.pop()
        if node is None or node in seen:
            continue
        seen.add(node)
        yield node
        waiting += [source for source, _ in node.next_functions]
