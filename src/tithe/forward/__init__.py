"""Restore what a forward pass draws and changes besides its output, so that it leaves the model unchanged.

rng    random states to go back to              modes  training or evaluation for the time of a pass
gradients  losses that take one within themselves; the leaves and dtypes that a loss was computed from
untouched  everything that a further pass writes    norm_statistics  running statistics, estimated again over data
probe  what a network answers, to know it by
"""

from tithe.forward.gradients import asked_for_gradient, graph_dtypes, graph_leaves
from tithe.forward.modes import evaluating, training
from tithe.forward.norm_statistics import estimate_statistics, tracked
from tithe.forward.probe import Probe, ask, differs, make_probe, watch_call
from tithe.forward.rng import RandomStates
from tithe.forward.untouched import untouched, written_weights

__all__ = [
    "Probe",
    "RandomStates",
    "ask",
    "asked_for_gradient",
    "differs",
    "estimate_statistics",
    "evaluating",
    "graph_dtypes",
    "graph_leaves",
    "make_probe",
    "tracked",
    "training",
    "untouched",
    "watch_call",
    "written_weights",
]
