"""Restore what a forward pass draws and changes besides its output, so that it leaves the model unchanged.

rng    random states to go back to              modes  training or evaluation for the time of a pass
untouched  everything that a further pass writes    norm_statistics  running statistics, estimated again over data
"""

from tithe.forward.modes import evaluating, training
from tithe.forward.norm_statistics import estimate_statistics, tracked
from tithe.forward.rng import RandomStates
from tithe.forward.untouched import untouched

__all__ = ["RandomStates", "estimate_statistics", "evaluating", "tracked", "training", "untouched"]
