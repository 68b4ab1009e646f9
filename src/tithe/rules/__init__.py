"""Rules: how an operation gets Sᵀ∇w and what it keeps for backward. One file a family; graft serves the rest.

table     what each rule keeps, and what stock keeps            sparse/  operations with a weight × kinds of selections
base      the frame: `Rule`, `Cost`, one `autograd.Function`    lean/    what the other operations keep
dispatch  how a rule reaches an operation; graft                theta    a weight, its selection, its θ
double_backward  how backward is differentiated itself, or refused
"""

from tithe.rules.base import Cost, Rule
from tithe.rules.dispatch import Call, Carrier, apply_rule, asking, autocast, fits, graft, needs_no_rule, raw, register
from tithe.rules.lean import activation, attention, batch_norm, cross_entropy, dropout, glu, pooling
from tithe.rules.lean import conv as lean_conv
from tithe.rules.lean import linear as lean_linear
from tithe.rules.lean import norm as lean_norm
from tithe.rules.lean.dispatch import Catch, Leanness, catch
from tithe.rules.sparse import conv, conv_transpose, embedding, linear, norm
from tithe.rules.sparse.probes import MomentProbe, Probe, SquareProbe, SumProbe
from tithe.rules.table import Row, Table, table
from tithe.rules.theta import Binding, FlatTheta, SharedTheta, check_holds, digest, theta_dtype, theta_key

__all__ = [
    "Binding",
    "Call",
    "Carrier",
    "Catch",
    "Cost",
    "FlatTheta",
    "Leanness",
    "MomentProbe",
    "Probe",
    "Row",
    "Rule",
    "SharedTheta",
    "SquareProbe",
    "SumProbe",
    "Table",
    "activation",
    "apply_rule",
    "asking",
    "attention",
    "autocast",
    "batch_norm",
    "catch",
    "check_holds",
    "conv",
    "conv_transpose",
    "cross_entropy",
    "digest",
    "dropout",
    "embedding",
    "fits",
    "glu",
    "graft",
    "lean_conv",
    "lean_linear",
    "lean_norm",
    "linear",
    "needs_no_rule",
    "norm",
    "pooling",
    "raw",
    "register",
    "table",
    "theta_dtype",
    "theta_key",
]
