"""Methods: recipes of published parts, each with its citation, its defaults and its deviations."""

from tithe.methods.fish import FISH

__all__ = ["FISH"]
