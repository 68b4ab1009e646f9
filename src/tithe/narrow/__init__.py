"""Narrow networks: some channels of a model do not exist while it runs.

stage      the model's own forward on smaller tensors    widths       what its modules say of their own width
live_weight  θ of a weight for the time of a step          build        from a model to a stage that works
trial      whether it works, compared with zeros         remedy       what to leave whole, tried before it is offered
inference  between steps: the likeliest network          subnet_loss  networks tried out on data
probabilities  of units, learned                         state        what is saved, checked
gates      what a unit is worth, from gradients          metrics      of units, for probabilities to start from
control    what earlier steps foretell of a difference   copying      of modules that Python alone does not copy
"""

from tithe.narrow.build import make_stage
from tithe.narrow.copying import copy_module
from tithe.narrow.gates import gate_gradients
from tithe.narrow.inference import InferenceNetwork
from tithe.narrow.live_weight import LiveWeight, LiveWeights
from tithe.narrow.metrics import unit_metric
from tithe.narrow.probabilities import Probabilities
from tithe.narrow.stage import Stage
from tithe.narrow.subnet_loss import (
    check_same_loss,
    check_scalar,
    loss_without_gradient,
    pick_best,
    run_frozen,
    sum_losses,
)

__all__ = [
    "InferenceNetwork",
    "LiveWeight",
    "LiveWeights",
    "Probabilities",
    "Stage",
    "check_same_loss",
    "check_scalar",
    "copy_module",
    "gate_gradients",
    "loss_without_gradient",
    "make_stage",
    "pick_best",
    "run_frozen",
    "sum_losses",
    "unit_metric",
]
