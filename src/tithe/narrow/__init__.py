"""Narrow networks: some channels of a model do not exist while it runs.

stage    the model's own forward on smaller tensors        widths  what its modules say of their own width
part     θ of a weight for the time of a step              check   from a model to a stage that works
outside  the model between steps: the likeliest network    trial   networks tried out on data
probabilities  of units, learned                           state   what is saved, checked
"""

from tithe.narrow.check import make_stage
from tithe.narrow.outside import Outside
from tithe.narrow.part import Part, Parts
from tithe.narrow.probabilities import Cost, Probabilities, Structure
from tithe.narrow.stage import Stage
from tithe.narrow.trial import check_same_loss, find_best, loss_without_gradient

__all__ = [
    "Cost",
    "Outside",
    "Part",
    "Parts",
    "Probabilities",
    "Stage",
    "Structure",
    "check_same_loss",
    "find_best",
    "loss_without_gradient",
    "make_stage",
]
