"""Batch norms with a plain frozen scale, in evaluation mode: an affine map of each channel, for which 1/σ is kept.

    y = w (x − μ) / σ + b        gx = gy w / σ

Shapes: C channels; x and gy (N, C, ...); w, b, μ, σ (C,).
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F

from tithe.rules.dispatch import Carrier, another, apply_rule, asking
from tithe.rules.lean.dispatch import Leanness, catch
from tithe.rules.sparse.norm import Evaluated


@catch(
    F.batch_norm,
    keeps="1/σ: 4 bytes a channel",
    stock="4 n",
    family="batch norm with a frozen scale in evaluation mode",
    note="=",
    asked=True,
)
def batch_norm(leanness: Leanness, *args: Any, **kwargs: Any) -> Any:
    """The map y = w (x − μ) / σ + b with a plain frozen w, of running μ and σ; gx = gy w / σ needs 1/σ alone."""
    found = Evaluated.of(*args, **kwargs)
    if found is None or isinstance(found.weight, Carrier) or another(found.bias) is not None:
        return NotImplemented
    weight = torch.ones_like(found.variance) if found.weight is None else found.weight
    if weight.requires_grad:
        return NotImplemented
    return apply_rule(found.rule(found.x, None, asking(found.bias)), found.x, weight, found.bias)
