"""Restore what a forward pass draws and changes besides its output, so that it leaves the model unchanged.

rng    random states to go back to              modes  training or evaluation for the time of a pass
gradients        losses that take one within themselves
norm_statistics  running statistics, estimated again over data
"""

from tithe.forward.gradients import asked_for_gradient
from tithe.forward.modes import evaluating, training
from tithe.forward.norm_statistics import estimate_statistics, tracked
from tithe.forward.rng import RandomStates

__all__ = ["RandomStates", "asked_for_gradient", "estimate_statistics", "evaluating", "tracked", "training"]
