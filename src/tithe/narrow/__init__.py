"""Narrow networks: some channels of a model do not exist while it runs.

stage      the model's own forward on smaller tensors    widths       what its modules say of their own width
live_weight  θ of a weight for the time of a step          build        from a model to a stage that works
inference  between steps: the likeliest network          subnet_loss  networks tried out on data
probabilities  of units, learned                         state        what is saved, checked
"""

from tithe.narrow.build import make_stage
from tithe.narrow.inference import InferenceNetwork
from tithe.narrow.live_weight import LiveWeight, LiveWeights
from tithe.narrow.probabilities import Probabilities
from tithe.narrow.stage import Stage
from tithe.narrow.subnet_loss import check_same_loss, loss_without_gradient, pick_best, sum_losses

__all__ = [
    "InferenceNetwork",
    "LiveWeight",
    "LiveWeights",
    "Probabilities",
    "Stage",
    "check_same_loss",
    "loss_without_gradient",
    "make_stage",
    "pick_best",
    "sum_losses",
]
