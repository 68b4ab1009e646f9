"""Selectors: a score, then a pick. Small pure functions."""

from tithe.select import picks, policy, scores

__all__ = ["picks", "policy", "scores"]
