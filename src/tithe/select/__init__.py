"""Selectors: a score, then a pick. Small pure functions."""

from tithe.select import picks, scores

__all__ = ["picks", "scores"]
