"""The attached model: the one mutable object, and everything that only it uses.

attach    a model and a method become a plan          base   what every plan offers
sparse    the unselected part keeps its value         mount  hooks and flags on the model, and how to undo them
narrow    the unselected part does not exist          parameters  globs over parameter names
subspace  all weights move, in the span of checkpoints
selected, optimizer_state, optimizers, state  what is chosen; the optimizer's part in it; what is saved
align, shared_theta, gradient_buffer          a history and a model; the θ that weights share, and its gradient
outlined                                      a span without a history, on shapes alone
"""

from tithe.plan.attach import Method, attach
from tithe.plan.base import Plan
from tithe.plan.narrow import NarrowPlan
from tithe.plan.sparse import SparsePlan
from tithe.plan.subspace import SubspacePlan

__all__ = ["Method", "NarrowPlan", "Plan", "SparsePlan", "SubspacePlan", "attach"]
