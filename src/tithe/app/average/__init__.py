"""Averages of checkpoints compared on data: what `tithe average` does, callable from Python.

    command  the options, checked            ways     fixed weights; what a way gave
    compare  every way tried, one written    bench    a recipe's model and data: put weights in, evaluate
    soup     checkpoints kept one by one     trained  coefficients trained in the span
    tasks    fine-tunings merged             show · plot   what is seen of it

`tithe.average` and `tithe.merge_tasks` look at no data, and are in the core.
"""

from tithe.app.average.command import run
from tithe.app.average.plot import plot
from tithe.app.average.show import show
from tithe.app.average.tasks import merge
from tithe.app.average.ways import METHODS, Comparison, Fixed, Row, Settings

__all__ = ["METHODS", "Comparison", "Fixed", "Row", "Settings", "merge", "plot", "run", "show"]
