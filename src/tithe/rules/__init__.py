"""Rules: how an operation gets Sᵀ∇w and what it keeps for backward. One file a family; graft serves the rest."""

from tithe.rules import (
    activation,
    attention,
    conv,
    dropout,
    embedding,
    frozen,
    gated,
    lean_linear,
    lean_norm,
    linear,
    norm,
    pooling,
)
from tithe.rules.binding import Binding, theta_key
from tithe.rules.carrier import Carrier, apply_rule, asking, autocast, fits, graft, needs_no_rule, raw, register
from tithe.rules.catch import Catch, Leanness, catch
from tithe.rules.pool import Pool
from tithe.rules.probe import Probe, SquareProbe, SumProbe
from tithe.rules.ruled import Cost, Rule
from tithe.rules.shared import Shared

__all__ = [
    "Binding",
    "Carrier",
    "Catch",
    "Cost",
    "Leanness",
    "Pool",
    "Probe",
    "Rule",
    "Shared",
    "SquareProbe",
    "SumProbe",
    "activation",
    "apply_rule",
    "asking",
    "attention",
    "autocast",
    "catch",
    "conv",
    "dropout",
    "embedding",
    "fits",
    "frozen",
    "gated",
    "graft",
    "lean_linear",
    "lean_norm",
    "linear",
    "needs_no_rule",
    "norm",
    "pooling",
    "raw",
    "register",
    "theta_key",
]
