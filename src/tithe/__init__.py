"""Fine-tune a chosen part of a PyTorch network, and pay memory, compute and communication only for that part."""

from tithe import rules, select
from tithe.averages import History, average, merge_tasks
from tithe.budget import Budget
from tithe.delta import DeltaInfo, apply, diff, inspect, merge
from tithe.errors import TitheError, TitheWarning
from tithe.ledger import Ledger, measure
from tithe.method import CutMethod, NarrowMethod, SelectionContext, SparseMethod, Spending, SubspaceMethod
from tithe.methods import FISH, TWA, VRPGE, SparseUpdate, SpIEL, TaylorPruning, TraDy
from tithe.plan import NarrowPlan, Plan, SparsePlan, SubspacePlan, attach
from tithe.ranking import Ranking
from tithe.rules.lean.model import Lean, lean
from tithe.schedule import Schedule, each_step, every, once
from tithe.scoring import causal_loss
from tithe.selection import Channels, Coordinates, Grid, Selection, Span

__all__ = [
    "FISH",
    "TWA",
    "VRPGE",
    "Budget",
    "Channels",
    "Coordinates",
    "CutMethod",
    "DeltaInfo",
    "Grid",
    "History",
    "Lean",
    "Ledger",
    "NarrowMethod",
    "NarrowPlan",
    "Plan",
    "Ranking",
    "Schedule",
    "Selection",
    "SelectionContext",
    "SpIEL",
    "Span",
    "SparseMethod",
    "SparsePlan",
    "SparseUpdate",
    "Spending",
    "SubspaceMethod",
    "SubspacePlan",
    "TaylorPruning",
    "TitheError",
    "TitheWarning",
    "TraDy",
    "apply",
    "attach",
    "average",
    "causal_loss",
    "diff",
    "each_step",
    "every",
    "inspect",
    "lean",
    "measure",
    "merge",
    "merge_tasks",
    "once",
    "rules",
    "select",
]

__version__ = "0.1.0"
