"""Narrow networks: some channels of a model do not exist while it runs.

stage      the model's own forward on smaller tensors    widths       what its modules say of their own width
fit        what exists, cut out and padded
live_weight  θ of a weight for the time of a step          build        from a model to a stage that works
trial      whether it works, compared with zeros         remedy       what to leave whole, tried before it is offered
inference  between steps: the likeliest network          subnet_loss  networks tried out on data
structure  what decides which units exist: probabilities, which are learned, or cuts, by score; costs  of networks
gates      what a unit is worth, from gradients          metrics      of units, for probabilities to start from
control    what earlier steps foretell of a difference   state        what is saved, checked
copying    of modules that Python alone does not copy    shrinking    of a weight, with its gradient and its state
"""

from tithe.narrow.build import make_stage
from tithe.narrow.copying import copy_module
from tithe.narrow.cuts import Cuts
from tithe.narrow.gates import gate_gradients, gates_of_step
from tithe.narrow.inference import InferenceNetwork
from tithe.narrow.live_weight import LiveWeight, LiveWeights
from tithe.narrow.metrics import unit_metric
from tithe.narrow.probabilities import Probabilities
from tithe.narrow.shrinking import check_state_shapes, shrink_parameter
from tithe.narrow.stage import Stage
from tithe.narrow.structure import Structure
from tithe.narrow.subnet_loss import (
    check_same_loss,
    check_scalar,
    loss_without_gradient,
    pick_best,
    run_frozen,
    sum_losses,
)

__all__ = [
    "Cuts",
    "InferenceNetwork",
    "LiveWeight",
    "LiveWeights",
    "Probabilities",
    "Stage",
    "Structure",
    "check_same_loss",
    "check_scalar",
    "check_state_shapes",
    "copy_module",
    "gate_gradients",
    "gates_of_step",
    "loss_without_gradient",
    "make_stage",
    "pick_best",
    "run_frozen",
    "shrink_parameter",
    "sum_losses",
    "unit_metric",
]
