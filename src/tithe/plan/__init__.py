"""The attached model: the one mutable object.

attach   a model and a method become a plan      base     what every plan offers
frozen   the unselected part keeps its value     absent   the unselected part does not exist
spanned  all weights move, in the span of checkpoints
"""

from tithe.choosing import Method
from tithe.plan.absent import AbsentPlan
from tithe.plan.attach import attach
from tithe.plan.base import Plan
from tithe.plan.frozen import FrozenPlan
from tithe.plan.spanned import SpannedPlan

__all__ = ["AbsentPlan", "FrozenPlan", "Method", "Plan", "SpannedPlan", "attach"]
