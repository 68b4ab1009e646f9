"""Selectors score and then pick, with small pure functions of tensors.

importance     the formulas of scores                           topk  exact picks of entries, of columns, of a share
channel_costs  the price list of input channels                 bernoulli_masks  draws, policy gradient, projection
"""

from tithe.select import bernoulli_masks, channel_costs, importance, topk
from tithe.select.bernoulli_masks import policy_gradient, project

__all__ = ["bernoulli_masks", "channel_costs", "importance", "policy_gradient", "project", "topk"]
